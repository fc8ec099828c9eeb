"""How a rollout worker talks to an environment: the `EnvironmentClient` protocol, and gRPC.

Answers are checked here, so that an environment that answers nonsense fails its episode and never
reaches training.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import structlog

from sdar.contracts.errors import (
    CapacityError,
    EnvironmentFailedError,
    InvalidInputError,
    SdarError,
    UnavailableError,
    UnknownResourceError,
)
from sdar.contracts.types import EnvironmentIdentity, Task
from sdar.v1 import environment_pb2
from sdar.wire.rpc_client import call
from sdar.wire.security import OPEN, Security
from services.rollout.environment_servers import EnvironmentServer, EnvironmentServers, Resolve

T = TypeVar("T")

log = structlog.get_logger()

OPEN_PATIENCE_S = 60.0
"""How long an environment that is away or full is waited for before an episode begins.

Only then does the attempt fail.
"""
_FIRST_OPEN_DELAY_S = 0.1
_LONGEST_OPEN_DELAY_S = 5.0
_CLOSE_PATIENCE_S = 5.0
"""How long a client that closes waits for sessions that were given up while they opened.

The server reaps the rest.
"""


@dataclass(frozen=True, slots=True)
class EnvironmentProfile:
    """What an episode needs to know before it begins, as the environment describes itself."""

    identity: EnvironmentIdentity
    instructions: str = ""
    action_format: str = ""


@dataclass(frozen=True, slots=True)
class Session:
    """An episode begun: the id by which its client knows it, and what the policy sees first."""

    session_id: str
    observation: str
    admissible_actions: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """An environment's answer to one response. All numbers are finite."""

    observation: str
    reward: float
    reward_components: dict[str, float]
    is_terminated: bool
    is_truncated: bool
    action: str
    is_action_valid: bool
    is_success: bool
    admissible_actions: tuple[str, ...] = ()


class EnvironmentClient(Protocol):
    """One environment, be it one server or many. Calls are safe to repeat by their keys.

    Every method raises EnvironmentFailedError when the environment died, hung or answered nonsense:
    the episode is lost, a new one may go well. InvalidInputError means that no other try can help.
    """

    async def describe(self, environment: str) -> EnvironmentProfile: ...

    async def open_session(self, task: Task, idempotency_key: str) -> Session:
        """Begin an episode of the task with its seed.

        Waits while all sessions are taken or no server is there.

        A session that opens after its caller was cancelled is closed at once.
        """

    async def step(self, session_id: str, step_index: int, text: str) -> StepOutcome: ...

    async def close_session(self, session_id: str) -> None:
        """End the session. Never raises: the server reaps what is not closed."""


class EnvironmentDirectory(Protocol):
    """Clients by the address that a task group names."""

    @property
    def num_waiting(self) -> int:
        """Episodes that wait because all servers are full or away."""

    def get(self, address: str) -> EnvironmentClient: ...

    async def close(self) -> None: ...


class GrpcEnvironmentDirectory:
    """One client per address."""

    def __init__(
        self,
        security: Security = OPEN,
        *,
        step_timeout_s: float,
        open_patience_s: float = OPEN_PATIENCE_S,
        resolve: Resolve | None = None,
    ) -> None:
        self._security = security
        self._resolve = resolve
        self._step_timeout_s = step_timeout_s
        self._open_patience_s = open_patience_s
        self._clients: dict[str, GrpcEnvironmentClient] = {}

    @property
    def num_waiting(self) -> int:
        return sum(client.num_waiting for client in self._clients.values())

    def get(self, address: str) -> EnvironmentClient:
        if address not in self._clients:
            self._clients[address] = GrpcEnvironmentClient(
                address,
                self._security,
                step_timeout_s=self._step_timeout_s,
                open_patience_s=self._open_patience_s,
                resolve=self._resolve,
            )
        return self._clients[address]

    async def close(self) -> None:
        for client in self._clients.values():
            await client.close()
        self._clients.clear()


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a session lives, and its id there: ids of different servers may be the same."""

    server: EnvironmentServer
    session_id: str


class GrpcEnvironmentClient:
    """`EnvironmentClient` over `sdar.v1.EnvironmentService`: sessions are spread over all servers
    behind the address.

    Args:
        step_timeout_s: deadline of one call, its transport-level retries included.
        open_patience_s: how long full or unreachable servers are waited for when an episode begins.
        resolve: finds the servers of a name; the system's resolver if not given.
    """

    def __init__(
        self,
        address: str,
        security: Security = OPEN,
        *,
        step_timeout_s: float,
        open_patience_s: float,
        resolve: Resolve | None = None,
    ) -> None:
        self._address = address
        self._timeout_s = step_timeout_s
        self._open_patience_s = open_patience_s
        self._servers = EnvironmentServers(address, security, resolve)
        self._places: dict[str, _Place] = {}
        self._profiles: dict[str, EnvironmentProfile] = {}
        self._given_up: set[asyncio.Task[None]] = set()
        self.num_waiting = 0

    async def describe(self, environment: str) -> EnvironmentProfile:
        if environment not in self._profiles:
            request = environment_pb2.DescribeRequest(environment=environment)
            server, response = await self._patiently(
                lambda server: self._call(server, server.stub.Describe, request)
            )
            # `_patiently` counts a session there, and none was opened.
            self._servers.release(server)
            found = next((one for one in response.environments if one.name == environment), None)
            if found is None or not found.version:
                raise self._nonsense(
                    f"Describe({environment!r}) without that environment or its version"
                )
            identity = EnvironmentIdentity(found.name, found.version)
            self._profiles[environment] = EnvironmentProfile(
                identity, found.instructions, found.action_format
            )
        return self._profiles[environment]

    async def open_session(self, task: Task, idempotency_key: str) -> Session:
        request = environment_pb2.OpenSessionRequest(
            environment=task.environment,
            task_id=task.task_id,
            seed=task.seed,
            idempotency_key=idempotency_key,
        )
        server, response = await self._patiently(lambda server: self._open(server, request))
        if not response.session_id or not response.observation:
            # Without an id there is no session to close.
            self._servers.release(server)
            raise self._nonsense(
                f"OpenSession of task {task.task_id!r} without session_id or observation"
            )
        # Made unique by the server's address: two servers may give the same id.
        own_id = f"{response.session_id}@{server.target}"
        self._places[own_id] = _Place(server, response.session_id)
        return Session(own_id, response.observation, tuple(response.admissible_actions))

    async def step(self, session_id: str, step_index: int, text: str) -> StepOutcome:
        place = self._places.get(session_id)
        if place is None:
            raise EnvironmentFailedError(
                f"Session lost at {self._address}: {session_id!r} is not open. Open another."
            )
        request = environment_pb2.StepRequest(
            session_id=place.session_id, step_index=step_index, text=text
        )
        try:
            response = await self._call(place.server, place.server.stub.Step, request)
        except UnknownResourceError as error:
            # The server restarted or reaped the session; the task itself is fine.
            raise EnvironmentFailedError(
                f"Session lost at {place.server.target}: {error}"
            ) from error
        self._check(response, step_index)
        return _read_outcome(response)

    async def close_session(self, session_id: str) -> None:
        if place := self._places.pop(session_id, None):
            await self._close(place)

    async def _close(self, place: _Place) -> None:
        server = place.server
        try:
            await self._call(
                server,
                server.stub.CloseSession,
                environment_pb2.CloseSessionRequest(session_id=place.session_id),
            )
        except SdarError as error:
            log.warning(
                "session_not_closed",
                address=server.target,
                session_id=place.session_id,
                error=str(error),
            )
        finally:
            self._servers.release(server)

    async def close(self) -> None:
        if self._given_up:
            await asyncio.wait(self._given_up, timeout=_CLOSE_PATIENCE_S)
        await self._servers.close()

    async def _open(
        self, server: EnvironmentServer, request: environment_pb2.OpenSessionRequest
    ) -> Any:
        """One call. The server opens a session whether or not the caller is still there.

        One that nobody waits for any more is closed.
        """
        # Shielded: a cancelled call would leave a session that nobody knows the id of.
        opening = asyncio.ensure_future(self._call(server, server.stub.OpenSession, request))
        try:
            return await asyncio.shield(opening)
        except asyncio.CancelledError:
            # `_try_each` releases the server as the cancellation passes through it. The session
            # that may yet open there is counted once more, until it is closed.
            self._servers.take(server)
            closing = asyncio.create_task(
                self._close_given_up(server, opening), name="close_given_up"
            )
            self._given_up.add(closing)
            closing.add_done_callback(self._given_up.discard)
            raise

    async def _close_given_up(
        self, server: EnvironmentServer, opening: asyncio.Future[Any]
    ) -> None:
        try:
            response = await opening
        except SdarError as error:
            log.info("session_not_opened", address=server.target, error=str(error))
            self._servers.release(server)
        else:
            await self._close(_Place(server, response.session_id))

    def _check(self, response: environment_pb2.StepResponse, step_index: int) -> None:
        # A reward that is no number would make every advantage of its group none.
        numbers = {"reward": response.reward, **response.reward_components}
        wrong = [f"{name} {value}" for name, value in numbers.items() if not math.isfinite(value)]
        if wrong:
            raise self._nonsense(f"Step {step_index} with {', '.join(wrong)}")
        is_over = response.terminated or response.truncated
        if not is_over and not response.observation:
            raise self._nonsense(
                f"Step {step_index} of an unfinished episode without an observation"
            )

    def _nonsense(self, what: str) -> EnvironmentFailedError:
        return EnvironmentFailedError(
            f"The environment at {self._address} answered {what}. Run `sdar env check "
            f"{self._address}` against it.",
            address=self._address,
        )

    async def _call(self, server: EnvironmentServer, method: Any, request: Any) -> Any:
        try:
            return await call(method, request, timeout_s=self._timeout_s, peer=server.target)
        except (InvalidInputError, UnavailableError, CapacityError):
            raise
        except SdarError as error:
            raise EnvironmentFailedError(
                f"The environment at {server.target} failed: {error}", address=server.target
            ) from error

    async def _patiently(
        self, attempt: Callable[[EnvironmentServer], Awaitable[T]]
    ) -> tuple[EnvironmentServer, T]:
        """Repeat while all servers are full or away: a restart there must not cost any groups.

        Returns the server too, with a session counted there.
        """
        deadline = time.monotonic() + self._open_patience_s
        delay_s = _FIRST_OPEN_DELAY_S
        is_waiting = False
        try:
            while True:
                try:
                    return await self._try_each(attempt)
                except EnvironmentFailedError:
                    raise
                except (UnavailableError, CapacityError) as error:
                    self._check_patience(deadline - delay_s, error)
                # Each caller that waits at all is counted once, for as long as it does.
                self.num_waiting += not is_waiting
                is_waiting = True
                await asyncio.sleep(delay_s)
                delay_s = min(2 * delay_s, _LONGEST_OPEN_DELAY_S)
        finally:
            self.num_waiting -= is_waiting

    def _check_patience(self, until: float, error: SdarError) -> None:
        """Raises EnvironmentFailedError after `until` (monotonic), for this error."""
        if time.monotonic() > until:
            raise EnvironmentFailedError(
                f"No session at {self._address} within {self._open_patience_s:g} s: {error}",
                address=self._address,
            ) from error

    async def _try_each(
        self, attempt: Callable[[EnvironmentServer], Awaitable[T]]
    ) -> tuple[EnvironmentServer, T]:
        """The first server that is neither full nor away; if all are, raises what the last said."""
        refusal: BaseException | None = None
        for server in await self._servers.rank():
            if not server.is_listed:
                continue  # it left while others were asked, and its channel may be closed
            self._servers.take(server)
            try:
                return server, await attempt(server)
            except BaseException as error:
                # A cancellation too: whatever ends the call, no session was opened there.
                self._servers.release(server)
                is_away = _is_away(error)
                if not is_away and not isinstance(error, CapacityError):
                    raise
                self._servers.avoid(server, is_away=is_away)
                refusal = error
        assert refusal is not None, "the first one that is ranked is there"
        raise refusal


def _is_away(error: BaseException) -> bool:
    """Whether a server can't be reached. One whose environment failed can."""
    return isinstance(error, UnavailableError) and not isinstance(error, EnvironmentFailedError)


def _read_outcome(response: environment_pb2.StepResponse) -> StepOutcome:
    return StepOutcome(
        observation=response.observation,
        reward=response.reward,
        reward_components=dict(response.reward_components),
        is_terminated=response.terminated,
        is_truncated=response.truncated,
        action=response.action,
        is_action_valid=response.is_action_valid,
        is_success=response.is_success,
        admissible_actions=tuple(response.admissible_actions),
    )
