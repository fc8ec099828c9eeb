"""A copy of the project that a test may change as a stranger would, and the costs of change as
docs/architecture.md states them.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "architecture.md"
COPIED = ("sdar", "services", "tests", "tools", "docs", "helm", "deploy")
"""Folders that changes and `make docs` write into; the others are links."""
LEFT_OUT = {".git", ".venv", ".hypothesis", ".pytest_cache", ".mypy_cache", ".ruff_cache"}
TOY_TEST = "tests/unit/test_toy.py"

WRITE_DOCS = """
import runpy
for module in {modules}:
    runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


@dataclass(frozen=True)
class Cost:
    """A row of the table: the files that a change touches, and the test that makes it."""

    files: frozenset[str]
    proof: str


def read_table(section: str) -> list[list[str]]:
    """The cells of the rows of a section's table in docs/architecture.md, without its head."""
    page = PAGE.read_text(encoding="utf-8")
    text = page.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    lines = [line for line in text.splitlines() if line[:2] == "| "]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[1:]]


def read_costs() -> dict[str, Cost]:
    """The table of docs/architecture.md by change; <name> is toy, and <service> is rollout."""
    costs = {}
    for change, files, proof in read_table("What a change costs"):
        named = files.replace("<name>", "toy").replace("<service>", "rollout")
        costs[change] = Cost(frozenset(re.findall("`([^`]+)`", named)), proof.strip("`"))
    return costs


class ProjectCopy:
    """The project under another path; imports in its processes are of its own files.

    Attributes:
        touched: files written by hand, by the change that they were written for.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.touched: dict[str, frozenset[str]] = {}
        root.mkdir()
        for path in ROOT.iterdir():
            if path.name in COPIED:
                shutil.copytree(path, root / path.name)
            elif path.name not in LEFT_OUT:
                (root / path.name).symlink_to(path)

    def add(self, change: str, path: str, text: str) -> None:
        """Write a file that was not there."""
        target = self.root / path
        assert not target.exists()
        target.parent.mkdir(exist_ok=True)
        self._write(change, path, text)

    def insert(self, change: str, path: str, *, after: str, text: str) -> None:
        """Put text behind a line, or a part of one, that the file has once."""
        found = (self.root / path).read_text(encoding="utf-8")
        assert found.count(after) == 1, f"{path} has {found.count(after)} times {after!r}"
        self._write(change, path, found.replace(after, after + text))

    def _write(self, change: str, path: str, text: str) -> None:
        (self.root / path).write_text(text, encoding="utf-8")
        self.touched[change] = self.touched.get(change, frozenset()) | {path}

    def test(self, use: str, *held: str) -> None:
        """`make docs`, then a test of what was added, and tests that the project holds anyway."""
        recipe = (ROOT / "Makefile").read_text().partition("\ndocs:")[2].partition("\n\n")[0]
        # In the process of the tests: both import the same, and torch alone takes seconds.
        docs = WRITE_DOCS.format(modules=re.findall(r"-m (\S+)", recipe))
        (self.root / TOY_TEST).write_text(docs + use, encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-qx", "-n0", "-p", "no:cacheprovider"]
        done = subprocess.run(
            [*command, TOY_TEST, *held],
            cwd=self.root,
            env=self.environment(),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def environment(self, **variables: str) -> dict[str, str]:
        """Variables of a process that works in the copy."""
        kept = {name: value for name, value in os.environ.items() if "PYTEST" not in name}
        return kept | {"PYTHONPATH": str(self.root)} | variables
