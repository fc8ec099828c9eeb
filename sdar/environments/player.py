"""Plays requests on the environment instances of one process, where user code may break.

Requests and answers are what JSON can hold; what an environment raises becomes an answer. It knows
no lease, no deadline and no wire, imports as little as it can, and checks nothing of what an
environment answers: the server does (`sdar.environments.answers`).
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any, TypeVar

from sdar.contracts.errors import (
    CapacityError,
    EnvironmentFailedError,
    SdarError,
    UnknownResourceError,
)
from sdar.contracts.types import Task
from sdar.environments.base import Environment, Observation, StepResult

T = TypeVar("T")
Request = dict[str, Any]
"""{"call": name, "environment": name, "arguments": {...}}"""
Answer = dict[str, Any]

MAX_THREADS = 64
"""Calls of blocking environments that run at once in one process."""

# Some exceptions quote all that they were given.
_MAX_REASON_CHARACTERS = 1000
_MAX_TRACEBACK_CHARACTERS = 10_000


class Player:
    """Plays the sessions of one process.

    Args:
        builders: makes an instance of each environment; one more of each answers for its tasks.
    """

    def __init__(self, builders: Mapping[str, Callable[[], Environment]]) -> None:
        self._builders = builders
        self._catalogues = {name: build() for name, build in builders.items()}
        self._games: dict[str, Environment] = {}
        self._threads = ThreadPoolExecutor(MAX_THREADS, thread_name_prefix="environment")
        self._calls: dict[str, Callable[..., Answer]] = {
            "describe": self._describe,
            "list_tasks": self._list_tasks,
            "reset": self._reset,
            "step": self._step,
            "close": self._close,
        }

    def play(self, request: Request, reply: Callable[[Answer], object]) -> None:
        """Give `reply` the answer, before returning.

        For an environment that blocks, it is given later and from a thread.
        """
        if self._catalogues[request["environment"]].is_blocking:
            self._threads.submit(lambda: reply(self._answer(request)))
        else:
            reply(self._answer(request))

    def close(self) -> None:
        """Close what is left, without waiting for calls that hang in threads."""
        for session_id in list(self._games):
            arguments = {"session_id": session_id}
            self._answer({"call": "close", "environment": "", "arguments": arguments})
        for catalogue in self._catalogues.values():
            try:
                catalogue.close()
            # Nothing depends on how an environment ends, but the log shows what it raised.
            except Exception:  # noqa: BLE001
                traceback.print_exc()
        self._threads.shutdown(wait=False)

    def _answer(self, request: Request) -> Answer:
        try:
            return self._calls[request["call"]](request["environment"], **request["arguments"])
        except (UnknownResourceError, CapacityError, EnvironmentFailedError) as error:
            return {
                "raised": type(error).__name__,
                "message": error.message,
                "fields": error.fields,
            }
        except KeyboardInterrupt:
            # Of a person, where episodes are played in the run's own process.
            raise
        # The boundary: an environment may break in any way, its worker must not. That includes
        # SystemExit: it would end all sessions of this process, or in a thread have no effect at
        # all, and no caller would learn of it.
        except BaseException as error:  # noqa: BLE001
            return _describe_failure(error, request["call"])

    def _describe(self, environment: str) -> Answer:
        return asdict(self._catalogues[environment].describe())

    def _list_tasks(self, environment: str, split: str, start: int, end: int) -> Answer:
        tasks = self._catalogues[environment].list_tasks(split)[start:end]
        return {"tasks": list(map(_task_to_json, tasks))}

    def _reset(self, environment: str, session_id: str, task_id: str, seed: int) -> Answer:
        task = self._catalogues[environment].get_task(task_id)
        # In the books before it begins: a close reaches it also while its reset waits in a thread.
        game = self._builders[environment]()
        self._games[session_id] = game
        try:
            observation = _expect(Observation, game.reset(task_id, seed), "reset")
            return {"task": _task_to_json(task), "observation": _observation_to_json(observation)}
        except BaseException:
            # Unless a close has taken it meanwhile: an environment is closed once.
            if self._games.pop(session_id, None) is not None:
                game.close()
            raise

    def _step(self, environment: str, session_id: str, text: str) -> Answer:
        result = _expect(StepResult, self._games[session_id].step(text), "step")
        # By hand: `asdict` copies deeply and takes longer than the rest of a step together.
        return {
            "observation": _observation_to_json(result.observation),
            "reward": result.reward,
            "terminated": result.terminated,
            "truncated": result.truncated,
            "action": result.action,
            "is_action_valid": result.is_action_valid,
            "is_success": result.is_success,
            "reward_components": result.reward_components,
            "info": result.info,
        }

    def _close(self, environment: str, session_id: str) -> Answer:
        game = self._games.pop(session_id, None)
        if game is not None:
            game.close()
        return {}


def _describe_failure(error: BaseException, call: str) -> Answer:
    # Its text is there even if the error's own __str__ raises.
    caught = traceback.TracebackException.from_exception(error)
    if isinstance(error, SdarError):
        reason = error.message
    else:
        reason = f"raised {type(error).__name__}: {caught}"
    return {
        "failure": f"{reason[:_MAX_REASON_CHARACTERS]} in {call}",
        # The end of it, which names the place where it was raised.
        "traceback": "".join(caught.format())[-_MAX_TRACEBACK_CHARACTERS:],
    }


def _expect(kind: type[T], value: Any, method: str) -> T:
    if not isinstance(value, kind):
        raise TypeError(f"{method} returned {value!r}, expected a {kind.__name__}")
    return value


def _observation_to_json(observation: Observation) -> dict[str, Any]:
    return {
        "text": observation.text,
        "actions": observation.admissible_actions,
        "info": observation.info,
    }


def _task_to_json(task: Task) -> list[Any]:
    return [task.split, task.task_id, task.task_type, task.description, task.seed]
