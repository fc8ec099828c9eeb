"""The report of a cluster test: a row per claim with its evidence, between two marks of a page.

A claim that was not tested this time keeps its earlier row, so that a page can be made in several
runs.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

BEGIN = "<!-- written by make test-kube -->"
END = "<!-- end of what make test-kube wrote -->"
_ROW = re.compile(r"^\| (?P<held>yes|\*\*NO\*\*) \| (?P<claim>[^|]+) \|")


@dataclass
class Claim:
    """One test: what it claims, whether that held, what showed it."""

    text: str
    outcome: str = ""
    duration_s: float = 0.0
    evidence: list[str] = field(default_factory=list)
    ended_at: datetime | None = None

    @classmethod
    def parse(cls, node_name: str) -> Claim:
        """Of a test's name: `test_a_b[c]` claims "a b: c"."""
        name, _, parameter = node_name.partition("[")
        text = name.removeprefix("test_").replace("_", " ")
        return cls(text + (f": {parameter.removesuffix(']')}" if parameter else ""))

    def note(self, outcome: str, duration_s: float) -> None:
        """Take in one phase of the test; its failures weigh more than what passed."""
        self.duration_s += duration_s
        self.ended_at = datetime.now(UTC)
        if self.outcome in ("", "passed"):
            self.outcome = outcome

    def format(self) -> str:
        """Its row; only for one that was put to the test."""
        assert self.ended_at is not None
        evidence = "; ".join(self.evidence).replace("|", "\\|").replace("\n", " ")
        when = self.ended_at.strftime("%Y-%m-%d %H:%M")
        held = "yes" if self.outcome == "passed" else "**NO**"
        return f"| {held} | {self.text} | {evidence} | {self.duration_s:.0f} | {when} |"


def format_claims(claims: Sequence[Claim], kept: str, *, where: str) -> str:
    """The table of all claims, those that ran now in the place of their earlier rows.

    Args:
        kept: what stood there before.
    """
    rows = {found["claim"]: line for line in kept.splitlines() if (found := _ROW.match(line))}
    rows |= {claim.text: claim.format() for claim in claims if claim.outcome}
    held = sum(row.startswith("| yes |") for row in rows.values())
    head = [
        textwrap.fill(f"{held} of {len(rows)} claims held. {where}", 120, break_on_hyphens=False),
        "",
        "| held | claim | evidence | s | UTC |",
        "|---|---|---|---|---|",
    ]
    return "\n".join([*head, *rows.values()]) + "\n"


def write_report(claims: Sequence[Claim], path: Path, *, where: str) -> None:
    """Renew the table between the marks of the page; a page without them gets them at its end."""
    page = path.read_text(encoding="utf-8") if path.exists() else ""
    head, found, rest = page.partition(BEGIN)
    kept, _, tail = rest.partition(END)
    text = format_claims(claims, kept, where=where)
    path.write_text(
        f"{head}{'' if found or not head else chr(10)}{BEGIN}\n{text}{END}{tail or chr(10)}",
        encoding="utf-8",
    )
