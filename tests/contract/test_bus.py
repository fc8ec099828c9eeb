"""The promises of `Bus`, kept by every implementation: the one in memory and the one over a real Redis server."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AsyncExitStack

import pytest

from sdar.contracts.codec import decode_ledger_event
from sdar.contracts.errors import CapacityError, ConfigurationError
from sdar.contracts.streams import BROADCAST_MAX_ENTRIES, ConsumerGroup, Stream
from sdar.contracts.types import GroupOutcome, LedgerEvent
from sdar.runtime.bus import BEFORE_FIRST, Bus, BusLimits, Delivery
from sdar.runtime.embedded_redis import EmbeddedRedis
from sdar.runtime.ledger import format_group_id
from sdar.runtime.memory_bus import MemoryBus
from sdar.runtime.redis_bus import RedisBus

TASKS, TRAJECTORIES, LEDGER = Stream.TASKS, Stream.TRAJECTORIES, Stream.LEDGER
ROLLOUT, TEACHER, LEARNER, GATEWAY = ConsumerGroup.ROLLOUT, ConsumerGroup.TEACHER, ConsumerGroup.LEARNER, ConsumerGroup.GATEWAY
WIRING: Mapping[Stream, tuple[ConsumerGroup, ...]] = {
    TASKS: (ROLLOUT,),
    TRAJECTORIES: (TEACHER, LEARNER),
    LEDGER: (GATEWAY,),
}
# Trimming is asked for where a test needs it; producers do it on their own when a stream is full.
LIMITS = BusLimits(max_entries=8, publish_timeout_s=0.2, trim_interval_s=3600.0, outage_tolerance_s=5.0)
BLOCK_S = 2.0
run_numbers = itertools.count()


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with EmbeddedRedis(tmp_path_factory.mktemp("redis")) as server:
        yield server.url


@pytest.fixture(params=["memory", "redis"])
async def buses(request: pytest.FixtureRequest) -> AsyncIterator[Callable[[], Bus]]:
    """Makes buses of one run, each as another process would have it."""
    async with AsyncExitStack() as stack:
        if request.param == "memory":
            memory = MemoryBus(WIRING, LIMITS)
            yield lambda: memory
            return
        url, run_id = request.getfixturevalue("redis_url"), f"run-{next(run_numbers)}"

        def build() -> Bus:
            bus = RedisBus(url, run_id, WIRING, LIMITS)
            stack.push_async_callback(bus.close)
            return bus

        yield build


@pytest.fixture
def bus(buses: Callable[[], Bus]) -> Bus:
    return buses()


def payloads(deliveries: list[Delivery]) -> list[bytes]:
    return [delivery.payload for delivery in deliveries]


def event(number: int, outcome: GroupOutcome, reason: str = "") -> LedgerEvent:
    return LedgerEvent("run", format_group_id(number), outcome, num_trajectories=2, policy_version=0, reason=reason)


async def read_journal(bus: Bus) -> list[LedgerEvent]:
    return [decode_ledger_event(entry.payload) for entry in await bus.tail(LEDGER, BEFORE_FIRST, max_count=9999)]


async def test_entries_arrive_whole_and_in_the_order_they_were_published(bus: Bus) -> None:
    awkward = [b"", b"\x00\xff\r\n", b"x" * 100_000]
    await bus.publish(TASKS, awkward)
    await bus.publish(TASKS, [b"later"])
    deliveries = await bus.read(TASKS, ROLLOUT, "a", max_count=10)
    assert payloads(deliveries) == [*awkward, b"later"]
    assert [delivery.num_deliveries for delivery in deliveries] == [1, 1, 1, 1]


async def test_consumers_of_one_group_share_the_entries_and_never_both_get_one(bus: Bus) -> None:
    await bus.publish(TASKS, [b"1", b"2", b"3"])
    assert payloads(await bus.read(TASKS, ROLLOUT, "a", max_count=2)) == [b"1", b"2"]
    assert payloads(await bus.read(TASKS, ROLLOUT, "b", max_count=2)) == [b"3"]
    assert await bus.read(TASKS, ROLLOUT, "a", max_count=2) == []


async def test_each_group_gets_every_entry_from_the_first_on(bus: Bus) -> None:
    await bus.publish(TRAJECTORIES, [b"1", b"2"])
    assert payloads(await bus.read(TRAJECTORIES, TEACHER, "t", max_count=9)) == [b"1", b"2"]
    assert payloads(await bus.read(TRAJECTORIES, LEARNER, "l", max_count=9)) == [b"1", b"2"]


async def test_a_blocking_read_returns_as_soon_as_something_is_published(buses: Callable[[], Bus]) -> None:
    async with asyncio.timeout(BLOCK_S), asyncio.TaskGroup() as tasks:
        reading = tasks.create_task(buses().read(TASKS, ROLLOUT, "a", max_count=1, block_s=60.0))
        await asyncio.sleep(0)
        await buses().publish(TASKS, [b"news"])
    assert payloads(reading.result()) == [b"news"]


async def test_a_read_of_a_quiet_stream_returns_nothing_when_its_time_is_over(bus: Bus) -> None:
    started = time.monotonic()
    assert await bus.read(TASKS, ROLLOUT, "a", max_count=1, block_s=0.03) == []
    assert time.monotonic() - started >= 0.03


async def test_entries_of_a_dead_consumer_reach_another_with_a_higher_delivery_count(buses: Callable[[], Bus]) -> None:
    await buses().publish(TASKS, [b"1", b"2"])
    await buses().read(TASKS, ROLLOUT, "dead", max_count=2)
    survivor = buses()
    assert await survivor.read(TASKS, ROLLOUT, "alive", max_count=9) == []
    taken: list[Delivery] = []
    async with asyncio.timeout(BLOCK_S):
        while len(taken) < 2:
            taken += await survivor.reclaim(TASKS, ROLLOUT, "alive", min_idle_s=0.02, max_count=9)
            await asyncio.sleep(0.005)
    assert [(d.payload, d.num_deliveries, d.consumer) for d in taken] == [(b"1", 2, "alive"), (b"2", 2, "alive")]


async def test_entries_that_are_not_idle_long_enough_stay_with_their_consumer(bus: Bus) -> None:
    await bus.publish(TASKS, [b"1"])
    await bus.read(TASKS, ROLLOUT, "busy", max_count=1)
    assert await bus.reclaim(TASKS, ROLLOUT, "thief", min_idle_s=60.0, max_count=9) == []


async def test_a_restarted_consumer_pages_through_all_it_held(bus: Bus) -> None:
    await bus.publish(TASKS, [b"%d" % number for number in range(5)])
    await bus.read(TASKS, ROLLOUT, "learner", max_count=5)
    first = await bus.reclaim(TASKS, ROLLOUT, "learner", min_idle_s=0.0, max_count=3)
    rest = await bus.reclaim(TASKS, ROLLOUT, "learner", min_idle_s=0.0, max_count=3, after_id=first[-1].entry_id)
    assert payloads(first + rest) == [b"0", b"1", b"2", b"3", b"4"]


async def test_a_renewed_delivery_is_not_idle_and_counts_as_no_new_attempt(bus: Bus) -> None:
    await bus.publish(TASKS, [b"1"])
    [held] = await bus.read(TASKS, ROLLOUT, "slow", max_count=1)
    lease_s = 0.3
    started = time.monotonic()
    while time.monotonic() < started + 1.2 * lease_s:
        assert await bus.renew([held]) == [held]
        await asyncio.sleep(lease_s / 20)
    assert await bus.reclaim(TASKS, ROLLOUT, "thief", min_idle_s=lease_s, max_count=9) == []
    [again] = await bus.reclaim(TASKS, ROLLOUT, "slow", min_idle_s=0.0, max_count=9)
    assert again.num_deliveries == 2


async def test_renewing_tells_a_consumer_what_it_has_lost(bus: Bus) -> None:
    await bus.publish(TASKS, [b"1", b"2", b"3"])
    held = await bus.read(TASKS, ROLLOUT, "slow", max_count=3)
    await bus.acknowledge(held[:1])
    [taken] = await bus.reclaim(TASKS, ROLLOUT, "peer", min_idle_s=0.0, max_count=1)
    assert taken.entry_id == held[1].entry_id
    assert await bus.renew(held) == [held[2]]
    assert await bus.renew([taken]) == [taken]


async def test_acknowledged_entries_are_never_delivered_again(bus: Bus) -> None:
    await bus.publish(TASKS, [b"1", b"2"])
    first, second = await bus.read(TASKS, ROLLOUT, "a", max_count=2)
    await bus.acknowledge([first])
    await bus.acknowledge([first])
    assert payloads(await bus.reclaim(TASKS, ROLLOUT, "b", min_idle_s=0.0, max_count=9)) == [second.payload]


async def test_a_commit_publishes_acknowledges_and_saves_together(bus: Bus) -> None:
    await bus.publish(TASKS, [b"task"])
    task = await bus.read(TASKS, ROLLOUT, "a", max_count=1)
    await bus.commit({TRAJECTORIES: [b"t0", b"t1"], LEDGER: [b"generated"]}, task, {"cursor": b"7"})
    assert payloads(await bus.read(TRAJECTORIES, TEACHER, "t", max_count=9)) == [b"t0", b"t1"]
    assert payloads(await bus.read(LEDGER, GATEWAY, "g", max_count=9)) == [b"generated"]
    assert await bus.load_state("cursor") == b"7"
    assert await bus.reclaim(TASKS, ROLLOUT, "b", min_idle_s=0.0, max_count=9) == []


async def test_a_commit_refused_for_lack_of_room_changes_nothing(bus: Bus) -> None:
    await bus.publish(TRAJECTORIES, [b"old"] * LIMITS.max_entries)
    await bus.publish(TASKS, [b"task"])
    task = await bus.read(TASKS, ROLLOUT, "a", max_count=1)
    with pytest.raises(CapacityError, match="trajectories holds 8 entries"):
        await bus.commit({LEDGER: [b"generated"], TRAJECTORIES: [b"new"]}, task, {"cursor": b"7"})
    assert await bus.newest(LEDGER) is None
    assert (await bus.stream_lag(TRAJECTORIES, TEACHER)).num_undelivered == LIMITS.max_entries
    assert await bus.load_state("cursor") is None
    assert payloads(await bus.reclaim(TASKS, ROLLOUT, "b", min_idle_s=0.0, max_count=9)) == [b"task"]


async def test_an_output_is_there_whenever_its_input_is_acknowledged(buses: Callable[[], Bus]) -> None:
    """A worker is cancelled at every point of its loop in turn; afterwards each task has its output or is still pending."""
    await buses().publish(TASKS, [b"%d" % number for number in range(8)])

    async def work(bus: Bus) -> None:
        while True:
            for delivery in await bus.read(TASKS, ROLLOUT, "worker", max_count=1, block_s=BLOCK_S):
                await bus.commit({LEDGER: [delivery.payload]}, [delivery])

    for num_steps in range(12):
        worker = asyncio.create_task(work(buses()))
        for _ in range(num_steps):
            await asyncio.sleep(0)
        worker.cancel()
        await asyncio.wait([worker])
    done = {entry.payload for entry in await buses().tail(LEDGER, BEFORE_FIRST, max_count=99)}
    pending = set(payloads(await buses().reclaim(TASKS, ROLLOUT, "other", min_idle_s=0.0, max_count=99)))
    unread = set(payloads(await buses().read(TASKS, ROLLOUT, "other", max_count=99)))
    assert done | pending | unread == {b"%d" % number for number in range(8)}


async def test_a_full_stream_makes_producers_wait_until_a_consumer_is_done(buses: Callable[[], Bus]) -> None:
    producer, consumer = buses(), buses()
    await producer.publish(TASKS, [b"old"] * LIMITS.max_entries)
    blocked = asyncio.create_task(producer.publish(TASKS, [b"new"]))
    deliveries = await consumer.read(TASKS, ROLLOUT, "a", max_count=99)
    assert payloads(deliveries) == [b"old"] * LIMITS.max_entries, "the new entry must not be in before there is room"
    await consumer.acknowledge(deliveries[:1])
    async with asyncio.timeout(BLOCK_S):
        await blocked
    assert payloads(await consumer.read(TASKS, ROLLOUT, "a", max_count=99, block_s=BLOCK_S)) == [b"new"]


async def test_a_full_stream_refuses_with_its_name_and_keeps_what_it_has(bus: Bus) -> None:
    await bus.publish(TASKS, [b"old"] * LIMITS.max_entries)
    with pytest.raises(CapacityError, match="Stream tasks holds 8 entries") as caught:
        await bus.publish(TASKS, [b"new"])
    assert caught.value.fields["stream"] == TASKS
    assert payloads(await bus.read(TASKS, ROLLOUT, "a", max_count=99)) == [b"old"] * LIMITS.max_entries


async def test_trimming_never_removes_what_a_group_has_not_acknowledged(bus: Bus) -> None:
    """Teacher has finished 0 1 2 and holds 3; learner has finished 1 and holds 0. Nothing may go until learner finishes 0."""
    await bus.publish(TRAJECTORIES, [b"0", b"1", b"2", b"3", b"4"])
    teacher = await bus.read(TRAJECTORIES, TEACHER, "t", max_count=4)
    await bus.acknowledge(teacher[:3])
    assert await bus.trim() == 0, "the learner has not read yet"
    learner = await bus.read(TRAJECTORIES, LEARNER, "l", max_count=2)
    await bus.acknowledge(learner[1:])
    assert await bus.trim() == 0, "the learner still holds 0"
    await bus.acknowledge(learner[:1])
    await bus.trim()
    assert [entry.payload for entry in await bus.tail(TRAJECTORIES, BEFORE_FIRST, max_count=9)] == [b"2", b"3", b"4"]
    assert payloads(await bus.read(TRAJECTORIES, LEARNER, "l", max_count=9)) == [b"2", b"3", b"4"]
    assert payloads(await bus.reclaim(TRAJECTORIES, TEACHER, "u", min_idle_s=0.0, max_count=9)) == [b"3"]


async def test_a_fully_acknowledged_stream_is_trimmed_to_nothing(bus: Bus) -> None:
    await bus.publish(TASKS, [b"1", b"2", b"3"])
    await bus.acknowledge(await bus.read(TASKS, ROLLOUT, "a", max_count=9))
    await bus.trim()
    assert await bus.newest(TASKS) is None
    await bus.publish(TASKS, [b"4"])
    assert payloads(await bus.read(TASKS, ROLLOUT, "a", max_count=9)) == [b"4"]


async def test_a_dead_letter_keeps_payload_and_reason_and_leaves_the_group(bus: Bus) -> None:
    failed = event(0, GroupOutcome.FAILED, reason="cannot decode: byte 0")
    await bus.commit({TASKS: [b"poison"]}, transitions=[event(0, GroupOutcome.ISSUED)])
    [delivery] = await bus.read(TASKS, ROLLOUT, "a", max_count=1)
    await bus.dead_letter(delivery, "cannot decode: byte 0", [failed])
    [letter] = await bus.list_dead_letters()
    assert (letter.payload, letter.reason) == (b"poison", "cannot decode: byte 0")
    assert (letter.stream, letter.group, letter.entry_id, letter.num_deliveries) == (TASKS, ROLLOUT, delivery.entry_id, 1)
    assert abs(letter.at_s - time.time()) < 60
    assert await bus.count_dead_letters() == 1
    assert await read_journal(bus) == [failed]
    assert await bus.reclaim(TASKS, ROLLOUT, "b", min_idle_s=0.0, max_count=9) == []


async def test_dead_letters_are_listed_newest_first(bus: Bus) -> None:
    await bus.publish(TASKS, [b"1", b"2", b"3"])
    for delivery in await bus.read(TASKS, ROLLOUT, "a", max_count=3):
        await bus.dead_letter(delivery, "bad")
    assert [letter.payload for letter in await bus.list_dead_letters(max_count=2)] == [b"3", b"2"]


async def test_a_broadcast_reaches_every_reader_and_keeps_the_newest_entries(bus: Bus) -> None:
    bound = BROADCAST_MAX_ENTRIES[Stream.POLICY_UPDATES]
    assert await bus.newest(Stream.POLICY_UPDATES) is None
    await bus.publish(Stream.POLICY_UPDATES, [b"%d" % number for number in range(bound + 2)])
    for _ in range(2):
        entries = await bus.tail(Stream.POLICY_UPDATES, BEFORE_FIRST, max_count=bound + 2)
        assert [entry.payload for entry in entries] == [b"%d" % number for number in range(2, bound + 2)]
    newest = await bus.newest(Stream.POLICY_UPDATES)
    assert newest == entries[-1]
    assert await bus.tail(Stream.POLICY_UPDATES, newest.entry_id, max_count=9, block_s=0.01) == []


async def test_a_tail_waits_for_the_next_entry(buses: Callable[[], Bus]) -> None:
    async with asyncio.timeout(BLOCK_S), asyncio.TaskGroup() as tasks:
        waiting = tasks.create_task(buses().tail(Stream.POLICY_UPDATES, BEFORE_FIRST, max_count=1, block_s=60.0))
        await asyncio.sleep(0)
        await buses().publish(Stream.POLICY_UPDATES, [b"v1"])
    assert [entry.payload for entry in waiting.result()] == [b"v1"]


async def test_lag_counts_what_is_undelivered_and_what_is_pending(bus: Bus) -> None:
    empty = await bus.stream_lag(TASKS, ROLLOUT)
    assert (empty.num_undelivered, empty.num_pending, empty.oldest_age_s) == (0, 0, 0.0)
    await bus.publish(TASKS, [b"1", b"2", b"3", b"4"])
    unread = await bus.stream_lag(TASKS, ROLLOUT)
    assert (unread.num_undelivered, unread.num_pending) == (4, 0)
    deliveries = await bus.read(TASKS, ROLLOUT, "a", max_count=3)
    await bus.acknowledge(deliveries[1:2])
    await asyncio.sleep(0.01)
    lag = await bus.stream_lag(TASKS, ROLLOUT)
    assert (lag.num_undelivered, lag.num_pending) == (1, 2)
    assert 0.01 <= lag.oldest_age_s < 60


async def test_state_is_what_was_saved_last(bus: Bus) -> None:
    assert await bus.load_state("scheduler") is None
    await bus.save_state("scheduler", b"1")
    await bus.save_state("scheduler", b"\x00\xff")
    assert await bus.load_state("scheduler") == b"\x00\xff"
    assert await bus.load_state("other") is None


async def test_publishing_what_nobody_consumes_is_refused(bus: Bus) -> None:
    with pytest.raises(ConfigurationError, match="Publishing to scored"):
        await bus.publish(Stream.SCORED, [b"1"])


async def test_reading_as_a_group_that_was_not_declared_is_refused(bus: Bus) -> None:
    with pytest.raises(ConfigurationError, match="Group learner does not consume stream tasks"):
        await bus.read(TASKS, LEARNER, "l", max_count=1)


async def test_publishing_nothing_is_nothing(bus: Bus) -> None:
    await bus.publish(TASKS, [])
    await bus.commit({})
    await bus.acknowledge([])
    assert await bus.newest(TASKS) is None


async def test_a_bus_answers_a_ping(bus: Bus) -> None:
    await bus.ping()


def test_a_broadcast_stream_takes_no_groups() -> None:
    with pytest.raises(ConfigurationError, match="broadcast"):
        MemoryBus({Stream.POLICY_UPDATES: (ROLLOUT,)})


def test_limits_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="max_entries"):
        BusLimits(max_entries=0)
