"""Groups when real rollout workers or environments die, hang or pause, on a real Redis."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import signal
import sys
import time
from asyncio.subprocess import Process
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import redis.asyncio

from sdar.bus.embedded_redis import EmbeddedRedis
from sdar.bus.ledger import format_group_id
from sdar.bus.protocol import BEFORE_FIRST
from sdar.bus.redis import RedisBus
from sdar.contracts import codec
from sdar.contracts.streams import ConsumerGroup, RunKeys, Stream
from sdar.contracts.types import GroupOutcome, LedgerEvent, Purpose, Task, TaskGroup
from sdar.environments.registry import EnvironmentSource
from sdar.environments.server import serve_environments
from sdar.environments.sessions import SessionLimits, SessionManager
from sdar.environments.workers import WorkerHost
from sdar.in_process.memory_bus import MemoryBus
from sdar.model.chat import ChatTokenizer
from sdar.process.telemetry import Health
from services.envs.household import HouseholdEnvironment
from services.rollout.environment_client import GrpcEnvironmentDirectory
from services.rollout.metrics import RETRIED_GROUPS, RolloutMetrics
from services.rollout.worker import RolloutLimits, RolloutWorker
from tests.integration.commands import ROOT
from tests.integration.environment_server import Client, serving
from tests.integration.rollout_process import RUN_ID, Order, make_config
from tests.unit.rollout.fakes import ScriptedEngine, make_group, make_rules, write_model

LEASE_S = 10.0
"""Of a session whose worker died: longer than a busy machine takes for a step."""
GROUP_SIZE = 2
NUM_GROUPS = 6
THINK_S = 0.3
CLAIM_IDLE_S = 2.0
RECOVERY_S = 30.0
"""From a worker's death to the publication of all its groups by another that runs."""
START_S = 180.0
"""What a worker's process may take to start on a busy machine."""


class House:
    """A run without its other services: Redis, a server of the household, and worker processes."""

    def __init__(self, redis_url: str, client: Client) -> None:
        self.redis_url, self.client = redis_url, client
        self.bus = RedisBus(redis_url, RUN_ID, make_config().stream_consumers)
        self.redis = redis.asyncio.Redis.from_url(redis_url)
        self.processes: dict[str, Process] = {}

    async def start(self, instance: str, lease_s: float) -> None:
        order = Order(self.redis_url, instance, lease_s, THINK_S, GROUP_SIZE * NUM_GROUPS // 2)
        self.processes[instance] = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "tests.integration.rollout_process",
            json.dumps(dataclasses.asdict(order)),
            cwd=ROOT,
        )

    async def issue(self) -> None:
        tasks = HouseholdEnvironment().list_tasks("train")
        config = make_config()
        groups = [
            TaskGroup(
                run_id=RUN_ID,
                group_id=format_group_id(number),
                task=tasks[number],
                group_size=GROUP_SIZE,
                purpose=Purpose.TRAIN,
                admitted_version=0,
                sampling=config.train_sampling,
                max_turns=8,
                environment_address=self.client.address,
            )
            for number in range(NUM_GROUPS)
        ]
        issued = [
            LedgerEvent(RUN_ID, group.group_id, GroupOutcome.ISSUED, 0, 0) for group in groups
        ]
        await self.bus.commit(
            {Stream.TASKS: [codec.encode_task_group(group) for group in groups]}, transitions=issued
        )

    async def held_by(self, instance: str) -> int:
        """Groups that a worker plays."""
        pending = await self.redis.xpending(
            RunKeys(RUN_ID).stream(Stream.TASKS), ConsumerGroup.ROLLOUT
        )
        return sum(
            one["pending"] for one in pending["consumers"] if one["name"].decode() == instance
        )

    async def entries(self, stream: Stream) -> list[bytes]:
        return [entry.payload for entry in await self.bus.tail(stream, BEFORE_FIRST, 10_000)]

    async def attempts(self) -> dict[str, int]:
        """The attempt by which each group was published, each episode of which is there once."""
        played = [
            codec.decode_trajectory(payload) for payload in await self.entries(Stream.TRAJECTORIES)
        ]
        episodes = Counter((one.group_id, one.episode_index) for one in played)
        assert set(episodes.values()) <= {1}
        return {one.group_id: one.attempt for one in played}

    async def values(self, instance: str) -> dict[str, float]:
        """The newest record of a worker."""
        records = [
            codec.decode_metric_record(payload) for payload in await self.entries(Stream.METRICS)
        ]
        return next(
            (record.values for record in reversed(records) if record.instance == instance), {}
        )

    async def num_sessions(self) -> int:
        return (await self.client.describe()).environments[0].capacity.num_open_sessions

    async def check_account(self) -> None:
        """Every group was generated exactly once, and nothing of the run is left anywhere."""
        counts = (await self.bus.read_ledger()).counts()
        found = (counts["issued"], counts["generated"], counts["running"], counts["failed"])
        assert found == (NUM_GROUPS, NUM_GROUPS, 0, 0)
        journal = [
            codec.decode_ledger_event(payload) for payload in await self.entries(Stream.LEDGER)
        ]
        assert Counter(event.group_id for event in journal) == dict.fromkeys(
            map(format_group_id, range(NUM_GROUPS)), 1
        )
        assert {event.outcome for event in journal} == {GroupOutcome.GENERATED}
        assert all(
            len(event.episode_turns) == GROUP_SIZE and min(event.episode_turns) > 0
            for event in journal
        )
        lag = await self.bus.stream_lag(Stream.TASKS, ConsumerGroup.ROLLOUT)
        assert (lag.num_pending, lag.num_undelivered) == (0, 0)

    async def stop(self) -> None:
        for process in self.processes.values():
            if process.returncode is None:
                process.kill()
            await process.wait()
        await self.redis.aclose()
        await self.bus.close()


async def reached(condition: Callable, timeout_s: float = 90.0) -> None:
    """Return once the coroutine of `condition` tells something true."""
    async with asyncio.timeout(timeout_s):
        while not await condition():  # noqa: ASYNC110  the bus offers no event for it
            await asyncio.sleep(0.02)


@asynccontextmanager
async def house(tmp_path, lease_s: float) -> AsyncIterator[House]:
    with EmbeddedRedis(tmp_path / "redis") as server:
        async with serving(SessionLimits(default_lease_s=lease_s), reap_every_s=0.1) as (
            client,
            _,
            _,
        ):
            run = House(server.url, client)
            try:
                yield run
            finally:
                await run.stop()


async def test_a_killed_worker_s_groups_and_no_others_are_played_again_by_the_other_one(tmp_path):
    async with house(tmp_path, lease_s=LEASE_S) as run:
        await asyncio.gather(run.start("one", CLAIM_IDLE_S), run.start("two", CLAIM_IDLE_S))
        for name in run.processes:
            await reached(lambda name=name: run.values(name), START_S)
        await run.issue()

        async def both_play() -> bool:
            return await run.held_by("one") > 0 and await run.held_by("two") > 0

        await reached(both_play)
        # Stopped first, so that what it holds does not change between the look and its death.
        run.processes["one"].send_signal(signal.SIGSTOP)
        num_lost = await run.held_by("one")
        run.processes["one"].kill()
        killed_at_s = time.monotonic()
        await reached(lambda: all_published(run))
        recovery_s = time.monotonic() - killed_at_s
        print(
            f"{num_lost} groups of a killed worker were published "
            f"{recovery_s:.1f} s after its death"
        )
        assert recovery_s < RECOVERY_S
        assert Counter((await run.attempts()).values()) == {0: NUM_GROUPS - num_lost, 1: num_lost}
        assert (await run.values("two"))["num_reclaimed_groups"] == num_lost > 0
        await run.check_account()
        await reached(lambda: no_session_is_left(run))


async def all_published(run: House) -> bool:
    return len(await run.attempts()) == NUM_GROUPS


async def no_session_is_left(run: House) -> bool:
    return await run.num_sessions() == 0


async def test_a_worker_paused_past_its_lease_loses_its_groups_and_its_late_results_are_refused(
    tmp_path,
):
    """It renews so seldom that it finds out only when it publishes."""
    async with house(tmp_path, lease_s=300.0) as run:
        await run.start("paused", 600.0)
        await reached(lambda: run.values("paused"), START_S)
        await run.issue()

        async def plays() -> bool:
            return await run.held_by("paused") > 0

        await reached(plays)
        run.processes["paused"].send_signal(signal.SIGSTOP)
        num_lost = await run.held_by("paused")
        await run.start("other", CLAIM_IDLE_S)
        await reached(lambda: all_published(run), START_S)
        run.processes["paused"].send_signal(signal.SIGCONT)

        async def all_refused() -> bool:
            values = await run.values("paused")
            return values["num_late_results"] == num_lost and values["num_repeated_tokens"] > 0

        await reached(all_refused)
        assert Counter((await run.attempts()).values()) == {0: NUM_GROUPS - num_lost, 1: num_lost}
        await run.check_account()
        await reached(lambda: no_session_is_left(run))


async def test_a_worker_that_restarts_under_its_name_goes_on_with_its_groups_at_once(tmp_path):
    """A claim would last for ten minutes."""
    async with house(tmp_path, lease_s=LEASE_S) as run:
        await run.start("one", 600.0)
        await reached(lambda: run.values("one"), START_S)
        await run.issue()

        async def plays() -> bool:
            return await run.held_by("one") > 0

        await reached(plays)
        run.processes["one"].send_signal(signal.SIGSTOP)
        num_lost = await run.held_by("one")
        run.processes["one"].kill()
        await run.processes["one"].wait()
        killed_at_s = time.monotonic()
        await run.start("one", 600.0)

        async def is_back() -> bool:
            return (await run.values("one")).get("num_reclaimed_groups") == num_lost

        await reached(is_back, START_S)
        recovery_s = time.monotonic() - killed_at_s
        print(
            f"{num_lost} groups were taken back {recovery_s:.1f} s after the death, start included"
        )
        await reached(lambda: all_published(run))
        assert Counter((await run.attempts()).values()) == {0: NUM_GROUPS - num_lost, 1: num_lost}
        await run.check_account()
        await reached(lambda: no_session_is_left(run))


# ---- environments that die or hang


CONSUMERS = {
    Stream.TASKS: (ConsumerGroup.ROLLOUT,),
    Stream.TRAJECTORIES: (ConsumerGroup.LEARNER,),
    Stream.EVALUATIONS: (ConsumerGroup.GATEWAY,),
    Stream.LEDGER: (ConsumerGroup.GATEWAY,),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return ChatTokenizer(write_model(tmp_path_factory.mktemp("tiny")))


class Bench:
    """A worker on a bus in memory whose sampler follows a script, repeating its last answer."""

    def __init__(self, tokenizer, *texts: str, **limits) -> None:
        self.bus = MemoryBus(CONSUMERS)
        self.metrics = RolloutMetrics()
        self.environments = GrpcEnvironmentDirectory(step_timeout_s=5.0)
        self.worker = RolloutWorker(
            self.bus,
            ScriptedEngine(
                *([*tokenizer.tokenizer.encode(text), tokenizer.stops.closing_id] for text in texts)
            ),
            self.environments,
            make_rules(tokenizer),
            run_id="test",
            instance="me",
            limits=RolloutLimits(
                max_concurrent_episodes=32, read_block_s=0.01, retry_delay_s=0.05, **limits
            ),
            health=Health(),
            metrics=self.metrics,
        )

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        stopping = asyncio.Event()
        task = asyncio.create_task(self.worker.run(stopping))
        try:
            yield
        finally:
            stopping.set()
            await task
            await self.environments.close()

    async def issue(
        self, address: str, num_groups: int = 1, purpose: Purpose = Purpose.TRAIN
    ) -> None:
        task = Task("misbehaving", "train", "task 0", "", "behave .", 0)
        groups = [
            make_group(f"g{number}", 3, purpose=purpose, max_turns=3)
            for number in range(num_groups)
        ]
        groups = [
            dataclasses.replace(group, task=task, environment_address=address) for group in groups
        ]
        await self.bus.publish(Stream.TASKS, [codec.encode_task_group(group) for group in groups])

    async def settled(self) -> bool:
        lag = await self.bus.stream_lag(Stream.TASKS, ConsumerGroup.ROLLOUT)
        return not lag.num_undelivered and not lag.num_pending

    async def attempts(self, stream: Stream = Stream.TRAJECTORIES) -> Counter[tuple[str, int]]:
        """Episodes published, by group and attempt."""
        entries = await self.bus.tail(stream, BEFORE_FIRST, 1000)
        played = [codec.decode_trajectory(entry.payload, stream) for entry in entries]
        return Counter((one.group_id, one.attempt) for one in played)

    async def ledger(self) -> list[LedgerEvent]:
        return [
            codec.decode_ledger_event(entry.payload)
            for entry in await self.bus.tail(Stream.LEDGER, BEFORE_FIRST, 1000)
        ]


@asynccontextmanager
async def misbehaving(num_workers: int = 1) -> AsyncIterator[tuple[Client, WorkerHost]]:
    host = WorkerHost(
        {"misbehaving": EnvironmentSource("tests.misbehaving:Misbehaving")}, num_workers
    )
    async with serving(SessionLimits(step_timeout_s=1.0), host, drain_s=0.0) as (client, _, _):
        yield client, host


async def count_sessions(client: Client) -> int:
    return (await client.describe()).environments[0].capacity.num_open_sessions


@pytest.mark.parametrize("purpose", list(Purpose))
async def test_a_hung_environment_ends_the_attempt_and_the_group_is_played_again_whole(
    tokenizer, purpose
):
    bench = Bench(tokenizer, "", "hang", "")
    async with misbehaving() as (client, _), bench.running():
        await bench.issue(client.address, purpose=purpose)
        await reached(bench.settled)
        assert await count_sessions(client) == 0
    stream = Stream.TRAJECTORIES if purpose is Purpose.TRAIN else Stream.EVALUATIONS
    assert await bench.attempts(stream) == {("g0", 1): 3}
    assert bench.metrics.read(RETRIED_GROUPS) == 1


@pytest.mark.parametrize("purpose", list(Purpose))
async def test_a_group_whose_environment_always_hangs_fails_with_reason_and_number_of_attempts(
    tokenizer, purpose
):
    bench = Bench(tokenizer, "hang", max_attempts=2)
    async with misbehaving() as (client, _), bench.running():
        await bench.issue(client.address, purpose=purpose)
        await reached(bench.settled)
        assert await count_sessions(client) == 0
    (event,) = await bench.ledger()
    assert event.outcome is GroupOutcome.FAILED
    assert event.reason.startswith("Given up after 2 attempts")
    assert "hung for 1 s in step" in event.reason


async def test_groups_of_a_killed_environment_worker_are_played_again_and_no_session_is_left(
    tokenizer,
):
    bench = Bench(tokenizer, "sleep 0.02")
    async with misbehaving(num_workers=2) as (client, host), bench.running():
        await bench.issue(client.address, num_groups=8)

        async def many_play() -> bool:
            return await count_sessions(client) >= 12

        await reached(many_play)
        os.kill(host.pids[0], signal.SIGKILL)
        await reached(bench.settled)
        assert await count_sessions(client) == 0
    attempts = await bench.attempts()
    assert set(attempts.values()) == {3}
    expected = [f"g{number}" for number in range(8)]
    assert sorted(group_id for group_id, _ in attempts) == expected
    assert sum(attempt for _, attempt in attempts) == bench.metrics.read(RETRIED_GROUPS) > 0
    assert {event.outcome for event in await bench.ledger()} == {GroupOutcome.GENERATED}


async def test_an_environment_that_is_away_before_a_session_is_opened_costs_no_attempt(
    tokenizer, unused_tcp_port
):
    bench, stopping = Bench(tokenizer, ""), asyncio.Event()
    host = WorkerHost({"misbehaving": EnvironmentSource("tests.misbehaving:Misbehaving")}, 1)
    async with bench.running():
        await bench.issue(f"127.0.0.1:{unused_tcp_port}")

        async def is_begun() -> bool:
            return (
                await bench.bus.stream_lag(Stream.TASKS, ConsumerGroup.ROLLOUT)
            ).num_pending == 1

        await reached(is_begun)
        serving_it = asyncio.create_task(
            serve_environments(
                stopping,
                sessions=SessionManager(host),
                host="127.0.0.1",
                port=unused_tcp_port,
                health=Health(),
            )
        )
        await reached(bench.settled)
        stopping.set()
        await serving_it
    assert await bench.attempts() == {("g0", 0): 3}
    assert bench.metrics.read(RETRIED_GROUPS) == 0
