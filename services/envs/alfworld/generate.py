"""Makes ALFWorld games without ALFRED's data: draws rooms and goals, keeps those that can be won.

Each game's walkthrough is found by knowing where everything lies and proven by playing it on the
real engine. The same arguments give the same bytes.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from sdar.contracts.errors import ConfigurationError, ConflictError, EnvironmentFailedError
from services.envs.alfworld.engine import AlfredGame, View
from services.envs.alfworld.games import (
    GAME_FILE,
    INDEX_FILE,
    TASK_TYPES,
    TRAJECTORY_FILE,
    GameEntry,
    replace_goal_template,
    write_index,
)
from services.envs.alfworld.rooms import (
    LOOK_TASK,
    ROOM_SIZES,
    STATIONS,
    TWO_OBJECTS_TASK,
    Goal,
    Receptacle,
    RoomTask,
    Scene,
    Thing,
    build_scene,
    describe,
    encode_key,
    lay_out,
    list_goals,
    list_room_kinds,
    write_problem,
)
from services.envs.alfworld.upstream import ALFRED_PDDL_PATH, ALFRED_TWL2_PATH

# Of eight games of a type six are small: what a small model can learn from, with the harder ones
# beside them.
SIZE_CYCLE = ("small", "small", "small", "medium", "small", "small", "small", "large")
_MIN_VALIDATION_TASKS = 12
_TRAIN_TASKS_PER_VALIDATION_TASK = 5


def generate(
    directory: Path, *, num_tasks: int, seed: int, report: Callable[[int, int], None]
) -> str:
    """Write games of all six types in three splits, and their index.

    `valid_seen` has other goals in the rooms of training, `valid_unseen` plays in rooms of its own.

    Args:
        num_tasks: games to train on; each validation split has a fifth of it, at least 12 and at
            most as many.
        report: called with the games made and their total, after each.

    Raises:
        ConfigurationError: less than one task.
        ConflictError: the directory exists and holds something.
    """
    _check_request(directory, num_tasks)
    least = min(num_tasks, _MIN_VALIDATION_TASKS)
    num_validation = max(least, num_tasks // _TRAIN_TASKS_PER_VALIDATION_TASK)
    total = num_tasks + 2 * num_validation

    entries: list[GameEntry] = []
    for split, task in draw_tasks(num_tasks, num_validation, seed):
        # A generator for each game: what one draws must not depend on those before it.
        rng = random.Random(f"{seed} game {len(entries)}")
        entries.append(write_game(directory, split, task, rng))
        report(len(entries), total)

    write_index(directory / INDEX_FILE, entries)
    return (
        f"{num_tasks} ALFWorld games to train on and {num_validation} in each of valid_seen and "
        "valid_unseen"
    )


def _check_request(directory: Path, num_tasks: int) -> None:
    if num_tasks < 1:
        raise ConfigurationError(
            f"ALFWorld was to be generated with {num_tasks} tasks. Ask for at least 1."
        )
    if directory.exists() and any(directory.iterdir()):
        raise ConflictError(
            f"{directory} exists and is not empty. Name a new directory, or delete this one."
        )


def draw_tasks(num_tasks: int, num_validation: int, seed: int) -> Iterator[tuple[str, RoomTask]]:
    """The tasks of all splits in order, each type in turn."""
    scenes: dict[int, Scene] = {}
    goals: set[tuple[int, Goal]] = set()
    for index in range(num_tasks):
        seen = list_scenes(index, seed, is_unseen=False)
        task = draw_task(index, seen, random.Random(f"{seed} train {index}"))
        scenes[task.scene.number] = task.scene
        goals.add((task.scene.number, task.goal))
        yield "train", task

    for index in range(num_validation):
        rng = random.Random(f"{seed} valid_seen {index}")
        yield "valid_seen", draw_task(index, list(scenes.values()), rng, goals)

    for index in range(num_validation):
        unseen = list_scenes(index, seed, is_unseen=True)
        rng = random.Random(f"{seed} valid_unseen {index}")
        yield "valid_unseen", draw_task(index, unseen, rng)


def list_scenes(index: int, seed: int, *, is_unseen: bool) -> list[Scene]:
    """The rooms in which the game of an index may play, by its type and its turn in the sizes."""
    size = SIZE_CYCLE[index // len(TASK_TYPES) % len(SIZE_CYCLE)]
    numbers = ROOM_SIZES[size].unseen_scenes if is_unseen else ROOM_SIZES[size].train_scenes
    kinds = list_room_kinds(_find_type(index))
    rooms = itertools.product(kinds, numbers)
    return [build_scene(kind, size, number, seed) for kind, number in rooms]


def draw_task(
    index: int,
    scenes: Sequence[Scene],
    rng: random.Random,
    taken: Set[tuple[int, Goal]] = frozenset(),
) -> RoomTask:
    """A room with a goal of the index's type that is not taken, and its objects laid out."""
    task_type = _find_type(index)
    possible = list(_list_possible(task_type, scenes, taken))
    if not possible:
        raise ConfigurationError(
            f"No goal of type {task_type} is left for valid_seen: training has them all. "
            "Ask for fewer tasks."
        )
    scene, goals = rng.choice(possible)
    return lay_out(scene, rng.choice(goals), rng)


def _list_possible(
    task_type: str, scenes: Sequence[Scene], taken: Set[tuple[int, Goal]]
) -> Iterator[tuple[Scene, list[Goal]]]:
    for scene in scenes:
        if scene.kind not in list_room_kinds(task_type):
            continue
        every = list_goals(scene, task_type)
        goals = [goal for goal in every if (scene.number, goal) not in taken]
        if goals:
            yield scene, goals


def _find_type(index: int) -> str:
    return TASK_TYPES[index % len(TASK_TYPES)]


def write_game(directory: Path, split: str, task: RoomTask, rng: random.Random) -> GameEntry:
    """Write the two files of a game once its walkthrough has won it."""
    goal = task.goal
    scene = task.scene
    description = describe(goal, rng)
    trial = f"trial_T{rng.randrange(10**17):017d}"
    # As ALFRED names its folders; "None" stands for the movable receptacle that no task here has.
    folder = f"{goal.task_type}-{goal.target}-None-{goal.destination or goal.lamp}-{scene.number}"
    path = directory / split / folder / trial

    grammar = Path(ALFRED_TWL2_PATH).read_text(encoding="utf-8")
    content = {
        "pddl_domain": Path(ALFRED_PDDL_PATH).read_text(encoding="utf-8"),
        "grammar": replace_goal_template(grammar, f"Your task is to: {description}."),
        "pddl_problem": write_problem(task),
        "solvable": True,
    }
    content["walkthrough"] = win(content, task, path / GAME_FILE)
    trajectory = _describe_trajectory(task, trial, description)

    path.mkdir(parents=True)
    (path / GAME_FILE).write_text(json.dumps(content), encoding="utf-8")
    (path / TRAJECTORY_FILE).write_text(json.dumps(trajectory, indent=1), encoding="utf-8")
    return GameEntry(
        f"{split}/{folder}/{trial}", goal.task_type, f"{description}.", len(scene.receptacles)
    )


def _describe_trajectory(task: RoomTask, trial: str, description: str) -> dict[str, Any]:
    """What ALFWorld's own loaders read of an ALFRED trajectory."""
    return {
        "task_id": trial,
        "task_type": task.goal.task_type,
        "pddl_params": {
            "object_target": task.goal.target,
            "parent_target": task.goal.destination,
            "toggle_target": task.goal.lamp,
            "mrecep_target": "",
            "object_sliced": False,
        },
        "scene": {"scene_num": task.scene.number, "floor_plan": f"FloorPlan{task.scene.number}"},
        "turk_annotations": {"anns": [{"task_desc": f"{description}.", "high_descs": []}]},
    }


def win(content: Mapping[str, Any], task: RoomTask, path: Path) -> list[str]:
    """Commands that win the game, played on the engine; the last one wins.

    Raises:
        EnvironmentFailedError: they do not.
    """
    game = AlfredGame(content, path)
    try:
        view = game.reset()
        commands = Walk(game.names).plan(task)
        if not _is_won_by(game, view, commands):
            raise EnvironmentFailedError(
                f"The walkthrough {commands} does not win {path}. Report this as a defect.",
                path=path,
            )
        return commands
    finally:
        game.close()


def _is_won_by(game: AlfredGame, view: View, commands: Sequence[str]) -> bool:
    """Whether every command can be played, and the last one wins, no earlier one."""
    for command in commands:
        if view.is_won or command not in view.commands:
            return False
        view = game.step(command)
    return view.is_won


class Walk:
    """A player who knows where everything lies.

    `names` are what the engine calls each thing, by its encoded id.
    """

    def __init__(self, names: Mapping[str, str]) -> None:
        self._names = names
        self._commands: list[str] = []
        self._place: Receptacle | None = None
        self._opened: set[str] = set()

    def plan(self, task: RoomTask) -> list[str]:
        goal = task.goal
        targets = [thing for thing in task.things if thing.kind == goal.target]
        if goal.task_type == LOOK_TASK:
            [lamp] = [thing for thing in task.things if thing.kind == goal.lamp]
            self._take(targets[0])
            self._go_to(lamp.place)
            self._commands.append(f"use {self._name(lamp)}")
            return self._commands

        num_wanted = 2 if goal.task_type == TWO_OBJECTS_TASK else 1
        for target in targets[:num_wanted]:
            self._take(target)
            self._treat(target, task)
            self._put(target, task.scene.find(goal.destination)[0])
        return self._commands

    def _name(self, thing: Thing | Receptacle) -> str:
        # Fast Downward knows lower case alone.
        return self._names[encode_key(thing.key).lower()]

    def _go_to(self, place: Receptacle) -> None:
        if place != self._place:
            self._commands.append(f"go to {self._name(place)}")
            self._place = place

    def _reach_into(self, place: Receptacle) -> None:
        self._go_to(place)
        if place.is_openable and place.key not in self._opened:
            self._commands.append(f"open {self._name(place)}")
            self._opened.add(place.key)

    def _take(self, thing: Thing) -> None:
        self._reach_into(thing.place)
        self._commands.append(f"take {self._name(thing)} from {self._name(thing.place)}")

    def _treat(self, thing: Thing, task: RoomTask) -> None:
        station = STATIONS.get(task.goal.task_type)
        if station is not None:
            place = task.scene.find(station.kind)[0]
            self._go_to(place)
            self._commands.append(f"{station.verb} {self._name(thing)} with {self._name(place)}")

    def _put(self, thing: Thing, place: Receptacle) -> None:
        self._reach_into(place)
        self._commands.append(f"move {self._name(thing)} to {self._name(place)}")
