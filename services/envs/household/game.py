"""The rules of the household game: tasks, procedures, splits, and one game in play.

There are no random numbers in it. A task asks to bring an object through its task type's procedure,
an ordered list of stations that no observation ever mentions, and then to put it in its place:

    open drawer -> take apple -> use sink -> use fan -> put apple in desk
    (closed places only)         (the hidden procedure)
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from types import MappingProxyType

OBJECTS = (
    "apple",
    "mug",
    "plate",
    "knife",
    "book",
    "egg",
    "towel",
    "pan",
    "shirt",
    "bottle",
    "spoon",
    "bowl",
)
OPEN_PLACES = ("table", "shelf", "desk", "rack")
CLOSED_PLACES = ("drawer", "cabinet", "box", "chest")
PLACES = OPEN_PLACES + CLOSED_PLACES
STATIONS = ("sink", "oven", "fridge", "fan", "iron", "lamp")

PROCEDURES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "place": (),
        "clean": ("sink",),
        "heat": ("oven",),
        "cool": ("fridge",),
        "dry": ("fan",),
        "inspect": ("lamp",),
        "cook": ("sink", "oven"),
        "chill": ("sink", "fridge"),
        "press": ("iron", "fan"),
        "polish": ("sink", "lamp"),
        "restore": ("sink", "fan", "iron"),
        "preserve": ("oven", "fan", "fridge"),
    }
)
TASK_TYPES = tuple(PROCEDURES)

TRAIN = "train"
HELDOUT = "heldout"
MAX_TURNS = 8
NOTHING_HAPPENS = "nothing happens ."
_HELDOUT_SHARE = 0.1


@dataclass(frozen=True)
class HouseholdTask:
    """One task; its id is its four parts, so any combination can be named without a list."""

    task_type: str
    object: str
    source: str
    destination: str

    @cached_property
    def task_id(self) -> str:
        return f"{self.task_type}-{self.object}-{self.source}-{self.destination}"

    @property
    def split(self) -> str:
        return HELDOUT if self.draw < _HELDOUT_SHARE else TRAIN

    @cached_property
    def draw(self) -> float:
        """A number in [0, 1) from the id alone, the same on every machine.

        It decides the split and the order of tasks.
        """
        digest = hashlib.sha256(self.task_id.encode()).digest()
        # 6 bytes are 48 bits, which a float holds exactly.
        return int.from_bytes(digest[:6]) / 2**48

    @property
    def description(self) -> str:
        return f"{self.task_type} the {self.object} and put it in the {self.destination} ."

    @property
    def procedure(self) -> tuple[str, ...]:
        return PROCEDURES[self.task_type]


@lru_cache
def list_household_tasks(split: str) -> tuple[HouseholdTask, ...]:
    """All tasks of a split, interleaved by type: every prefix is as balanced as possible."""
    by_type = []
    for task_type in TASK_TYPES:
        tasks = [task for task in _tasks_of_type(task_type) if task.split == split]
        by_type.append(sorted(tasks, key=lambda task: task.draw))

    # None stands in for tasks of a type that has no more of them.
    in_turn = itertools.chain.from_iterable(itertools.zip_longest(*by_type))
    return tuple(task for task in in_turn if task is not None)


def parse_task_id(task_id: str) -> HouseholdTask | None:
    """The task of an id, None if no such task exists."""
    parts = task_id.split("-")
    if len(parts) != 4:
        return None
    task = HouseholdTask(*parts)
    if task.task_type not in PROCEDURES or task.object not in OBJECTS:
        return None
    if task.source not in PLACES or task.destination not in PLACES:
        return None
    return task if task.source != task.destination else None


def _tasks_of_type(task_type: str) -> list[HouseholdTask]:
    tasks = []
    for thing in OBJECTS:
        for source, destination in itertools.permutations(PLACES, 2):
            tasks.append(HouseholdTask(task_type, thing, source, destination))
    return tasks


class HouseholdGame:
    """One game in play. Ends at the first `put`, or at turn `MAX_TURNS`."""

    def __init__(self, task: HouseholdTask) -> None:
        self.task = task
        self.num_turns = 0
        self.is_put = False
        self._used: list[str] = []
        self._is_open = task.source in OPEN_PLACES
        self._is_carrying = False

    @property
    def first_observation(self) -> str:
        task = self.task
        return (
            f"task : {task.description} the {task.object} is in the {task.source} . "
            f"you see {' '.join(STATIONS)} ."
        )

    @property
    def is_solved(self) -> bool:
        """The object is in its place, and went through exactly the task type's procedure."""
        return self.is_put and tuple(self._used) == self.task.procedure

    @property
    def is_over(self) -> bool:
        return self.is_put or self.num_turns >= MAX_TURNS

    def list_actions(self) -> tuple[str, ...]:
        """The admissible actions now, none once the game is over."""
        if self.is_over:
            return ()
        if not self._is_open:
            return (f"open {self.task.source}",)
        if not self._is_carrying:
            return (f"take {self.task.object}",)
        uses = [f"use {station}" for station in STATIONS]
        return (*uses, f"put {self.task.object} in {self.task.destination}")

    def act(self, action: str) -> str:
        """Play one action and return what the player sees.

        An inadmissible action only costs a turn.
        """
        is_admissible = action in self.list_actions()
        self.num_turns += 1
        if not is_admissible:
            return NOTHING_HAPPENS
        match action.split():
            case ["open", place]:
                self._is_open = True
                return f"the {place} is open . you see the {self.task.object} ."
            case ["take", thing]:
                self._is_carrying = True
                return f"you have the {thing} ."
            case ["use", station]:
                self._used.append(station)
                return f"the {station} is done ."
            case _:
                self.is_put = True
                return "the end ."
