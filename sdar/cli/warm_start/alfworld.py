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

_ACT = "<think></think><action>"
_END = "</action>"
_GO = "go to "
_OPEN = "open "
_MOVE = "move "
_PLACE = re.compile(r"You arrive at (\w+ \d+)")
_CAN_TAKE = re.compile(r"take (\w+) \d+ from ")
_TAKEN = re.compile(r"You pick up the (\w+ \d+)")
_TREATED = re.compile(r"You (?:clean|heat|cool) the ")
_WORDS = (
    # Responses, and commands as they are listed.
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
    # What a game says.
    "inventory\n",
    "look\n",
    "You are in the middle of a room. Looking quickly around you, you see a ",
    ", a ",
    ", and a ",
    "You arrive at ",
    ". On the ",
    ". The ",
    " is closed.",
    " is open.",
    " In it, you see a ",
    " In it, you see nothing.",
    ", you see a ",
    ", you see nothing.",
    "You pick up the ",
    "You move the ",
    "You open the ",
    "You close the ",
    " from the ",
    " to the ",
    "You clean the ",
    "You heat the ",
    "You cool the ",
    " using the ",
    "Nothing happens.",
    "You turn on the ",
    # What a task asks for.
    "put a ",
    "put some ",
    "clean some ",
    "heat some ",
    "cool some ",
    "put a clean ",
    "put a hot ",
    "put a cool ",
    "look at ",
    " in ",
    " on ",
    " and put it in ",
    " under the ",
    "examine the ",
    " with the ",
    # Numbers of things and places.
    " 1",
    " 2",
    " 3",
    "inventory",
    "look",
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

        played = _find_easy(games)
        self.tasks = [task for task in self.tasks if task.task_id in played]
        # What could be taken in each game, as the players have seen it so far.
        self._takeable: dict[str, set[str]] = defaultdict(set)

    def list_phrases(self) -> Sequence[str]:
        kinds: set[str] = set()
        for room in ROOM_KINDS.values():
            names = (*room.always, *room.at_most, *room.objects, room.lamp)
            # Not every room has a lamp.
            kinds.update(name.lower() for name in names if name)
        return sorted({*self.list_common_phrases(), *kinds, *_WORDS})

    def open_player(self, task: Task) -> Player:
        return _Housekeeper(task, self._forgetful_share, self._takeable[task.task_id])

    def draw_task(self, rng: random.Random) -> Task:
        """A game with a wish of its own for any thing that was seen in it: what games ask for would
        be learnt by heart.
        """
        task = rng.choice(self.tasks)
        target = read_aim(task.description).target
        # Sorted, for the order of a set is not the same in every process.
        wished = rng.choice(sorted(self._takeable[task.task_id] | {target}))
        description = re.sub(rf"\b{target}\b", wished, task.description)
        return dataclasses.replace(task, description=description)


def _find_easy(games: Path) -> set[str]:
    """Ids of the tasks in small rooms with one object to carry."""
    _, most_receptacles = ROOM_SIZES["small"].num_receptacles
    found = set()
    for entry in load_entries(games)["train"]:
        is_small = entry.num_receptacles <= most_receptacles
        if is_small and entry.task_type != TWO_OBJECTS_TASK:
            found.add(entry.task_id)
    return found


class _Housekeeper:
    """Knows from the texts alone where it is, what it holds, and whether that was treated. Notes
    what could be taken.
    """

    def __init__(self, task: Task, forgetful_share: float, takeable: set[str]) -> None:
        self._takeable = takeable
        self._task_type = task.task_type
        self._aim = read_aim(task.description)
        # Where the object is cleaned, heated or cooled; None for tasks without that.
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

        erring = expert
        if rng.random() < self._forgetful_share:
            erring = self._choose(admissible, rng, is_forgetful=True)
        # Where forgetting changes nothing, the erring player fumbles.
        if erring == expert:
            erring = rng.choice(admissible)
        return Choice(f"{_ACT}{expert}{_END}", f"{_ACT}{erring}{_END}")

    def _note(self, observation: Observation) -> None:
        """Remember what the game just said."""
        for action in observation.admissible_actions:
            found = _CAN_TAKE.match(action)
            if found is not None:
                self._takeable.add(found[1])

        arrived = _PLACE.search(observation.text)
        if arrived is not None:
            self._place = arrived[1]
            self._visited.add(self._place)
        taken = _TAKEN.search(observation.text)
        if taken is not None:
            self._holding = taken[1]
            self._is_treated = False
            # With another thing in hand, every place is worth a visit again.
            self._visited.clear()
        if observation.text.startswith("You move the "):
            self._holding = ""
        if _TREATED.search(observation.text):
            self._is_treated = True

    def _choose(self, admissible: Sequence[str], rng: random.Random, *, is_forgetful: bool) -> str:
        """The next command towards the aim; a forgetful player leaves out the treatment."""
        target = self._aim.target
        destination = self._aim.destination
        if not self._holding.startswith(f"{target} "):
            return _find(admissible, f"take {target} ") or self._explore(admissible, rng)
        if self._task_type == LOOK_TASK:
            return _find(admissible, f"use {destination} ") or self._explore(admissible, rng)

        if self._station is not None and not (self._is_treated or is_forgetful):
            treatment = _find(admissible, f"{self._station.verb} ")
            if treatment:
                return treatment
            station = self._station.kind.lower()
            if not self._place.startswith(f"{station} "):
                return _go(admissible, station, rng)

        if not self._place.startswith(f"{destination} "):
            return _go(admissible, destination, rng)
        # A closed destination takes nothing until it is open.
        here = _find(admissible, _MOVE) or _find(admissible, _OPEN)
        return here or self._explore(admissible, rng)

    def _explore(self, admissible: Sequence[str], rng: random.Random) -> str:
        """Put down the wrong thing, open what is closed here, else go to another place: to one that
        is new, if there is one.
        """
        here = ""
        # To look at a thing under the lamp, it has to stay in hand.
        if self._task_type != LOOK_TASK:
            here = _find(admissible, _MOVE)
        here = here or _find(admissible, _OPEN)
        if here:
            return here

        going = _list_starting(admissible, _GO)
        new = [command for command in going if command.removeprefix(_GO) not in self._visited]
        return rng.choice(new or going)


def _find(admissible: Sequence[str], start: str) -> str:
    """The first command that starts so, "" if there is none."""
    return next(iter(_list_starting(admissible, start)), "")


def _go(admissible: Sequence[str], kind: str, rng: random.Random) -> str:
    """To a place of a kind; anywhere, if the only one is here."""
    there = _list_starting(admissible, f"{_GO}{kind} ")
    return rng.choice(there or _list_starting(admissible, _GO))


def _list_starting(admissible: Sequence[str], start: str) -> list[str]:
    return [command for command in admissible if command.startswith(start)]
