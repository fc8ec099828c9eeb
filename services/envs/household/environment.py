"""The household game as an environment; its rules are in `game`."""

from __future__ import annotations

from functools import lru_cache

from sdar.contracts.types import Task
from sdar.environments.base import Environment, Observation, StepResult
from services.envs.household.game import (
    HELDOUT,
    MAX_TURNS,
    TRAIN,
    HouseholdGame,
    HouseholdTask,
    list_household_tasks,
    parse_task_id,
)


class HouseholdEnvironment(Environment):
    """Reward 1 for an object put in its place after exactly its type's procedure, 0 otherwise.

    The seed changes nothing.
    """

    name = "household"
    version = "1"
    splits = (TRAIN, HELDOUT)
    action_format = "One line: open PLACE, take OBJECT, use STATION or put OBJECT in PLACE."
    max_turns = MAX_TURNS

    _game: HouseholdGame

    def list_tasks(self, split: str) -> tuple[Task, ...]:
        if split not in self.splits:
            raise self.unknown_split(split)
        return _list_tasks(split)

    def get_task(self, task_id: str) -> Task:
        return _to_task(self._parse(task_id))

    def reset(self, task_id: str, seed: int) -> Observation:
        self._game = HouseholdGame(self._parse(task_id))
        return Observation(self._game.first_observation, self._game.list_actions())

    def step(self, text: str) -> StepResult:
        game = self._game
        action = text.strip()
        # Asked before it is played, which changes what is admissible.
        is_action_valid = action in game.list_actions()
        seen = game.act(action)
        reward = float(game.is_solved)
        return StepResult(
            observation=Observation(seen, game.list_actions()),
            reward=reward,
            reward_components={"success": reward},
            terminated=game.is_put,
            truncated=game.is_over and not game.is_put,
            action=action,
            is_action_valid=is_action_valid,
            is_success=game.is_solved,
        )

    def _parse(self, task_id: str) -> HouseholdTask:
        task = parse_task_id(task_id)
        if task is None:
            raise self.unknown_task(task_id)
        return task


@lru_cache
def _list_tasks(split: str) -> tuple[Task, ...]:
    return tuple(map(_to_task, list_household_tasks(split)))


def _to_task(task: HouseholdTask) -> Task:
    return Task(
        environment=HouseholdEnvironment.name,
        split=task.split,
        task_id=task.task_id,
        task_type=task.task_type,
        description=task.description,
        seed=0,
    )
