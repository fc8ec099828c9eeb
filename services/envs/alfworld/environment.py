"""ALFWorld as an environment: valid actions, observations, rewards.

`games` finds the games and `engine` plays them. The engine is imported where the first episode
starts and nowhere else, since that takes a second.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from sdar.contracts.errors import ConfigurationError
from sdar.contracts.types import Task
from sdar.environments.base import Environment, Observation, StepResult
from sdar.process.settings import read_variable
from services.envs.alfworld.games import GAME_FILE, SPLITS, load_entries, read_game
from services.envs.responses import find_between

if TYPE_CHECKING:
    from services.envs.alfworld.engine import AlfredGame, View

DATA_VARIABLE = "ALFWORLD_DATA"
"""ALFWorld's own: the directory that holds json_2.1.1, read where the option data_dir is empty."""
MAX_TURNS = 50
WIN_REWARD = 10.0
# The engine knows this command, but its answer holds nothing that the agent does not see anyway.
# It is therefore not offered, and so not valid.
_HELP = "help"
_WELCOME = "-= Welcome to TextWorld, ALFRED! =-\n\n"
_TASK_MARK = "\n\nYour task is to: "


class AlfworldEnvironment(Environment):
    """Reward 10 for a won game, 0 otherwise.

    The seed changes nothing: a game's rooms are in its file.

    A response is valid if it has one `<think>...</think>` and one `<action>...</action>` that holds
    an admissible command. A command without its reasoning is played, but counts as invalid; two
    commands, or none, play nothing. Every response uses a turn. As upstream, a command is
    lower-cased before it is matched, since every name in a game is.

    Options:
        data_dir: directory that holds train/, valid_seen/ and valid_unseen/, by default
            $ALFWORLD_DATA/json_2.1.1.
    """

    name = "alfworld"
    version = "1"
    splits = SPLITS
    instructions = (
        "You are an expert agent in a household, which you know through text alone. Each turn, "
        "reason about what to do next, then choose one admissible action."
    )
    action_format = (
        "Reason inside <think> </think>, then write one admissible action inside <action> "
        "</action>."
    )
    max_turns = MAX_TURNS

    def __init__(self, data_dir: str = "") -> None:
        if importlib.util.find_spec("alfworld") is None:
            raise ConfigurationError(
                "ALFWorld's engine is not installed. Run `pip install 'sdar[alfworld]'`."
            )
        self._directory = _resolve_directory(data_dir)
        # Read now and kept for the process: a directory that cannot be used is refused before
        # anything is served.
        load_entries(self._directory)
        self._game: AlfredGame | None = None
        self._admissible: tuple[str, ...] = ()
        self._num_turns = 0

    def list_tasks(self, split: str) -> tuple[Task, ...]:
        if split not in self.splits:
            raise self.unknown_split(split)
        return _list_tasks(self._directory, split)

    def get_task(self, task_id: str) -> Task:
        task = _index_tasks(self._directory).get(task_id)
        if task is None:
            raise self.unknown_task(task_id)
        return task

    def reset(self, task_id: str, seed: int) -> Observation:
        """The scene, without the task's sentence: that is the task's description."""
        from services.envs.alfworld.engine import AlfredGame

        # An unknown task is refused before its path is looked for on the disk.
        self.get_task(task_id)
        self.close()
        path = self._directory / task_id / GAME_FILE
        self._game = AlfredGame(read_game(path), path)
        self._num_turns = 0
        return self._observe(self._game.reset(), is_over=False, is_first=True)

    def step(self, text: str) -> StepResult:
        command, is_well_formed = read_response(text)
        is_valid = is_well_formed and command in self._admissible
        self._num_turns += 1
        if self._game is None:
            raise RuntimeError("An environment is stepped between reset and close.")
        view = self._game.step(command)
        is_truncated = not view.is_won and self._num_turns >= MAX_TURNS
        return StepResult(
            observation=self._observe(view, is_over=view.is_won or is_truncated),
            reward=WIN_REWARD * view.is_won,
            reward_components={"success": float(view.is_won)},
            terminated=view.is_won,
            truncated=is_truncated,
            action=command,
            is_action_valid=is_valid,
            is_success=view.is_won,
        )

    def close(self) -> None:
        if self._game is not None:
            self._game.close()
            self._game = None

    def _observe(self, view: View, *, is_over: bool, is_first: bool = False) -> Observation:
        self._admissible = ()
        if not is_over:
            self._admissible = tuple(command for command in view.commands if command != _HELP)
        text = extract_scene(view.feedback) if is_first else view.feedback
        return Observation(text, self._admissible)


def read_response(text: str) -> tuple[str, bool]:
    """The command in an agent's text ("" for none or several), and whether its form is as asked."""
    command = (find_between(text, "<action>", "</action>") or "").strip().lower()
    is_reasoned = find_between(text, "<think>", "</think>") is not None
    return command, is_reasoned and bool(command)


def extract_scene(introduction: str) -> str:
    """The engine's first feedback without its greeting and without the task's sentence."""
    scene, found, _ = introduction.rpartition(_TASK_MARK)
    if not found:
        scene = introduction
    return scene.removeprefix(_WELCOME)


def _resolve_directory(data_dir: str) -> Path:
    """The directory of the games, from the option or from ALFWorld's own variable."""
    if data_dir:
        return Path(data_dir).expanduser()
    home = read_variable(DATA_VARIABLE)
    if not home:
        raise ConfigurationError(
            f"ALFWorld has no games: the option data_dir is empty and {DATA_VARIABLE} is not set. "
            "Make games with `sdar env generate alfworld DIRECTORY`, or fetch the public ones with "
            "`alfworld-download`, and name the directory that holds train/, valid_seen/ and "
            "valid_unseen/ in data_dir."
        )
    return Path(home).expanduser() / "json_2.1.1"


@lru_cache(maxsize=8)
def _list_tasks(directory: Path, split: str) -> tuple[Task, ...]:
    return tuple(
        Task(
            environment=AlfworldEnvironment.name,
            split=split,
            task_id=entry.task_id,
            task_type=entry.task_type,
            description=entry.description,
            seed=0,
        )
        for entry in load_entries(directory)[split]
    )


@lru_cache(maxsize=8)
def _index_tasks(directory: Path) -> Mapping[str, Task]:
    tasks: dict[str, Task] = {}
    for split in SPLITS:
        tasks.update((task.task_id, task) for task in _list_tasks(directory, split))
    return tasks
