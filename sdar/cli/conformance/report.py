"""Shows the verdicts: a table with remedies for people, one JSON object for programs."""

from __future__ import annotations

from typing import Any

from rich import markup
from rich.console import Console
from rich.table import Table

from sdar.cli.conformance.check import Outcome, Verdict
from sdar.cli.conformance.runner import Report
from sdar.process.text import escape_controls

_COLOURS = {Verdict.PASS: "green", Verdict.FAIL: "bold red", Verdict.NOT_RUN: "yellow"}


def print_report(report: Report, console: Console) -> None:
    title = f"{report.environment}, version {report.version}, at {report.address}"
    table = Table(title=escape(title), title_justify="left")
    table.add_column("check")
    table.add_column("claim")
    table.add_column("verdict")
    table.add_column("seconds", justify="right")
    for outcome in report.outcomes:
        verdict = f"[{_COLOURS[outcome.verdict]}]{outcome.verdict}[/]"
        table.add_row(
            outcome.check.check_id, escape(outcome.check.claim), verdict, f"{outcome.seconds:.2f}"
        )
    console.print(table)

    for outcome in report.outcomes:
        _explain(outcome, console)
    if not report.is_action_known:
        console.print(
            "No valid action was found: the texts played were invalid ones, so the episodes show "
            "less."
        )

    counts = ", ".join(f"{report.count(verdict)} {words}" for verdict, words in _WORDS.items())
    console.print(f"{counts}, in {report.seconds:.1f} s.", highlight=False)


_WORDS = {Verdict.PASS: "passed", Verdict.FAIL: "failed", Verdict.NOT_RUN: "not run"}


def escape(text: str) -> str:
    """What a server wrote, as plain text: without rich's markup and without control characters."""
    return markup.escape(escape_controls(text))


def _explain(outcome: Outcome, console: Console) -> None:
    if outcome.verdict is Verdict.PASS:
        return
    lines = [f"[{_COLOURS[outcome.verdict]}]{outcome.verdict} {outcome.check.check_id}[/]"]
    if outcome.verdict is Verdict.FAIL:
        lines += [
            f"  expected  {escape(outcome.expected)}",
            f"  got       {escape(outcome.got)}",
            f"  remedy    {escape(outcome.check.remedy)}",
        ]
    else:
        lines.append(f"  {escape(outcome.got)}")
    console.print("\n".join(lines), highlight=False, soft_wrap=True)


def to_json(report: Report) -> dict[str, Any]:
    return {
        "address": report.address,
        "environment": report.environment,
        "version": report.version,
        "is_passed": report.is_passed,
        "is_action_known": report.is_action_known,
        "num_passed": report.count(Verdict.PASS),
        "num_failed": report.count(Verdict.FAIL),
        "num_not_run": report.count(Verdict.NOT_RUN),
        "seconds": round(report.seconds, 3),
        "checks": [_outcome_to_json(outcome) for outcome in report.outcomes],
    }


def _outcome_to_json(outcome: Outcome) -> dict[str, Any]:
    return {
        "id": outcome.check.check_id,
        "claim": outcome.check.claim,
        "verdict": outcome.verdict.value,
        "seconds": round(outcome.seconds, 3),
        "expected": outcome.expected,
        "got": outcome.got,
        "remedy": outcome.check.remedy if outcome.verdict is Verdict.FAIL else "",
    }
