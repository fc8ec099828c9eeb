"""Checks what an environment answers, so that nonsense reaches neither training nor the server.

It turns plain JSON values, as `sdar.environments.player` makes them, into the records of
`sdar.environments.base`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from sdar.contracts.types import EnvironmentIdentity, Task
from sdar.environments.base import EnvironmentDescription, Observation, StepResult


class NonsenseError(ValueError):
    """What was found and what was expected. The caller adds which environment answered it."""


def read_description(answer: Mapping[str, Any]) -> EnvironmentDescription:
    name = _text("name", answer["identity"]["name"])
    version = _text("version", answer["identity"]["version"])
    splits = {_text("split", split): int(number) for split, number in answer["splits"].items()}
    return EnvironmentDescription(
        identity=EnvironmentIdentity(name, version),
        splits=splits,
        instructions=_text("instructions", answer["instructions"]),
        action_format=_text("action_format", answer["action_format"]),
        max_turns=answer["max_turns"],
        is_blocking=_flag("is_blocking", answer["is_blocking"]),
    )


def read_task(environment: str, values: list[Any]) -> Task:
    """A task, under the name that its environment is served under, whatever it calls itself."""
    split, task_id, task_type, description, seed = values
    # By its type: True is an integer to `isinstance`.
    if type(seed) is not int or not -_SEEDS <= seed < _SEEDS:
        raise NonsenseError(
            f"task {_shown(task_id)} with seed {_shown(seed)}, expected an integer of 64 bits"
        )
    return Task(
        environment=environment,
        split=_text("split", split),
        task_id=_text("task_id", task_id),
        task_type=_text("task_type", task_type),
        description=_text("description", description),
        seed=seed,
    )


def read_observation(values: Mapping[str, Any]) -> Observation:
    actions = values["actions"]
    if not isinstance(actions, list | tuple):
        raise NonsenseError(f"admissible_actions {_shown(actions)}, expected a tuple of texts")
    return Observation(
        _text("observation", values["text"]),
        tuple(_text("action", action) for action in actions),
        _texts(values["info"]),
    )


def read_step(values: Mapping[str, Any]) -> StepResult:
    result = StepResult(
        observation=read_observation(values["observation"]),
        reward=_number("reward", values["reward"]),
        terminated=_flag("terminated", values["terminated"]),
        truncated=_flag("truncated", values["truncated"]),
        action=_text("action", values["action"]),
        is_action_valid=_flag("is_action_valid", values["is_action_valid"]),
        is_success=_flag("is_success", values["is_success"]),
        reward_components=_numbers(values["reward_components"]),
        info=_texts(values["info"]),
    )
    if result.terminated and result.truncated:
        raise NonsenseError("terminated and truncated both true, expected at most one end")
    return result


def _text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise NonsenseError(f"{name} {_shown(value)}, expected text")
    # A lone surrogate is a text to Python that UTF-8, and so the wire, cannot hold. Asked first
    # whether it is ASCII, which is quick and usual.
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise NonsenseError(
                f"{name} {_shown(value)}, which is no Unicode text: {error.reason}"
            ) from error
    return value


def _texts(values: object) -> dict[str, str]:
    if not isinstance(values, dict):
        raise NonsenseError(f"info {_shown(values)}, expected texts by name")
    checked: dict[str, str] = {}
    for name, value in values.items():
        checked[_text("info key", name)] = _text(f"info[{name!r}]", value)
    return checked


def _numbers(values: object) -> dict[str, float]:
    if not isinstance(values, dict):
        raise NonsenseError(f"reward_components {_shown(values)}, expected numbers by name")
    return {_text("reward component", name): _number(name, value) for name, value in values.items()}


def _number(name: str, value: object) -> float:
    # Compared rather than converted first: an integer of a thousand digits is no float either.
    if isinstance(value, int | float) and (-_LARGEST <= value <= _LARGEST):
        return float(value)
    raise NonsenseError(f"{name} {_shown(value)}, expected a finite number")


def _flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise NonsenseError(f"{name} {_shown(value)}, expected True or False")
    return value


def _shown(value: object) -> str:
    # In ASCII: what is refused may be a text that no log could hold.
    shown = ascii(value)
    if len(shown) <= _MAX_SHOWN:
        return shown
    return f"{shown[:_MAX_SHOWN]}..."


_LARGEST = math.nextafter(math.inf, 0)
_SEEDS = 1 << 63
_MAX_SHOWN = 80
