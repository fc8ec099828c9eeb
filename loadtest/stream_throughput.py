"""Measures the stream of trajectories over a real Redis, against PipelineRL's way.

Both sides write everything, then read everything, in one process, so nothing but their own work is
in the time: ours encodes and checks every trajectory, commits a group in one transaction as a
rollout worker does, reads in pages as a learner does, decodes and acknowledges.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadtest.comparison import Comparison, Measurement, Say, Target, describe_pair
from loadtest.peers import PickleStream, count_pickled_bytes, to_training_texts
from loadtest.workloads import RUN_ID, AgentShape, build_agent_groups, build_household_groups
from sdar.bus.embedded_redis import EmbeddedRedis
from sdar.bus.redis import RedisBus
from sdar.contracts import codec
from sdar.contracts.streams import ConsumerGroup, Stream
from sdar.contracts.types import GroupOutcome, LedgerEvent, Trajectory

NUM_GROUPS = 16
GROUP_SIZE = 8
PAGE = 64
NUM_PAIRS = 4
CONSUMERS = {Stream.TRAJECTORIES: (ConsumerGroup.LEARNER,), Stream.LEDGER: (ConsumerGroup.GATEWAY,)}
TARGET = Target("at_least", 5)
BY_CALL = "PipelineRL's records, an entry a call"
BY_TRAJECTORY = "PipelineRL's records, an entry a trajectory"
BY_GROUP = "PipelineRL's records, an entry a group"
SAME_OBJECT = "pickle of the same object, an entry a trajectory"

Groups = Sequence[Sequence[Trajectory]]


def measure(say: Say) -> Measurement:
    workloads = _build_workloads()
    comparisons: list[Comparison] = []
    with (
        tempfile.TemporaryDirectory(prefix="sdar-bench-") as directory,
        EmbeddedRedis(Path(directory)) as redis,
    ):
        for workload in workloads:
            say(f"{workload.name} trajectories")
            comparisons += asyncio.run(_compare(redis.url, workload, say))
    return Measurement(tuple(comparisons), notes=_list_notes())


def _list_notes() -> tuple[str, ...]:
    shape = AgentShape()
    return (
        f"Agent trajectories are drawn at random: {shape.num_first_tokens} tokens of first "
        f"prompt, {shape.num_observation_tokens} of each observation, {shape.num_response_tokens} "
        f"of each response on average, ids of a vocabulary of {shape.vocabulary_size:,}. The "
        "ratio grows with their length: ours holds each token once, the peer once a turn.",
        "A sample is one trajectory. PipelineRL's records: a dictionary of plain lists per call "
        "of the model, each with its whole prompt and labels; XADD of a pickle, XREAD COUNT 1. "
        "Its actor puts a group's records into one entry. The same object: our own Trajectory "
        "with its arrays, pickled.",
        "Ours carries more (messages, per-token versions, identities), is checked on both sides, "
        "is acknowledged, and its reader needs no trust in the writer. On the household's tiny "
        "trajectories that costs more than it saves.",
    )


@dataclass(frozen=True, slots=True)
class Workload:
    """Groups to send, and the peers to send them by."""

    name: str
    groups: Groups
    peers: tuple[str, ...]
    target: Target | None = None


def _build_workloads() -> list[Workload]:
    def draw(num_turns: int) -> Groups:
        return build_agent_groups(NUM_GROUPS, GROUP_SIZE, AgentShape(num_turns=num_turns))

    long = draw(num_turns=20)
    short = draw(num_turns=8)
    household = build_household_groups(4 * NUM_GROUPS, GROUP_SIZE)
    all_peers = (BY_CALL, BY_TRAJECTORY, BY_GROUP, SAME_OBJECT)
    fast_peers = (BY_TRAJECTORY, BY_GROUP)
    return [
        Workload(f"agent ({_describe(long)})", long, all_peers, TARGET),
        Workload(f"agent ({_describe(short)})", short, fast_peers),
        Workload(f"household ({_describe(household)})", household, fast_peers),
    ]


def _describe(groups: Groups) -> str:
    """Mean lengths of the groups' trajectories."""
    trajectories = list(itertools.chain.from_iterable(groups))
    num_turns = statistics.mean(len(trajectory.turns) for trajectory in trajectories)
    num_tokens = statistics.mean(map(_count_tokens, trajectories))
    return f"{num_turns:.0f} turns, {num_tokens:,.0f} tokens"


def _count_tokens(trajectory: Trajectory) -> int:
    # The last turn's prompt holds all turns before it.
    last = trajectory.turns[-1]
    return len(last.prompt_token_ids) + len(last.response_token_ids)


async def _compare(url: str, workload: Workload, say: Say) -> list[Comparison]:
    """Samples per second against each of the workload's peers, then bytes a sample."""
    bus = RedisBus(url, RUN_ID, CONSUMERS)
    try:
        rates = [await _compare_with(peer, bus, url, workload, say) for peer in workload.peers]
    finally:
        await bus.close()
    return rates + _compare_bytes(workload)


async def _compare_with(
    peer: str, bus: RedisBus, url: str, workload: Workload, say: Say
) -> Comparison:
    trajectories = list(itertools.chain.from_iterable(workload.groups))
    contents = _pack_as_peer(peer, trajectories)

    pairs = []
    for index in range(1 + NUM_PAIRS):
        ours = len(trajectories) / await _time_ours(bus, workload.groups)
        theirs = len(trajectories) / _time_peer(url, contents)
        if index:  # the first pair warms up
            pairs.append((ours, theirs))
            say(f"{peer}, {describe_pair(index, NUM_PAIRS, (ours, theirs))}")

    what = f"stream, {workload.name}"
    target = workload.target if peer == BY_TRAJECTORY else None
    return Comparison(what, peer, "samples/s", tuple(pairs), target)


def _compare_bytes(workload: Workload) -> list[Comparison]:
    trajectories = list(itertools.chain.from_iterable(workload.groups))
    ours_bytes = statistics.mean(map(len, map(codec.encode_trajectory, trajectories)))

    comparisons = []
    for peer in (BY_TRAJECTORY, SAME_OBJECT):
        theirs_bytes = statistics.mean(map(count_pickled_bytes, _pack_as_peer(peer, trajectories)))
        what = f"stream, {workload.name}, bytes a sample"
        comparisons.append(Comparison(what, peer, "bytes", ((ours_bytes, theirs_bytes),)))
    return comparisons


def _pack_as_peer(peer: str, trajectories: Sequence[Trajectory]) -> Sequence[Any]:
    """What the peer writes, entry by entry."""
    if peer == SAME_OBJECT:
        return trajectories
    records = [to_training_texts(trajectory) for trajectory in trajectories]
    if peer == BY_TRAJECTORY:
        return records
    if peer == BY_CALL:
        return list(itertools.chain.from_iterable(records))
    groups = []
    for start in range(0, len(records), GROUP_SIZE):
        own = records[start : start + GROUP_SIZE]
        groups.append(list(itertools.chain.from_iterable(own)))
    return groups


async def _time_ours(bus: RedisBus, groups: Groups) -> float:
    """Seconds to publish all groups, and to read, decode and acknowledge them."""
    began = time.perf_counter()
    for group in groups:
        event = LedgerEvent(RUN_ID, group[0].group_id, GroupOutcome.GENERATED, len(group), 0)
        payloads = [codec.encode_trajectory(trajectory) for trajectory in group]
        await bus.commit(
            {Stream.TRAJECTORIES: payloads, Stream.LEDGER: [codec.encode_ledger_event(event)]}
        )

    num_waiting = sum(map(len, groups))
    while num_waiting > 0:
        deliveries = await bus.read(Stream.TRAJECTORIES, ConsumerGroup.LEARNER, "bench", PAGE)
        trajectories = [codec.decode_trajectory(delivery.payload) for delivery in deliveries]
        num_waiting -= len(trajectories)
        await bus.acknowledge(deliveries)
    duration_s = time.perf_counter() - began

    # Untimed: the streams are left empty for the next pair.
    events = await bus.read(Stream.LEDGER, ConsumerGroup.GATEWAY, "bench", len(groups))
    await bus.acknowledge(events)
    await bus.trim()
    return duration_s


def _time_peer(url: str, contents: Sequence[Any]) -> float:
    """Seconds to write all contents one by one, and to read them one by one."""
    stream = PickleStream(url, "peer")
    try:
        began = time.perf_counter()
        for content in contents:
            stream.write(content)
        for _ in contents:
            stream.read()
        return time.perf_counter() - began
    finally:
        stream.clear()
        stream.close()
