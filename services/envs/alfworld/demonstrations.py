"""Players of ALFWorld to learn from: an expert with the walkthrough, and one who has to search.

Never used while playing: no rule depends on it. Both speak as an agent must,
`<think>...</think><action>...</action>`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sdar.contracts.errors import ConfigurationError
from services.envs.alfworld.games import GAME_FILE, read_game

# Every wording of ALFWorld's goals: the object first, then where it must go or the lamp.
_GOAL_WORDINGS = (
    re.compile(r"put (?:a|some|two) (?:clean |hot |cool )?(\w+) (?:in|on) (\w+)"),
    re.compile(r"(?:clean|heat|cool) some (\w+) and put it in (\w+)"),
    re.compile(r"find two (\w+) and put them in (\w+)"),
    re.compile(r"look at (\w+) under the (\w+)"),
    re.compile(r"examine the (\w+) with the (\w+)"),
)
_TREATMENTS = {
    "pick_clean_then_place_in_recep": ("clean", "sinkbasin"),
    "pick_heat_then_place_in_recep": ("heat", "microwave"),
    "pick_cool_then_place_in_recep": ("cool", "fridge"),
}
_LOOK_TASK = "look_at_obj_in_light"
_TWO_OBJECTS_TASK = "pick_two_obj_and_place"
_GO = "go to "


def phrase(thought: str, command: str) -> str:
    """A response of the form that the environment asks for."""
    return f"<think>{thought}</think><action>{command}</action>"


def list_walkthrough(directory: Path, task_id: str) -> list[str]:
    """The expert's responses in a game: the walkthrough in its file.

    Raises:
        EnvironmentFailedError: the file is no game.
        ConfigurationError: it holds no walkthrough.
    """
    path = directory / task_id / GAME_FILE
    commands = read_game(path).get("walkthrough")
    if not commands:
        raise ConfigurationError(
            f"{path} holds no walkthrough. Take a game that was solved.", path=path
        )
    return [phrase("I know the way.", command) for command in commands]


@dataclass(frozen=True, slots=True)
class Aim:
    """What a task's sentence asks for. `destination` is a kind of receptacle, or of lamp."""

    target: str
    destination: str


def read_aim(description: str) -> Aim:
    """The aim in a task's sentence.

    Raises:
        ValueError: it is none of ALFWorld's wordings.
    """
    for wording in _GOAL_WORDINGS:
        found = wording.match(description)
        if found:
            return Aim(found[1], found[2])
    raise ValueError(f"task {description!r} has none of ALFWorld's wordings")


class ExploringPlayer:
    """Plays one episode, knowing what it has seen and no more.

    Visits the receptacles one after the other, in the order in which the admissible actions list
    them and on from where it stands; opens what is closed; takes what the task is about; then does
    the task's procedure. Except for the places where it saw things (`remembers`), each choice
    depends on the last few turns alone: what a model with a short window can learn.
    """

    def __init__(self, *, remembers: bool = True) -> None:
        self._remembers = remembers
        self._places: list[str] = []
        self._place = ""
        self._holding = ""
        self._is_treated = False
        self._seen_at: dict[str, str] = {}

    def next_action(
        self, description: str, task_type: str, observation: str, admissible_actions: Sequence[str]
    ) -> str:
        """The whole response to an observation."""
        return phrase(*self.choose(description, task_type, observation, admissible_actions))

    def choose(
        self, description: str, task_type: str, observation: str, admissible_actions: Sequence[str]
    ) -> tuple[str, str]:
        """The next thought and command. Must be called for every turn, and its command played."""
        # The first turn alone lists every place: later ones leave out where the player stands.
        if not self._places:
            going = [command for command in admissible_actions if command.startswith(_GO)]
            self._places = [command.removeprefix(_GO) for command in going]

        aim = read_aim(description)
        self._note(observation)
        decide = self._carry_on if self._holding else self._search
        thought, command = decide(aim, task_type, admissible_actions)
        self._apply(command)
        return thought, command

    def _note(self, observation: str) -> None:
        """Remember where the things in sight are."""
        _, found, things = observation.partition("you see ")
        if self._place and found:
            for thing in re.findall(r"\ba (\w+ \d+)", things):
                self._seen_at[thing] = self._place

    def _apply(self, command: str) -> None:
        """Note what the command changes, if it works; admissible commands always do."""
        verb, _, rest = command.partition(" ")
        if command.startswith(_GO):
            self._place = command.removeprefix(_GO)
        elif verb == "take":
            self._holding = rest.partition(" from ")[0]
            self._seen_at.pop(self._holding, None)
            self._is_treated = False
        elif verb == "move":
            self._seen_at[self._holding] = self._place
            self._holding = ""
        elif verb in {"clean", "heat", "cool"}:
            self._is_treated = True

    def _search(self, aim: Aim, task_type: str, admissible: Sequence[str]) -> tuple[str, str]:
        """Look for the object.

        Where two objects are to be brought to one place, what lies there already is left there.
        """
        done_at = self._first_of(aim.destination) if task_type == _TWO_OBJECTS_TASK else ""
        for command in admissible:
            if command.startswith(f"take {aim.target} ") and self._place != done_at:
                return f"take the {aim.target}", command
        return f"find a {aim.target}", self._explore(aim.target, admissible, passing_by=done_at)

    def _carry_on(self, aim: Aim, task_type: str, admissible: Sequence[str]) -> tuple[str, str]:
        """The object is in hand: treat it, then bring it where it must go."""
        if task_type == _LOOK_TASK:
            for command in admissible:
                if command.startswith(f"use {aim.destination} "):
                    return f"use the {aim.destination}", command
            return f"find a {aim.destination}", self._explore(aim.destination, admissible)

        verb, station = _TREATMENTS.get(task_type, ("", ""))
        if verb and not self._is_treated:
            place = self._first_of(station)
            command = f"{verb} {self._holding} with {place}"
            return f"{verb} the {aim.target}", self._reach(place, command, admissible)

        place = self._first_of(aim.destination)
        command = f"move {self._holding} to {place}"
        return f"put it in the {aim.destination}", self._reach(place, command, admissible)

    def _first_of(self, kind: str) -> str:
        return next(place for place in self._places if place.partition(" ")[0] == kind)

    def _reach(self, place: str, command: str, admissible: Sequence[str]) -> str:
        """The command if it can be played, else what leads to it: going there, or opening."""
        if command in admissible:
            return command
        return f"open {place}" if place == self._place else f"{_GO}{place}"

    def _explore(self, kind: str, admissible: Sequence[str], passing_by: str = "") -> str:
        """Look into what is closed here, then go on.

        First to where a thing of the kind was seen, else to the next place in line.
        """
        opening = f"open {self._place}"
        if opening in admissible:
            return opening

        if self._remembers:
            for thing, place in self._seen_at.items():
                if thing.partition(" ")[0] == kind and place not in (self._place, passing_by):
                    return f"{_GO}{place}"

        # The player begins in the middle of the room, at no place.
        after = self._places.index(self._place) + 1 if self._place in self._places else 0
        return f"{_GO}{self._places[after % len(self._places)]}"
