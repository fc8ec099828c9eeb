"""ALFWorld's demonstrations: a player who searches at random, fumbles, and often forgets a step.

It learns in small rooms of its own making, with one object to carry, so that no shipped game is
ever seen.
"""

from __future__ import annotations

import dataclasses
import random
import re
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from sdar.cli.warm_start.recipe import WarmStartPhase
from sdar.cli.warm_start.windowed import (
    Choice,
    Player,
    WindowDemonstrator,
    WindowRecipe,
    describe_prompts,
)
from sdar.contracts.types import Task
from sdar.environments.base import Observation
from services.envs.alfworld.demonstrations import read_aim
from services.envs.alfworld.environment import AlfworldEnvironment
from services.envs.alfworld.games import load_entries
from services.envs.alfworld.generate import generate
from services.envs.alfworld.rooms import (
    LOOK_TASK,
    ROOM_KINDS,
    ROOM_SIZES,
    STATIONS,
    TWO_OBJECTS_TASK,
)

_ACT, _END = "<think></think><action>", "</action>"
_GO = "go to "
_OPEN = "open "
_MOVE = "move "
_PLACE = re.compile(r"You arrive at (\w+ \d+)")
_CAN_TAKE = re.compile(r"take (\w+) \d+ from ")
_TAKEN = re.compile(r"You pick up the (\w+ \d+)")
_TREATED = re.compile(r"You (?:clean|heat|cool) the ")
_WORDS = (
    *(
        _ACT,
        _END,
        _GO,
        _OPEN,
        _MOVE,
        "close ",
        "take ",
        "use ",
        "examine ",
        "clean ",
        "heat ",
        "cool ",
        " from ",
        " to ",
        " with ",
    ),
    *(
        "inventory\n",
        "look\n",
        "You are in the middle of a room. Looking quickly around you, you see a ",
        ", a ",
        ", and a ",
    ),
    *(
        "You arrive at ",
        ". On the ",
        ". The ",
        " is closed.",
        " is open.",
        " In it, you see a ",
        " In it, you see nothing.",
    ),
    *(
        ", you see a ",
        ", you see nothing.",
        "You pick up the ",
        "You move the ",
        "You open the ",
        "You close the ",
        " from the ",
    ),
    *(
        " to the ",
        "You clean the ",
        "You heat the ",
        "You cool the ",
        " using the ",
        "Nothing happens.",
        "You turn on the ",
    ),
    *(
        "put a ",
        "put some ",
        "clean some ",
        "heat some ",
        "cool some ",
        "put a clean ",
        "put a hot ",
        "put a cool ",
        "look at ",
    ),
    *(
        " in ",
        " on ",
        " and put it in ",
        " under the ",
        "examine the ",
        " with the ",
        " 1",
        " 2",
        " 3",
        "inventory",
        "look",
    ),
)


@dataclass(frozen=True)
class AlfworldRecipe(WindowRecipe):
    """Attributes:
    games_seed, num_games: of the games it learns from; the small ones among them are played.
    forgetful_share: chance that the erring player takes an untreated object straight to where it
        must go.
    """

    environment: ClassVar[str] = "alfworld"

    num_layers: int = 3
    vocabulary_limit: int = 576
    language_model_weight: float = 0.5
    num_tokenizer_episodes: int = 300
    max_turns: int = 14
    expert_share: float = 0.7
    thinned_share: float = 0.5
    phases: tuple[WarmStartPhase, ...] = (WarmStartPhase(2600, 4e-3, 0.8, 0.4),)
    games_seed: int = 20_000
    num_games: int = 240
    forgetful_share: float = 0.7

    def open_demonstrator(self) -> AlfworldDemonstrator:
        return AlfworldDemonstrator(self)

    def describe_wording(self) -> list[Any]:
        return [describe_prompts(AlfworldEnvironment), _WORDS]


class AlfworldDemonstrator(WindowDemonstrator):
    def __init__(self, recipe: AlfworldRecipe) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="sdar-warm-start-")
        games = Path(self._directory.name) / "games"
        generate(
            games,
            num_tasks=recipe.num_games,
            seed=recipe.games_seed,
            report=lambda done, total: None,
        )
        super().__init__(recipe, AlfworldEnvironment(data_dir=str(games)))
        self._forgetful_share = recipe.forgetful_share
        _, most_receptacles = ROOM_SIZES["small"].num_receptacles
        small = {
            entry.task_id
            for entry in load_entries(games)["train"]
            if entry.num_receptacles <= most_receptacles and entry.task_type != TWO_OBJECTS_TASK
        }
        self.tasks = [task for task in self.tasks if task.task_id in small]
        self._takeable: dict[str, set[str]] = defaultdict(set)

    def list_phrases(self) -> Sequence[str]:
        kinds = {
            name.lower()
            for room in ROOM_KINDS.values()
            for name in (*room.always, *room.at_most, *room.objects, room.lamp)
            if name
        }
        return sorted({*self.list_common_phrases(), *kinds, *_WORDS})

    def open_player(self, task: Task) -> Player:
        return _Housekeeper(task, self._forgetful_share, self._takeable[task.task_id])

    def draw_task(self, rng: random.Random) -> Task:
        """A game with a wish of its own for any thing that was seen in it: what games ask for would
        be learnt by heart.
        """
        task = rng.choice(self.tasks)
        target = read_aim(task.description).target
        wished = rng.choice(sorted(self._takeable[task.task_id] | {target}))
        return dataclasses.replace(
            task, description=re.sub(rf"\b{target}\b", wished, task.description)
        )


class _Housekeeper:
    """Knows from the texts alone where it is, what it holds, and whether that was treated. Notes
    what could be taken.
    """

    def __init__(self, task: Task, forgetful_share: float, takeable: set[str]) -> None:
        self._takeable = takeable
        self._task_type, self._aim = task.task_type, read_aim(task.description)
        self._station = STATIONS.get(task.task_type)
        self._forgetful_share = forgetful_share
        self._place = ""
        self._holding = ""
        self._is_treated = False
        self._visited: set[str] = set()

    def __call__(self, observation: Observation, rng: random.Random) -> Choice:
        self._note(observation)
        admissible = observation.admissible_actions
        expert = self._choose(admissible, rng, is_forgetful=False)
        is_forgetful = rng.random() < self._forgetful_share
        erring = self._choose(admissible, rng, is_forgetful=True) if is_forgetful else expert
        if erring == expert:
            erring = rng.choice(admissible)
        return Choice(f"{_ACT}{expert}{_END}", f"{_ACT}{erring}{_END}")

    def _note(self, observation: Observation) -> None:
        self._takeable.update(
            found[1]
            for action in observation.admissible_actions
            if (found := _CAN_TAKE.match(action))
        )
        if arrived := _PLACE.search(observation.text):
            self._place = arrived[1]
            self._visited.add(self._place)
        if taken := _TAKEN.search(observation.text):
            self._holding, self._is_treated = taken[1], False
            self._visited.clear()
        if observation.text.startswith("You move the "):
            self._holding = ""
        if _TREATED.search(observation.text):
            self._is_treated = True

    def _choose(self, admissible: Sequence[str], rng: random.Random, *, is_forgetful: bool) -> str:
        target, destination = self._aim.target, self._aim.destination
        if not self._holding.startswith(f"{target} "):
            return _find(admissible, f"take {target} ") or self._explore(admissible, rng)
        if self._task_type == LOOK_TASK:
            return _find(admissible, f"use {destination} ") or self._explore(admissible, rng)
        if self._station is not None and not (self._is_treated or is_forgetful):
            station = self._station.kind.lower()
            if treatment := _find(admissible, f"{self._station.verb} "):
                return treatment
            if not self._place.startswith(f"{station} "):
                return _go(admissible, station, rng)
        if self._place.startswith(f"{destination} "):
            return (
                _find(admissible, _MOVE)
                or _find(admissible, _OPEN)
                or self._explore(admissible, rng)
            )
        return _go(admissible, destination, rng)

    def _explore(self, admissible: Sequence[str], rng: random.Random) -> str:
        """Open what is closed here; then anywhere else, new places first. With the wrong thing in
        hand, put it down.
        """
        if here := _find(admissible, _MOVE) if self._task_type != LOOK_TASK else "":
            return here
        if here := _find(admissible, _OPEN):
            return here
        places = [command for command in admissible if command.startswith(_GO)]
        return rng.choice(
            [place for place in places if place.removeprefix(_GO) not in self._visited] or places
        )


def _find(admissible: Sequence[str], start: str) -> str:
    """The first command that starts so, "" if there is none."""
    return next((command for command in admissible if command.startswith(start)), "")


def _go(admissible: Sequence[str], kind: str, rng: random.Random) -> str:
    """To a place of a kind; anywhere, if the only one is here."""
    places = [command for command in admissible if command.startswith(_GO)]
    return rng.choice([place for place in places if place.startswith(f"{_GO}{kind} ")] or places)
