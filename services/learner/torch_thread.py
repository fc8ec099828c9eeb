"""The one thread in which a learner's torch runs, so that the event loop never waits for a step."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable
from concurrent.futures import Executor
from functools import partial
from typing import ParamSpec, TypeVar

import structlog

from sdar.contracts.errors import CapacityError, WeightsUnavailableError
from sdar.process.lifecycle import wait_or_stop
from sdar.process.telemetry import Health

log = structlog.get_logger()

P = ParamSpec("P")
T = TypeVar("T")


class TorchThread:
    """Runs functions in a thread and waits for them.

    Args:
        executor: of one thread.
        health: reports a disk or store that is waited for.
        storage_retry_s: between two tries to write to it.
    """

    def __init__(self, executor: Executor, health: Health, storage_retry_s: float) -> None:
        self._executor = executor
        self._health = health
        self._storage_retry_s = storage_retry_s

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The result of a function, once all that was asked for before is done."""
        # With this context, in which a log line finds the service's name.
        call = partial(contextvars.copy_context().run, function, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._executor, call)

    async def insist(
        self,
        stopping: asyncio.Event,
        function: Callable[P, T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        """As `run`, again and again while a full disk or an absent store refuses: a restart would
        meet the same.

        Raises:
            CapacityError, WeightsUnavailableError: still refused when `stopping` was set.
        """
        # Nothing of torch is lost meanwhile: what is to be written stays in `args`.
        while True:
            try:
                result = await self.run(function, *args, **kwargs)
            except (CapacityError, WeightsUnavailableError) as error:
                log.error("storage_refused", error=error.message, retry_in_s=self._storage_retry_s)
                self._health.report_blocked(error.message)
                if await wait_or_stop(stopping, self._storage_retry_s):
                    raise
            else:
                self._health.report_blocked("")
                return result
