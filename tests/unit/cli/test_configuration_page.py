from __future__ import annotations

from sdar.cli.configuration_page import PAGE, render_page


def test_the_configuration_page_is_written_from_the_current_run_config() -> None:
    assert PAGE.read_text(encoding="utf-8") == render_page(), (
        "docs/configuration.md is out of date: run `make docs`"
    )


def test_every_key_has_a_meaning() -> None:
    rows = [line for line in render_page().splitlines() if line.startswith("| `")]
    assert len(rows) > 60
    assert [row for row in rows if row.rstrip(" |").endswith("|")] == []
