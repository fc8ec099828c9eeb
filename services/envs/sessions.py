"""Owns the lives of episodes: sessions with leases in bounded number, and steps that can be retried.

One event loop owns a `SessionManager`; nothing here is thread-safe. Environments that block are called in threads. It knows
no wire format.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import ParamSpec, TypeVar, cast

import structlog
from prometheus_client import Counter, Gauge

from sdar.contracts.errors import (
    CapacityError,
    ConflictError,
    EnvironmentFailedError,
    InvalidInputError,
    UnavailableError,
    UnknownResourceError,
)
from sdar.contracts.types import Task
from services.envs.base import Environment, EnvironmentDescription, Observation, StepResult

P = ParamSpec("P")
T = TypeVar("T")
EnvironmentFactory = Callable[[], Environment]

log = structlog.get_logger()
SESSIONS = Gauge("sdar_env_sessions", "Sessions that hold a place")
STEPS = Counter("sdar_env_steps_total", "Steps played", ["environment"])
REAPED = Counter("sdar_env_sessions_reaped_total", "Sessions whose lease ran out")
FAILURES = Counter("sdar_env_failures_total", "Episodes lost to a failing environment", ["environment"])

MAX_KEY_CHARACTERS = 128
_MAX_THREADS = 64


@dataclass(frozen=True, slots=True)
class SessionLimits:
    """Bounds the manager enforces; times in seconds."""

    max_sessions: int = 512
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
    game: Environment
    lease_s: float
    expires_at: float
    idempotency_key: str
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


@dataclass
class SessionManager:
    """Opens, steps, closes and reaps sessions of the named environments, at most `limits.max_sessions` at once in all.

    Args:
        environments: a factory per name; it makes one instance per session, and one that lists tasks.
        clock: seconds, monotonic; leases are measured by it.
    """

    environments: Mapping[str, EnvironmentFactory]
    limits: SessionLimits = SessionLimits()
    clock: Callable[[], float] = time.monotonic
    _catalogues: dict[str, Environment] = field(init=False)
    _sessions: dict[str, _Session] = field(default_factory=dict, init=False)
    _keyed: dict[str, _Keyed] = field(default_factory=dict, init=False)
    _opening: set[asyncio.Task[OpenedSession]] = field(default_factory=set, init=False)
    _is_draining: bool = field(default=False, init=False)
    _closed: asyncio.Event = field(default_factory=asyncio.Event, init=False)
    _threads: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(_MAX_THREADS, thread_name_prefix="environment"), init=False
    )

    def __post_init__(self) -> None:
        self._catalogues = {name: build() for name, build in self.environments.items()}

    @property
    def num_sessions(self) -> int:
        """Places taken: open sessions and those being opened."""
        return len(self._sessions) + len(self._opening)

    def describe(self, environment: str) -> EnvironmentDescription:
        """Raises UnknownResourceError: no environment of that name here."""
        return self._catalogue(environment).describe()

    async def list_tasks(self, environment: str, split: str) -> Sequence[Task]:
        """All tasks of a split. Raises UnknownResourceError for an unknown environment or split."""
        catalogue = self._catalogue(environment)
        return await self._guard(catalogue, catalogue.list_tasks, split)

    async def open(
        self, environment: str, task_id: str, seed: int, *, idempotency_key: str = "", lease_s: float = 0.0
    ) -> OpenedSession:
        """Start an episode; with a key, a repeated call gets the same session while that lives.

        Args:
            idempotency_key: unique per session wanted; "" is never deduplicated.
            lease_s: idle seconds after which the session may be reaped, 0 for the default; cut to the longest allowed.

        Raises:
            UnknownResourceError: no such environment or task. InvalidInputError: a bad key or lease.
            CapacityError: all places are taken. ConflictError: the key was used with another task, seed or lease.
            EnvironmentFailedError: the environment did not start. UnavailableError: the server is shutting down.
        """
        request = _Request(environment, task_id, seed, self._grant_lease(lease_s))
        _check_key(idempotency_key)
        if self.num_sessions >= self.limits.max_sessions or idempotency_key in self._keyed:
            await self.reap()
        if not idempotency_key:
            return await asyncio.shield(self._start_opening(request, ""))
        keyed = self._keyed.get(idempotency_key)
        if keyed is None:
            keyed = self._keyed[idempotency_key] = _Keyed(request, self._start_opening(request, idempotency_key))
        elif keyed.request != request:
            raise ConflictError(
                f"Idempotency key {idempotency_key!r} opened task {keyed.request.task_id!r} of {keyed.request.environment} "
                f"with seed {keyed.request.seed}; got {task_id!r} of {environment}, seed {seed}. Use a fresh key per session.",
                idempotency_key=idempotency_key,
            )
        # Shielded: the caller's deadline must not tear down what its retry will ask for.
        opened = await asyncio.shield(keyed.opening)
        self._renew(opened.session_id)
        return opened

    async def step(self, session_id: str, step_index: int, text: str) -> StepResult:
        """Play one step, or repeat the answer of the last one if index and text are the last one's.

        Raises:
            UnknownResourceError: the session is closed, expired or never was. InvalidInputError: text over the limit.
            ConflictError: another index than the next, another text for the last one, or a step after the end.
            EnvironmentFailedError: the environment broke; the session is gone.
        """
        session = self._live(session_id)
        last = session.last_step
        if last is not None and step_index == last.index:
            if text != last.text:
                raise self._conflict(session, f"step {step_index} was taken with another text. Retry with the same text.")
        else:
            self._check_next(session, step_index, text)
            last = _Step(step_index, text, asyncio.create_task(self._play(session, step_index, text)))
            session.last_step = last
        # Shielded: a caller that gives up must not leave half a step behind.
        result = await asyncio.shield(last.answer)
        self._renew(session_id)
        return result

    async def close(self, session_id: str) -> None:
        """End a session and free its place; closing what is not there succeeds."""
        session = self._sessions.get(session_id)
        if session is not None:
            await self._drop(session)

    async def reap(self) -> int:
        """Close the sessions whose lease ran out, save those in the middle of a step; returns how many."""
        expired = [session for session in self._sessions.values() if self._is_expired(session)]
        for session in expired:
            log.info("session_reaped", session_id=session.session_id, environment=session.game.name, lease_s=session.lease_s)
            REAPED.inc()
            await self._drop(session)
        return len(expired)

    async def drain(self, timeout_s: float) -> None:
        """Open no more sessions, and wait until callers have closed those that are open, but no longer than the timeout."""
        self._is_draining = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self.num_sessions:
                    self._closed.clear()
                    await self._closed.wait()

    async def close_all(self) -> None:
        """Wait for what is being opened, then close every session. Call it once no caller is left."""
        await asyncio.gather(*self._opening, return_exceptions=True)
        for session in list(self._sessions.values()):
            await self._drop(session)
        for catalogue in self._catalogues.values():
            await self._close_game(catalogue)
        self._threads.shutdown(wait=False)

    def _start_opening(self, request: _Request, key: str) -> asyncio.Task[OpenedSession]:
        """Reserve a place now, build without holding anything up, and give the place back if that fails."""
        catalogue = self._catalogue(request.environment)
        if self._is_draining:
            raise UnavailableError("This environment server is shutting down. Open the session on another, or once it is back.")
        if self.num_sessions >= self.limits.max_sessions:
            raise CapacityError(
                f"All {self.limits.max_sessions} sessions are taken. Retry after a while, close finished sessions, or raise "
                "environment.capacity.",
                max_sessions=self.limits.max_sessions,
            )
        opening = asyncio.create_task(self._open(catalogue, request, key))
        self._opening.add(opening)
        return opening

    async def _open(self, catalogue: Environment, request: _Request, key: str) -> OpenedSession:
        game: Environment | None = None
        try:
            task = await self._guard(catalogue, catalogue.get_task, request.task_id)
            game = self.environments[request.environment]()
            observation = await self._guard(game, game.reset, request.task_id, request.seed)
        except BaseException:
            self._keyed.pop(key, None)
            if game is not None:
                await self._close_game(game)
            raise
        finally:
            # Here and not in a done-callback: the place must not count twice once the session is in the books.
            self._opening.discard(cast("asyncio.Task[OpenedSession]", asyncio.current_task()))
            self._closed.set()
        session = _Session(uuid.uuid4().hex, game, request.lease_s, self.clock() + request.lease_s, key)
        self._sessions[session.session_id] = session
        SESSIONS.set(self.num_sessions)
        return OpenedSession(session.session_id, dataclasses.replace(task, seed=request.seed), observation, request.lease_s)

    async def _play(self, session: _Session, step_index: int, text: str) -> StepResult:
        game = session.game
        try:
            result = await self._guard(game, game.step, text)
            _check_result(game, result)
        except EnvironmentFailedError:
            await self._drop(session)
            raise
        STEPS.labels(game.name).inc()
        if step_index + 1 >= game.max_turns and not result.is_over:
            return dataclasses.replace(result, truncated=True)
        return result

    async def _guard(self, game: Environment, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call an environment; whatever it raises but refusals of the input becomes EnvironmentFailedError."""
        try:
            async with asyncio.timeout(self.limits.step_timeout_s):
                return await self._call(game, function, *args, **kwargs)
        except (UnknownResourceError, EnvironmentFailedError):
            raise
        # The boundary: an environment may break in any way, the server must not.
        except Exception as error:
            is_hung = isinstance(error, TimeoutError)
            reason = f"hung for {self.limits.step_timeout_s} s" if is_hung else f"raised {type(error).__name__}: {error}"
            FAILURES.labels(game.name).inc()
            log.warning("environment_failed", environment=game.name, call=function.__name__, reason=reason, exc_info=error)
            raise EnvironmentFailedError(
                f"Environment {game.name} {game.version} {reason} in {function.__name__}. The episode is lost; open another.",
                environment=game.name,
            ) from error

    async def _call(self, game: Environment, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        if not game.is_blocking:
            return function(*args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._threads, lambda: function(*args, **kwargs))

    async def _drop(self, session: _Session) -> None:
        # Out of the books before anything is awaited: nobody can step a session that is being closed.
        if self._sessions.pop(session.session_id, None) is None:
            return
        self._keyed.pop(session.idempotency_key, None)
        SESSIONS.set(self.num_sessions)
        self._closed.set()
        await self._close_game(session.game)

    async def _close_game(self, game: Environment) -> None:
        try:
            await self._call(game, game.close)
        except Exception as error:  # the boundary: the episode is over, no answer depends on this
            log.warning("environment_close_failed", environment=game.name, exc_info=error)

    def _catalogue(self, environment: str) -> Environment:
        if environment not in self._catalogues:
            raise UnknownResourceError(
                f"No environment {environment!r} is served here. Use one of {', '.join(self.environments) or 'none'}.",
                environment=environment,
            )
        return self._catalogues[environment]

    def _grant_lease(self, lease_s: float) -> float:
        if not math.isfinite(lease_s) or lease_s < 0:
            raise InvalidInputError(f"lease_s is {lease_s}; ask for a number of seconds of at least 0 (0: the default).")
        return min(lease_s or self.limits.default_lease_s, self.limits.max_lease_s)

    def _live(self, session_id: str) -> _Session:
        session = self._sessions.get(session_id)
        if session is None or self._is_expired(session):
            raise UnknownResourceError(
                f"No session {session_id!r}: it was closed, failed, or idle for longer than its lease. Open another.",
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
            raise self._conflict(session, f"got step_index {step_index}, expected {session.next_index}. Send steps in order.")
        if session.is_busy:
            raise self._conflict(session, f"step {step_index - 1} is still being played. Wait for its answer.")
        if session.last_step is not None and session.last_step.answer.result().is_over:
            raise self._conflict(session, f"step {step_index} comes after the end of the episode. Close it and open another.")
        size_bytes = len(text.encode())
        if size_bytes > self.limits.max_text_bytes:
            raise InvalidInputError(
                f"Session {session.session_id} step {step_index}: text of {size_bytes} bytes, the limit is "
                f"{self.limits.max_text_bytes}. Bound the response's tokens.",
                max_text_bytes=self.limits.max_text_bytes,
            )

    @staticmethod
    def _conflict(session: _Session, problem: str) -> ConflictError:
        return ConflictError(
            f"Session {session.session_id}: {problem}", session_id=session.session_id, next_step_index=session.next_index
        )


def _check_key(key: str) -> None:
    if len(key) > MAX_KEY_CHARACTERS:
        raise InvalidInputError(f"idempotency_key has {len(key)} characters, the limit is {MAX_KEY_CHARACTERS}. Shorten it.")


def _check_result(game: Environment, result: StepResult) -> None:
    """Nonsense from an environment must not reach training."""
    numbers = (result.reward, *result.reward_components.values())
    if not all(map(math.isfinite, numbers)) or (result.terminated and result.truncated):
        raise EnvironmentFailedError(
            f"Environment {game.name} {game.version} answered reward {result.reward}, components {result.reward_components}, "
            f"terminated {result.terminated}, truncated {result.truncated}. Rewards must be finite, at most one end true.",
            environment=game.name,
        )
