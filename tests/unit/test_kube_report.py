"""What `make test-kube` writes into a page: only between its marks, and nothing that held looks as if it had not."""

from __future__ import annotations

from pathlib import Path

from tests.kube.report import BEGIN, END, Claim, format_claims, write_report


def test_a_claim_is_what_its_test_is_named() -> None:
    assert Claim.parse("test_it_goes_on[redis]").text == "it goes on: redis"
    assert Claim.parse("test_it_ends").text == "it ends"


def test_a_claim_that_failed_or_was_not_run_is_told_as_such() -> None:
    claims = [Claim("a", "passed", 1.2, ["x | y", "z"]), Claim("b", "failed"), Claim("c")]
    text = format_claims(claims, where="here", duration_s=90.0)
    assert "1 of 3 claims held, in 2 minutes. here" in text
    assert "| yes | a | x \\| y; z | 1 |" in text
    assert "| **NO** | b |" in text
    assert "| not run | c |" in text


def test_only_what_stands_between_the_marks_is_replaced(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    write_report("new\n", page)
    assert page.read_text() == f"before\n{BEGIN}\nnew\n{END}\nafter\n"


def test_a_page_without_marks_keeps_its_text_and_gets_them_at_its_end(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n")
    write_report("new\n", page)
    assert page.read_text() == f"before\n\n{BEGIN}\nnew\n{END}\n"
    write_report("newer\n", page)
    assert page.read_text() == f"before\n\n{BEGIN}\nnewer\n{END}\n"
