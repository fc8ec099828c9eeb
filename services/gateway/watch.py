"""What is known of the bus, and what is wrong with the run, looked up once a second.

So no request has to wait for Redis.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import TypeVar

from sdar.bus.protocol import Bus, BusMemory, StreamLag
from sdar.contracts.errors import BusUnavailableError
from sdar.contracts.roles import REPORTING, Role
from sdar.contracts.streams import Stream
from sdar.process.lifecycle import wait_or_stop

from .alarms import AlarmBoard, BusCondition, BusState, Situation
from .metrics import GatewayMetrics
from .scheduler import Scheduler

T = TypeVar("T")

_REFRESH_S = 1.0
ANSWER_S = 2.0
"""Longest wait for Redis' answer to a small question: a status page and a dead letter are asked for
by people.
"""
_STARTUP_S = 300.0
"""An engine may take minutes to load its model: a service that never reported isn't missed before.
"""
_NEWEST_UPDATES = 20
_BUSY_PARTS = ("step_s", "publish_s", "checkpoint_s")


class Watch:
    """A second look at the bus beside the scheduler's, which may be waiting in a call of its own.

    Args:
        bus: one whose calls nobody else depends on: they are given up after `answer_s`.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        bus: Bus,
        metrics: GatewayMetrics | None = None,
        clock: Callable[[], float] = time.time,
        answer_s: float = ANSWER_S,
    ) -> None:
        self.lags: dict[Stream, StreamLag] = {}
        self.memory = BusMemory(0, 0)
        self.num_dead_letters = 0
        self.condition = BusCondition(BusState.OK, clock())
        self.board = AlarmBoard()
        self.scaling_problem = ""
        """What keeps the scaler from its work, for the alarm."""
        self._scheduler = scheduler
        self._bus = bus
        self._metrics = metrics or GatewayMetrics()
        self._clock = clock
        self._answer_s = answer_s
        self._began_s = clock()
        self._progress = scheduler.progress
        self._progress_at_s = clock()
        self._was_blocked = False

    async def run(self, stopping: asyncio.Event) -> None:
        """Look once a second, until `stopping` is set."""
        while not stopping.is_set():
            await self.refresh()
            await wait_or_stop(stopping, _REFRESH_S)

    async def refresh(self) -> None:
        """Look now. Never raises for a Redis that is away."""
        try:
            await self.ask(self._look())
        except BusUnavailableError as error:
            self._change(BusState.UNREACHABLE, error.message)
        else:
            # Twice in a row: the scheduler's own call takes a moment to notice that Redis is back.
            blocked = self._scheduler.health.blocked or self._describe_fullness()
            is_full = bool(blocked) and self._was_blocked
            self._change(BusState.FULL if is_full else BusState.OK, blocked if is_full else "")
            self._was_blocked = bool(blocked)
        # Judged whether Redis answered or not: from what was seen last.
        self._note_progress()
        self.board.update(self._describe_situation())
        self._metrics.observe_bus(
            self.condition.state, self.lags, self.memory, self.num_dead_letters, self.board.alarms
        )

    def _describe_fullness(self) -> str:
        """That Redis has no room; empty if it has.

        A gateway with nothing to write would not find out from a refused write.
        """
        used = self.memory.used_bytes
        most = self.memory.max_bytes
        if not most or used < most:
            return ""
        return f"Redis is full ({used} of {most} bytes). Raise its maxmemory."

    async def ask(self, question: Awaitable[T]) -> T:
        """The answer to a question to Redis, for somebody who waits.

        Raises:
            BusUnavailableError: there is none in time.
        """
        try:
            async with asyncio.timeout(self._answer_s):
                return await question
        except TimeoutError as error:
            silence = f"Redis gave no answer within {self._answer_s:g} s."
            raise BusUnavailableError(self._scheduler.health.blocked or silence) from error

    async def _look(self) -> None:
        # Shown only when all is known: a half-finished look mixes two moments.
        lags: dict[Stream, StreamLag] = {}
        for stream, groups in self._scheduler.config.stream_consumers.items():
            for group in groups:  # one at most: one role reads a stream
                lags[stream] = await self._bus.stream_lag(stream, group)
        memory = await self._bus.memory()
        self.num_dead_letters = await self._bus.count_dead_letters()
        self.lags = lags
        self.memory = memory

    def _change(self, state: BusState, message: str) -> None:
        since_s = self.condition.since_s if state is self.condition.state else self._clock()
        self.condition = BusCondition(state, since_s, message)

    @property
    def progress_at_s(self) -> float:
        """When the run last got on, Unix time; no earlier than when it was last woken."""
        return max(self._progress_at_s, self._scheduler.control.woken_at_s)

    def compute_learner_busy_s(self) -> float:
        """The slowest of the learner's newest updates, seconds without its waiting; 0 before the
        first.
        """
        updates = self._scheduler.history.newest_values(Role.LEARNER, _NEWEST_UPDATES)
        return max(map(_compute_busy_s, updates), default=0.0)

    def _note_progress(self) -> None:
        if self._scheduler.progress != self._progress:
            self._progress = self._scheduler.progress
            self._progress_at_s = self._clock()

    def _describe_situation(self) -> Situation:
        scheduler = self._scheduler
        woken_s = scheduler.control.woken_at_s
        # A service that never reported, or has slept, may take minutes to come up.
        expected_s = max(self._began_s, woken_s) + _STARTUP_S
        return Situation(
            now_s=self._clock(),
            phase=scheduler.state.phase,
            bus=self.condition,
            memory=self.memory,
            lags=self.lags,
            heard_at_s=self._list_heard(expected_s),
            learner_busy_s=self.compute_learner_busy_s(),
            learner_input=scheduler.config.learner_input,
            num_dead_letters=self.num_dead_letters,
            ledger_gap=scheduler.ledger_gap,
            length_drift=scheduler.lengths.compute_drift(),
            progress_at_s=self.progress_at_s,
            is_asleep=scheduler.state.sleep is not None,
            expected_at_s=expected_s if woken_s else 0.0,
            scaling_problem=self.scaling_problem,
            misread=scheduler.history.find_misread(),
            action_format=self._find_action_format(),
            figures=scheduler.history.collect_figures(),
            dtype=scheduler.config.model.dtype,
        )

    def _find_action_format(self) -> str:
        found = self._scheduler.environments.get(self._scheduler.config.environment.name)
        return found.action_format if found else ""

    def _list_heard(self, expected_s: float) -> dict[str, float]:
        """When each role reported last, Unix time; `expected_s` if not since the run awoke."""
        heard: dict[str, float] = {}
        for role in REPORTING:
            at_s = self._scheduler.history.last_heard_s(role)
            if at_s is None or at_s < self._scheduler.control.woken_at_s:
                at_s = expected_s
            heard[role] = at_s
        return heard


def _compute_busy_s(values: Mapping[str, float]) -> float:
    return sum(values.get(part, 0.0) for part in _BUSY_PARTS)
