"""The Redis bus outlives outages and restarts, heals missing groups and says what is wrong."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import redis.asyncio as redis

from sdar.bus import redis_connection, redis_trimming
from sdar.bus.embedded_redis import EmbeddedRedis, _find_executable
from sdar.bus.ledger import format_group_id
from sdar.bus.protocol import BEFORE_FIRST, SUSPECT_FACTOR, BusLimits
from sdar.bus.redis import RedisBus
from sdar.bus.redis_consuming import RedisConsuming
from sdar.contracts.codec import decode_ledger_event
from sdar.contracts.errors import (
    BusUnavailableError,
    ConfigurationError,
    CorruptionError,
    SupersededError,
)
from sdar.contracts.streams import ConsumerGroup, RunKeys, Stream
from sdar.contracts.types import GroupOutcome, LedgerEvent

TASKS = Stream.TASKS
LEDGER = Stream.LEDGER
ROLLOUT = ConsumerGroup.ROLLOUT
GATEWAY = ConsumerGroup.GATEWAY
WIRING = {TASKS: (ROLLOUT,), LEDGER: (GATEWAY,)}
LIMITS = BusLimits(
    max_entries=100, publish_timeout_s=0.2, trim_interval_s=0.0, outage_tolerance_s=10.0
)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis(tmp_path) as server:
        yield server


@pytest.fixture
async def bus(server: EmbeddedRedis) -> AsyncIterator[RedisBus]:
    bus = RedisBus(server.url, "run", WIRING, LIMITS)
    yield bus
    await bus.close()


@pytest.fixture
async def client(server: EmbeddedRedis) -> AsyncIterator[redis.Redis]:
    client = redis.Redis.from_url(server.url)
    yield client
    await client.aclose()


def event(number: int, outcome: GroupOutcome) -> LedgerEvent:
    return LedgerEvent(
        "run", format_group_id(number), outcome, num_trajectories=2, policy_version=0
    )


class Reports:
    """What the bus said about being held up, in order; `arrived` is set by each."""

    def __init__(self) -> None:
        self.reasons: list[str] = []
        self.arrived = asyncio.Event()

    def __call__(self, reason: str) -> None:
        self.reasons.append(reason)
        self.arrived.set()

    async def wait_for(self, num_reasons: int) -> None:
        async with asyncio.timeout(10.0):
            while len(self.reasons) < num_reasons:
                self.arrived.clear()
                await self.arrived.wait()


@pytest.mark.parametrize(
    ("fsync", "end"), [("everysec", EmbeddedRedis.stop), ("always", EmbeddedRedis.kill)]
)
async def test_nothing_is_lost_when_redis_restarts(
    tmp_path: Path, fsync: Literal["everysec", "always"], end: Callable[[EmbeddedRedis], None]
) -> None:
    with EmbeddedRedis(tmp_path, fsync=fsync) as server:
        bus = RedisBus(server.url, "run", WIRING, LIMITS)
        await bus.publish(TASKS, [b"0", b"1", b"2", b"3"])
        held = await bus.read(TASKS, ROLLOUT, "a", max_count=3)
        await bus.commit({LEDGER: [b"done 0"]}, held[:1], {"cursor": b"1"})
        end(server)
        server.start()
        assert [
            d.payload for d in await bus.reclaim(TASKS, ROLLOUT, "b", min_idle_s=0.0, max_count=9)
        ] == [b"1", b"2"]
        assert [d.payload for d in await bus.read(TASKS, ROLLOUT, "b", max_count=9)] == [b"3"]
        assert [entry.payload for entry in await bus.tail(LEDGER, BEFORE_FIRST, max_count=9)] == [
            b"done 0"
        ]
        assert await bus.load_state("cursor") == b"1"
        await bus.close()


async def test_calls_wait_out_a_short_outage_and_say_so_until_the_last_is_through(
    server: EmbeddedRedis,
) -> None:
    reports = Reports()
    bus = RedisBus(server.url, "run", WIRING, LIMITS, on_blocked=reports)
    reading = asyncio.create_task(bus.read(TASKS, ROLLOUT, "a", max_count=1, block_s=30.0))
    await bus.ping()
    server.kill()
    publishing = asyncio.create_task(bus.publish(TASKS, [b"1"]))
    await reports.wait_for(5)
    assert not publishing.done()
    assert all("does not answer" in reason for reason in reports.reasons)
    server.start()
    async with asyncio.timeout(10.0):
        await publishing
        assert [delivery.payload for delivery in await reading] == [b"1"]
    assert reports.reasons.index("") == len(reports.reasons) - 1, (
        "once, and last: the read waited longer than the publication"
    )
    await bus.close()


async def test_something_else_that_answers_at_the_address_for_a_while_is_waited_out(
    tmp_path: Path,
) -> None:
    """A proxy, for example, before a network knows where the address leads."""

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await writer.drain()
        writer.close()

    reports = Reports()
    other = await asyncio.start_server(refuse, "127.0.0.1", 0)
    port = other.sockets[0].getsockname()[1]
    bus = RedisBus(f"redis://127.0.0.1:{port}/0", "run", WIRING, LIMITS, on_blocked=reports)
    asking = asyncio.create_task(bus.ping())
    await reports.wait_for(2)
    assert "does not answer (ConnectionError: what answers there is no Redis" in reports.reasons[0]
    other.close()
    await other.wait_closed()
    with EmbeddedRedis(tmp_path / "redis", port=port):
        async with asyncio.timeout(10.0):
            await asking
    await bus.close()


async def test_a_call_that_is_cancelled_while_it_waits_is_no_longer_held_up(
    server: EmbeddedRedis,
) -> None:
    reports = Reports()
    bus = RedisBus(server.url, "run", WIRING, LIMITS, on_blocked=reports)
    server.kill()
    calls = [asyncio.create_task(bus.ping()) for _ in range(2)]
    await reports.wait_for(4)
    for call in calls:
        assert reports.reasons[-1] != ""
        call.cancel()
        await asyncio.wait([call])
        assert call.cancelled()
    assert reports.reasons[-1] == ""
    await bus.close()


async def test_a_redis_that_is_still_loading_its_file_is_waited_for(tmp_path: Path) -> None:
    """The server takes 5 ms for each of 160 keys and says every 2 MB that it is loading."""
    slow = tmp_path / "slow-redis"
    slow.write_text(f'#!/bin/sh\nexec {_find_executable()} "$@" --key-load-delay 5000\n')
    slow.chmod(0o700)
    reports = Reports()
    with EmbeddedRedis(tmp_path / "data", executable=slow) as server:
        bus = RedisBus(server.url, "run", WIRING, LIMITS, on_blocked=reports)
        await bus.save_state("cursor", b"7")
        async with redis.Redis.from_url(server.url) as client:
            await client.mset({f"key {number}": random.randbytes(1 << 16) for number in range(160)})
            await client.bgrewriteaof()
            is_rewriting = True
            while is_rewriting:
                await asyncio.sleep(0.01)
                state = await client.info("persistence")
                is_rewriting = state["aof_rewrite_in_progress"] or state["aof_rewrite_scheduled"]
        server.stop()
        starting = asyncio.create_task(asyncio.to_thread(server.start))
        assert await bus.load_state("cursor") == b"7"
        await starting
        await bus.close()
    assert any("BusyLoadingError" in reason for reason in reports.reasons)
    assert reports.reasons[-1] == ""


class ForgetfulProxy:
    """Stands before a Redis.

    Once armed, it drops the connection in place of the next reply to a command of this name.
    """

    def __init__(self, url: str, command: bytes = b"EVALSHA") -> None:
        self._target = parse_address(url)
        self._command = command
        self._connections: set[asyncio.Task[None]] = set()
        self.is_armed = False
        self.num_dropped = 0

    async def __aenter__(self) -> str:
        self._listener = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return f"redis://127.0.0.1:{self._listener.sockets[0].getsockname()[1]}/0"

    async def __aexit__(self, *error: object) -> None:
        self._listener.close()
        for connection in self._connections:
            connection.cancel()
        await asyncio.wait(self._connections)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections.add(asyncio.current_task())
        redis_reader, redis_writer = await asyncio.open_connection(*self._target)
        try:
            await self._forward(reader, writer, redis_reader, redis_writer)
        finally:
            for side in (writer, redis_writer):
                side.close()

    async def _forward(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        redis_reader: asyncio.StreamReader,
        redis_writer: asyncio.StreamWriter,
    ) -> None:
        is_chosen = False

        async def forward_requests() -> None:
            nonlocal is_chosen
            while data := await reader.read(1 << 16):
                is_chosen = self._command in data
                redis_writer.write(data)
            redis_writer.write_eof()

        requests = asyncio.create_task(forward_requests())
        try:
            while data := await redis_reader.read(1 << 16):
                if self.is_armed and is_chosen:
                    self.is_armed, self.num_dropped = False, self.num_dropped + 1
                    break
                writer.write(data)
        finally:
            requests.cancel()


def parse_address(url: str) -> tuple[str, int]:
    host, port = url.removeprefix("redis://").removesuffix("/0").split(":")
    return host, int(port)


async def test_a_commit_whose_reply_was_lost_is_applied_once(
    server: EmbeddedRedis, bus: RedisBus
) -> None:
    proxy = ForgetfulProxy(server.url)
    async with proxy as url:
        far = RedisBus(url, "run", WIRING, LIMITS)
        await far.commit(
            {TASKS: [b"1", b"2"]},
            transitions=[event(0, GroupOutcome.ISSUED), event(1, GroupOutcome.ISSUED)],
        )
        first, second = await far.read(TASKS, ROLLOUT, "a", max_count=2)
        proxy.is_armed = True
        await far.commit(
            {LEDGER: [b"done"]}, [first], {"cursor": b"1"}, [event(0, GroupOutcome.GENERATED)]
        )
        proxy.is_armed = True
        await far.dead_letter(second, "bad", [event(1, GroupOutcome.FAILED)])
        assert proxy.num_dropped == 2
        await far.close()
    payloads = [entry.payload for entry in await bus.tail(LEDGER, BEFORE_FIRST, max_count=9)]
    assert payloads[0] == b"done"
    booked = [event(0, GroupOutcome.GENERATED), event(1, GroupOutcome.FAILED)]
    assert [decode_ledger_event(payload) for payload in payloads[1:]] == booked
    assert (await bus.read_ledger()).counts()["generated"] == 2
    assert await bus.count_dead_letters() == 1


async def test_entries_taken_over_by_a_call_whose_reply_was_lost_are_returned_by_its_repeat(
    server: EmbeddedRedis,
) -> None:
    proxy = ForgetfulProxy(server.url)
    async with proxy as url:
        far = RedisBus(url, "run", WIRING, LIMITS)
        await far.publish(TASKS, [b"1", b"2"])
        first, _ = await far.read(TASKS, ROLLOUT, "dead", max_count=2)
        # So that Redis knows the script.
        assert len(await far.reclaim(TASKS, ROLLOUT, "a", 0.0, 1)) == 1
        proxy.is_armed = True
        taken = await far.reclaim(TASKS, ROLLOUT, "a", 0.0, 9, after_id=first.entry_id)
        assert proxy.num_dropped == 1
        assert [(delivery.payload, delivery.num_deliveries) for delivery in taken] == [(b"2", 2)]
        assert await far.renew(taken) == taken
        await far.close()


async def test_the_mark_of_a_commit_outlives_every_retry_and_then_expires(
    server: EmbeddedRedis, client: redis.Redis
) -> None:
    bus = RedisBus(server.url, "run", WIRING, replace(LIMITS, outage_tolerance_s=1000.0))
    await bus.publish(TASKS, [b"1"])
    [mark] = [key async for key in client.scan_iter("*:commit:*")]
    assert 1000 < await client.ttl(mark) <= 2000
    await bus.close()


async def test_an_acknowledgement_alone_leaves_no_mark(bus: RedisBus, client: redis.Redis) -> None:
    await bus.publish(TASKS, [b"1"])
    await bus.acknowledge(await bus.read(TASKS, ROLLOUT, "a", max_count=1))
    assert len([key async for key in client.scan_iter("*:commit:*")]) == 1


async def test_consumers_that_hold_nothing_and_were_long_silent_are_forgotten(
    server: EmbeddedRedis, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pods come under ever new names; what one of them still holds keeps its name."""
    monkeypatch.setattr(redis_trimming, "_FORGET_AFTER_S", 0.2)
    bus = RedisBus(server.url, "run", WIRING, replace(LIMITS, trim_interval_s=0.0))
    await bus.publish(TASKS, [b"1", b"2", b"3"])
    gone, _ = [
        (await bus.read(TASKS, ROLLOUT, name, max_count=1))[0] for name in ("gone", "holder")
    ]
    await bus.acknowledge([gone])
    [last] = await bus.read(TASKS, ROLLOUT, "alive", max_count=1)
    await asyncio.sleep(0.25)
    assert await bus.renew([last]) == [last]
    await bus.acknowledge([last])
    [key] = [key async for key in client.scan_iter("*tasks*")]
    names = {info["name"] for info in await client.xinfo_consumers(key, ROLLOUT)}
    assert {name.decode() if isinstance(name, bytes) else name for name in names} == {
        "alive",
        "holder",
    }
    assert (await bus.stream_lag(TASKS, ROLLOUT)).num_pending == 1
    await bus.close()


async def test_a_commit_of_thousands_goes_through(server: EmbeddedRedis) -> None:
    many = 5_000
    bus = RedisBus(server.url, "run", WIRING, BusLimits(max_entries=2 * many))
    await bus.commit(
        {TASKS: [b"x"] * many},
        transitions=[event(number, GroupOutcome.ISSUED) for number in range(many)],
    )
    held = await bus.read(TASKS, ROLLOUT, "a", max_count=many)
    assert await bus.renew(held) == held
    taken = await bus.reclaim(TASKS, ROLLOUT, "a", 0.0, many)
    await bus.commit(
        {}, taken, transitions=[event(number, GroupOutcome.CANCELLED) for number in range(many)]
    )
    assert (await bus.stream_lag(TASKS, ROLLOUT)).num_pending == 0
    assert await bus.list_closed(GroupOutcome.CANCELLED) == list(range(many))
    await bus.close()


def tear(file: Path, num_cut: int) -> None:
    data = file.read_bytes()
    file.write_bytes(data[:-num_cut] if num_cut else data + b"*3\r\n$3\r\nSET\r\n$100\r\nabc")


@pytest.mark.parametrize("num_cut", [0, 5])
async def test_redis_comes_back_with_a_torn_file_and_a_transaction_is_there_whole_or_not(
    tmp_path: Path, num_cut: int
) -> None:
    """Killed with fsync "always".

    Without a cut the tail is a write that nobody was told of; the cut goes into one that was.
    """
    with EmbeddedRedis(tmp_path, fsync="always") as server:
        bus = RedisBus(server.url, "run", WIRING, LIMITS)
        await bus.commit({TASKS: [b"1", b"2"]}, transitions=[event(0, GroupOutcome.ISSUED)])
        first, second = await bus.read(TASKS, ROLLOUT, "a", max_count=2)
        await bus.commit({LEDGER: [b"first"]}, [first], {"cursor": b"1"})
        await bus.commit(
            {LEDGER: [b"second"]}, [second], {"cursor": b"2"}, [event(0, GroupOutcome.GENERATED)]
        )
        server.kill()
        tear(tmp_path / "appendonly.aof", num_cut)
        server.start()
        is_there = not num_cut
        ledger = await bus.tail(LEDGER, BEFORE_FIRST, max_count=9)
        assert len(ledger) == (3 if is_there else 1)
        assert await bus.load_state("cursor") == (b"2" if is_there else b"1")
        assert (await bus.read_ledger()).open == {0: is_there}
        assert await bus.renew([first, second]) == ([] if is_there else [second])
        await bus.close()


async def test_an_entry_renewed_while_another_makes_up_its_mind_stays_where_it_is(
    server: EmbeddedRedis, bus: RedisBus
) -> None:
    class Hesitant(RedisConsuming):
        num_found = 0

        async def _select_dead(
            self, pending: list[dict[str, Any]], min_idle_s: float
        ) -> list[dict[str, Any]]:
            dead = await super()._select_dead(pending, min_idle_s)
            self.num_found += len(dead)
            await bus.renew(held)
            return dead

    thief = RedisBus(server.url, "run", WIRING, LIMITS)
    thief._consuming = hesitant = Hesitant(thief._session)
    await bus.publish(TASKS, [b"1"])
    held = await bus.read(TASKS, ROLLOUT, "slow", max_count=1)
    async with asyncio.timeout(10.0):
        while not hesitant.num_found:
            assert await thief.reclaim(TASKS, ROLLOUT, "thief", 0.3, 9) == []
    assert await bus.renew(held) == held
    await thief.close()


async def test_after_a_restart_of_redis_nobody_living_is_taken_for_dead(tmp_path: Path) -> None:
    """All were idle beyond any bound, and the first one back finds nobody else connected."""
    min_idle_s = 0.3
    with EmbeddedRedis(tmp_path, fsync="always") as server:
        client = redis.Redis.from_url(server.url)
        worker = RedisBus(server.url, "run", WIRING, LIMITS, client_name="worker")
        peer = RedisBus(server.url, "run", WIRING, LIMITS, client_name="peer")
        await peer.publish(TASKS, [b"1"])
        held = await worker.read(TASKS, ROLLOUT, "worker", max_count=1)
        await asyncio.sleep(SUSPECT_FACTOR * min_idle_s)
        server.kill()
        server.start()
        assert await peer.reclaim(TASKS, ROLLOUT, "peer", 0.0, 9, held_by="nobody") == []
        [row] = await client.xpending_range(RunKeys("run").stream(TASKS), ROLLOUT, "-", "+", 9)
        assert row["time_since_delivered"] >= SUSPECT_FACTOR * min_idle_s * 1000, (
            "the idle clock survives the restart"
        )
        assert await peer.reclaim(TASKS, ROLLOUT, "peer", min_idle_s, 9) == []
        for _ in range(30):
            assert await worker.renew(held) == held
            assert await peer.reclaim(TASKS, ROLLOUT, "peer", min_idle_s, 9) == []
            await asyncio.sleep(min_idle_s / 6)
        await worker.close()
        async with asyncio.timeout(10.0):
            taken = []
            while not taken:
                taken = await peer.reclaim(TASKS, ROLLOUT, "peer", min_idle_s, 9)
        assert [delivery.payload for delivery in taken] == [b"1"]
        await peer.close()
        await client.aclose()


async def test_a_server_that_forbids_asking_who_is_connected_leaves_only_the_long_bound(
    server: EmbeddedRedis, bus: RedisBus, client: redis.Redis
) -> None:
    """Managed ones, too: the user may run no administrative commands, naming included."""
    await client.execute_command(
        "ACL", "SETUSER", "limited", "on", ">secret", "~*", "+@all", "-@dangerous", "+xinfo"
    )
    limited = RedisBus(
        server.url.replace("//", "//limited:secret@"), "run", WIRING, LIMITS, client_name="limited"
    )
    await limited.publish(TASKS, [b"1"])
    started = asyncio.get_running_loop().time()
    await bus.read(TASKS, ROLLOUT, "dead", max_count=1)
    min_idle_s, taken = 0.2, []
    async with asyncio.timeout(10.0):
        while not taken:
            taken = await limited.reclaim(TASKS, ROLLOUT, "limited", min_idle_s, 9)
    assert asyncio.get_running_loop().time() - started >= SUSPECT_FACTOR * min_idle_s
    with pytest.raises(ConfigurationError, match="denies its user a command"):
        await limited.memory()
    await limited.close()


async def test_a_claim_is_newer_than_one_before_redis_lost_its_disk(
    server: EmbeddedRedis, bus: RedisBus, client: redis.Redis
) -> None:
    before = RedisBus(server.url, "run", WIRING, LIMITS)
    for _ in range(3):
        await before.claim_role(GATEWAY)
    await client.flushall()
    await bus.claim_role(GATEWAY)
    await bus.save_state("cursor", b"2")
    with pytest.raises(SupersededError):
        await before.save_state("cursor", b"3")
    await before.close()


async def test_a_process_with_a_role_raises_when_redis_comes_back_empty(
    bus: RedisBus, client: redis.Redis
) -> None:
    """Going on would train from nothing, or put an empty account into the next checkpoint."""
    await bus.claim_role(GATEWAY)
    held = await bus.read(LEDGER, GATEWAY, "g", max_count=1)
    await client.flushall()
    calls: list[Callable[[], Awaitable[object]]] = [
        lambda: bus.publish(TASKS, [b"1"]),
        lambda: bus.commit({}, held, transitions=[event(0, GroupOutcome.ISSUED)]),
        lambda: bus.read(LEDGER, GATEWAY, "g", max_count=1),
        lambda: bus.take_snapshot(),
        lambda: bus.retire_versions([1]),
    ]
    for call in calls:
        with pytest.raises(CorruptionError, match="came back without this run's data"):
            await call()
    assert await client.keys(f"{RunKeys('run').stream(TASKS)}*") == []
    await bus.claim_role(GATEWAY)
    assert await bus.read(LEDGER, GATEWAY, "g", max_count=1) == []


async def test_a_role_that_is_taken_over_ends_the_read_that_waits(
    server: EmbeddedRedis, bus: RedisBus
) -> None:
    before = RedisBus(server.url, "run", WIRING, LIMITS)
    await before.claim_role(GATEWAY)
    reading = asyncio.create_task(
        before.read(LEDGER, GATEWAY, "gateway", max_count=9, block_s=30.0)
    )
    await bus.claim_role(GATEWAY)
    await bus.publish(LEDGER, [b"1"])
    async with asyncio.timeout(10.0):
        with pytest.raises(SupersededError):
            await reading
    assert [
        delivery.payload for delivery in await bus.read(LEDGER, GATEWAY, "gateway", max_count=9)
    ] == [b"1"]
    await before.close()


@pytest.mark.parametrize("has_role", [False, True])
async def test_entries_of_a_read_whose_reply_was_lost_are_returned_by_the_next(
    server: EmbeddedRedis, has_role: bool
) -> None:
    """0 is pending from an earlier read, 1 and 2 are in the lost reply, 3 comes later."""
    proxy = ForgetfulProxy(server.url, b"EVALSHA" if has_role else b"XREADGROUP")
    async with proxy as url:
        far = RedisBus(url, "run", WIRING, LIMITS)
        if has_role:
            await far.claim_role(GATEWAY)
        await far.publish(TASKS, [b"0", b"1", b"2"])
        [zero] = await far.read(TASKS, ROLLOUT, "a", max_count=1)
        proxy.is_armed = True
        held = await far.read(TASKS, ROLLOUT, "a", max_count=2)
        assert proxy.num_dropped == 1
        await far.publish(TASKS, [b"3"])
        held += await far.read(TASKS, ROLLOUT, "a", max_count=9)
        found = [(delivery.payload, delivery.num_deliveries) for delivery in held]
        assert found == [(b"1", 1), (b"2", 1), (b"3", 1)]
        assert await far.renew([zero, *held]) == [zero, *held]
        await far.close()


@pytest.mark.parametrize("has_role", [False, True])
async def test_entries_of_a_lost_reply_are_found_behind_those_taken_over(
    server: EmbeddedRedis, has_role: bool
) -> None:
    """As after a start: more is pending than one read asks for, and the first read is lost."""
    proxy = ForgetfulProxy(server.url, b"EVALSHA" if has_role else b"XREADGROUP")
    async with proxy as url:
        far = RedisBus(url, "run", WIRING, LIMITS)
        if has_role:
            await far.claim_role(GATEWAY)
        await far.publish(TASKS, [str(number).encode() for number in range(5)])
        await far.read(TASKS, ROLLOUT, "a", max_count=3)
        await far.close()
        far = RedisBus(url, "run", WIRING, LIMITS)
        if has_role:
            await far.claim_role(GATEWAY)
        taken = await far.reclaim(TASKS, ROLLOUT, "a", 0.0, 9, held_by="a")
        proxy.is_armed = True
        held = await far.read(TASKS, ROLLOUT, "a", max_count=2)
        assert proxy.num_dropped == 1
        assert [delivery.payload for delivery in taken] == [b"0", b"1", b"2"]
        found = [(delivery.payload, delivery.num_deliveries) for delivery in held]
        assert found == [(b"3", 1), (b"4", 1)]
        await far.close()


async def test_a_redis_on_a_unix_socket_will_do(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path, unix_socket=tmp_path / "redis.sock") as server:
        bus = RedisBus(server.url, "run", WIRING, LIMITS, client_name="a")
        await bus.ping()
        await bus.close()


async def test_scripts_come_back_after_redis_forgot_them(
    bus: RedisBus, client: redis.Redis
) -> None:
    await bus.publish(TASKS, [b"1"])
    await client.script_flush()
    await bus.publish(TASKS, [b"2"])
    assert len(await bus.read(TASKS, ROLLOUT, "a", max_count=9)) == 2


async def test_the_bound_of_memory_is_the_server_s(bus: RedisBus, client: redis.Redis) -> None:
    await client.config_set("maxmemory", 123_456_789)
    memory = await bus.memory()
    assert 0 < memory.used_bytes < memory.max_bytes == 123_456_789


async def test_a_long_outage_says_where_and_what_to_do(server: EmbeddedRedis) -> None:
    bus = RedisBus(server.url, "run", WIRING, BusLimits(outage_tolerance_s=0.1))
    server.kill()
    with pytest.raises(
        BusUnavailableError, match=r"127\.0\.0\.1:\d+/0 did not answer for 0\.1 s .* SDAR_REDIS_URL"
    ):
        await bus.ping()
    await bus.close()


async def test_no_message_shows_the_password() -> None:
    bus = RedisBus(
        "redis://user:secret@127.0.0.1:1/0", "run", WIRING, BusLimits(outage_tolerance_s=0.0)
    )
    with pytest.raises(BusUnavailableError) as caught:
        await bus.ping()
    assert "secret" not in f"{caught.value} {caught.value.fields}"
    await bus.close()


async def test_wrong_credentials_fail_at_once(bus: RedisBus, client: redis.Redis) -> None:
    await client.config_set("requirepass", "right")
    with pytest.raises(ConfigurationError, match="refuses the credentials"):
        await bus.ping()


async def test_a_redis_without_memory_is_waited_out_and_reported_and_nothing_is_half_done(
    server: EmbeddedRedis, client: redis.Redis
) -> None:
    reports = Reports()
    bus = RedisBus(
        server.url, "run", WIRING, replace(LIMITS, outage_tolerance_s=0.0), on_blocked=reports
    )
    await bus.publish(TASKS, [b"1", b"2"])
    held = await bus.read(TASKS, ROLLOUT, "a", max_count=2)
    await client.config_set("maxmemory", 1)
    committing = asyncio.create_task(
        bus.commit({LEDGER: [b"done"]}, held[:1], {"cursor": b"1"}, [event(0, GroupOutcome.ISSUED)])
    )
    await reports.wait_for(3)
    assert not committing.done()
    [reason] = set(reports.reasons)  # in Redis' own words, without those of the script that met it
    assert reason.endswith(
        " is full (command not allowed when used memory > 'maxmemory'). Raise its maxmemory."
    )
    await bus.acknowledge(held[1:])  # frees memory, so it must not wait
    assert await bus.renew(held) == held[:1]
    assert await bus.newest(LEDGER) is None
    assert await bus.load_state("cursor") is None
    assert (await bus.read_ledger()).num_issued == 0
    assert len([key async for key in client.scan_iter("*:commit:*")]) == 1, (
        "the mark of the first publication alone"
    )
    await client.config_set("maxmemory", 0)
    async with asyncio.timeout(10.0):
        await committing
    assert reports.reasons[-1] == ""
    assert await bus.load_state("cursor") == b"1"
    assert (await bus.read_ledger()).num_issued == 1
    assert await bus.renew(held) == []
    await bus.close()


@pytest.mark.parametrize("is_away", [True, False])
async def test_who_is_asked_to_stop_does_not_wait_for_redis_for_long(
    server: EmbeddedRedis, client: redis.Redis, monkeypatch: pytest.MonkeyPatch, is_away: bool
) -> None:
    monkeypatch.setattr(redis_connection, "LEAVE_S", 0.5)
    reports, stopping = Reports(), asyncio.Event()
    bus = RedisBus(server.url, "run", WIRING, LIMITS, on_blocked=reports)
    hurrying = asyncio.create_task(bus.hurry(stopping))
    await client.config_set("maxmemory", 1)
    if is_away:
        server.kill()
    publishing = asyncio.create_task(bus.publish(TASKS, [b"1"]))
    await reports.wait_for(3)
    assert not publishing.done()
    stopping.set()
    async with asyncio.timeout(5.0):
        await hurrying
        with pytest.raises(BusUnavailableError, match="Asked to stop meanwhile"):
            await publishing
    await bus.close()


async def test_a_redis_that_would_evict_is_refused_by_whoever_claims_a_role(
    bus: RedisBus, client: redis.Redis
) -> None:
    await client.config_set("maxmemory-policy", "volatile-lru")
    with pytest.raises(
        ConfigurationError, match=r"maxmemory-policy volatile-lru.*Set it to noeviction"
    ):
        await bus.claim_role(GATEWAY)
    await client.config_set("maxmemory", 0)
    await bus.claim_role(GATEWAY)  # without a bound it never evicts


async def test_groups_come_back_after_redis_was_flushed_even_under_a_blocked_read(
    bus: RedisBus, client: redis.Redis
) -> None:
    reading = asyncio.create_task(bus.read(TASKS, ROLLOUT, "a", max_count=1, block_s=30.0))
    async with asyncio.timeout(10.0):
        num_blocked = 0
        while not num_blocked:
            num_blocked = (await client.info("clients"))["blocked_clients"]
        await client.flushall()
        await bus.publish(TASKS, [b"after"])
        assert [delivery.payload for delivery in await reading] == [b"after"]
    await client.flushall()
    assert await bus.reclaim(TASKS, ROLLOUT, "a", min_idle_s=0.0, max_count=9) == []
    assert (await bus.stream_lag(TASKS, ROLLOUT)).num_pending == 0


async def test_renewing_after_a_flush_holds_nothing(bus: RedisBus, client: redis.Redis) -> None:
    await bus.publish(TASKS, [b"1"])
    held = await bus.read(TASKS, ROLLOUT, "a", max_count=1)
    await client.flushall()
    assert await bus.renew(held) == []


async def test_trimming_spares_groups_that_only_exist_in_redis(
    bus: RedisBus, client: redis.Redis
) -> None:
    await bus.publish(TASKS, [b"1", b"2"])
    await client.xgroup_create(RunKeys("run").stream(TASKS), "archive", "0")
    await bus.acknowledge(await bus.read(TASKS, ROLLOUT, "a", max_count=9))
    assert await bus.trim() == 0


async def test_acknowledging_trims_on_the_way(bus: RedisBus, client: redis.Redis) -> None:
    await bus.publish(TASKS, [b"1", b"2"])
    first, second = await bus.read(TASKS, ROLLOUT, "a", max_count=9)
    await bus.acknowledge([first])
    await bus.acknowledge([second])
    assert await client.xlen(RunKeys("run").stream(TASKS)) == 1, (
        "each acknowledgement trims what was finished before it"
    )


async def test_a_read_can_be_cancelled_at_any_moment(server: EmbeddedRedis) -> None:
    async with AsyncExitStack() as stack, asyncio.timeout(20.0):
        for num_steps in range(30):
            bus = RedisBus(server.url, "run", WIRING, LIMITS)
            stack.push_async_callback(bus.close)
            reading = asyncio.create_task(bus.read(TASKS, ROLLOUT, "a", max_count=1, block_s=30.0))
            for _ in range(num_steps):
                await asyncio.sleep(0)
            reading.cancel()
            await asyncio.wait([reading])
            assert reading.cancelled()


async def test_runs_do_not_see_each_other(server: EmbeddedRedis, bus: RedisBus) -> None:
    other = RedisBus(server.url, "other", WIRING, LIMITS)
    await other.publish(TASKS, [b"theirs"])
    assert await bus.read(TASKS, ROLLOUT, "a", max_count=1) == []
    await other.close()


def test_an_address_that_is_no_redis_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"redis://host:port/0"):
        RedisBus("http://localhost", "run", WIRING)
