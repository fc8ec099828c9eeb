"""Owns what is told of a cluster test: each claim with its evidence, as Markdown between two marks of a page. Runs nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

BEGIN = "<!-- written by make test-kube -->"
END = "<!-- end of what make test-kube wrote -->"


@dataclass
class Claim:
    """One test: what it claims, whether that held, what showed it."""

    text: str
    outcome: str = "not run"
    duration_s: float = 0.0
    evidence: list[str] = field(default_factory=list)

    @classmethod
    def parse(cls, node_name: str) -> Claim:
        """Of a test's name: `test_a_b[c]` claims "a b: c"."""
        name, _, parameter = node_name.partition("[")
        text = name.removeprefix("test_").replace("_", " ")
        return cls(text + (f": {parameter.removesuffix(']')}" if parameter else ""))


def format_claims(claims: Sequence[Claim], *, where: str, duration_s: float) -> str:
    """The table of one run, with its date and where it ran."""
    date = datetime.now(UTC).strftime("%Y-%m-%d")
    held = sum(claim.outcome == "passed" for claim in claims)
    lines = [
        f"{date}: {held} of {len(claims)} claims held, in {duration_s / 60:.0f} minutes. {where}",
        "",
        "| held | claim | evidence | s |",
        "|---|---|---|---|",
    ]
    for claim in claims:
        told = {"passed": "yes", "not run": "not run"}.get(claim.outcome, "**NO**")
        evidence = "; ".join(claim.evidence).replace("|", "\\|").replace("\n", " ")
        lines.append(f"| {told} | {claim.text} | {evidence} | {claim.duration_s:.0f} |")
    return "\n".join(lines) + "\n"


def write_report(text: str, path: Path) -> None:
    """Replace what stands between the marks of the page; a page without them gets them at its end."""
    page = path.read_text(encoding="utf-8") if path.exists() else ""
    head, found, rest = page.partition(BEGIN)
    tail = rest.partition(END)[2] if found else ""
    path.write_text(f"{head}{'' if found or not head else chr(10)}{BEGIN}\n{text}{END}{tail or chr(10)}", encoding="utf-8")
