"""`make test-kube` writes only between its marks, and no failure looks as if it had held."""

from __future__ import annotations

from pathlib import Path

from tests.kube.report import BEGIN, END, Claim, write_report


def make_claim(text: str, *outcomes: str) -> Claim:
    claim = Claim(text)
    for outcome in outcomes:
        claim.note(outcome, 1.0)
    return claim


def test_a_claim_is_what_its_test_is_named() -> None:
    assert Claim.parse("test_it_goes_on[redis]").text == "it goes on: redis"
    assert Claim.parse("test_it_ends").text == "it ends"


def test_a_failure_in_any_phase_is_told(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    claims = [
        make_claim("a", "passed", "passed"),
        make_claim("b", "failed"),
        make_claim("c", "passed", "failed"),
    ]
    claims[0].evidence += ["x | y", "z"]
    write_report(claims, page, where="Here.")
    text = page.read_text()
    assert "1 of 3 claims held. Here." in text
    assert "| yes | a | x \\| y; z | 2 |" in text
    assert "| **NO** | b |" in text
    assert "| **NO** | c |" in text


def test_only_what_stands_between_the_marks_is_replaced(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    write_report([make_claim("a", "passed")], page, where="Here.")
    text = page.read_text()
    assert text.startswith(f"before\n{BEGIN}\n1 of 1 claims")
    assert text.endswith(f"{END}\nafter\n")
    assert "old" not in text


def test_a_claim_keeps_its_row_until_it_is_put_to_the_test_again(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n")
    write_report(
        [make_claim("a", "failed"), make_claim("b", "passed"), Claim("not run")],
        page,
        where="Here.",
    )
    assert "1 of 2 claims held" in page.read_text()
    write_report([make_claim("a", "passed"), Claim("b")], page, where="There.")
    text = page.read_text()
    assert "2 of 2 claims held. There." in text
    assert text.count(BEGIN) == text.count(END) == 1
    assert text.index("| yes | a |") < text.index("| yes | b |")
