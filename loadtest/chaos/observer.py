"""Watches a run from outside: probes, the ledger second by second, metric records.

It works in a thread of its own, with an event loop, and only looks. It reads Redis past the links
that faults cut, so that a fault hurts the run and not its witness.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, Self

import httpx
import redis.asyncio
from prometheus_client.parser import text_string_to_metric_families

from loadtest.chaos.faults import ENVS, GATEWAY, REDIS
from sdar.bus.ledger import CLOSING, LedgerAccount
from sdar.bus.protocol import BEFORE_FIRST, BusLimits, parse_entry_id
from sdar.bus.redis import RedisBus
from sdar.config import RunConfig
from sdar.contracts import codec
from sdar.contracts.errors import SdarError
from sdar.contracts.streams import ConsumerGroup, RunKeys, Stream
from sdar.contracts.types import GroupOutcome, MetricRecord

_LOOK_EVERY_S = 0.5
_SAMPLE_EVERY_S = 1.0
_TIMEOUT_S = 2.0
_COMMITTED = (
    Stream.TASKS,
    Stream.TRAJECTORIES,
    Stream.SCORED,
    Stream.LEDGER,
    Stream.METRICS,
    Stream.POLICY_UPDATES,
)
_MAX_RECORDS = 5000


@dataclass(frozen=True, slots=True)
class Sample:
    """The account at one moment, and Redis' memory."""

    at_s: float
    counts: dict[str, int]
    gap: int
    redis_bytes: int


@dataclass
class Seen:
    """What was seen so far.

    Times are Unix seconds; `ready_at_s` and `sign_at_s` hold when the request behind them began.
    """

    ready_at_s: dict[str, float] = field(default_factory=dict)
    sign_at_s: dict[str, float] = field(default_factory=dict)
    """Newest sign of progress of the services that are not asked for it in their logs."""
    status: dict[str, Any] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)
    num_samples_missed: int = 0
    records: list[MetricRecord] = field(default_factory=list)
    env_gauges: dict[str, float] = field(default_factory=dict)


class Observer:
    """Use as a context manager; `loop` is the thread's, for the links.

    Args:
        urls: where each service answers probes, once `watch` is called.
    """

    def __init__(self, config: RunConfig, redis_url: str) -> None:
        self.seen = Seen()
        self.failure: BaseException | None = None
        self.loop = asyncio.new_event_loop()
        self._config = config
        self._redis_url = redis_url
        self._thread = threading.Thread(target=self._run_loop, name="observer", daemon=True)
        self._tasks: list[asyncio.Task[None]] = []
        self._num_opened = 0.0
        self._cursor = BEFORE_FIRST

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.call(self._stop)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()

    def call(self, function: Callable[[], Awaitable[Any]], timeout_s: float = 20.0) -> Any:
        """Run a coroutine function in the observer's thread and wait for its result."""

        async def run() -> Any:
            return await function()

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(timeout_s)

    def watch(self, urls: dict[str, str]) -> None:
        """Begin to look."""

        async def begin() -> None:
            self._http = httpx.AsyncClient(timeout=_TIMEOUT_S)
            self._bus = RedisBus(
                self._redis_url,
                self._config.name,
                self._config.stream_consumers,
                BusLimits(outage_tolerance_s=_TIMEOUT_S),
            )
            self._redis = redis.asyncio.Redis.from_url(self._redis_url, socket_timeout=_TIMEOUT_S)
            for name, url in urls.items():
                self._start(self._every(_LOOK_EVERY_S, self._look_at(name, url)))
            self._start(self._every(_LOOK_EVERY_S, self._look_at_redis))
            self._start(self._every(_SAMPLE_EVERY_S, self._sample))

        self.call(begin)

    def list_closed(self) -> dict[GroupOutcome, list[int]]:
        """Numbers of all closed groups by outcome, as the account has them now."""

        async def read() -> dict[GroupOutcome, list[int]]:
            return {outcome: await self._bus.list_closed(outcome) for outcome in CLOSING}

        found: dict[GroupOutcome, list[int]] = self.call(read)
        return found

    def find_held(self, consumer: str, report: Callable[[list[str]], None]) -> None:
        """Report, once Redis answers, the entries of the task groups that a worker holds.

        Returns at once; `report` is called in the observer's thread.
        """
        stream = RunKeys(self._config.name).stream(Stream.TASKS)
        group = ConsumerGroup.ROLLOUT.value

        async def read() -> None:
            while True:
                # Redis may be the next to be killed: it is asked until it answers.
                with contextlib.suppress(redis.RedisError):
                    found = await self._redis.xpending_range(
                        stream, group, "-", "+", _MAX_RECORDS, consumername=consumer
                    )
                    report([entry["message_id"].decode() for entry in found])
                    return
                await asyncio.sleep(_LOOK_EVERY_S)

        self.loop.call_soon_threadsafe(self._start, read())

    def read_account(self) -> LedgerAccount:
        found: LedgerAccount = self.call(self._bus.read_ledger)
        return found

    def catch_up(self) -> int:
        """Read what is left of the metric records; returns the number of dead letters."""

        async def read() -> int:
            await self._read_records()
            return await self._bus.count_dead_letters()

        found: int = self.call(read)
        return found

    # ---- the thread

    def _run_loop(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()

    async def _stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._tasks:
            await self._http.aclose()
            await self._bus.close()
            await self._redis.aclose()

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        """In the loop's thread: a task that is over at the end and whose failure is the run's."""
        task = self.loop.create_task(work)
        task.add_done_callback(self._note_failure)
        self._tasks.append(task)

    def _note_failure(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is not None:
            self.failure = self.failure or task.exception()

    async def _every(self, interval_s: float, look: Callable[[], Awaitable[None]]) -> None:
        while True:
            began = self.loop.time()
            # What is away is not news: faults take it away, and its return is what is waited for.
            with contextlib.suppress(httpx.HTTPError, SdarError, TimeoutError):
                await look()
            await asyncio.sleep(max(0.0, began + interval_s - self.loop.time()))

    def _look_at(self, name: str, url: str) -> Callable[[], Awaitable[None]]:
        async def look() -> None:
            began_s = time.time()
            answer = await self._http.get(f"{url}/readyz")
            if answer.status_code == httpx.codes.OK:
                self.seen.ready_at_s[name] = began_s
            if name == GATEWAY:
                await self._read_status(url)
            elif name == ENVS:
                await self._read_envs(url)

        return look

    async def _read_status(self, url: str) -> None:
        began_s = time.time()
        answer = await self._http.get(f"{url}/v1/run")
        if answer.status_code == httpx.codes.OK:
            self.seen.status = answer.json()
            self.seen.sign_at_s[GATEWAY] = began_s

    async def _read_envs(self, url: str) -> None:
        began_s = time.time()
        values = read_gauges((await self._http.get(f"{url}/metrics")).text)
        self.seen.env_gauges = values
        num_opened = values.get("sdar_env_sessions_opened_total", 0.0)
        # A smaller number is that of a new process, and a sign as well.
        if num_opened not in (0.0, self._num_opened):
            self.seen.sign_at_s[ENVS] = began_s
        self._num_opened = num_opened

    async def _look_at_redis(self) -> None:
        async with asyncio.timeout(_TIMEOUT_S):
            began_s = time.time()
            entries = [await self._bus.newest(stream) for stream in _COMMITTED]
            self.seen.ready_at_s[REDIS] = began_s
            # An entry's id begins with the milliseconds of its commit.
            ids_ms = [parse_entry_id(entry.entry_id)[0] for entry in entries if entry is not None]
            self.seen.sign_at_s[REDIS] = max(ids_ms, default=0) / 1000.0

    async def _sample(self) -> None:
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                account = await self._bus.read_ledger()
                memory = await self._bus.memory()
                self.seen.samples.append(
                    Sample(time.time(), account.counts(), account.find_gap(), memory.used_bytes)
                )
                await self._read_records()
        except (SdarError, TimeoutError):
            self.seen.num_samples_missed += 1

    async def _read_records(self) -> None:
        while entries := await self._bus.tail(Stream.METRICS, self._cursor, _MAX_RECORDS):
            self._cursor = entries[-1].entry_id
            self.seen.records += [codec.decode_metric_record(entry.payload) for entry in entries]


def read_gauges(text: str) -> dict[str, float]:
    """Values of a Prometheus page by name, summed over labels."""
    values: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            values[sample.name] = values.get(sample.name, 0.0) + sample.value
    return values
