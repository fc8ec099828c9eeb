"""The rules of leases, on both buses: what is renewed, taken back, taken over, handed back."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack

import pytest

from sdar.bus.embedded_redis import EmbeddedRedis
from sdar.bus.leases import Leases, wait_for_room
from sdar.bus.protocol import BEFORE_FIRST, Bus, BusLimits, Delivery
from sdar.bus.redis import RedisBus
from sdar.contracts.errors import BusUnavailableError, CapacityError, LeaseLostError
from sdar.contracts.streams import ConsumerGroup, Stream
from sdar.in_process.memory_bus import MemoryBus
from tests.support import until

TASKS = Stream.TASKS
ROLLOUT = ConsumerGroup.ROLLOUT
WIRING = {TASKS: (ROLLOUT,), Stream.TRAJECTORIES: (ConsumerGroup.TEACHER,)}
LIMITS = BusLimits(max_entries=8, publish_timeout_s=0.02, trim_interval_s=0.0)
LEASE_S = 0.2
LONG_S = 60.0

BusOf = Callable[[str], Bus]
"""The bus as the process of this name has it."""
run_numbers = itertools.count()


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with EmbeddedRedis(tmp_path_factory.mktemp("redis")) as server:
        yield server.url


@pytest.fixture(params=["memory", "redis"])
async def bus_of(request: pytest.FixtureRequest) -> AsyncIterator[BusOf]:
    memory = MemoryBus(WIRING, LIMITS)
    run_id = f"leases-{next(run_numbers)}"
    async with AsyncExitStack() as stack:

        def connect(name: str) -> Bus:
            if request.param == "memory":
                return memory.view(name)
            url = request.getfixturevalue("redis_url")
            bus = RedisBus(url, run_id, WIRING, LIMITS, client_name=name)
            stack.push_async_callback(bus.close)
            return bus

        yield connect


def lease(bus: Bus, name: str = "me", lease_s: float = LONG_S) -> Leases:
    return Leases(bus, TASKS, ROLLOUT, name, lease_s)


def payloads(deliveries: Sequence[Delivery]) -> list[bytes]:
    return [delivery.payload for delivery in deliveries]


def attempts(deliveries: Sequence[Delivery]) -> list[int]:
    return [delivery.num_deliveries for delivery in deliveries]


async def take_over_soon(leases: Leases) -> list[Delivery]:
    """What is taken over first; a bus that has just been connected to takes nobody for dead yet."""
    async with asyncio.timeout(10):
        # The bus has no event for it.
        while not (taken := await leases.take_over(9)):  # noqa: ASYNC110
            await asyncio.sleep(LEASE_S / 10)
    return taken


async def test_a_process_takes_back_page_by_page_what_its_name_held_and_nothing_of_others(
    bus_of: BusOf,
) -> None:
    bus = bus_of("me")
    await bus.publish(TASKS, [b"0", b"1", b"2", b"3", b"4"])
    await lease(bus).read(3)
    await lease(bus, "other").read(1)
    successor = lease(bus)
    pages = [await successor.take_back(2) for _ in range(4)]
    assert [payloads(page) for page in pages] == [[b"0", b"1"], [b"2"], [], []]
    assert [attempts(page) for page in pages] == [[2, 2], [2], [], []]


async def test_what_a_process_holds_itself_is_not_taken_back_once_all_was(bus_of: BusOf) -> None:
    bus = bus_of("me")
    leases = lease(bus)
    assert await leases.take_back(9) == []
    await bus.publish(TASKS, [b"0"])
    held = await leases.read(9)
    assert await leases.take_back(9) == []
    assert await leases.renew(held) == held


async def test_a_role_takes_all_that_is_lent_to_anybody_each_time_it_asks(bus_of: BusOf) -> None:
    bus = bus_of("me")
    await bus.publish(TASKS, [b"0", b"1", b"2"])
    await lease(bus, "one").read(1)
    await lease(bus, "two").read(2)
    leases = lease(bus)
    first = await leases.take_all(page_size=2)
    second = await leases.take_all(page_size=1)
    assert payloads(first) == payloads(second) == [b"0", b"1", b"2"]
    assert (attempts(first), attempts(second)) == ([2, 2, 2], [3, 3, 3])


async def test_an_entry_begun_again_is_the_next_attempt_and_the_one_before_is_refused(
    bus_of: BusOf,
) -> None:
    bus = bus_of("me")
    await bus.publish(TASKS, [b"0", b"1", b"2"])
    leases = lease(bus)
    before, middle, after = await leases.read(3)
    again = await leases.begin_again(middle)
    assert again is not None
    assert (again.payload, again.num_deliveries) == (b"1", 2)
    assert await leases.renew([before, middle, after, again]) == [before, after, again]
    with pytest.raises(LeaseLostError):
        await bus.commit({Stream.TRAJECTORIES: [b"late"]}, [middle])


async def test_an_entry_that_was_lost_is_not_begun_again(bus_of: BusOf) -> None:
    bus = bus_of("me")
    await bus.publish(TASKS, [b"0"])
    leases = lease(bus)
    [held] = await leases.read(1)
    await lease(bus, "other").take_all(1)
    assert await leases.begin_again(held) is None


async def test_leases_that_are_kept_outlive_their_time_and_the_others_are_taken_over(
    bus_of: BusOf,
) -> None:
    """No process of the name `me` is connected: only the renewals speak for it."""
    bus = bus_of("peer")
    await bus.publish(TASKS, [b"kept", b"left"])
    leases = lease(bus, "me", LEASE_S)
    kept, left = await leases.read(2)
    peer = lease(bus, "peer", LEASE_S)
    over = asyncio.Event()

    async def keep() -> None:
        async for lost in leases.keep(lambda: [kept], over):
            assert not lost

    keeping = asyncio.create_task(keep())
    taken = await take_over_soon(peer)
    over.set()
    await keeping
    assert (payloads(taken), taken[0].entry_id) == ([b"left"], left.entry_id)
    assert await leases.renew([kept, left]) == [kept]


async def test_keeping_names_what_was_lost(bus_of: BusOf) -> None:
    bus = bus_of("me")
    await bus.publish(TASKS, [b"0", b"1"])
    leases = lease(bus, "me", LEASE_S)
    first, second = await leases.read(2)
    taken = await bus.reclaim(TASKS, ROLLOUT, "other", 0.0, 1)
    assert payloads(taken) == [b"0"]
    async for lost in leases.keep(lambda: [first, second], asyncio.Event()):
        assert lost == {first}
        break


async def test_what_is_in_hand_is_asked_for_at_each_renewal(bus_of: BusOf) -> None:
    bus = bus_of("me")
    await bus.publish(TASKS, [b"0"])
    leases = lease(bus, "me", LEASE_S)
    in_hand: list[Delivery] = []
    found: list[set[Delivery]] = []
    over = asyncio.Event()
    async for lost in leases.keep(in_hand.copy, over):
        found.append(set(lost))
        if len(found) == 1:
            in_hand += await leases.read(1)
            await lease(bus, "other").take_all(1)
        else:
            over.set()
    assert found == [set(), set(in_hand)]


async def test_a_batch_is_held_while_it_is_worked_on(bus_of: BusOf) -> None:
    bus = bus_of("peer")
    await bus.publish(TASKS, [b"0"])
    leases = lease(bus, "me", LEASE_S)
    batch = await leases.read(1)
    async with leases.holding(batch):
        await asyncio.sleep(2 * LEASE_S)
        assert await lease(bus, "peer", LEASE_S).take_over(1) == []
    assert await leases.renew(batch) == batch


async def test_a_renewal_that_fails_leaves_the_work_in_hand_alone() -> None:
    class Away(MemoryBus):
        num_renewals = 0

        async def renew(self, deliveries: Sequence[Delivery]) -> list[Delivery]:
            self.num_renewals += 1
            raise BusUnavailableError("away")

    bus = Away(WIRING)
    await bus.publish(TASKS, [b"0"])
    leases = lease(bus, "me", 0.01)
    batch = await leases.read(1)
    async with leases.holding(batch):
        await until(lambda: bus.num_renewals > 0)
        await asyncio.sleep(0)
    await bus.commit({Stream.TRAJECTORIES: [b"done"]}, batch)


async def test_what_is_handed_back_goes_to_whoever_looks_next(bus_of: BusOf) -> None:
    bus = bus_of("me")
    await bus.publish(TASKS, [b"0", b"1"])
    leases = lease(bus)
    first, second = await leases.read(2)
    await leases.hand_back([first])
    taken = await take_over_soon(lease(bus_of("peer"), "peer", LEASE_S))
    assert (payloads(taken), attempts(taken)) == ([b"0"], [2])
    assert await leases.renew([first, second]) == [second]


async def test_a_hand_back_that_the_bus_refuses_does_not_hold_up_a_stop() -> None:
    class Away(MemoryBus):
        async def hand_back(self, deliveries: Sequence[Delivery]) -> None:
            raise BusUnavailableError("away")

    bus = Away(WIRING)
    await bus.publish(TASKS, [b"0"])
    leases = lease(bus)
    await leases.hand_back(await leases.read(1))


async def test_a_commit_waits_for_room_and_is_written_once(bus_of: BusOf) -> None:
    bus = bus_of("me")
    await bus.publish(TASKS, [b"0"])
    await bus.publish(Stream.TRAJECTORIES, [b"in the way"] * LIMITS.max_entries)
    held = await lease(bus).read(1)
    num_tries = 0

    def beat() -> None:
        nonlocal num_tries
        num_tries += 1

    async def write() -> None:
        await bus.commit({Stream.TRAJECTORIES: [b"played"]}, held)

    writing = asyncio.create_task(wait_for_room(write, asyncio.Event(), beat))
    await until(lambda: num_tries > 2)
    teacher = ConsumerGroup.TEACHER
    await bus.acknowledge(await bus.read(Stream.TRAJECTORIES, teacher, "teacher", 99))
    assert await writing
    entries = await bus.tail(Stream.TRAJECTORIES, BEFORE_FIRST, 99)
    assert [entry.payload for entry in entries].count(b"played") == 1


async def test_a_stop_ends_the_wait_for_room_with_nothing_written_and_the_input_still_held(
    bus_of: BusOf,
) -> None:
    bus = bus_of("me")
    await bus.publish(TASKS, [b"0"])
    await bus.publish(Stream.TRAJECTORIES, [b"in the way"] * LIMITS.max_entries)
    leases = lease(bus)
    held = await leases.read(1)
    stopping = asyncio.Event()
    stopping.set()

    async def write() -> None:
        await bus.commit({Stream.TRAJECTORIES: [b"played"]}, held)

    assert not await wait_for_room(write, stopping)
    assert await leases.renew(held) == held


async def test_what_is_written_may_change_while_room_is_waited_for() -> None:
    written: list[int] = []

    async def write() -> None:
        written.append(len(written))
        if len(written) < 3:
            raise CapacityError("full")

    assert await wait_for_room(write)
    assert written == [0, 1, 2]


async def test_a_lost_lease_ends_the_wait_for_room(bus_of: BusOf) -> None:
    bus = bus_of("me")
    await bus.publish(TASKS, [b"0"])
    held = await lease(bus).read(1)
    await lease(bus, "other").take_all(1)

    async def write() -> None:
        await bus.commit({Stream.TRAJECTORIES: [b"late"]}, held)

    with pytest.raises(LeaseLostError):
        await wait_for_room(write)
