"""Environments that answer at once, so that only their server's work is measured.

The module imports no more than an environment worker needs.
"""

from __future__ import annotations

from typing import ClassVar

from sdar.contracts.types import Task
from sdar.environments.base import Environment, Observation, StepResult

OBSERVATION = (
    "You are in the middle of a room. Looking quickly around you, you see a cabinet, a countertop "
    "and a fridge. " * 2
)
ACTION = (
    "<think>The cup has to be cleaned first, so I look for it on the countertop.</think>"
    "<action>look</action>"
)
MAX_TURNS = 1_000_000


class InstantEnvironment(Environment):
    """One task whose episode goes on and on."""

    name = "instant"
    version = "1"
    splits = ("train",)
    tasks: ClassVar = {"train": (Task("instant", "train", "only", "instant", "Look around.", 0),)}
    max_turns = MAX_TURNS

    def reset(self, task_id: str, seed: int) -> Observation:
        return Observation(OBSERVATION)

    def step(self, text: str) -> StepResult:
        return StepResult(Observation(OBSERVATION), action=text)


class ShortEpisodes(Environment):
    """Many tasks whose episodes end after a fixed number of turns, whatever is done."""

    name = "short"
    version = "1"
    splits = ("train",)
    tasks = {  # noqa: RUF012 - the base class declares a Mapping
        "train": tuple(
            Task("short", "train", f"task-{i}", "short", "Look around.", i) for i in range(64)
        )
    }
    num_turns = 4
    max_turns = num_turns

    def reset(self, task_id: str, seed: int) -> Observation:
        self._num_steps = 0
        return Observation(f"{task_id}. {OBSERVATION}")

    def step(self, text: str) -> StepResult:
        self._num_steps += 1
        is_over = self._num_steps == self.num_turns
        return StepResult(
            Observation("" if is_over else OBSERVATION),
            float(is_over),
            terminated=is_over,
            action=text,
        )
