"""The promises of `Bus`, kept in memory and over a real Redis server."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Protocol

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdar.bus.embedded_redis import EmbeddedRedis
from sdar.bus.ledger import CLOSING, format_group_id
from sdar.bus.protocol import BEFORE_FIRST, SUSPECT_FACTOR, Bus, BusLimits, Delivery
from sdar.bus.redis import RedisBus
from sdar.bus.snapshot import RESTORATION
from sdar.contracts.codec import decode_ledger_event
from sdar.contracts.errors import (
    CapacityError,
    ConfigurationError,
    CorruptionError,
    InvalidInputError,
    LeaseLostError,
    SupersededError,
)
from sdar.contracts.streams import BROADCAST_MAX_ENTRIES, ConsumerGroup, Stream
from sdar.contracts.types import GroupOutcome, LedgerEvent
from sdar.in_process.memory_bus import MemoryBus

TASKS = Stream.TASKS
TRAJECTORIES = Stream.TRAJECTORIES
LEDGER = Stream.LEDGER
ISSUED = GroupOutcome.ISSUED
GENERATED = GroupOutcome.GENERATED
TRAINED = GroupOutcome.TRAINED
STALE = GroupOutcome.STALE
FAILED = GroupOutcome.FAILED
CANCELLED = GroupOutcome.CANCELLED
ROLLOUT = ConsumerGroup.ROLLOUT
TEACHER = ConsumerGroup.TEACHER
LEARNER = ConsumerGroup.LEARNER
GATEWAY = ConsumerGroup.GATEWAY
WIRING: Mapping[Stream, tuple[ConsumerGroup, ...]] = {
    TASKS: (ROLLOUT,),
    TRAJECTORIES: (TEACHER, LEARNER),
    LEDGER: (GATEWAY,),
}
# Trimming is asked for where a test needs it; producers do it on their own when a stream is full.
LIMITS = BusLimits(
    max_entries=8, publish_timeout_s=0.2, trim_interval_s=3600.0, outage_tolerance_s=5.0
)
BLOCK_S = 2.0
run_numbers = itertools.count()


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with EmbeddedRedis(tmp_path_factory.mktemp("redis")) as server:
        yield server.url


class Maker(Protocol):
    """Makes buses of one run, each as another process would have it, named or not."""

    def __call__(self, client_name: str = "") -> Bus: ...


@pytest.fixture(params=["memory", "redis"])
async def new_run(request: pytest.FixtureRequest) -> AsyncIterator[Callable[[], Maker]]:
    async with AsyncExitStack() as stack:

        def start_run() -> Maker:
            run_id = f"run-{next(run_numbers)}"
            memory = MemoryBus(WIRING, LIMITS)

            def build(client_name: str = "") -> Bus:
                if request.param == "memory":
                    return memory.view(client_name)
                bus = RedisBus(
                    request.getfixturevalue("redis_url"),
                    run_id,
                    WIRING,
                    LIMITS,
                    client_name=client_name,
                )
                stack.push_async_callback(bus.close)
                return bus

            return build

        yield start_run


@pytest.fixture
def buses(new_run: Callable[[], Maker]) -> Maker:
    return new_run()


@pytest.fixture
def bus(buses: Maker) -> Bus:
    return buses()


def payloads(deliveries: list[Delivery]) -> list[bytes]:
    return [delivery.payload for delivery in deliveries]


def event(number: int, outcome: GroupOutcome, reason: str = "") -> LedgerEvent:
    return LedgerEvent(
        "run", format_group_id(number), outcome, num_trajectories=2, policy_version=0, reason=reason
    )


def events(outcome: GroupOutcome, *numbers: int) -> list[LedgerEvent]:
    return [event(number, outcome) for number in numbers]


async def read_account(bus: Bus) -> dict[str, int]:
    account = await bus.read_ledger()
    assert account.find_gap() == 0
    return {name: count for name, count in account.counts().items() if count}


async def read_journal(bus: Bus) -> list[LedgerEvent]:
    return [
        decode_ledger_event(entry.payload)
        for entry in await bus.tail(LEDGER, BEFORE_FIRST, max_count=9999)
    ]


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


async def test_a_blocking_read_returns_as_soon_as_something_is_published(buses: Maker) -> None:
    async with asyncio.timeout(BLOCK_S), asyncio.TaskGroup() as tasks:
        reading = tasks.create_task(buses().read(TASKS, ROLLOUT, "a", max_count=1, block_s=60.0))
        await asyncio.sleep(0)
        await buses().publish(TASKS, [b"news"])
    assert payloads(reading.result()) == [b"news"]


async def test_a_read_of_a_quiet_stream_returns_nothing_when_its_time_is_over(bus: Bus) -> None:
    started = time.monotonic()
    assert await bus.read(TASKS, ROLLOUT, "a", max_count=1, block_s=0.03) == []
    assert time.monotonic() - started >= 0.03


async def test_entries_of_a_dead_consumer_reach_another_with_a_higher_delivery_count(
    buses: Maker,
) -> None:
    await buses().publish(TASKS, [b"1", b"2"])
    await buses().read(TASKS, ROLLOUT, "dead", max_count=2)
    survivor = buses()
    assert await survivor.read(TASKS, ROLLOUT, "alive", max_count=9) == []
    taken: list[Delivery] = []
    async with asyncio.timeout(BLOCK_S):
        while len(taken) < 2:
            taken += await survivor.reclaim(TASKS, ROLLOUT, "alive", min_idle_s=0.02, max_count=9)
            await asyncio.sleep(0.005)
    found = [(d.payload, d.num_deliveries, d.consumer) for d in taken]
    assert found == [(b"1", 2, "alive"), (b"2", 2, "alive")]


async def test_entries_that_are_not_idle_long_enough_stay_with_their_consumer(bus: Bus) -> None:
    await bus.publish(TASKS, [b"1"])
    await bus.read(TASKS, ROLLOUT, "busy", max_count=1)
    assert await bus.reclaim(TASKS, ROLLOUT, "thief", min_idle_s=60.0, max_count=9) == []


async def test_a_restarted_consumer_pages_through_all_it_held(bus: Bus) -> None:
    await bus.publish(TASKS, [b"%d" % number for number in range(5)])
    await bus.read(TASKS, ROLLOUT, "learner", max_count=5)
    first = await bus.reclaim(TASKS, ROLLOUT, "learner", min_idle_s=0.0, max_count=3)
    rest = await bus.reclaim(
        TASKS, ROLLOUT, "learner", min_idle_s=0.0, max_count=3, after_id=first[-1].entry_id
    )
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


async def test_what_is_handed_back_reaches_another_at_once_and_what_was_lost_is_left_alone(
    buses: Maker,
) -> None:
    leaving, survivor = buses("leaving"), buses("survivor")
    lease_s = 1.0
    await leaving.publish(TASKS, [b"0"])
    await leaving.read(TASKS, ROLLOUT, "dead", max_count=1)
    # Until the survivor has been in touch for long enough to judge others.
    async with asyncio.timeout(10 * lease_s):
        first: list[Delivery] = []
        while not first:
            first = await survivor.reclaim(TASKS, ROLLOUT, "survivor", lease_s, max_count=9)
            await asyncio.sleep(lease_s / 20)
    await leaving.publish(TASKS, [b"1", b"2", b"3"])
    handed, kept, done = await leaving.read(TASKS, ROLLOUT, "leaving", max_count=3)
    await leaving.acknowledge([done])
    await leaving.hand_back([replace(first[0], num_deliveries=1), handed, done])
    [taken] = await survivor.reclaim(TASKS, ROLLOUT, "survivor", lease_s, max_count=9)
    assert (taken.payload, taken.num_deliveries) == (b"1", 2)
    with pytest.raises(LeaseLostError):
        await leaving.commit({TRAJECTORIES: [b"late"]}, [handed])
    assert await leaving.renew([kept]) == [kept]
    assert await survivor.renew([*first, taken]) == [*first, taken]


async def test_renewing_returns_only_what_the_consumer_still_holds(bus: Bus) -> None:
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
    assert payloads(await bus.reclaim(TASKS, ROLLOUT, "b", min_idle_s=0.0, max_count=9)) == [
        second.payload
    ]


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
    assert payloads(await bus.reclaim(TASKS, ROLLOUT, "b", min_idle_s=0.0, max_count=9)) == [
        b"task"
    ]


async def test_an_output_is_there_whenever_its_input_is_acknowledged(buses: Maker) -> None:
    """A worker is cancelled at each point of its loop; each task has its output or is pending."""
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
    pending = set(
        payloads(await buses().reclaim(TASKS, ROLLOUT, "other", min_idle_s=0.0, max_count=99))
    )
    unread = set(payloads(await buses().read(TASKS, ROLLOUT, "other", max_count=99)))
    assert done | pending | unread == {b"%d" % number for number in range(8)}


async def test_a_full_stream_makes_producers_wait_until_a_consumer_is_done(buses: Maker) -> None:
    producer, consumer = buses(), buses()
    await producer.publish(TASKS, [b"old"] * LIMITS.max_entries)
    blocked = asyncio.create_task(producer.publish(TASKS, [b"new"]))
    deliveries = await consumer.read(TASKS, ROLLOUT, "a", max_count=99)
    assert payloads(deliveries) == [b"old"] * LIMITS.max_entries, (
        "the new entry must not be in before there is room"
    )
    await consumer.acknowledge(deliveries[:1])
    async with asyncio.timeout(BLOCK_S):
        await blocked
    assert payloads(await consumer.read(TASKS, ROLLOUT, "a", max_count=99, block_s=BLOCK_S)) == [
        b"new"
    ]


async def test_a_full_stream_refuses_with_its_name_and_keeps_what_it_has(bus: Bus) -> None:
    await bus.publish(TASKS, [b"old"] * LIMITS.max_entries)
    with pytest.raises(CapacityError, match="Stream tasks holds 8 entries") as caught:
        await bus.publish(TASKS, [b"new"])
    assert caught.value.fields["stream"] == TASKS
    assert (
        payloads(await bus.read(TASKS, ROLLOUT, "a", max_count=99)) == [b"old"] * LIMITS.max_entries
    )


async def test_trimming_never_removes_what_a_group_has_not_acknowledged(bus: Bus) -> None:
    """Teacher has finished 0 1 2 and holds 3; learner has finished 1 and holds 0.

    Nothing may go until learner finishes 0.
    """
    await bus.publish(TRAJECTORIES, [b"0", b"1", b"2", b"3", b"4"])
    teacher = await bus.read(TRAJECTORIES, TEACHER, "t", max_count=4)
    await bus.acknowledge(teacher[:3])
    assert await bus.trim() == 0, "the learner has not read yet"
    learner = await bus.read(TRAJECTORIES, LEARNER, "l", max_count=2)
    await bus.acknowledge(learner[1:])
    assert await bus.trim() == 0, "the learner still holds 0"
    await bus.acknowledge(learner[:1])
    await bus.trim()
    found = [entry.payload for entry in await bus.tail(TRAJECTORIES, BEFORE_FIRST, max_count=9)]
    assert found == [b"2", b"3", b"4"]
    assert payloads(await bus.read(TRAJECTORIES, LEARNER, "l", max_count=9)) == [b"2", b"3", b"4"]
    assert payloads(await bus.reclaim(TRAJECTORIES, TEACHER, "u", min_idle_s=0.0, max_count=9)) == [
        b"3"
    ]


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
    found = (letter.stream, letter.group, letter.entry_id, letter.num_deliveries)
    assert found == (TASKS, ROLLOUT, delivery.entry_id, 1)
    assert abs(letter.at_s - time.time()) < 60
    assert await bus.count_dead_letters() == 1
    assert await read_journal(bus) == [failed]
    assert await bus.reclaim(TASKS, ROLLOUT, "b", min_idle_s=0.0, max_count=9) == []


async def test_dead_letters_are_listed_newest_first(bus: Bus) -> None:
    await bus.publish(TASKS, [b"1", b"2", b"3"])
    for delivery in await bus.read(TASKS, ROLLOUT, "a", max_count=3):
        await bus.dead_letter(delivery, "bad")
    assert [letter.payload for letter in await bus.list_dead_letters(max_count=2)] == [b"3", b"2"]


async def test_dead_letters_have_ids_by_which_they_are_found_and_paged(bus: Bus) -> None:
    await bus.publish(TASKS, [b"1", b"2", b"3"])
    for delivery in await bus.read(TASKS, ROLLOUT, "a", max_count=3):
        await bus.dead_letter(delivery, "bad")
    newest, *older = await bus.list_dead_letters()
    assert await bus.find_dead_letter(newest.letter_id) == newest
    assert await bus.list_dead_letters(before_id=newest.letter_id) == older
    assert await bus.list_dead_letters(max_count=1, before_id=older[0].letter_id) == older[1:]
    for unknown in ("0-1", "", "nonsense", "1-1-1", "٣-٣"):
        assert await bus.find_dead_letter(unknown) is None
    with pytest.raises(InvalidInputError, match="'nonsense' is no id of a dead letter"):
        await bus.list_dead_letters(before_id="nonsense")


async def test_a_letter_is_retired_once_together_with_what_replaces_it(bus: Bus) -> None:
    await bus.publish(TASKS, [b"poison"])
    [delivery] = await bus.read(TASKS, ROLLOUT, "a", max_count=1)
    await bus.dead_letter(delivery, "bad")
    [letter] = await bus.list_dead_letters()
    await bus.commit(
        {TASKS: [b"again"]}, transitions=events(ISSUED, 5), retired_letters=[letter.letter_id]
    )
    assert await bus.count_dead_letters() == 0
    for gone in (letter.letter_id, "nonsense"):
        with pytest.raises(LeaseLostError, match="no dead letter"):
            await bus.commit(
                {TASKS: [b"twice"]}, transitions=events(ISSUED, 6), retired_letters=[gone]
            )
    assert payloads(await bus.read(TASKS, ROLLOUT, "a", max_count=9)) == [b"again"]
    assert await read_account(bus) == {"issued": 1, "running": 1}


async def test_late_results_of_an_entry_that_was_given_to_another_are_refused_whole(
    bus: Bus,
) -> None:
    await bus.commit({TASKS: [b"1"]}, transitions=events(ISSUED, 1))
    [late] = await bus.read(TASKS, ROLLOUT, "slow", max_count=1)
    [taken] = await bus.reclaim(TASKS, ROLLOUT, "peer", min_idle_s=0.0, max_count=1)
    with pytest.raises(LeaseLostError, match="no longer lent to slow as attempt 1") as caught:
        await bus.commit(
            {TRAJECTORIES: [b"late"]}, [late], {"cursor": b"late"}, events(GENERATED, 1)
        )
    assert caught.value.fields["entry_id"] == late.entry_id
    with pytest.raises(LeaseLostError):
        await bus.dead_letter(late, "late", events(FAILED, 1))
    assert await bus.newest(TRAJECTORIES) is None
    assert await bus.load_state("cursor") is None
    assert await bus.count_dead_letters() == 0
    assert await read_account(bus) == {"issued": 1, "running": 1}
    await bus.commit({TRAJECTORIES: [b"first"]}, [taken], transitions=events(GENERATED, 1))
    with pytest.raises(LeaseLostError):
        await bus.commit({TRAJECTORIES: [b"second"]}, [taken])
    assert [entry.payload for entry in await bus.tail(TRAJECTORIES, BEFORE_FIRST, max_count=9)] == [
        b"first"
    ]


async def test_an_entry_taken_back_by_the_same_consumer_refuses_its_earlier_attempt(
    bus: Bus,
) -> None:
    await bus.publish(TASKS, [b"1"])
    [earlier] = await bus.read(TASKS, ROLLOUT, "worker-0", max_count=1)
    [again] = await bus.reclaim(TASKS, ROLLOUT, "worker-0", 0.0, 9, held_by="worker-0")
    assert await bus.renew([earlier]) == []
    with pytest.raises(LeaseLostError):
        await bus.commit({LEDGER: [b"earlier"]}, [earlier])
    await bus.commit({LEDGER: [b"again"]}, [again])


async def test_one_lost_input_refuses_the_commit_and_the_others_stay_held(bus: Bus) -> None:
    await bus.publish(TASKS, [b"1", b"2"])
    held = await bus.read(TASKS, ROLLOUT, "a", max_count=2)
    await bus.reclaim(TASKS, ROLLOUT, "b", 0.0, 1, after_id=held[0].entry_id)
    with pytest.raises(LeaseLostError) as caught:
        await bus.commit({LEDGER: [b"both"]}, held)
    assert caught.value.fields["entry_id"] == held[1].entry_id
    assert await bus.renew(held) == held[:1]


async def test_acknowledging_what_was_given_to_another_leaves_it_there(bus: Bus) -> None:
    await bus.publish(TASKS, [b"1"])
    lost = await bus.read(TASKS, ROLLOUT, "slow", max_count=1)
    taken = await bus.reclaim(TASKS, ROLLOUT, "peer", min_idle_s=0.0, max_count=1)
    await bus.acknowledge(lost)
    assert await bus.renew(taken) == taken


async def test_a_worker_takes_back_at_once_what_its_earlier_life_held_and_nothing_of_others(
    buses: Maker,
) -> None:
    await buses().publish(TASKS, [b"mine", b"theirs"])
    first_life = buses("worker-0")
    await first_life.read(TASKS, ROLLOUT, "worker-0", max_count=1)
    await buses("worker-1").read(TASKS, ROLLOUT, "worker-1", max_count=1)
    second_life = buses("worker-0")
    taken = await second_life.reclaim(TASKS, ROLLOUT, "worker-0", 0.0, 9, held_by="worker-0")
    assert [(delivery.payload, delivery.num_deliveries) for delivery in taken] == [(b"mine", 2)]


async def test_a_silent_consumer_is_spared_while_it_is_connected_until_its_silence_is_too_long(
    buses: Maker,
) -> None:
    """Entry 1 is held by a consumer that dies, 2 by a silent one; both need cleaning up."""
    min_idle_s = 0.2
    await buses().publish(TASKS, [b"1", b"2"])
    dead = buses("dead one")
    silent = buses("silent\nöne")
    survivor = buses("survivor")
    await survivor.ping()
    started = time.monotonic()
    await dead.read(TASKS, ROLLOUT, "dead one", max_count=1)
    await silent.read(TASKS, ROLLOUT, "silent\nöne", max_count=1)
    await dead.close()
    taken: dict[bytes, float] = {}
    async with asyncio.timeout(10.0):
        while len(taken) < 2:
            for delivery in await survivor.reclaim(
                TASKS, ROLLOUT, "survivor", min_idle_s, max_count=9
            ):
                taken[delivery.payload] = time.monotonic() - started
                await survivor.acknowledge([delivery])
            await asyncio.sleep(0.005)
    assert list(taken) == [b"1", b"2"]
    assert taken[b"1"] >= min_idle_s
    assert taken[b"2"] >= SUSPECT_FACTOR * min_idle_s


async def test_of_two_that_reclaim_at_once_one_gets_each_entry(buses: Maker) -> None:
    await buses().publish(TASKS, [b"%d" % number for number in range(8)])
    await buses().read(TASKS, ROLLOUT, "dead", max_count=8)
    survivors = [buses() for _ in range(3)]
    taken: list[bytes] = []
    async with asyncio.timeout(10.0):
        while len(taken) < 8:
            calls = [
                survivor.reclaim(TASKS, ROLLOUT, f"s{i}", 0.3, 3)
                for i, survivor in enumerate(survivors)
            ]
            taken += [
                delivery.payload for page in await asyncio.gather(*calls) for delivery in page
            ]
    assert sorted(taken) == [b"%d" % number for number in range(8)]


async def test_a_superseded_process_is_refused_in_its_role_from_then_on(buses: Maker) -> None:
    before = buses()
    after = buses()
    gateway = buses()
    await before.claim_role(LEARNER)
    await gateway.claim_role(GATEWAY)
    await before.publish(TASKS, [b"1"])
    held = await before.read(TASKS, ROLLOUT, "a", max_count=1)
    snapshot = await before.take_snapshot()
    await after.publish(TASKS, [b"2"])
    await after.claim_role(LEARNER)
    refused: list[Callable[[], Awaitable[object]]] = [
        lambda: before.publish(TASKS, [b"late"]),
        lambda: before.acknowledge(held),
        lambda: before.dead_letter(held[0], "late"),
        lambda: before.save_state("cursor", b"1"),
        lambda: before.retire_versions([1]),
        lambda: before.restore_snapshot(snapshot, []),
        lambda: before.take_snapshot(),
        lambda: before.read(TASKS, ROLLOUT, "a", max_count=1),
        lambda: before.reclaim(TASKS, ROLLOUT, "b", 0.0, 1),
    ]
    for write in refused:
        with pytest.raises(SupersededError, match="taken over the role of learner"):
            await write()
    await after.save_state("cursor", b"2")
    await gateway.publish(TASKS, [b"3"])
    found = [entry.payload for entry in await after.tail(TASKS, BEFORE_FIRST, max_count=9)]
    assert found == [b"1", b"2", b"3"]
    assert await after.load_state("cursor") == b"2"
    assert await after.count_dead_letters() == 0
    assert await after.renew(held) == held
    assert payloads(await after.read(TASKS, ROLLOUT, "a", max_count=9)) == [b"2", b"3"]


async def test_every_group_is_accounted_for_at_every_step(bus: Bus) -> None:
    await bus.commit({TASKS: [b"0", b"1", b"2"]}, transitions=events(ISSUED, 0, 1, 2))
    assert await read_account(bus) == {"issued": 3, "running": 3}
    await bus.commit({}, transitions=events(GENERATED, 0, 1))
    assert await read_account(bus) == {"issued": 3, "running": 1, "generated": 2, "buffered": 2}
    await bus.commit({}, transitions=[event(0, TRAINED), event(2, FAILED, "no environment")])
    assert await read_account(bus) == {
        "issued": 3,
        "generated": 3,
        "trained": 1,
        "failed": 1,
        "buffered": 1,
    }
    assert (await bus.read_ledger()).open == {1: True}
    found = [await bus.list_closed(outcome) for outcome in (TRAINED, FAILED, STALE)]
    assert found == [[0], [2], []]


async def test_a_transition_that_changes_nothing_is_neither_counted_nor_journaled(bus: Bus) -> None:
    await bus.commit({}, transitions=events(ISSUED, 1))
    useful = [event(1, GENERATED), event(1, TRAINED)]
    await bus.commit(
        {},
        transitions=[event(1, ISSUED), useful[0], event(1, GENERATED), useful[1], event(1, FAILED)],
    )
    await bus.commit(
        {}, transitions=[event(1, outcome) for outcome in GroupOutcome] + events(TRAINED, 77)
    )
    assert await read_account(bus) == {"issued": 1, "generated": 1, "trained": 1}
    assert await read_journal(bus) == useful


async def test_transitions_of_groups_without_an_account_are_journaled_every_time(bus: Bus) -> None:
    strange = [
        replace(event(0, FAILED), group_id=group_id)
        for group_id in ("eval-7-0", "group-1", "group-4294967296")
    ]
    await bus.commit({}, transitions=strange)
    await bus.commit({}, transitions=strange)
    assert await read_journal(bus) == strange + strange
    assert await read_account(bus) == {}


async def test_the_journal_waits_for_no_room(bus: Bus) -> None:
    """Its reader, the gateway, books transitions too: it would wait for itself."""
    numbers = range(2 * LIMITS.max_entries)
    await bus.commit({}, transitions=events(ISSUED, *numbers))
    for number in numbers:
        await bus.commit({}, transitions=events(CANCELLED, number))
    assert len(await read_journal(bus)) == 2 * LIMITS.max_entries


_steps = st.lists(
    st.lists(st.tuples(st.integers(0, 5), st.sampled_from(GroupOutcome)), max_size=4), max_size=12
)


@settings(max_examples=60)
@given(steps=_steps)
def test_both_buses_keep_the_same_account(
    redis_url: str, steps: list[list[tuple[int, GroupOutcome]]]
) -> None:
    async def drive() -> None:
        memory, other = (
            MemoryBus(WIRING, LIMITS),
            RedisBus(redis_url, f"run-{next(run_numbers)}", WIRING, LIMITS),
        )
        for step in steps:
            for bus in (memory, other):
                await bus.commit(
                    {}, transitions=[event(number, outcome) for number, outcome in step]
                )
            account = await memory.read_ledger()
            assert account.find_gap() == 0
            assert await other.read_ledger() == account
        assert await read_journal(other) == await read_journal(memory)
        for outcome in CLOSING:
            assert await other.list_closed(outcome) == await memory.list_closed(outcome)
        assert await other.take_snapshot() == await memory.take_snapshot()
        await other.close()

    asyncio.run(drive())


async def test_a_snapshot_brings_states_and_account_into_a_server_that_lost_them(
    new_run: Callable[[], Maker],
) -> None:
    before, after = new_run()(), new_run()()
    await before.commit(
        {TASKS: [b"t"]}, state={"cursor": b"\x00\xff"}, transitions=events(ISSUED, 0, 1, 2, 3, 70)
    )
    await before.commit({}, transitions=events(GENERATED, 1, 2, 70) + events(STALE, 70))
    snapshot = await before.take_snapshot()
    await before.commit({}, transitions=events(TRAINED, 1))
    assert await after.restore_snapshot(snapshot, trained=[1, 999])
    assert await read_account(after) == {
        "issued": 5,
        "generated": 5,
        "trained": 1,
        "stale": 1,
        "cancelled": 3,
    }
    found = [await after.list_closed(outcome) for outcome in (TRAINED, STALE, CANCELLED)]
    assert found == [[1], [70], [0, 2, 3]]
    assert await after.load_state("cursor") == b"\x00\xff"
    assert await after.newest(TASKS) is None
    await after.commit({}, transitions=events(ISSUED, 1, 4))
    assert (await after.read_ledger()).open == {4: False}, "a closed group stays closed"


async def test_each_restored_snapshot_leaves_a_mark_of_its_own(
    new_run: Callable[[], Maker],
) -> None:
    first, second, third = (new_run()() for _ in range(3))
    await first.commit({}, transitions=events(ISSUED, 0))
    assert await first.load_state(RESTORATION) is None
    assert await second.restore_snapshot(await first.take_snapshot(), trained=[])
    restoration = await second.load_state(RESTORATION)
    assert not await second.restore_snapshot(await first.take_snapshot(), trained=[])
    assert await second.load_state(RESTORATION) == restoration
    assert await third.restore_snapshot(await second.take_snapshot(), trained=[])
    assert await third.load_state(RESTORATION) not in (None, restoration)


async def test_a_snapshot_does_not_touch_an_account_that_is_there(
    new_run: Callable[[], Maker],
) -> None:
    before, after = new_run()(), new_run()()
    await before.commit({}, state={"cursor": b"old"}, transitions=events(ISSUED, 0))
    await after.commit({}, transitions=events(ISSUED, 8))
    assert not await after.restore_snapshot(await before.take_snapshot(), trained=[])
    assert (await after.read_ledger()).open == {8: False}
    assert await after.load_state("cursor") is None


async def test_an_empty_snapshot_can_be_restored(new_run: Callable[[], Maker]) -> None:
    assert await new_run()().restore_snapshot(await new_run()().take_snapshot(), trained=[])


async def test_a_damaged_snapshot_is_refused_and_nothing_restored(
    bus: Bus, new_run: Callable[[], Maker]
) -> None:
    await bus.commit(
        {},
        state={"cursor": b"1"},
        transitions=events(ISSUED, 0, 1) + events(GENERATED, 0, 1) + events(TRAINED, 1),
    )
    document = json.loads(await bus.take_snapshot())
    damages = (
        {"issued": 3},
        {"open": {"0": False}},
        {"open": {"1": True}},
        {"closed": {}},
        {"format": 2},
        {"states": {"a": "%"}},
    )
    for data in (
        b"",
        b"[]",
        b"\xff",
        b"null",
        b"[" * 100_000,
        *(json.dumps(document | damage).encode() for damage in damages),
    ):
        with pytest.raises(CorruptionError, match="Bus snapshot"):
            await (other := new_run()()).restore_snapshot(data, trained=[])
        assert await read_account(other) == {}
        assert await other.load_state("cursor") is None


async def test_a_version_in_use_is_not_retired_and_a_retired_one_not_taken_into_use(
    bus: Bus,
) -> None:
    assert await bus.pin_versions("rollout-0", [3, 4], ttl_s=60.0)
    assert await bus.pin_versions("teacher-0", [4], ttl_s=60.0)
    assert not await bus.retire_versions([2, 3]), "all or nothing: 3 is in use"
    assert await bus.pin_versions("rollout-0", [2, 4], ttl_s=60.0), (
        "2 was not retired; 3 is given up"
    )
    assert await bus.retire_versions([3])
    assert await bus.retire_versions([3]), "again is the same"
    assert not await bus.pin_versions("teacher-0", [5, 3], ttl_s=60.0)
    assert not await bus.retire_versions([4]), "the refused pin left the one before it"
    assert await bus.pin_versions("teacher-0", [], ttl_s=60.0)
    assert await bus.pin_versions("rollout-0", [5], ttl_s=60.0)
    assert await bus.retire_versions([2, 4])
    assert await bus.retire_versions([])


async def test_a_pin_that_is_not_renewed_expires(bus: Bus) -> None:
    assert await bus.pin_versions("gone", [1], ttl_s=0.1)
    assert not await bus.retire_versions([1])
    async with asyncio.timeout(BLOCK_S):
        is_retired = False
        while not is_retired:
            await asyncio.sleep(0.01)
            is_retired = await bus.retire_versions([1])


async def test_memory_grows_with_what_is_kept(bus: Bus) -> None:
    before = await bus.memory()
    await bus.publish(TASKS, [b"x" * 1_000_000])
    assert (await bus.memory()).used_bytes >= before.used_bytes + 1_000_000


async def test_a_broadcast_reaches_every_reader_and_keeps_the_newest_entries(bus: Bus) -> None:
    bound = BROADCAST_MAX_ENTRIES[Stream.POLICY_UPDATES]
    assert await bus.newest(Stream.POLICY_UPDATES) is None
    await bus.publish(Stream.POLICY_UPDATES, [b"%d" % number for number in range(bound + 2)])
    for _ in range(2):
        entries = await bus.tail(Stream.POLICY_UPDATES, BEFORE_FIRST, max_count=bound + 2)
        expected = [b"%d" % number for number in range(2, bound + 2)]
        assert [entry.payload for entry in entries] == expected
    newest = await bus.newest(Stream.POLICY_UPDATES)
    assert newest == entries[-1]
    assert await bus.tail(Stream.POLICY_UPDATES, newest.entry_id, max_count=9, block_s=0.01) == []


async def test_a_tail_waits_for_the_next_entry(buses: Maker) -> None:
    async with asyncio.timeout(BLOCK_S), asyncio.TaskGroup() as tasks:
        waiting = tasks.create_task(
            buses().tail(Stream.POLICY_UPDATES, BEFORE_FIRST, max_count=1, block_s=60.0)
        )
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


async def test_booking_where_nobody_reads_the_journal_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="no group consumes ledger"):
        await MemoryBus({TASKS: (ROLLOUT,)}).commit({}, transitions=events(ISSUED, 1))


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
