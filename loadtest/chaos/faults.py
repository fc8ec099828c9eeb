"""What goes wrong and when: kinds of faults, and a schedule of them drawn from a seed.

Pure: the injector does what is planned here.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

REDIS = "redis"
GATEWAY = "gateway"
LEARNER = "learner"
TEACHER = "teacher"
ENVS = "envs"
SERVICES = (REDIS, GATEWAY, LEARNER, TEACHER, ENVS)
"""One process each; rollout workers, `rollout-0` and so on, come on top."""

OUTAGE_S = 60.0


class FaultKind(StrEnum):
    """What is done to a target."""

    KILL = "kill"
    """SIGKILL of the service's process; its supervisor starts it again."""
    KILL_TWICE = "kill twice"
    """SIGKILL, and again while the next process starts."""
    KILL_CHILD = "kill child"
    """SIGKILL of a process the service started: an environments' worker, vLLM's engine core."""
    PAUSE = "pause"
    """SIGSTOP of all its processes, SIGCONT after `duration_s`."""
    SEVER = "sever"
    """All its connections are cut and new ones let through; of the environments: their clients'."""
    REFUSE = "refuse"
    """They are cut, and new ones refused for `duration_s`."""
    DELAY = "delay"
    """What they carry comes late for `duration_s`."""
    OUTAGE = "outage"
    """Redis is killed and stays away for `duration_s`."""


KILLS = (FaultKind.KILL, FaultKind.KILL_TWICE, FaultKind.KILL_CHILD, FaultKind.OUTAGE)


@dataclass(frozen=True, slots=True)
class Fault:
    """One planned fault. It is due `at_s` after the start, outages of Redis not counted, or once
    `at_progress` of the updates are done if that is earlier."""

    at_s: float
    at_progress: float
    kind: FaultKind
    target: str
    duration_s: float = 0.0

    @property
    def num_kills(self) -> int:
        if self.kind is FaultKind.KILL_TWICE:
            return 2
        return int(self.kind in KILLS)


@dataclass(frozen=True, slots=True)
class _Row:
    """One kind of fault of one target: `number` of them in ten minutes, at least `least`.

    `times_s` bounds how long each lasts.
    """

    kind: FaultKind
    target: str
    number: int
    times_s: tuple[float, float] = (0.0, 0.0)
    least: int = 0


def _rows(num_rollouts: int, lease_s: float) -> Iterable[_Row]:
    rollouts = [f"rollout-{index}" for index in range(num_rollouts)]
    yield from _kill_rows(rollouts)
    yield from _pause_rows(rollouts, lease_s)
    yield from _link_rows(rollouts)
    yield _Row(FaultKind.OUTAGE, REDIS, 1, (OUTAGE_S, OUTAGE_S))


def _kill_rows(rollouts: Sequence[str]) -> Iterable[_Row]:
    """Slow starters are killed less often: vLLM needs twenty seconds of a core each time."""
    yield _Row(FaultKind.KILL, GATEWAY, 10, least=1)
    yield _Row(FaultKind.KILL, ENVS, 9, least=1)
    yield _Row(FaultKind.KILL, REDIS, 9, least=1)
    yield _Row(FaultKind.KILL, TEACHER, 8, least=1)
    yield _Row(FaultKind.KILL, LEARNER, 9, least=1)
    for target in (GATEWAY, TEACHER, LEARNER, ENVS):
        yield _Row(FaultKind.KILL_TWICE, target, 1)
    for target in rollouts:
        yield _Row(FaultKind.KILL, target, max(1, 8 // len(rollouts)), least=1)
        yield _Row(FaultKind.KILL_CHILD, target, 1)
        yield _Row(FaultKind.SEVER, target, 1)
    yield _Row(FaultKind.KILL_CHILD, ENVS, 3, least=1)


def _pause_rows(rollouts: Sequence[str], lease_s: float) -> Iterable[_Row]:
    yield _Row(FaultKind.PAUSE, rollouts[0], 1, (2.0, 5.0))
    # Beyond its lease, and beyond what a silent worker is waited for: it is taken for dead, and its
    # late results are refused.
    yield _Row(FaultKind.PAUSE, rollouts[-1], 1, (lease_s + 2.0, lease_s + 5.0))
    yield _Row(FaultKind.PAUSE, LEARNER, 1, (2.0, 25.0))
    yield _Row(FaultKind.PAUSE, TEACHER, 1, (2.0, 25.0), least=1)
    yield _Row(FaultKind.PAUSE, GATEWAY, 1, (2.0, 10.0))
    yield _Row(FaultKind.PAUSE, ENVS, 1, (2.0, 10.0))
    yield _Row(FaultKind.PAUSE, REDIS, 1, (2.0, 8.0))


def _link_rows(rollouts: Sequence[str]) -> Iterable[_Row]:
    for target in (GATEWAY, TEACHER, LEARNER):
        yield _Row(FaultKind.SEVER, target, 1, least=int(target == LEARNER))
    yield _Row(FaultKind.SEVER, ENVS, 2, least=1)
    yield _Row(FaultKind.REFUSE, ENVS, 1, (2.0, 6.0))
    yield _Row(FaultKind.REFUSE, LEARNER, 1, (2.0, 10.0))
    yield _Row(FaultKind.REFUSE, rollouts[0], 1, (2.0, 10.0))
    yield _Row(FaultKind.DELAY, ENVS, 1, (3.0, 6.0))
    yield _Row(FaultKind.DELAY, TEACHER, 1, (3.0, 6.0))


def build_schedule(seed: int, minutes: float, num_rollouts: int, lease_s: float) -> list[Fault]:
    """Faults for a run of about `minutes`, by time. The same arguments give the same faults.

    Args:
        lease_s: silence after which a rollout worker is taken for dead although it is connected.
    """
    draw = random.Random(seed)
    planned: list[_Planned] = []
    for row in _rows(num_rollouts, lease_s):
        number = max(row.least, int(row.number * minutes / 10.0))
        durations_s = [round(draw.uniform(*row.times_s), 1) for _ in range(number)]
        planned += [(row.kind, row.target, duration_s) for duration_s in durations_s]
    ordered = _spread(planned, draw)

    # A fault's time leaves out outages of Redis, so they are no part of what the faults share.
    num_outages = sum(kind is FaultKind.OUTAGE for kind, _, _ in ordered)
    step_s = (_FAULT_SHARE * minutes * 60.0 - num_outages * OUTAGE_S) / len(ordered)

    faults = []
    for index, (kind, target, duration_s) in enumerate(ordered):
        place = index + draw.uniform(0.0, 0.9)
        at_s = round(place * step_s, 1)
        at_progress = round(_LAST_PROGRESS * place / len(ordered), 4)
        faults.append(Fault(at_s, at_progress, kind, target, duration_s))
    return faults


_FAULT_SHARE = 0.85
"""Share of the minutes in which faults begin; the rest is for recovery and the run's end."""
_LAST_PROGRESS = 0.85
"""The last fault comes before this share of the updates is done, however fast the machine."""

_Planned = tuple[FaultKind, str, float]


def _spread(planned: list[_Planned], draw: random.Random) -> list[_Planned]:
    """Shuffle in rounds that hold every target at most once, so no service waits for long."""
    by_target: dict[str, list[_Planned]] = {}
    for item in planned:
        by_target.setdefault(item[1], []).append(item)

    num_rounds = max(map(len, by_target.values()))
    rounds: list[list[_Planned]] = [[] for _ in range(num_rounds)]
    for items in by_target.values():
        draw.shuffle(items)
        # Those with few faults get theirs all over the run, not at its beginning.
        indices = sorted(draw.sample(range(num_rounds), len(items)))
        for item, index in zip(items, indices, strict=True):
            rounds[index].append(item)

    ordered: list[_Planned] = []
    for one in rounds:
        draw.shuffle(one)
        ordered += one
    return ordered
