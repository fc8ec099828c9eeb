"""Keeps the sessions of an environment server: their number, leases, retries and ends.

One event loop owns a `SessionManager`; nothing here is thread-safe. Its `Host` plays the episodes.
It knows no wire format.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
import time
import uuid
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import structlog

from sdar.contracts.errors import (
    CapacityError,
    ConflictError,
    EnvironmentFailedError,
    InvalidInputError,
    UnavailableError,
    UnknownResourceError,
)
from sdar.contracts.types import Task
from sdar.environments.base import EnvironmentDescription, Observation, StepResult
from sdar.environments.hosts import Host, build_failure
from sdar.environments.measurements import (
    CAPACITY,
    FAILURES,
    METERS,
    OPENED,
    REAPED,
    SESSIONS,
    STEP_SECONDS,
    STEPS,
)

T = TypeVar("T")

log = structlog.get_logger()

MAX_KEY_CHARACTERS = 128
MAX_TASK_ID_CHARACTERS = 1024
_MAX_LOST = 10_000
"""Failed sessions remembered at most: what a client needs is its own, and soon."""


@dataclass(frozen=True, slots=True)
class SessionLimits:
    """Bounds the manager enforces; times in seconds."""

    max_sessions: int = 512
    max_sessions_per_client: int = 0
    """0 for all there are."""
    max_text_bytes: int = 1 << 20
    step_timeout_s: float = 30.0
    default_lease_s: float = 300.0
    max_lease_s: float = 3600.0


@dataclass(frozen=True, slots=True)
class OpenedSession:
    session_id: str
    task: Task
    observation: Observation
    lease_s: float


@dataclass(frozen=True, slots=True)
class _Request:
    """What an open asked for: a retry must ask for the same."""

    environment: str
    task_id: str
    seed: int
    lease_s: float


@dataclass(slots=True)
class _Step:
    index: int
    text: str
    answer: asyncio.Task[StepResult]


@dataclass(slots=True)
class _Session:
    """`last_step` is the newest step, perhaps still being played; older answers are forgotten."""

    session_id: str
    environment: str
    lease_s: float
    expires_at: float
    idempotency_key: str
    client: str = ""
    last_step: _Step | None = None

    @property
    def next_index(self) -> int:
        return 0 if self.last_step is None else self.last_step.index + 1

    @property
    def is_busy(self) -> bool:
        return self.last_step is not None and not self.last_step.answer.done()


@dataclass(slots=True)
class _Keyed:
    request: _Request
    opening: asyncio.Task[OpenedSession]


@dataclass(frozen=True, slots=True)
class _Lost:
    """A session that failed: the answer to later calls for it, until `forget_at`."""

    reason: str
    environment: str
    forget_at: float


@dataclass
class SessionManager:
    """Opens, steps, closes and reaps sessions of the host's environments. One class because every
    call, the reaper and the host's losses change the same table of sessions and places.

    At most `limits.max_sessions` are open at once, in all environments together. Call `start`
    first.

    Args:
        clock: seconds, monotonic; leases are measured by it.
    """

    host: Host
    limits: SessionLimits = SessionLimits()
    clock: Callable[[], float] = time.monotonic
    _sessions: dict[str, _Session] = field(default_factory=dict, init=False)
    _lost: dict[str, _Lost] = field(default_factory=dict, init=False)
    _keyed: dict[str, _Keyed] = field(default_factory=dict, init=False)
    _opening: dict[asyncio.Task[OpenedSession], str] = field(default_factory=dict, init=False)
    """What is being opened, and for which client."""
    _is_draining: bool = field(default=False, init=False)
    _closed: asyncio.Event = field(default_factory=asyncio.Event, init=False)

    @property
    def num_sessions(self) -> int:
        """Places taken: open sessions and those being opened."""
        return len(self._sessions) + len(self._opening)

    async def start(self) -> None:
        """Build the environments. Raises ConfigurationError for one that cannot be built."""
        METERS.set(CAPACITY, self.limits.max_sessions)
        await self.host.start(self.limits.step_timeout_s, self._lose)
        for name in self.host.names:
            # There at 0, so that the first one is seen as an increase.
            METERS.count(FAILURES, 0, environment=name)

    def describe(self, environment: str) -> EnvironmentDescription:
        """Raises UnknownResourceError: no environment of that name here."""
        return self.host.describe(environment)

    async def list_tasks(
        self, environment: str, split: str, start: int = 0, end: int | None = None
    ) -> Sequence[Task]:
        """The tasks of a split from `start` to before `end`, or all.

        Raises UnknownResourceError.
        """
        splits = self.host.describe(environment).splits
        if split not in splits:
            raise UnknownResourceError(
                f"Environment {environment} has no split {split!r}. Use one of "
                f"{', '.join(splits)}.",
                environment=environment,
                split=split,
            )
        if end is None:
            end = splits[split]
        return await self.host.list_tasks(environment, split, start, end)

    async def open(
        self,
        environment: str,
        task_id: str,
        seed: int,
        *,
        idempotency_key: str = "",
        lease_s: float = 0.0,
        client: str = "",
    ) -> OpenedSession:
        """Start an episode; with a key, a repeated call gets the same session while that lives.

        Args:
            idempotency_key: unique per session wanted; "" is never deduplicated.
            lease_s: idle seconds after which the session may be reaped, 0 for the default; cut to
                the longest allowed.
            client: whose session it is; each may hold `limits.max_sessions_per_client`.

        Raises:
            UnknownResourceError: no such environment or task.
            InvalidInputError: a bad key or lease.
            CapacityError: all places are taken.
            ConflictError: the key was used with another task, seed or lease.
            EnvironmentFailedError: the environment did not start.
            UnavailableError: the server is shutting down.
        """
        request = _Request(environment, task_id, seed, self._grant_lease(lease_s))
        _check_length("idempotency_key", idempotency_key, MAX_KEY_CHARACTERS)
        _check_length("task_id", task_id, MAX_TASK_ID_CHARACTERS)
        # The reaper runs once in a while: a place, or a key, may be that of an expired session.
        if self._find_full(client) or idempotency_key in self._keyed:
            self.reap()

        if not idempotency_key:
            return await self._open_once(request, client)
        opening = self._find_or_start(request, idempotency_key, client)
        # Shielded: the caller's deadline must not tear down what its retry will ask for.
        opened = await asyncio.shield(opening)
        self._renew(opened.session_id)
        return opened

    async def step(self, session_id: str, step_index: int, text: str) -> StepResult:
        """Play one step, or repeat the answer of the last one if index and text are the last one's.

        Raises:
            UnknownResourceError: the session is closed, expired or never was.
            InvalidInputError: text over the limit.
            ConflictError: another index than the next, another text for the last one, or a step
                after the end.
            EnvironmentFailedError: the environment broke, now or earlier; the session is gone.
        """
        session = self._live(session_id)
        last = session.last_step
        if last is None or step_index != last.index:
            self._check_next(session, step_index, text)
            answer = _spawn(self._play(session, step_index, text))
            last = _Step(step_index, text, answer)
            session.last_step = last
        elif text != last.text:
            raise self._conflict(
                session,
                f"step {step_index} was taken with another text. Retry with the same text.",
            )
        # Shielded: a caller that gives up must not leave half a step behind.
        result = await asyncio.shield(last.answer)
        self._renew(session_id)
        return result

    def close(self, session_id: str) -> None:
        """End a session and free its place; an unknown id changes nothing."""
        self._lost.pop(session_id, None)
        session = self._sessions.get(session_id)
        if session is not None:
            self._drop(session)

    def reap(self) -> int:
        """Close the sessions whose lease ran out; returns how many.

        One in the middle of a step is left alone: its caller waits for the answer.
        """
        expired = [session for session in self._sessions.values() if self._is_expired(session)]
        for session in expired:
            log.info(
                "session_reaped",
                session_id=session.session_id,
                environment=session.environment,
                lease_s=session.lease_s,
            )
            METERS.count(REAPED)
            self._drop(session)

        now = self.clock()
        self._lost = {key: lost for key, lost in self._lost.items() if now < lost.forget_at}
        return len(expired)

    async def drain(self, timeout_s: float) -> None:
        """Open no more sessions, and wait until callers have closed those that are open.

        The wait ends with the timeout.
        """
        self._is_draining = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self.num_sessions:
                    self._closed.clear()
                    await self._closed.wait()

    async def close_all(self) -> None:
        """Give up what is being opened, and close every session. Call it once no caller is left."""
        for opening in self._opening:
            opening.cancel()
        await asyncio.gather(*self._opening, return_exceptions=True)
        for session in list(self._sessions.values()):
            self._drop(session)
        await self.host.stop()

    def _find_or_start(
        self, request: _Request, key: str, client: str
    ) -> asyncio.Task[OpenedSession]:
        """The opening under this key, begun now if there is none yet."""
        keyed = self._keyed.get(key)
        if keyed is None:
            # Entered before anything is awaited: a retry that comes meanwhile must find it.
            opening = self._start_opening(request, key, client)
            self._keyed[key] = _Keyed(request, opening)
            return opening

        earlier = keyed.request
        if earlier != request:
            raise ConflictError(
                f"Idempotency key {key!r} opened task {earlier.task_id!r} of "
                f"{earlier.environment} with seed {earlier.seed}; got {request.task_id!r} of "
                f"{request.environment}, seed {request.seed}. Use a fresh key per session.",
                idempotency_key=key,
            )
        return keyed.opening

    async def _open_once(self, request: _Request, client: str) -> OpenedSession:
        opening = self._start_opening(request, "", client)
        try:
            return await asyncio.shield(opening)
        except asyncio.CancelledError:
            # Its caller gave up, and without a key nobody can ask for it again.
            opening.add_done_callback(self._abandon)
            raise

    def _abandon(self, opening: asyncio.Task[OpenedSession]) -> None:
        if not opening.cancelled() and opening.exception() is None:
            self.close(opening.result().session_id)

    def _start_opening(
        self, request: _Request, key: str, client: str
    ) -> asyncio.Task[OpenedSession]:
        """Reserve a place now, and build the episode in a task that frees the place if it fails."""
        self.host.describe(request.environment)
        if self._is_draining:
            raise UnavailableError(
                "This environment server is shutting down. Open the session on another, or once it "
                "is back."
            )
        full = self._find_full(client)
        if full:
            raise CapacityError(
                f"{full}. Retry after a while, or close finished sessions.",
                max_sessions=self.limits.max_sessions,
            )
        opening = _spawn(self._open(request, key, client))
        self._opening[opening] = client
        return opening

    def _find_full(self, client: str) -> str:
        """Which bound leaves this client no place; empty if there is one."""
        if self.num_sessions >= self.limits.max_sessions:
            return f"All {self.limits.max_sessions} sessions are taken (environment.capacity)"
        bound = self.limits.max_sessions_per_client
        if bound:
            num_held = sum(session.client == client for session in self._sessions.values())
            num_opening = sum(owner == client for owner in self._opening.values())
            if num_held + num_opening >= bound:
                return f"This client holds its {bound} sessions (SDAR_MAX_SESSIONS_PER_CLIENT)"
        return ""

    async def _open(self, request: _Request, key: str, client: str) -> OpenedSession:
        # Of ours, and not to be guessed: who knows it may play the session.
        session_id = uuid.uuid4().hex
        try:
            task, observation = await self.host.open(
                session_id, request.environment, request.task_id, request.seed
            )
        except BaseException as error:
            # Also on a cancellation. A retry under the key begins anew, and what the host may have
            # built is closed.
            self._keyed.pop(key, None)
            self.host.close(session_id, request.environment)
            if isinstance(error, EnvironmentFailedError):
                METERS.count(FAILURES, environment=request.environment)
            raise
        finally:
            # Here and not in a done-callback: the place must not count twice once the session is in
            # the books.
            self._opening.pop(cast("asyncio.Task[OpenedSession]", asyncio.current_task()), None)
            self._closed.set()

        self._enter(session_id, request, key, client)
        seeded = dataclasses.replace(task, seed=request.seed)
        return OpenedSession(session_id, seeded, observation, request.lease_s)

    def _enter(self, session_id: str, request: _Request, key: str, client: str) -> None:
        expires_at = self.clock() + request.lease_s
        self._sessions[session_id] = _Session(
            session_id, request.environment, request.lease_s, expires_at, key, client
        )
        METERS.set(SESSIONS, self.num_sessions)
        METERS.count(OPENED, environment=request.environment)

    async def _play(self, session: _Session, step_index: int, text: str) -> StepResult:
        environment = session.environment
        began_s = time.perf_counter()
        try:
            result = await self.host.step(session.session_id, environment, text)
        except EnvironmentFailedError as error:
            self._fail(session, error.message)
            raise

        METERS.count(STEPS, environment=environment)
        duration_s = time.perf_counter() - began_s
        METERS.observe(STEP_SECONDS, duration_s, environment=environment)
        # Cut here as well as in the environment: one that forgets its own limit must not go on.
        if step_index + 1 >= self.host.describe(environment).max_turns and not result.is_over:
            return dataclasses.replace(result, truncated=True)
        return result

    def _lose(self, session_ids: Sequence[str], reason: str) -> None:
        """Forget sessions whose worker died.

        One that is still being opened is not in the table: its opening fails by itself.
        """
        for session_id in session_ids:
            session = self._sessions.get(session_id)
            if session is not None:
                self._fail(session, build_failure(session.environment, reason).message)

    def _fail(self, session: _Session, reason: str) -> None:
        if session.session_id not in self._sessions:
            return
        self._drop(session)
        METERS.count(FAILURES, environment=session.environment)

        # Remembered for a lease: its caller's next call must say why, not that it never was.
        forget_at = self.clock() + session.lease_s
        self._lost[session.session_id] = _Lost(reason, session.environment, forget_at)
        if len(self._lost) > _MAX_LOST:
            oldest = next(iter(self._lost))
            del self._lost[oldest]

    def _drop(self, session: _Session) -> None:
        if self._sessions.pop(session.session_id, None) is None:
            return
        self._keyed.pop(session.idempotency_key, None)
        METERS.set(SESSIONS, self.num_sessions)
        self._closed.set()
        self.host.close(session.session_id, session.environment)

    def _grant_lease(self, lease_s: float) -> float:
        if not math.isfinite(lease_s) or lease_s < 0:
            raise InvalidInputError(
                f"lease_s is {lease_s}; ask for a number of seconds of at least 0 (0: the default)."
            )
        return min(lease_s or self.limits.default_lease_s, self.limits.max_lease_s)

    def _live(self, session_id: str) -> _Session:
        lost = self._lost.get(session_id)
        if lost is not None and self.clock() < lost.forget_at:
            raise EnvironmentFailedError(
                lost.reason, session_id=session_id, environment=lost.environment
            )

        session = self._sessions.get(session_id)
        if session is None or self._is_expired(session):
            raise UnknownResourceError(
                f"No session {session_id!r}: it was closed, failed, or idle for longer than its "
                "lease. Open another.",
                session_id=session_id,
            )
        return session

    def _is_expired(self, session: _Session) -> bool:
        return self.clock() >= session.expires_at and not session.is_busy

    def _renew(self, session_id: str) -> None:
        session = self._sessions.get(session_id)
        if session is not None:
            session.expires_at = self.clock() + session.lease_s

    def _check_next(self, session: _Session, step_index: int, text: str) -> None:
        if step_index != session.next_index:
            raise self._conflict(
                session,
                f"got step_index {step_index}, expected {session.next_index}. Send steps in order.",
            )
        # A client plays one step at a time, so this is a second one on the same session.
        if session.is_busy:
            raise self._conflict(
                session, f"step {step_index - 1} is still being played. Wait for its answer."
            )
        if session.last_step is not None and session.last_step.answer.result().is_over:
            raise self._conflict(
                session,
                f"step {step_index} comes after the end of the episode. Close it and open another.",
            )
        self._check_size(session, step_index, text)

    def _check_size(self, session: _Session, step_index: int, text: str) -> None:
        size_bytes = len(text.encode())
        if size_bytes > self.limits.max_text_bytes:
            raise InvalidInputError(
                f"Session {session.session_id} step {step_index}: text of {size_bytes} bytes, the "
                f"limit is {self.limits.max_text_bytes}. Bound the response's tokens.",
                max_text_bytes=self.limits.max_text_bytes,
            )

    @staticmethod
    def _conflict(session: _Session, problem: str) -> ConflictError:
        return ConflictError(
            f"Session {session.session_id}: {problem}",
            session_id=session.session_id,
            next_step_index=session.next_index,
        )


def _check_length(name: str, value: str, limit: int) -> None:
    if len(value) > limit:
        raise InvalidInputError(
            f"{name} has {len(value)} characters, the limit is {limit}. Shorten it."
        )


def _spawn(work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    """A task whose failure is no news if its caller has given up."""
    task = asyncio.create_task(work)
    task.add_done_callback(lambda done: done.cancelled() or done.exception())
    return task
