"""The report of a chaos run: the table, and the same as JSON and Markdown.

Pure but for the two files it writes.
"""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from loadtest.chaos.checks import Check
from loadtest.chaos.faults import FaultKind
from loadtest.chaos.logs import LogEvent
from loadtest.chaos.recovery import ROLLOUT_PREFIX, Injury
from loadtest.chaos.run import Evidence
from loadtest.page import describe_machine
from sdar.contracts.types import MetricRecord

LATE_RESULT_EVENTS = ("late_result_refused", "claim_lost")


@dataclass(frozen=True, slots=True)
class Recovery:
    """Recovery of one service over all its faults, seconds; None where it was never measured."""

    service: str
    faults: dict[str, int]
    ready_p50_s: float | None
    ready_max_s: float | None
    resumed_p50_s: float | None
    resumed_max_s: float | None


def summarize_recoveries(injuries: Sequence[Injury]) -> list[Recovery]:
    """One row a service, rollout workers together."""
    by_service: dict[str, list[Injury]] = defaultdict(list)
    for injury in injuries:
        service = "rollout" if injury.target.startswith(ROLLOUT_PREFIX) else injury.target
        by_service[service].append(injury)
    rows = []
    for service, own in sorted(by_service.items()):
        ready = [injury.ready_after_s for injury in own if injury.ready_after_s is not None]
        resumed = [injury.resumed_after_s for injury in own if injury.resumed_after_s is not None]
        faults = {
            kind.value: sum(injury.fault.kind is kind for injury in own) for kind in FaultKind
        }
        rows.append(
            Recovery(
                service,
                {kind: number for kind, number in faults.items() if number},
                *_spread(ready),
                *_spread(resumed),
            )
        )
    return rows


def summarize_work(evidence: Evidence) -> dict[str, float]:
    """What the faults cost, and what the run came to."""
    played = evidence.of("group_played")
    updates = [
        r.values for r in evidence.records if r.service == "learner" and "staleness_max" in r.values
    ]
    num_updates = evidence.status.get("num_updates", 0)
    beyond = [
        injury.resumed_after_s - injury.engine_start_s
        for injury in evidence.injuries
        if injury.resumed_after_s is not None and injury.engine_start_s is not None
    ]
    return {
        "updates": num_updates,
        "updates trained again": len(evidence.of("batch_trained")) - num_updates,
        "groups issued": evidence.account.num_issued,
        **{f"groups {outcome.value}": len(numbers) for outcome, numbers in evidence.closed.items()},
        "groups regenerated": sum(int(event.fields.get("attempt", 0)) > 0 for event in played),
        "groups taken over": len(evidence.of("group_reclaimed")),
        "groups begun again after an environment failed": len(evidence.of("group_retried")),
        "tokens published": sum(count_tokens(event) for event in played),
        "tokens repeated": count_repeated_tokens(evidence.records, played),
        "late results refused": sum(len(evidence.of(name)) for name in LATE_RESULT_EVENTS),
        "dead letters": evidence.num_dead_letters,
        "staleness max": max((values["staleness_max"] for values in updates), default=0.0),
        "rollout resumed beyond engine start p50 (s)": round(median(beyond), 1)
        if beyond
        else float("nan"),
        "rollout resumed beyond engine start max (s)": round(max(beyond), 1)
        if beyond
        else float("nan"),
        "ledger samples": len(evidence.samples),
        "duration (s)": round(evidence.duration_s),
    }


@dataclass(frozen=True, slots=True)
class ChaosReport:
    """A run's result with where it comes from."""

    date: str
    machine: str
    command: str
    seed: int
    minutes: float
    checks: list[Check]
    recoveries: list[Recovery]
    work: dict[str, float]

    @property
    def is_sound(self) -> bool:
        return all(check.is_kept for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"is_sound": self.is_sound}


def build_report(
    evidence: Evidence, checks: list[Check], *, seed: int, minutes: float, command: str
) -> ChaosReport:
    date = datetime.now(UTC).strftime("%Y-%m-%d")
    recoveries = summarize_recoveries(evidence.injuries)
    return ChaosReport(
        date,
        describe_machine(),
        command,
        seed,
        minutes,
        checks,
        recoveries,
        summarize_work(evidence),
    )


def format_table(report: ChaosReport) -> str:
    """For a terminal: faults and recoveries by service, the cost, the checks."""
    lines = _align([_RECOVERY_HEAD, *(_recovery_cells(row) for row in report.recoveries)])
    lines += ["", *_align([[name, f"{value:g}"] for name, value in report.work.items()]), ""]
    lines += [
        f"{'kept  ' if check.is_kept else 'BROKEN'} {check.promise}: {check.evidence}"
        for check in report.checks
    ]
    return "\n".join(lines)


def write_markdown(report: ChaosReport, path: Path) -> None:
    parts = [
        "# Chaos\n",
        "Written by `make chaos`; do not edit. A real run (gateway, rollout workers with vLLM, "
        "teacher, environments, learner, Redis) of the household example with its tiny model, "
        "while processes are killed and paused and connections cut. Ready: the readiness probe "
        "answers again. Resumed: the service does its part of the run again "
        "(`loadtest/chaos/recovery.py`). Both count from the end of the fault; all services share "
        "the machine's cores.\n",
        f"- Command: `{report.command}` (seed {report.seed}, {report.minutes:g} minutes of faults)",
        f"- Date: {report.date}",
        f"- Machine: {report.machine}\n",
        "## Promises\n",
        *_markdown_table(
            ["kept", "promise", "evidence"], [_check_cells(check) for check in report.checks]
        ),
        "\n## Faults and recovery\n",
        *_markdown_table(_RECOVERY_HEAD, [_recovery_cells(row) for row in report.recoveries]),
        "\n## What it cost\n",
        *_markdown_table(
            ["what", "number"], [[name, f"{value:g}"] for name, value in report.work.items()]
        ),
    ]
    path.write_text("\n".join(parts) + "\n", encoding="utf-8")


def write_json(report: ChaosReport, evidence: Evidence, path: Path) -> None:
    """The report, and every fault with its times."""
    faults = [
        {
            "kind": injury.fault.kind.value,
            "target": injury.target,
            "at_s": round(injury.began_s - evidence.injuries[0].began_s, 2),
            "lasted_s": None if injury.over_s is None else round(injury.over_s - injury.began_s, 2),
            "ready_after_s": _round(injury.ready_after_s),
            "resumed_after_s": _round(injury.resumed_after_s),
            "engine_start_s": injury.engine_start_s,
            "is_overtaken": injury.is_overtaken,
        }
        for injury in evidence.injuries
    ]
    path.write_text(
        json.dumps(
            report.to_json() | {"faults": faults, "memory": _list_memory(evidence)}, indent=1
        )
        + "\n",
        encoding="utf-8",
    )


def _list_memory(evidence: Evidence) -> dict[str, list[tuple[float, int]]]:
    """Of each life of a service: seconds since the first fault, and MiB."""
    lives: dict[str, list[tuple[float, int]]] = defaultdict(list)
    for sample in evidence.memory:
        at_s = round(sample.at_s - evidence.injuries[0].began_s, 1)
        lives[f"{sample.service} {sample.pid}"].append((at_s, sample.num_bytes >> 20))
    return lives


_SAMPLED = "num_tokens_generated"
_RECOVERY_HEAD = ["service", "faults", "ready p50", "ready max", "resumed p50", "resumed max"]


def _check_cells(check: Check) -> list[str]:
    return ["yes" if check.is_kept else "**NO**", check.promise, check.evidence]


def _recovery_cells(row: Recovery) -> list[str]:
    faults = ", ".join(f"{number} {kind}" for kind, number in row.faults.items())
    return [
        row.service,
        faults,
        *(
            "-" if value is None else f"{value:.1f} s"
            for value in (row.ready_p50_s, row.ready_max_s, row.resumed_p50_s, row.resumed_max_s)
        ),
    ]


def _spread(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Median and maximum."""
    return (median(values), max(values)) if values else (None, None)


def count_tokens(event: LogEvent) -> int:
    """Sampled tokens of a group that was played."""
    return int(event.fields.get("num_tokens", 0))


def count_repeated_tokens(records: Sequence[MetricRecord], played: Sequence[LogEvent]) -> float:
    """Tokens that were sampled for nothing: of each life of a rollout worker, those it had sampled
    at its last record but not published by then. A worker records every two seconds; what it
    sampled after its last record nobody counts.
    """
    total = 0.0
    for instance in {record.instance for record in records if record.service == "rollout"}:
        own = [
            record
            for record in records
            if record.instance == instance and _SAMPLED in record.values
        ]
        events = [event for event in played if event.service == instance]
        began_s = 0.0
        for record, following in itertools.zip_longest(own, own[1:]):
            if following is None or following.values[_SAMPLED] < record.values[_SAMPLED]:
                published = sum(
                    count_tokens(event) for event in events if began_s < event.at_s <= record.at_s
                )
                total += max(0.0, record.values[_SAMPLED] - published)
                began_s = record.at_s
    return total


def _align(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def _round(value: float | None) -> float | None:
    return None if value is None else round(value, 2)
