"""Tasks that are only seeds, and the action in a text: what the adapters share.

It knows neither Gymnasium nor OpenEnv.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from sdar.contracts.errors import ConfigurationError
from sdar.contracts.types import Task
from sdar.environments.base import Environment
from sdar.environments.thoughts import drop_thoughts

MAX_TASKS = 1_000_000
HELDOUT_SHARE = 10
"""One heldout task for so many of the train split."""

_ACTION = re.compile(r"<action>(.*?)</action>", re.DOTALL)


class SeededEnvironment(Environment):
    """Task N of a split is the N-th seed.

    Two tasks, of one split or of two, have the same seed by a chance of one in four billion.

    Args:
        num_tasks: of the train split; heldout has a tenth of them.
        game: what is played, one line; the tasks' type and part of their description.
    """

    def __init__(self, *, num_tasks: int, game: str) -> None:
        if type(num_tasks) is not int or not 1 <= num_tasks <= MAX_TASKS:
            raise ConfigurationError(
                f"Option num_tasks of {self.name} is {num_tasks!r}, expected an integer of 1 to "
                f"{MAX_TASKS:,}. Correct it."
            )
        self._game = game
        train, heldout = self.splits
        num_heldout = math.ceil(num_tasks / HELDOUT_SHARE)
        self._num_tasks = {train: num_tasks, heldout: num_heldout}

    def list_tasks(self, split: str) -> Sequence[Task]:
        if split not in self.splits:
            raise self.unknown_split(split)
        return _list_tasks(self.name, self._game, split, self._num_tasks[split])

    def get_task(self, task_id: str) -> Task:
        split, _, number = task_id.rpartition("-")
        # Its length before its value: Python takes long to read an integer of a million digits.
        is_number = number.isascii() and number.isdigit() and len(number) <= len(str(MAX_TASKS))
        if split not in self.splits or not is_number:
            raise self.unknown_task(task_id)
        task = _build_task(self.name, self._game, split, int(number))
        # Compared as a whole: "train-007" is not another name of "train-7".
        if task.task_id != task_id or int(number) >= self._num_tasks[split]:
            raise self.unknown_task(task_id)
        return task

    def compute_seed(self, task_id: str, seed: int) -> int:
        """32 bits of the task and the session's seed, the same on every machine.

        Raises:
            UnknownResourceError: no such task.
        """
        name = f"{self.get_task(task_id).task_id} {seed}"
        return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")


def find_action(text: str) -> str:
    """The last <action>...</action> behind the text's thoughts, or all that stands there if there
    is none.

    White space around it is left out.
    """
    said = drop_thoughts(text)
    tagged = _ACTION.findall(said)
    action: str = tagged[-1] if tagged else said
    return action.strip()


def parse_json(text: str) -> Any:
    """The value of a JSON text, None if it is none; NaN and Infinity are not JSON."""
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return None


def format_value(value: Any) -> str:
    """A value that JSON can hold, for people and models to read.

    Text stays as it is; anything else becomes JSON with sorted keys.
    """
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, sort_keys=True)


def format_facts(facts: Mapping[str, Any]) -> dict[str, str]:
    """The single numbers, texts and truths among an environment's facts, for logs."""
    single = {key: value for key, value in facts.items() if isinstance(value, int | float | str)}
    return {str(key): format_value(value) for key, value in single.items()}


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


@lru_cache
def _list_tasks(environment: str, game: str, split: str, num_tasks: int) -> tuple[Task, ...]:
    return tuple(_build_task(environment, game, split, number) for number in range(num_tasks))


def _build_task(environment: str, game: str, split: str, number: int) -> Task:
    return Task(
        environment, split, f"{split}-{number}", task_type=game, description=f"Play {game}.", seed=0
    )
