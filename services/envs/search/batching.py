"""Collects simultaneous queries into batches for the retriever, with a bound on the wait."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import structlog
from prometheus_client import REGISTRY

from sdar.contracts.errors import CapacityError, UnavailableError
from sdar.process.measurements import Counter, Declarations, Gauge, Histogram, Meters
from services.envs.search.passages import Hit, Retriever

MAX_BATCH_QUERIES = 256
"""A batch takes whole requests while it has no more queries than this, and always one."""
MAX_WAITING_QUERIES = 8192

log = structlog.get_logger()

RETRIEVER = Declarations()

QUERIES = RETRIEVER.declare(Counter("sdar_retriever_queries_total", "queries", "Queries answered."))
FAILURES = RETRIEVER.declare(
    Counter("sdar_retriever_failures_total", "failures", "Batches on which the retriever failed.")
)
WAITING = RETRIEVER.declare(
    Gauge("sdar_retriever_waiting_queries", "queries", "Queries that wait for their batch.")
)
BATCH_QUERIES = RETRIEVER.declare(
    Histogram(
        "sdar_retriever_batch_queries",
        "queries",
        "Queries of a batch.",
        buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256, 1024),
    )
)
BATCH_SECONDS = RETRIEVER.declare(
    Histogram("sdar_retriever_batch_seconds", "seconds", "Seconds that a batch took.")
)

METERS = Meters(RETRIEVER, REGISTRY)
"""Of this process: it has one retriever."""


@dataclass(slots=True)
class _Request:
    queries: Sequence[str]
    topk: int
    answer: asyncio.Future[list[list[Hit]]]


class Batcher:
    """Collects requests into a batch while the batch before it is ranked in a thread.

    No request waits for company: on an idle retriever it is a batch by itself. Use it as a context.
    """

    def __init__(self, retriever: Retriever) -> None:
        self._retriever = retriever
        self._waiting: deque[_Request] = deque()
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="retriever")

    async def __aenter__(self) -> Batcher:
        self._loop = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._loop.cancel()
        await asyncio.gather(self._loop, return_exceptions=True)
        # Whoever still waits must not wait for ever.
        for request in self._waiting:
            request.answer.cancel()
        self._thread.shutdown()

    async def retrieve(self, queries: Sequence[str], topk: int) -> list[list[Hit]]:
        """The hits of each query.

        Raises:
            CapacityError: too many wait already. UnavailableError: the retriever failed.
        """
        num_waiting = self._count_waiting()
        if num_waiting + len(queries) > MAX_WAITING_QUERIES:
            raise CapacityError(
                f"{num_waiting} queries wait already, the limit is {MAX_WAITING_QUERIES}. Retry "
                "after a while, or run more retrievers."
            )
        request = _Request(queries, topk, asyncio.get_running_loop().create_future())
        self._waiting.append(request)
        METERS.set(WAITING, self._count_waiting())
        self._arrived.set()
        return await request.answer

    async def _run(self) -> None:
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            while self._waiting:
                await self._answer(self._take_batch())

    def _take_batch(self) -> list[_Request]:
        batch = [self._waiting.popleft()]
        num_queries = len(batch[0].queries)
        while self._waiting:
            num_next = len(self._waiting[0].queries)
            if num_queries + num_next > MAX_BATCH_QUERIES:
                break
            batch.append(self._waiting.popleft())
            num_queries += num_next
        METERS.set(WAITING, self._count_waiting())
        METERS.observe(BATCH_QUERIES, num_queries)
        return batch

    def _count_waiting(self) -> int:
        return sum(len(request.queries) for request in self._waiting)

    async def _answer(self, batch: Sequence[_Request]) -> None:
        queries: list[str] = []
        for request in batch:
            queries += request.queries
        # One number for the batch: each request takes its own share of what was found.
        topk = max(request.topk for request in batch)
        began_s = time.perf_counter()
        try:
            found = await asyncio.get_running_loop().run_in_executor(
                self._thread, self._retriever.retrieve, queries, topk
            )
        # The boundary: one failed batch must not end the service.
        except Exception as error:
            METERS.count(FAILURES)
            log.warning("retriever_failed", num_queries=len(queries), exc_info=error)
            failure = UnavailableError(
                f"The retriever failed on this request: {type(error).__name__}: {error}. Retry it."
            )
            for request in batch:
                _set(request.answer, failure)
            return
        finally:
            METERS.observe(BATCH_SECONDS, time.perf_counter() - began_s)

        METERS.count(QUERIES, len(queries))
        rest = iter(found)
        for request in batch:
            own = itertools.islice(rest, len(request.queries))
            _set(request.answer, [hits[: request.topk] for hits in own])


def _set(
    answer: asyncio.Future[list[list[Hit]]], outcome: list[list[Hit]] | UnavailableError
) -> None:
    # Its caller went away.
    if answer.done():
        return
    if isinstance(outcome, UnavailableError):
        answer.set_exception(outcome)
    else:
        answer.set_result(outcome)
