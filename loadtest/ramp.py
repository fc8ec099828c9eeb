"""Raises a load until a server is full: the stages of it, the search for them, tables of results.

Pure: it starts nothing and imports no Locust, which would patch the process of whoever imports it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from loadtest.comparison import Table, format_figure
from loadtest.page import format_table

BOUND_MS = 250.0
"""A server is full when its slowest hundredth of requests takes longer."""
LEAST_GROWTH = 0.5
"""It is full too when its rate grows by less than this share of what the users do."""
GENERATOR_IS_FULL = 0.9
"""Share of a core beyond which the load generator's own lateness is in the figures."""
OTHERS_DISTURB = 0.25
"""Cores that other work may take before a stage that is not held is played again."""
NUM_TRIES = 3
NUM_NARROWINGS = 2
MAX_USERS = 20_000
BEGIN_MARK = "<!-- make loadtest -->\n"
END_MARK = "<!-- end -->\n"


@dataclass(frozen=True, slots=True)
class Stage:
    """Outcome of one number of users. Shares are of a core; None where the server is remote."""

    num_users: int
    requests_per_s: float
    num_failed: int
    p50_ms: float
    p95_ms: float
    p99_ms: float
    generator_share: float
    server_share: float | None = None
    workers_share: float | None = None
    """Of the server's child processes; in `server_share` too."""
    memory_bytes: float | None = None
    others_share: float | None = None
    """What the machine did beside server and generator."""

    @property
    def requests_per_cpu_s(self) -> float | None:
        """Requests per second of the server's CPU time; holds also where cores are shared."""
        if not self.server_share:
            return None
        return self.requests_per_s / self.server_share


@dataclass(frozen=True, slots=True)
class Ramp:
    """All stages in order, the largest one held, and what stopped it from being larger."""

    what: str
    unit: str
    """Of a user, in the plural."""
    pace_s: float
    stages: tuple[Stage, ...]
    held: int
    """Its index in `stages`."""
    limit: str

    @property
    def best(self) -> Stage:
        return self.stages[self.held]

    @property
    def memory_per_100_bytes(self) -> float | None:
        """Server memory of 100 more users, between the smallest and the largest stage held."""
        first = self.stages[0]
        if first.memory_bytes is None or self.best.memory_bytes is None:
            return None
        num_more_users = self.best.num_users - first.num_users
        if num_more_users == 0:
            return None
        return 100 * (self.best.memory_bytes - first.memory_bytes) / num_more_users

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Ramp:
        return cls(**{**value, "stages": tuple(Stage(**stage) for stage in value["stages"])})


def explain_limit(stage: Stage, before: Stage | None) -> str:
    """Why a stage is more than the server holds; empty if it is held."""
    if stage.num_failed:
        return f"{stage.num_failed} requests failed"
    if stage.p99_ms > BOUND_MS:
        return f"p99 is {stage.p99_ms:.0f} ms"
    if before is not None and stage.num_users > before.num_users:
        growth_of_rate = stage.requests_per_s / before.requests_per_s - 1
        growth_of_users = stage.num_users / before.num_users - 1
        if growth_of_rate / growth_of_users < LEAST_GROWTH:
            return f"the rate no longer grows: {stage.requests_per_s:.0f}/s"
    return ""


def climb(try_out: Callable[[int], Stage], first: int, what: str, unit: str, pace_s: float) -> Ramp:
    """Double the users until a stage is not held, then narrow down twice.

    A stage that other work disturbed is tried again. Raises ValueError: not even the first stage is
    held.
    """
    stages: list[Stage] = []
    held = -1
    failed = math.inf
    limit = ""
    number = first
    narrowings = 0
    while True:
        before = stages[held] if held >= 0 else None
        reason = _try_until_undisturbed(try_out, number, stages, before)
        if reason:
            failed = number
            limit = reason
        else:
            held = len(stages) - 1
        if held < 0:
            raise ValueError(
                f"{what} does not hold {first} {unit}: {reason}. See its log, "
                "or measure on a quieter machine."
            )

        if failed == math.inf and number < MAX_USERS:
            number = min(2 * number, MAX_USERS)
        elif failed < math.inf and narrowings < NUM_NARROWINGS:
            # Halfway by factors, as the doubling went by factors.
            number = round(math.sqrt(stages[held].num_users * failed))
            narrowings += 1
        else:
            return Ramp(what, unit, pace_s, tuple(stages), held, limit)


def _try_until_undisturbed(
    try_out: Callable[[int], Stage], number: int, stages: list[Stage], before: Stage | None
) -> str:
    """Append the stages that were played; returns why the last is not held, empty if it is."""
    for _ in range(NUM_TRIES):
        stage = try_out(number)
        stages.append(stage)
        reason = explain_limit(stage, before)
        is_disturbed = stage.others_share is not None and stage.others_share > OTHERS_DISTURB
        if not reason or not is_disturbed:
            break

    if reason and stage.generator_share > GENERATOR_IS_FULL:
        reason += f", with the load generator at {stage.generator_share:.0%} of a core"
    if reason and is_disturbed:
        reason += f", with other work on {stage.others_share:.1f} cores"
    return reason


def build_stages_table(ramp: Ramp) -> Table:
    columns = (
        ramp.unit,
        "requests/s",
        "failed",
        "p50, ms",
        "p95, ms",
        "p99, ms",
        "server, cores",
        "generator",
        "others",
    )
    return Table(ramp.what, columns, tuple(map(_format_stage, ramp.stages)))


def _format_stage(stage: Stage) -> tuple[str, ...]:
    return (
        str(stage.num_users),
        format_figure(stage.requests_per_s),
        str(stage.num_failed),
        format_figure(stage.p50_ms),
        format_figure(stage.p95_ms),
        format_figure(stage.p99_ms),
        _format_share(stage.server_share),
        _format_share(stage.generator_share),
        _format_share(stage.others_share),
    )


def _format_share(share: float | None) -> str:
    return "" if share is None else f"{share:.2f}"


def build_summary_table(ramps: Sequence[Ramp]) -> Table:
    columns = (
        "server on one core",
        "holds",
        "requests/s",
        "p50, p95, p99, ms",
        "requests per CPU-second",
        "MiB per 100",
        "then",
    )
    return Table("", columns, tuple(map(_format_ramp, ramps)))


def _format_ramp(ramp: Ramp) -> tuple[str, ...]:
    best = ramp.best
    times_ms = map(format_figure, (best.p50_ms, best.p95_ms, best.p99_ms))

    # Neither is known of a remote server.
    per_cpu_s = best.requests_per_cpu_s
    memory = ramp.memory_per_100_bytes
    return (
        ramp.what,
        f"{best.num_users} {ramp.unit}",
        format_figure(best.requests_per_s),
        ", ".join(times_ms),
        "" if per_cpu_s is None else format_figure(per_cpu_s),
        "" if memory is None else format_figure(max(0.0, memory) / 2**20),
        ramp.limit,
    )


def format_block(results: dict[str, Any]) -> str:
    """What `make loadtest` writes between its marks in docs/operations.md."""
    ramps = list(map(Ramp.from_json, results["ramps"]))
    # The table has no title, which leaves an empty line in its place.
    table = format_table(build_summary_table(ramps)).lstrip("\n")
    circumstances = f", {results['circumstances']}" if results["circumstances"] else ""
    made = f"`{results['command']}`, {results['date']}, seed {results['seed']}"
    return f"{made}, {results['machine']}{circumstances}:\n\n{table}\n"


def replace_block(page: str, block: str) -> str:
    """The page with another text between the marks."""
    head, begin, rest = page.partition(BEGIN_MARK)
    _, end, tail = rest.partition(END_MARK)
    if not begin or not end:
        raise ValueError(
            f"The page has no {BEGIN_MARK.strip()} ... {END_MARK.strip()}. "
            "Put both where the figures belong."
        )
    return f"{head}{begin}{block}{end}{tail}"
