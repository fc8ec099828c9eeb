from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "invariants.md").read_text(encoding="utf-8")


def test_every_test_an_invariant_names_exists() -> None:
    named = set(re.findall(r"`(test_\w+)`", PAGE))
    sources = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    defined = set(re.findall(r"def (test_\w+)\(", sources))
    assert len(named) > 20
    assert named - defined == set()


def test_every_rule_is_one_sentence_and_names_its_tests() -> None:
    tables = re.findall(r"^\| rule \| tests \|\n\|---\|---\|\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
    rows = "".join(tables).splitlines()
    assert len(rows) > 20
    for row in rows:
        rule, tests = row.strip("| ").split(" | ")
        assert re.fullmatch(r"((?!\. ).)+\.", rule), f"not one sentence: {rule}"
        assert re.fullmatch(r"`test_\w+`(, `test_\w+`)*", tests), f"no list of tests: {tests}"
