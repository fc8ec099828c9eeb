"""Serves environments to code of the same process, without worker processes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from sdar.environments.base import Environment
from sdar.environments.hosts import Host, build_failure
from sdar.environments.player import Answer, Player, Request


class InProcessHost(Host):
    """Plays in this process: for a whole run in one process, and for tests.

    Only blocking environments have a deadline: the others hold the event loop while they play.

    Args:
        builders: makes an instance of each environment.
    """

    def __init__(self, builders: Mapping[str, Callable[[], Environment]]) -> None:
        super().__init__(builders)
        self._player = Player(builders)
        self._closing: set[asyncio.Future[Answer]] = set()

    @property
    def is_ready(self) -> bool:
        return True

    async def stop(self) -> None:
        if self._closing:
            await asyncio.wait(self._closing, timeout=self._step_timeout_s)
        self._player.close()

    def close(self, session_id: str, environment: str) -> None:
        closing = self._play(
            {"call": "close", "environment": environment, "arguments": {"session_id": session_id}}
        )
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)

    async def _ask(self, session_id: str, request: Request) -> Answer:
        try:
            async with asyncio.timeout(self._step_timeout_s):
                return await self._play(request)
        except TimeoutError as error:
            reason = f"hung for {self._step_timeout_s:g} s in {request['call']}"
            raise build_failure(request["environment"], reason) from error

    def _play(self, request: Request) -> asyncio.Future[Answer]:
        loop = asyncio.get_running_loop()
        answered: asyncio.Future[Answer] = loop.create_future()
        # By way of the loop: a blocking environment answers from a thread.
        self._player.play(
            request, lambda answer: loop.call_soon_threadsafe(_settle, answered, answer)
        )
        return answered


def _settle(answered: asyncio.Future[Answer], answer: Answer) -> None:
    # Done already where the caller gave up or the deadline passed.
    if not answered.done():
        answered.set_result(answer)
