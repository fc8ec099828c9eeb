"""What must hold at the end of a chaos run: one pure function a promise, with its evidence."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import nan
from statistics import median

from loadtest.chaos.faults import KILLS, SERVICES
from loadtest.chaos.observer import Sample
from loadtest.chaos.recovery import ROLLOUT_PREFIX, Injury
from loadtest.chaos.run import MemorySample
from sdar.bus.ledger import CLOSING, LedgerAccount, format_group_id
from sdar.contracts.types import GroupOutcome

_GROWTH_SHARE = 0.10
_GROWTH_BYTES = 20 * 2**20
_WARM_UP_S = 10.0
_WARM_UP_SIGNS = {"rollout": 150, "learner": 10, "teacher": 10}
"""Of each life, after it is ready: late imports, caches and allocators settle. vLLM takes 400 MiB
more over its first 150 groups and then stays where it is, measured over 1,700 groups and 400
updates without faults."""
_LEAST_SAMPLES = 12
"""A life with fewer samples than this says nothing about growth."""
_MAX_NAMED = 5
"""So many culprits are named in the evidence."""
MAX_REDIS_BYTES = 64 * 2**20
MAX_ROLLOUT_RECOVERY_S = 30.0
"""From a rollout worker's death to its next group, beyond its engine's start."""


@dataclass(frozen=True, slots=True)
class Check:
    """One promise, whether it was kept, and what shows it."""

    promise: str
    is_kept: bool
    evidence: str


def check_end(phase: str, num_updates: int, target: int) -> Check:
    return Check(
        "the run ends with its target of updates",
        phase == "finished" and num_updates == target,
        f"phase {phase}, {num_updates} of {target} updates",
    )


def check_samples(samples: Sequence[Sample], num_missed: int) -> Check:
    """Both equations hold in every sample, and what only grows never shrinks."""
    gaps = [sample for sample in samples if sample.gap != 0]
    # Not "running" and "buffered": groups leave those states again.
    growing = ["issued", "generated", *(outcome.value for outcome in CLOSING)]

    shrunk: list[str] = []
    for before, after in itertools.pairwise(samples):
        shrunk += [name for name in growing if after.counts[name] < before.counts[name]]

    return Check(
        "the ledger's equations hold at every moment",
        len(samples) > 0 and not gaps and not shrunk,
        f"{len(samples)} samples, one a second ({num_missed} while Redis was away): "
        f"{len(gaps)} with a gap, {len(shrunk)} numbers that shrank",
    )


def check_closed(account: LedgerAccount, closed: Mapping[GroupOutcome, Sequence[int]]) -> Check:
    """0 groups lost: every number ever issued is closed, by exactly one outcome."""
    times = Counter(itertools.chain.from_iterable(closed.values()))
    issued = set(range(account.num_issued))
    lost = issued - times.keys()
    twice = [number for number, count in times.items() if count > 1]
    invented = times.keys() - issued
    gap = account.find_gap()

    return Check(
        "0 groups are lost: each is closed by exactly one outcome",
        not (lost or twice or invented or account.open) and gap == 0,
        f"{account.num_issued} issued, {len(times)} closed, {len(account.open)} open, gap {gap}"
        + _name("lost", lost)
        + _name("closed twice", twice)
        + _name("closed but never issued", invented),
    )


def check_trained(
    updates: Sequence[Sequence[str]],
    trained: Sequence[int],
    groups_per_update: int,
    num_updates: int,
) -> Check:
    """0 groups trained twice.

    Args:
        updates: group ids of every optimizer step, from the learner's last checkpoint.
        trained: the ledger's.
    """
    times = Counter(itertools.chain.from_iterable(updates))
    twice = [group_id for group_id, count in times.items() if count > 1]
    uneven = [index for index, update in enumerate(updates) if len(update) != groups_per_update]

    booked = set(map(format_group_id, trained))
    different = times.keys() ^ booked

    return Check(
        "0 groups are trained twice: the optimizer's steps and the ledger "
        "name the same groups, each once",
        not (twice or different or uneven) and len(updates) == num_updates,
        f"{len(updates)} steps of {groups_per_update} groups name {len(times)} groups, "
        f"the ledger {len(booked)}"
        + _name("trained twice", twice)
        + _name("in one of both only", different)
        + _name("steps of another size", uneven),
    )


def check_faults(injuries: Sequence[Injury], num_planned: int, num_rollouts: int) -> Check:
    kills = Counter(injury.target for injury in injuries if injury.fault.kind in KILLS)
    rollouts = [f"{ROLLOUT_PREFIX}{index}" for index in range(num_rollouts)]
    missing = [name for name in (*SERVICES, *rollouts) if not kills[name]]
    # More than the kills counted above: a fault may kill its target twice.
    num_kills = sum(injury.fault.num_kills for injury in injuries)

    return Check(
        "every planned fault was done, and every service was killed",
        len(injuries) == num_planned and not missing,
        f"{len(injuries)} of {num_planned} faults, {num_kills} kills"
        + _name("never killed", missing),
    )


def check_recovered(injuries: Sequence[Injury]) -> Check:
    # The recovery of an overtaken target counts for the fault that came after.
    hurt = [injury for injury in injuries if injury.ready_s is None and not injury.is_overtaken]
    names = [f"{injury.fault.kind} {injury.target}" for injury in hurt]
    return Check(
        "every service is ready again after every fault",
        not hurt,
        f"{len(injuries)} faults" + _name("not recovered from", names),
    )


def check_rollout_recovery(injuries: Sequence[Injury]) -> Check:
    """A killed rollout worker serves again within the bound beyond its engine's start."""
    beyond_s: list[float] = []
    for injury in injuries:
        if not injury.needs_engine:
            continue
        if injury.ready_after_s is not None and injury.engine_start_s is not None:
            beyond_s.append(injury.ready_after_s - injury.engine_start_s)
    # With no times at all the check fails: nan is not within the bound.
    longest_s = max(beyond_s, default=nan)

    return Check(
        "a killed rollout worker is ready again within "
        f"{MAX_ROLLOUT_RECOVERY_S:.0f} s beyond its engine's start",
        longest_s <= MAX_ROLLOUT_RECOVERY_S,
        f"{len(beyond_s)} times, longest {longest_s:.1f} s",
    )


def check_regenerated(reclaimed: Sequence[str], injuries: Sequence[Injury]) -> Check:
    """Only groups that a hurt worker held at that moment are played again."""
    held: set[str] = set()
    for injury in injuries:
        held.update(injury.held_entries)
    taken_over = set(reclaimed)
    others = taken_over - held

    return Check(
        "at most its own groups are played again after a rollout worker's death",
        not others,
        f"{len(taken_over)} groups taken over, {len(held)} were held by workers when they were hit"
        + _name("held by nobody hurt", others),
    )


def check_nothing_left(
    num_sessions: float, orphans: Sequence[str], partial: Sequence[str], not_drained: Sequence[str]
) -> Check:
    return Check(
        "no session, process or half-written file is left",
        num_sessions == 0 and not (orphans or partial or not_drained),
        f"{num_sessions:g} sessions, {len(orphans)} processes, {len(partial)} files"
        + _name("orphans", orphans)
        + _name("half-written", partial)
        + _name("did not end when asked", not_drained),
    )


def check_memory(samples: Sequence[MemorySample]) -> Check:
    """No life of a service grows by more than the bound, once it has settled."""
    growths = list(_measure_growths(samples))
    grown = [growth.describe() for growth in growths if growth.is_leak]
    largest = max((growth.num_bytes for growth in growths), default=0.0)
    services = Counter(growth.service for growth in growths)

    return Check(
        f"memory is flat: no life grows by more than {_GROWTH_SHARE:.0%} "
        f"+ {_GROWTH_BYTES >> 20} MiB",
        len(growths) > 0 and not grown,
        f"{len(growths)} lives long enough to tell ({_format_counts(services)}), "
        f"largest growth {largest / 2**20:.1f} MiB" + _name("grown", grown),
    )


@dataclass(frozen=True, slots=True)
class _Growth:
    """Memory of one life: medians of the first and of the last third of its settled samples."""

    service: str
    first: float
    last: float

    @property
    def num_bytes(self) -> float:
        return self.last - self.first

    @property
    def is_leak(self) -> bool:
        return self.last > self.first * (1 + _GROWTH_SHARE) + _GROWTH_BYTES

    def describe(self) -> str:
        return f"{self.service} from {self.first / 2**20:.0f} to {self.last / 2**20:.0f} MiB"


def _measure_growths(samples: Sequence[MemorySample]) -> Iterator[_Growth]:
    """Of each life that was sampled for long enough."""
    lives: dict[tuple[str, int], list[MemorySample]] = {}
    for sample in samples:
        lives.setdefault((sample.service, sample.pid), []).append(sample)

    for (service, _), life in lives.items():
        settled = [sample.num_bytes for sample in life if _is_settled(sample, life[0])]
        if len(settled) < _LEAST_SAMPLES:
            continue
        third = len(settled) // 3
        yield _Growth(service, median(settled[:third]), median(settled[-third:]))


def _is_settled(sample: MemorySample, first: MemorySample) -> bool:
    """Whether the life that began with `first` has run and worked for long enough."""
    kind = sample.service.split("-")[0]  # "rollout" of "rollout-0"
    num_signs = sample.num_signs - first.num_signs
    age_s = sample.at_s - first.at_s
    return age_s >= _WARM_UP_S and num_signs >= _WARM_UP_SIGNS.get(kind, 0)


def _format_counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{number} {name}" for name, number in sorted(counts.items()))


def check_redis_memory(samples: Sequence[Sample]) -> Check:
    most = max((sample.redis_bytes for sample in samples), default=0)
    evidence = "no sample"
    if samples:
        last = samples[-1].redis_bytes
        evidence = f"at most {most / 2**20:.1f} MiB, {last / 2**20:.1f} MiB at the end"

    return Check(
        f"Redis stays under {MAX_REDIS_BYTES >> 20} MiB",
        0 < most <= MAX_REDIS_BYTES,
        evidence,
    )


def _name(what: str, found: Collection[object]) -> str:
    """The first few of what should not be there, for the evidence."""
    if not found:
        return ""
    shown = sorted(map(str, found))[:_MAX_NAMED]
    dots = ", ..." if len(found) > _MAX_NAMED else ""
    return f"; {what}: {', '.join(shown)}{dots}"
