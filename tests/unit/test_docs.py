"""Pages are narrow enough to be read as text, and what they point at exists."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WIDTH = 120
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "helm/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "examples").rglob("README.md")),
]
ROOMS = "sdar|services|tests|loadtest|tools|proto|examples|skills|deploy|helm|infra|docs"
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
PATH = re.compile(rf"`((?:{ROOMS})/[\w./*{{}},-]*)`")
MODULE = re.compile(r"\b((?:sdar|services|tests|loadtest|tools)(?:\.\w+)+)\b")
FORMER = ("CHANGELOG.md",)
"""Pages that name what no longer exists."""
ELSEWHERE = {
    "infra/terraform/terraform.tfvars",  # each reader's own, ignored by git
    "loadtest/results_gpu.json",  # where a GPU was measured
    "sdar.dev",  # domain of node labels, no module
    "sdar.yaml",  # the file of the alerts
}

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def remove_code_blocks(text: str) -> str:
    """The text with empty lines in the place of fenced blocks, so that line numbers stay."""
    return FENCE.sub(lambda found: "\n" * found[0].count("\n"), text)


def list_anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, made as GitHub makes them."""
    text = remove_code_blocks(page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def expand_braces(pattern: str) -> Iterator[str]:
    """`a/{b,c}` as `a/b` and `a/c`."""
    found = re.search(r"\{([^}]*)\}", pattern)
    if found is None:
        yield pattern
        return
    for choice in found[1].split(","):
        yield from expand_braces(pattern[: found.start()] + choice + pattern[found.end() :])


def exists(pattern: str) -> bool:
    """Whether every path that a pattern with braces and stars stands for is there."""
    paths = expand_braces(pattern)
    return pattern in ELSEWHERE or all(any(ROOT.glob(path.rstrip("/"))) for path in paths)


def is_module(name: str) -> bool:
    """Whether a dotted name is a module, or a name that stands in one."""
    path = ROOT / name.replace(".", "/")
    if path.is_dir() or path.with_suffix(".py").is_file() or name in ELSEWHERE:
        return True
    around = [path.parent.with_suffix(".py"), *path.parent.glob("__init__.py")]
    around += (ROOT / "proto" / path.parent.relative_to(ROOT)).glob("*.proto")
    sources = (source.read_text(encoding="utf-8") for source in around if source.is_file())
    return any(re.search(rf"\b{path.name}\b", source) for source in sources)


@each_page
def test_lines_are_at_most_120_columns_wide_except_in_tables_and_code(page: Path) -> None:
    lines = remove_code_blocks(page.read_text(encoding="utf-8")).splitlines()
    wide = [
        f"{page.name}:{number} has {len(line)} columns"
        for number, line in enumerate(lines, 1)
        if len(line) > WIDTH and not line.startswith("|")
    ]
    assert wide == []


@each_page
def test_every_relative_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    text = remove_code_blocks(page.read_text(encoding="utf-8"))
    relative = [link for link in LINK.findall(text) if not re.match(r"\w+:", link)]
    broken = []
    for link in relative:
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in list_anchors(target)):
            broken.append(link)
    assert broken == []


@each_page
def test_every_path_in_backticks_exists(page: Path) -> None:
    named = PATH.findall(remove_code_blocks(page.read_text(encoding="utf-8")))
    assert [path for path in named if not exists(path)] == []


@each_page
def test_every_module_named_exists(page: Path) -> None:
    if page.name in FORMER:
        return
    spans = re.findall(r"`([^`\n]+)`", remove_code_blocks(page.read_text(encoding="utf-8")))
    named = {name for span in spans for name in MODULE.findall(span)}
    assert sorted(name for name in named if not is_module(name)) == []
