"""Makes the report of a chaos run: a table for the terminal, a JSON file and a Markdown page.

Apart from writing those two files it is pure.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from math import nan
from pathlib import Path
from statistics import median
from typing import Any

from loadtest.chaos.checks import Check
from loadtest.chaos.faults import FaultKind
from loadtest.chaos.logs import LogEvent
from loadtest.chaos.recovery import ROLLOUT_PREFIX, Injury
from loadtest.chaos.run import Evidence
from loadtest.page import describe_machine, wrap_prose
from sdar.contracts.types import MetricRecord

_INTRODUCTION = (
    "Written by `make chaos`; do not edit. This is a real run of the household example with its "
    "tiny model: gateway, rollout workers with vLLM, teacher, environments, learner and Redis. "
    "Meanwhile processes are killed and paused, and connections are cut. A service is ready when "
    "its readiness probe answers again, and has resumed when it does its part of the run again "
    "(`loadtest/chaos/recovery.py`). Both times count from the end of the fault. All services "
    "share the machine's cores."
)
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
        is_rollout = injury.target.startswith(ROLLOUT_PREFIX)
        by_service["rollout" if is_rollout else injury.target].append(injury)
    return [_summarize_recovery(service, own) for service, own in sorted(by_service.items())]


def _summarize_recovery(service: str, injuries: Sequence[Injury]) -> Recovery:
    times = Counter(injury.fault.kind for injury in injuries)
    # In the order of the kinds' declaration, whatever came first.
    faults = {kind.value: times[kind] for kind in FaultKind if times[kind]}

    ready_p50_s, ready_max_s = _measure_spread(injury.ready_after_s for injury in injuries)
    resumed_p50_s, resumed_max_s = _measure_spread(injury.resumed_after_s for injury in injuries)
    return Recovery(service, faults, ready_p50_s, ready_max_s, resumed_p50_s, resumed_max_s)


def _measure_spread(values: Iterable[float | None]) -> tuple[float | None, float | None]:
    """Median and maximum of those that were measured."""
    measured = [value for value in values if value is not None]
    if not measured:
        return None, None
    return median(measured), max(measured)


def summarize_work(evidence: Evidence) -> dict[str, float]:
    """What the faults cost, and what the run came to."""
    played = evidence.of("group_played")
    num_updates = evidence.status.get("num_updates", 0)
    closed = {f"groups {outcome.value}": len(groups) for outcome, groups in evidence.closed.items()}
    num_again = sum(int(event.fields.get("attempt", 0)) > 0 for event in played)
    num_refused = sum(len(evidence.of(name)) for name in LATE_RESULT_EVENTS)
    # Where no worker was killed the table shows nan.
    beyond_s = _list_resumed_beyond_start(evidence) or [nan]

    return {
        "updates": num_updates,
        "updates trained again": len(evidence.of("batch_trained")) - num_updates,
        "groups issued": evidence.account.num_issued,
        **closed,
        "groups regenerated": num_again,
        "groups taken over": len(evidence.of("group_reclaimed")),
        "groups begun again after an environment failed": len(evidence.of("group_retried")),
        "tokens published": sum(map(count_tokens, played)),
        "tokens repeated": count_repeated_tokens(evidence.records, played),
        "late results refused": num_refused,
        "dead letters": evidence.num_dead_letters,
        "staleness max": _find_staleness_max(evidence.records),
        "rollout resumed beyond engine start p50 (s)": round(median(beyond_s), 1),
        "rollout resumed beyond engine start max (s)": round(max(beyond_s), 1),
        "ledger samples": len(evidence.samples),
        "duration (s)": round(evidence.duration_s),
    }


def _find_staleness_max(records: Sequence[MetricRecord]) -> float:
    learners = [record.values for record in records if record.service == "learner"]
    return max((values.get("staleness_max", 0.0) for values in learners), default=0.0)


def _list_resumed_beyond_start(evidence: Evidence) -> list[float]:
    """Seconds in which killed rollout workers resumed, less their engines' starts."""
    return [
        injury.resumed_after_s - injury.engine_start_s
        for injury in evidence.injuries
        if injury.resumed_after_s is not None and injury.engine_start_s is not None
    ]


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
    return ChaosReport(
        date=datetime.now(UTC).strftime("%Y-%m-%d"),
        machine=describe_machine(),
        command=command,
        seed=seed,
        minutes=minutes,
        checks=checks,
        recoveries=summarize_recoveries(evidence.injuries),
        work=summarize_work(evidence),
    )


def format_table(report: ChaosReport) -> str:
    """For a terminal: faults and recoveries by service, the cost, the checks."""
    lines = _align([_RECOVERY_HEAD, *map(_recovery_cells, report.recoveries)])
    lines += ["", *_align(_work_cells(report)), ""]
    for check in report.checks:
        verdict = "kept  " if check.is_kept else "BROKEN"
        lines.append(f"{verdict} {check.promise}: {check.evidence}")
    return "\n".join(lines)


def write_markdown(report: ChaosReport, path: Path) -> None:
    parts = [
        "# Chaos\n",
        f"{wrap_prose(_INTRODUCTION)}\n",
        f"- Command: `{report.command}` (seed {report.seed}, {report.minutes:g} minutes of faults)",
        f"- Date: {report.date}",
        f"{wrap_prose(f'- Machine: {report.machine}', '  ')}\n",
        "## Promises\n",
        *_markdown_table(["kept", "promise", "evidence"], map(_check_cells, report.checks)),
        "\n## Faults and recovery\n",
        *_markdown_table(_RECOVERY_HEAD, map(_recovery_cells, report.recoveries)),
        "\n## What it cost\n",
        *_markdown_table(["what", "number"], _work_cells(report)),
    ]
    path.write_text("\n".join(parts) + "\n", encoding="utf-8")


def write_json(report: ChaosReport, evidence: Evidence, path: Path) -> None:
    """The report, and every fault with its times."""
    first_s = evidence.injuries[0].began_s if evidence.injuries else 0.0
    content = report.to_json()
    content["faults"] = [_describe(injury, first_s) for injury in evidence.injuries]
    content["memory"] = _list_memory(evidence)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _describe(injury: Injury, first_s: float) -> dict[str, Any]:
    lasted_s = None if injury.over_s is None else injury.over_s - injury.began_s
    return {
        "kind": injury.fault.kind.value,
        "target": injury.target,
        "at_s": round(injury.began_s - first_s, 2),
        "lasted_s": _round(lasted_s),
        "ready_after_s": _round(injury.ready_after_s),
        "resumed_after_s": _round(injury.resumed_after_s),
        "engine_start_s": injury.engine_start_s,
        "is_overtaken": injury.is_overtaken,
    }


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
    times_s = (row.ready_p50_s, row.ready_max_s, row.resumed_p50_s, row.resumed_max_s)
    return [row.service, faults, *map(_format_seconds, times_s)]


def _format_seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} s"


def _work_cells(report: ChaosReport) -> list[list[str]]:
    return [[name, f"{value:g}"] for name, value in report.work.items()]


def count_tokens(event: LogEvent) -> int:
    """Sampled tokens of a group that was played."""
    return int(event.fields.get("num_tokens", 0))


def count_repeated_tokens(records: Sequence[MetricRecord], played: Sequence[LogEvent]) -> float:
    """Tokens that were sampled for nothing.

    Of each life of a rollout worker, those that it had sampled at its last record but not published
    by then. A worker records every two seconds; what it sampled after its last record is not
    counted.
    """
    own: dict[str, list[MetricRecord]] = defaultdict(list)
    for record in records:
        if record.service == "rollout" and _SAMPLED in record.values:
            own[record.instance].append(record)

    total = 0.0
    for instance, of_instance in own.items():
        events = [event for event in played if event.service == instance]
        total += _count_lost_tokens(of_instance, events)
    return total


def _count_lost_tokens(records: Sequence[MetricRecord], played: Sequence[LogEvent]) -> float:
    """Of all lives of one worker; a counter that falls begins a life."""
    total = 0.0
    began_s = 0.0
    for record, following in itertools.zip_longest(records, records[1:]):
        num_sampled = record.values[_SAMPLED]
        is_last_of_life = following is None or following.values[_SAMPLED] < num_sampled
        if not is_last_of_life:
            continue

        inside = [event for event in played if began_s < event.at_s <= record.at_s]
        num_published = sum(map(count_tokens, inside))
        # A group whose record came late looks as if more was published than sampled.
        total += max(0.0, num_sampled - num_published)
        began_s = record.at_s
    return total


def _align(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def _markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def _round(value: float | None) -> float | None:
    return None if value is None else round(value, 2)
