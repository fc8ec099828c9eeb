"""Collects simultaneous queries into batches for the retriever, with a bound on the wait."""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import structlog
from prometheus_client import Counter, Gauge, Histogram

from sdar.contracts.errors import CapacityError, UnavailableError
from services.envs.search.passages import Hit, Retriever

MAX_BATCH_QUERIES = 256
"""A batch takes whole requests while it has no more queries than this, and always one."""
MAX_WAITING_QUERIES = 8192

log = structlog.get_logger()
QUERIES = Counter("sdar_retriever_queries_total", "Queries answered")
FAILURES = Counter("sdar_retriever_failures_total", "Batches on which the retriever failed")
WAITING = Gauge("sdar_retriever_waiting_queries", "Queries that wait for their batch")
BATCH_SIZES = Histogram(
    "sdar_retriever_batch_queries",
    "Queries of a batch",
    buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256, 1024),
)
BATCH_SECONDS = Histogram("sdar_retriever_batch_seconds", "Seconds that a batch took")


@dataclass(slots=True)
class _Request:
    queries: Sequence[str]
    topk: int
    answer: asyncio.Future[list[list[Hit]]]


class Batcher:
    """While one batch is ranked in a thread, requests gather for the next: nobody waits for
    company. Use as a context.
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
        for request in self._waiting:
            request.answer.cancel()
        self._thread.shutdown()

    async def retrieve(self, queries: Sequence[str], topk: int) -> list[list[Hit]]:
        """The hits of each query.

        Raises:
            CapacityError: too many wait already. UnavailableError: the retriever failed.
        """
        num_waiting = sum(len(request.queries) for request in self._waiting)
        if num_waiting + len(queries) > MAX_WAITING_QUERIES:
            raise CapacityError(
                f"{num_waiting} queries wait already, the limit is {MAX_WAITING_QUERIES}. Retry "
                "after a while, or run more "
                "retrievers."
            )
        request = _Request(queries, topk, asyncio.get_running_loop().create_future())
        self._waiting.append(request)
        WAITING.set(num_waiting + len(queries))
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
        while self._waiting and num_queries + len(self._waiting[0].queries) <= MAX_BATCH_QUERIES:
            batch.append(self._waiting.popleft())
            num_queries += len(batch[-1].queries)
        WAITING.dec(num_queries)
        BATCH_SIZES.observe(num_queries)
        return batch

    async def _answer(self, batch: Sequence[_Request]) -> None:
        queries = list(itertools.chain.from_iterable(request.queries for request in batch))
        topk = max(request.topk for request in batch)
        try:
            with BATCH_SECONDS.time():
                found = await asyncio.get_running_loop().run_in_executor(
                    self._thread, self._retriever.retrieve, queries, topk
                )
        # The boundary: one failed batch must not end the service.
        except Exception as error:
            FAILURES.inc()
            log.warning("retriever_failed", num_queries=len(queries), exc_info=error)
            failure = UnavailableError(
                f"The retriever failed on this request: {type(error).__name__}: {error}. Retry it."
            )
            for request in batch:
                _set(request.answer, failure)
            return
        QUERIES.inc(len(queries))
        hits = iter(found)
        for request in batch:
            _set(request.answer, [next(hits)[: request.topk] for _ in request.queries])


def _set(
    answer: asyncio.Future[list[list[Hit]]], outcome: list[list[Hit]] | UnavailableError
) -> None:
    if answer.done():  # its caller went away
        return
    if isinstance(outcome, UnavailableError):
        answer.set_exception(outcome)
    else:
        answer.set_result(outcome)
