"""What must hold at the end of a chaos run: one pure function a promise, with its evidence."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
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
    growing = ("issued", "generated", *(outcome.value for outcome in CLOSING))
    shrunk = [
        name
        for before, after in itertools.pairwise(samples)
        for name in growing
        if after.counts[name] < before.counts[name]
    ]
    return Check(
        "the ledger's equations hold at every moment",
        len(samples) > 0 and not gaps and not shrunk,
        f"{len(samples)} samples, one a second ({num_missed} while Redis was away): "
        f"{len(gaps)} with a gap, {len(shrunk)} numbers that shrank",
    )


def check_closed(account: LedgerAccount, closed: Mapping[GroupOutcome, Sequence[int]]) -> Check:
    """0 groups lost: every number ever issued is closed, by exactly one outcome."""
    times = Counter(number for numbers in closed.values() for number in numbers)
    lost = set(range(account.num_issued)) - times.keys()
    twice = [number for number, count in times.items() if count > 1]
    invented = times.keys() - set(range(account.num_issued))
    return Check(
        "0 groups are lost: each is closed by exactly one outcome",
        not (lost or twice or invented or account.open) and account.find_gap() == 0,
        f"{account.num_issued} issued, {len(times)} closed, "
        f"{len(account.open)} open, gap {account.find_gap()}"
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
    times = Counter(group_id for update in updates for group_id in update)
    twice = [group_id for group_id, count in times.items() if count > 1]
    booked = {format_group_id(number) for number in trained}
    uneven = [index for index, update in enumerate(updates) if len(update) != groups_per_update]
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
    return Check(
        "every planned fault was done, and every service was killed",
        len(injuries) == num_planned and not missing,
        f"{len(injuries)} of {num_planned} faults, "
        f"{sum(injury.fault.num_kills for injury in injuries)} kills"
        + _name("never killed", missing),
    )


def check_recovered(injuries: Sequence[Injury]) -> Check:
    hurt = [injury for injury in injuries if not injury.is_overtaken and injury.ready_s is None]
    return Check(
        "every service is ready again after every fault",
        not hurt,
        f"{len(injuries)} faults"
        + _name("not recovered from", [f"{i.fault.kind} {i.target}" for i in hurt]),
    )


def check_rollout_recovery(injuries: Sequence[Injury]) -> Check:
    """A killed rollout worker serves again within the bound beyond its engine's start."""
    beyond = [
        injury.ready_after_s - injury.engine_start_s
        for injury in injuries
        if injury.needs_engine
        and injury.ready_after_s is not None
        and injury.engine_start_s is not None
    ]
    return Check(
        "a killed rollout worker is ready again within "
        f"{MAX_ROLLOUT_RECOVERY_S:.0f} s beyond its engine's start",
        len(beyond) > 0 and max(beyond) <= MAX_ROLLOUT_RECOVERY_S,
        f"{len(beyond)} times, longest {max(beyond, default=float('nan')):.1f} s",
    )


def check_regenerated(reclaimed: Sequence[str], injuries: Sequence[Injury]) -> Check:
    """Only groups that a hurt worker held at that moment are played again."""
    held = {entry_id for injury in injuries for entry_id in injury.held_entries}
    others = set(reclaimed) - held
    return Check(
        "at most its own groups are played again after a rollout worker's death",
        not others,
        f"{len(set(reclaimed))} groups taken over, {len(held)} were held by workers when they were "
        "hit" + _name("held by nobody hurt", others),
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
    """Of each life: the median of the last third against that of the first."""
    lives: dict[tuple[str, int], list[MemorySample]] = {}
    for sample in samples:
        lives.setdefault((sample.service, sample.pid), []).append(sample)
    growths = {}
    for (service, pid), life in lives.items():
        settled = [sample.num_bytes for sample in life if _is_settled(sample, life[0])]
        if len(settled) >= _LEAST_SAMPLES:
            third = len(settled) // 3
            growths[service, pid] = (median(settled[:third]), median(settled[-third:]))
    grown = [
        f"{service} from {first / 2**20:.0f} to {last / 2**20:.0f} MiB"
        for (service, _), (first, last) in growths.items()
        if last > first * (1 + _GROWTH_SHARE) + _GROWTH_BYTES
    ]
    largest = max(((last - first) / 2**20 for first, last in growths.values()), default=0.0)
    return Check(
        f"memory is flat: no life grows by more than {_GROWTH_SHARE:.0%} "
        f"+ {_GROWTH_BYTES >> 20} MiB",
        len(growths) > 0 and not grown,
        f"{len(growths)} lives long enough to tell ({_count(service for service, _ in growths)}), "
        f"largest growth {largest:.1f} MiB" + _name("grown", grown),
    )


def _is_settled(sample: MemorySample, first: MemorySample) -> bool:
    num_signs = _WARM_UP_SIGNS.get(sample.service.split("-")[0], 0)
    return (
        sample.at_s - first.at_s >= _WARM_UP_S and sample.num_signs - first.num_signs >= num_signs
    )


def _count(names: Iterable[str]) -> str:
    return ", ".join(f"{number} {name}" for name, number in sorted(Counter(names).items()))


def check_redis_memory(samples: Sequence[Sample]) -> Check:
    most = max((sample.redis_bytes for sample in samples), default=0)
    return Check(
        f"Redis stays under {MAX_REDIS_BYTES >> 20} MiB",
        0 < most <= MAX_REDIS_BYTES,
        f"at most {most / 2**20:.1f} MiB, {samples[-1].redis_bytes / 2**20:.1f} MiB at the end"
        if samples
        else "no sample",
    )


def _name(what: str, found: Sequence[object] | set[object]) -> str:
    """The first few of what should not be there, for the evidence."""
    shown = sorted(map(str, found))[:5]
    return f"; {what}: {', '.join(shown)}{', ...' if len(found) > 5 else ''}" if found else ""
