"""The life of a service: it runs until SIGTERM or until one of its tasks dies, drains and stops."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any

import structlog

log = structlog.get_logger()


async def run_until_stopped(*mains: Callable[[asyncio.Event], Coroutine[Any, Any, None]]) -> None:
    """Run the coroutines together until one fails, all return, or SIGTERM/SIGINT asks to drain.

    Each gets an event that is set when it should finish its unit of work and return. The first
    failure sets it for the others too and is raised after they have returned: no service lives on
    half alive.
    """
    stopping = asyncio.Event()
    _stop_on_signals(stopping)
    tasks = [
        asyncio.create_task(main(stopping), name=getattr(main, "__qualname__", "main"))
        for main in mains
    ]
    in_order = await _wait_for_all(tasks, stopping)
    # Asked of every task: asyncio prints the traceback of an error that nobody took.
    errors = [error for task in in_order if not task.cancelled() and (error := task.exception())]
    if errors:
        raise errors[0]


def _stop_on_signals(stopping: asyncio.Event) -> None:
    # Only a main thread can own signals. There a failure to take them is raised: a service that
    # cannot drain must not start.
    if threading.current_thread() is threading.main_thread():
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stopping.set)


async def _wait_for_all(
    tasks: Sequence[asyncio.Task[Any]], stopping: asyncio.Event
) -> list[asyncio.Task[Any]]:
    """Wait for the first failure or for all, then for the rest; returns them in that order."""
    try:
        done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        # The others end their unit of work: cancelled in its middle they would leave it half done.
        stopping.set()
        if pending:
            await asyncio.wait(pending)
    except asyncio.CancelledError:
        # Whoever runs the service gives it up. Its tasks must not outlive it.
        stopping.set()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
    return [*done, *pending]


async def wait_or_stop(stopping: asyncio.Event, timeout_s: float) -> bool:
    """Wait until `stopping` is set or the time is over; returns whether it is set."""
    with contextlib.suppress(TimeoutError):
        # Not asyncio.wait_for: before Python 3.12 it can swallow a cancellation.
        async with asyncio.timeout(timeout_s):
            await stopping.wait()
    return stopping.is_set()


async def retry_while_unavailable(
    action: Callable[[], Awaitable[None]],
    stopping: asyncio.Event,
    *,
    what: str,
    max_delay_s: float = 5.0,
) -> None:
    """Repeat `action` while it raises UnavailableError, until it succeeds or the service stops.

    The delay between two tries doubles each time, up to `max_delay_s`.
    """
    from sdar.contracts.errors import UnavailableError

    delay_s = 0.2
    while not stopping.is_set():
        try:
            return await action()
        except UnavailableError as error:
            log.warning("dependency_unavailable", what=what, error=str(error), retry_in_s=delay_s)
            await wait_or_stop(stopping, delay_s)
            delay_s = min(delay_s * 2, max_delay_s)
