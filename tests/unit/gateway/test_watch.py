"""What the gateway knows of a Redis that hangs, fills or is gone, and that nobody has to wait for
it.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest
import redis.asyncio as redis
from prometheus_client import CollectorRegistry

from sdar.bus.embedded_redis import EmbeddedRedis
from sdar.bus.redis import RedisBus
from sdar.contracts import codec
from sdar.contracts.streams import ConsumerGroup, Stream
from sdar.contracts.types import MetricRecord
from sdar.process.telemetry import Health
from services.gateway.alarms import BusState
from services.gateway.app import build_app
from services.gateway.history import History
from services.gateway.metrics import GatewayMetrics
from services.gateway.scheduler import Scheduler
from services.gateway.state import RunPhase
from services.gateway.watch import ANSWER_S, Watch

from .fakes import FakeCatalog, build_config


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis(tmp_path) as server:
        yield server


@pytest.fixture
async def bus(server: EmbeddedRedis) -> AsyncIterator[RedisBus]:
    bus = RedisBus(server.url, "test", build_config().stream_consumers)
    yield bus
    await bus.close()


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def health() -> Health:
    return Health()


@pytest.fixture
def scheduler(bus: RedisBus, health: Health) -> Scheduler:
    return Scheduler(
        build_config(),
        bus,
        FakeCatalog(),
        History(Stream.TRAJECTORIES),
        health,
        default_address="here:1",
    )


@pytest.fixture
def watch(scheduler: Scheduler, bus: RedisBus, registry: CollectorRegistry) -> Watch:
    return Watch(scheduler, bus, GatewayMetrics(registry))


@pytest.fixture
async def client(scheduler: Scheduler, watch: Watch, bus: RedisBus, registry: CollectorRegistry):
    app = build_app(scheduler, watch, bus, registry=registry)
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://gateway"
    ) as client:
        yield client


async def set_max_memory(server: EmbeddedRedis, max_bytes: int) -> None:
    admin = redis.Redis.from_url(server.url)
    await admin.config_set("maxmemory", max_bytes)
    await admin.aclose()


async def test_the_watch_sees_lags_memory_and_dead_letters(
    watch: Watch, bus: RedisBus, registry: CollectorRegistry
) -> None:
    await bus.publish(Stream.TASKS, [b"one", b"two", b"three"])
    delivery = (await bus.read(Stream.TASKS, ConsumerGroup.ROLLOUT, "r", 2))[0]
    await bus.dead_letter(delivery, "no good")
    await watch.refresh()
    lag = watch.lags[Stream.TASKS]
    assert (lag.num_undelivered, lag.num_pending, watch.num_dead_letters) == (1, 1, 1)
    assert 0 < watch.memory.used_bytes < watch.memory.max_bytes
    assert [alarm.name for alarm in watch.board.alarms] == ["dead_letters"]
    shown = {
        "undelivered": registry.get_sample_value(
            "sdar_stream_entries", {"stream": "tasks", "state": "undelivered"}
        ),
        "used": registry.get_sample_value("sdar_redis_memory_bytes", {"kind": "used"}),
        "letters": registry.get_sample_value("sdar_dead_letters"),
        "alarm": registry.get_sample_value("sdar_alarm", {"name": "dead_letters"}),
        "other alarm": registry.get_sample_value("sdar_alarm", {"name": "no_progress"}),
        "state": registry.get_sample_value("sdar_bus_state", {"state": "ok"}),
    }
    assert shown == {
        "undelivered": 1,
        "used": watch.memory.used_bytes,
        "letters": 1,
        "alarm": 1,
        "other alarm": 0,
        "state": 1,
    }


async def test_while_redis_hangs_the_status_is_shown_at_once_and_questions_are_put_off(
    watch: Watch, bus: RedisBus, server: EmbeddedRedis, client: httpx.AsyncClient
) -> None:
    await bus.publish(Stream.TASKS, [b"one"])
    await watch.refresh()
    os.kill(server.pid, signal.SIGSTOP)
    try:
        await watch.refresh()
        began = time.monotonic()
        status = (await client.get("/v1/run")).json()
        assert time.monotonic() - began < ANSWER_S / 4
        assert (status["bus"]["state"], [alarm["name"] for alarm in status["alarms"]]) == (
            "unreachable",
            ["redis_unreachable"],
        )
        assert status["stream_lags"]["tasks"]["num_undelivered"] == 1  # as last seen
        for answer in (
            await client.get("/v1/dead-letters"),
            await client.post("/v1/dead-letters/1-0/retry"),
        ):
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    finally:
        os.kill(server.pid, signal.SIGCONT)
    await watch.refresh()
    status = (await client.get("/v1/run")).json()
    assert (status["bus"]["state"], status["alarms"]) == ("ok", [])


async def test_a_redis_that_refuses_writes_is_full_and_not_absent(
    watch: Watch, health: Health, server: EmbeddedRedis, client: httpx.AsyncClient
) -> None:
    await set_max_memory(server, 1)
    health.mark_ready()
    health.report_blocked("Redis refuses writes: OOM")  # as the scheduler's bus does at every try
    await watch.refresh()
    assert watch.condition.state is BusState.OK  # one look may meet what is over the next moment
    await watch.refresh()
    assert (watch.condition.state, watch.condition.message) == (
        BusState.FULL,
        "Redis refuses writes: OOM",
    )
    assert {alarm.name for alarm in watch.board.alarms} == {"redis_full", "redis_memory"}
    assert (await client.get("/readyz")).status_code == 503
    assert "refuses writes" in (await client.get("/readyz")).text
    assert (await client.get("/healthz")).status_code == 200
    health.report_blocked("")
    await set_max_memory(server, 1 << 30)
    await watch.refresh()
    assert watch.condition.state is BusState.OK


async def test_a_full_redis_is_shown_by_a_gateway_that_has_nothing_to_write(
    watch: Watch, server: EmbeddedRedis
) -> None:
    await set_max_memory(server, 1)
    await watch.refresh()
    await watch.refresh()
    assert watch.condition.state is BusState.FULL
    assert {alarm.name for alarm in watch.board.alarms} == {"redis_full", "redis_memory"}
    await set_max_memory(server, 1 << 30)
    await watch.refresh()
    assert (watch.condition.state, watch.board.alarms) == (BusState.OK, [])


async def test_a_worker_is_missed_a_minute_after_its_last_report_and_only_later_before_its_first(
    scheduler: Scheduler, bus: RedisBus
) -> None:
    now = [1000.0]
    watch = Watch(scheduler, bus, clock=lambda: now[0])
    scheduler.state.phase = RunPhase.RUNNING
    await bus.publish(Stream.TASKS, [b"one"])
    now[0] = 1301.0
    await watch.refresh()
    assert watch.board.alarms == []
    await bus.publish(
        Stream.METRICS,
        [codec.encode_metric_record(MetricRecord("test", "rollout", "r", 0, now[0], {}))],
    )
    await scheduler.history.follow(bus)
    now[0] += 61
    await watch.refresh()
    assert [alarm.name for alarm in watch.board.alarms] == ["rollout_silent"]


async def test_progress_is_whatever_moves_the_account_the_policy_or_an_evaluation(
    scheduler: Scheduler, bus: RedisBus
) -> None:
    now = [1000.0]
    watch = Watch(scheduler, bus, clock=lambda: now[0])
    now[0] += 601
    await watch.refresh()
    assert [alarm.name for alarm in watch.board.alarms] == ["no_progress"]
    scheduler.policy.version = 1
    await watch.refresh()
    assert watch.board.alarms == []
