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
    shape = AgentShape()
    notes = (
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
    return Measurement(tuple(comparisons), notes=notes)


@dataclass(frozen=True, slots=True)
class Workload:
    """Groups to send, and the peers to send them by."""

    name: str
    groups: Groups
    peers: tuple[str, ...]
    target: Target | None = None


def _build_workloads() -> list[Workload]:
    def agent(num_turns: int) -> Groups:
        return build_agent_groups(NUM_GROUPS, GROUP_SIZE, AgentShape(num_turns=num_turns))

    workloads = (
        ("agent", agent(20), (BY_CALL, BY_TRAJECTORY, BY_GROUP, SAME_OBJECT), TARGET),
        ("agent", agent(8), (BY_TRAJECTORY, BY_GROUP), None),
        (
            "household",
            build_household_groups(4 * NUM_GROUPS, GROUP_SIZE),
            (BY_TRAJECTORY, BY_GROUP),
            None,
        ),
    )
    return [
        Workload(f"{name} ({_describe(groups)})", groups, peers, target)
        for name, groups, peers, target in workloads
    ]


def _describe(groups: Groups) -> str:
    trajectories = [trajectory for group in groups for trajectory in group]
    num_turns = statistics.mean(len(trajectory.turns) for trajectory in trajectories)
    last = [trajectory.turns[-1] for trajectory in trajectories]
    num_tokens = statistics.mean(
        len(turn.prompt_token_ids) + len(turn.response_token_ids) for turn in last
    )
    return f"{num_turns:.0f} turns, {num_tokens:,.0f} tokens"


async def _compare(url: str, workload: Workload, say: Say) -> list[Comparison]:
    trajectories = list(itertools.chain.from_iterable(workload.groups))
    bus = RedisBus(url, RUN_ID, CONSUMERS)
    comparisons: list[Comparison] = []
    try:
        for peer in workload.peers:
            contents = _pack_as_peer(peer, trajectories)
            pairs = []
            for index in range(1 + NUM_PAIRS):
                ours = len(trajectories) / await _time_ours(bus, workload.groups)
                theirs = len(trajectories) / _time_peer(url, contents)
                if index:
                    pairs.append((ours, theirs))
                    say(f"{peer}, {describe_pair(index, NUM_PAIRS, (ours, theirs))}")
            what = f"stream, {workload.name}"
            target = workload.target if peer == BY_TRAJECTORY else None
            comparisons.append(Comparison(what, peer, "samples/s", tuple(pairs), target))
    finally:
        await bus.close()
    return comparisons + _compare_bytes(workload, trajectories)


def _compare_bytes(workload: Workload, trajectories: Sequence[Trajectory]) -> list[Comparison]:
    comparisons = []
    ours_bytes = statistics.mean(
        len(codec.encode_trajectory(trajectory)) for trajectory in trajectories
    )
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
        return list(itertools.chain(*records))
    return [
        list(itertools.chain(*records[start : start + GROUP_SIZE]))
        for start in range(0, len(records), GROUP_SIZE)
    ]


async def _time_ours(bus: RedisBus, groups: Groups) -> float:
    """Seconds to publish all groups, and to read, decode and acknowledge them."""
    began = time.perf_counter()
    for group in groups:
        event = LedgerEvent(RUN_ID, group[0].group_id, GroupOutcome.GENERATED, len(group), 0)
        payloads = [codec.encode_trajectory(trajectory) for trajectory in group]
        await bus.commit(
            {Stream.TRAJECTORIES: payloads, Stream.LEDGER: [codec.encode_ledger_event(event)]}
        )
    num_read, num_sent = 0, sum(map(len, groups))
    while num_read < num_sent:
        deliveries = await bus.read(Stream.TRAJECTORIES, ConsumerGroup.LEARNER, "bench", PAGE)
        num_read += len([codec.decode_trajectory(delivery.payload) for delivery in deliveries])
        await bus.acknowledge(deliveries)
    duration_s = time.perf_counter() - began
    await bus.acknowledge(
        await bus.read(Stream.LEDGER, ConsumerGroup.GATEWAY, "bench", len(groups))
    )
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
