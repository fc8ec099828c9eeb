"""The interface of what plays an environment server's sessions, and what all of its kinds share.

A `Host` turns calls into requests, and answers into records or typed errors.
`sdar.environments.workers` has the one for services, and `sdar.in_process` the one for a run that
lives in one process.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import structlog

from sdar.contracts.errors import (
    CapacityError,
    ConfigurationError,
    EnvironmentFailedError,
    SdarError,
    UnavailableError,
    UnknownResourceError,
)
from sdar.contracts.types import Task
from sdar.environments.answers import (
    NonsenseError,
    read_description,
    read_observation,
    read_step,
    read_task,
)
from sdar.environments.base import EnvironmentDescription, Observation, StepResult
from sdar.environments.player import Answer, Request

T = TypeVar("T")

_RAISED = {
    kind.__name__: kind for kind in (UnknownResourceError, CapacityError, EnvironmentFailedError)
}
"""What an environment may raise on purpose; it reaches the caller as it is."""

_EPISODE_IS_LOST = " The episode is lost; open another."

OnLost = Callable[[Sequence[str], str], None]
"""Called with the ids of sessions that were lost with what played them, and the reason."""

log = structlog.get_logger()


def build_failure(environment: str, reason: str) -> EnvironmentFailedError:
    """The error of a call whose episode is lost; its message begins "Environment NAME REASON"."""
    return EnvironmentFailedError(
        f"Environment {environment} {reason}.{_EPISODE_IS_LOST}", environment=environment
    )


def _rebuild_error(environment: str, answer: Answer) -> SdarError:
    """What the environment raised on purpose, as it crossed the process's border."""
    error = _RAISED[answer["raised"]](answer["message"])
    error.fields = answer["fields"]
    if isinstance(error, EnvironmentFailedError):
        log.warning("environment_failed", environment=environment, reason=error.message)
    return error


class Host(ABC):
    """Plays sessions of the named environments. One event loop owns it.

    Calls raise EnvironmentFailedError when the environment broke: raised, hung or answered
    nonsense. The session is then lost, and its owner closes it.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.names = tuple(names)
        self._step_timeout_s = math.inf
        self._on_lost: OnLost = lambda session_ids, reason: None
        self._descriptions: dict[str, EnvironmentDescription] = {}

    @property
    @abstractmethod
    def is_ready(self) -> bool:
        """Whether sessions can be opened now."""

    async def start(self, step_timeout_s: float, on_lost: OnLost) -> None:
        """Build the environments.

        Args:
            step_timeout_s: a call that takes longer hangs.

        Raises:
            ConfigurationError: an environment cannot be built.
        """
        self._step_timeout_s = step_timeout_s
        self._on_lost = on_lost
        for name in self.names:
            answer = await self._ask("", {"call": "describe", "environment": name, "arguments": {}})
            try:
                self._descriptions[name] = self._read(name, answer, read_description)
            except (EnvironmentFailedError, UnknownResourceError, CapacityError) as error:
                # No episode was begun, so none is lost.
                problem = error.message.removesuffix(_EPISODE_IS_LOST)
                raise ConfigurationError(
                    f"Environment {name} cannot describe itself and count its tasks: {problem}"
                ) from error

    @abstractmethod
    async def stop(self) -> None:
        """Close every session. The host cannot be started again."""

    def describe(self, environment: str) -> EnvironmentDescription:
        """Raises UnknownResourceError: no environment of that name here."""
        if environment not in self.names:
            raise UnknownResourceError(
                f"No environment {environment!r} is served here. Use one of "
                f"{', '.join(self.names) or 'none'}.",
                environment=environment,
            )
        if environment not in self._descriptions:
            raise UnavailableError(
                "This environment server is still starting. Retry after a while."
            )
        return self._descriptions[environment]

    async def list_tasks(self, environment: str, split: str, start: int, end: int) -> list[Task]:
        """The tasks of a split from `start` to before `end`.

        Raises:
            UnknownResourceError: there is no such split. UnavailableError: not now; retry.
        """

        def read(values: Answer) -> list[Task]:
            return [read_task(environment, task) for task in values["tasks"]]

        arguments = {"split": split, "start": start, "end": end}
        request = {"call": "list_tasks", "environment": environment, "arguments": arguments}
        try:
            return self._read(environment, await self._ask("", request), read)
        except EnvironmentFailedError as error:
            # No episode is lost by it, and another worker may know better.
            problem = error.message.removesuffix(_EPISODE_IS_LOST)
            raise UnavailableError(
                f"Tasks cannot be listed: {problem} Retry.", environment=environment
            ) from error

    async def open(
        self, session_id: str, environment: str, task_id: str, seed: int
    ) -> tuple[Task, Observation]:
        """Start an episode.

        Raises:
            UnknownResourceError: no such task. CapacityError: something outside has no room now.
        """

        def read(values: Answer) -> tuple[Task, Observation]:
            task = read_task(environment, values["task"])
            return task, read_observation(values["observation"])

        arguments = {"session_id": session_id, "task_id": task_id, "seed": seed}
        request = {"call": "reset", "environment": environment, "arguments": arguments}
        return self._read(environment, await self._ask(session_id, request), read)

    async def step(self, session_id: str, environment: str, text: str) -> StepResult:
        """Play one response of the agent."""
        arguments = {"session_id": session_id, "text": text}
        request = {"call": "step", "environment": environment, "arguments": arguments}
        answer = await self._ask(session_id, request)
        try:
            return self._read(environment, answer, read_step)
        except (UnknownResourceError, CapacityError) as error:
            # An episode that is being played cannot be refused any more.
            raise build_failure(
                environment, f"raised {type(error).__name__}: {error} in step"
            ) from error

    @abstractmethod
    def close(self, session_id: str, environment: str) -> None:
        """Begin to end a session, and return at once, however long its environment takes.

        An unknown id changes nothing.
        """

    @abstractmethod
    async def _ask(self, session_id: str, request: Request) -> Answer:
        """Have a request played, for a session or (with "") for none.

        Raises:
            EnvironmentFailedError: the call hangs.
        """

    def _read(self, environment: str, answer: Answer, read: Callable[[Answer], T]) -> T:
        """What `read` makes of an answer, or the error that the answer is.

        Three kinds of answer are errors: what the environment raised on purpose, how it broke, and
        what `read` finds to be nonsense.
        """
        if "raised" in answer:
            raise _rebuild_error(environment, answer)
        if "failure" in answer:
            details = {"exception": answer["traceback"]} if "traceback" in answer else {}
            log.warning(
                "environment_failed", environment=environment, reason=answer["failure"], **details
            )
            raise build_failure(environment, answer["failure"])
        try:
            return read(answer)
        except NonsenseError as error:
            log.warning("environment_answered_nonsense", environment=environment, found=str(error))
            raise build_failure(environment, f"answered {error}") from error
