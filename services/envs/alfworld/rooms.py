"""The rooms of generated games: receptacles, objects, sizes, and the PDDL problem of a task.

What fits where, what opens and what can be cleaned, heated or cooled is ALFWorld's own table; which
rooms there are is ours. It knows no engine and writes no file.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType

from services.envs.alfworld.upstream import constants, goal_library


@dataclass(frozen=True, slots=True)
class RoomKind:
    """What a kind of room holds.

    Some receptacles it has always, others up to a number of each; `objects` may lie about.
    """

    first_scene: int
    always: tuple[str, ...]
    at_most: Mapping[str, int]
    objects: tuple[str, ...]
    lamp: str = ""


@dataclass(frozen=True, slots=True)
class RoomSize:
    """How much a room holds.

    `train_scenes` and `unseen_scenes` are the numbers of its rooms within their kind; the latter
    are kept from training.
    """

    num_receptacles: tuple[int, int]
    num_objects: tuple[int, int]
    train_scenes: range
    unseen_scenes: range


@dataclass(frozen=True, slots=True)
class Station:
    """The receptacle that does a task's work, what its object must be, and the command's verb."""

    kind: str
    affordance: str
    verb: str


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ROOM_KINDS = MappingProxyType(
    {
        "kitchen": RoomKind(
            first_scene=1,
            always=("Fridge", "Microwave", "SinkBasin", "CounterTop"),
            at_most={
                "Cabinet": 8,
                "Drawer": 6,
                "StoveBurner": 4,
                "Shelf": 3,
                "CounterTop": 2,
                "GarbageCan": 1,
                "DiningTable": 1,
                "CoffeeMachine": 1,
                "Toaster": 1,
            },
            objects=_words(
                "Apple Bread ButterKnife Bowl Cup DishSponge Egg Fork Kettle Knife Ladle "
                "Lettuce Mug Pan PepperShaker Plate Pot Potato SaltShaker SoapBottle Spatula "
                "Spoon Tomato WineBottle"
            ),
        ),
        "living room": RoomKind(
            first_scene=201,
            always=("Sofa", "CoffeeTable", "SideTable"),
            at_most={
                "Drawer": 6,
                "Shelf": 6,
                "Cabinet": 4,
                "ArmChair": 2,
                "SideTable": 1,
                "Dresser": 1,
                "DiningTable": 1,
                "Ottoman": 1,
                "GarbageCan": 1,
            },
            objects=_words(
                "Book Box CellPhone CreditCard KeyChain Laptop Newspaper Pencil Pillow Plate "
                "RemoteControl Statue TissueBox Vase Watch WateringCan"
            ),
            lamp="FloorLamp",
        ),
        "bedroom": RoomKind(
            first_scene=301,
            always=("Bed", "Desk", "SideTable"),
            at_most={
                "Drawer": 8,
                "Shelf": 6,
                "Cabinet": 2,
                "SideTable": 1,
                "Dresser": 1,
                "Safe": 1,
                "ArmChair": 1,
                "LaundryHamper": 1,
                "GarbageCan": 1,
            },
            objects=_words(
                "AlarmClock BaseballBat Book Bowl Box CD CellPhone CreditCard KeyChain Laptop "
                "Mug Pen Pencil Pillow TennisRacket TissueBox Watch"
            ),
            lamp="DeskLamp",
        ),
        "bathroom": RoomKind(
            first_scene=401,
            always=("SinkBasin", "CounterTop", "Toilet"),
            at_most={
                "Cabinet": 6,
                "Drawer": 6,
                "Shelf": 4,
                "HandTowelHolder": 2,
                "TowelHolder": 1,
                "SinkBasin": 1,
                "BathtubBasin": 1,
                "ToiletPaperHanger": 1,
                "GarbageCan": 1,
            },
            objects=_words(
                "Candle Cloth DishSponge HandTowel SoapBar SoapBottle SprayBottle TissueBox "
                "ToiletPaper ToiletPaperRoll"
            ),
        ),
    }
)
ROOM_SIZES = MappingProxyType(
    {
        "small": RoomSize((5, 7), (4, 7), range(0, 14), range(14, 18)),
        "medium": RoomSize((9, 12), (8, 12), range(18, 22), range(22, 24)),
        "large": RoomSize((16, 22), (12, 18), range(24, 28), range(28, 30)),
    }
)
STATIONS = MappingProxyType(
    {
        "pick_clean_then_place_in_recep": Station("SinkBasin", "Cleanable", "clean"),
        "pick_heat_then_place_in_recep": Station("Microwave", "Heatable", "heat"),
        "pick_cool_then_place_in_recep": Station("Fridge", "Coolable", "cool"),
    }
)
LOOK_TASK = "look_at_obj_in_light"
TWO_OBJECTS_TASK = "pick_two_obj_and_place"
LAMP_SURFACES = ("SideTable", "Desk", "CoffeeTable")
_AFFORDANCES = {
    "Cleanable": "cleanable",
    "Heatable": "heatable",
    "Coolable": "coolable",
    "Sliceable": "sliceable",
}
# How ALFWorld writes the letters of an object's id that PDDL does not know.
_ENCODED_LETTERS = {"-": "_minus_", "|": "_bar_", "+": "_plus_", ".": "_dot_"}


@dataclass(frozen=True, slots=True)
class Receptacle:
    kind: str
    key: str
    location: str

    @property
    def is_openable(self) -> bool:
        return self.kind in constants.OPENABLE_CLASS_LIST

    def fits(self, object_kind: str) -> bool:
        return object_kind in constants.VAL_RECEPTACLE_OBJECTS[self.kind]


@dataclass(frozen=True, slots=True)
class Thing:
    """An object in its place."""

    kind: str
    key: str
    place: Receptacle


@dataclass(frozen=True, slots=True)
class Scene:
    """A room's furniture: the same for every task that plays in it."""

    number: int
    kind: str
    size: str
    receptacles: tuple[Receptacle, ...]

    def find(self, kind: str) -> list[Receptacle]:
        return [receptacle for receptacle in self.receptacles if receptacle.kind == kind]


@dataclass(frozen=True, slots=True)
class Goal:
    """What a task asks for: `destination` or `lamp`, and the other of the two is ""."""

    task_type: str
    target: str
    destination: str
    lamp: str


@dataclass(frozen=True, slots=True)
class RoomTask:
    """A goal in a furnished room with its objects laid out: all that a game is made of."""

    scene: Scene
    goal: Goal
    things: tuple[Thing, ...]


@lru_cache(maxsize=512)
def build_scene(kind: str, size: str, index: int, seed: int) -> Scene:
    """The room of a number: the same furniture for the same seed."""
    room = ROOM_KINDS[kind]
    number = room.first_scene + index
    rng = random.Random(f"{seed} scene {number}")

    more = list(Counter(room.at_most).elements())
    num_more = rng.randint(*ROOM_SIZES[size].num_receptacles) - len(room.always)
    kinds = [*room.always, *sorted(rng.sample(more, num_more))]

    # The player starts at the origin: no receptacle stands there, and no two stand in one place.
    squares = list(itertools.product(range(-12, 13), repeat=2))
    squares.remove((0, 0))
    spots = rng.sample(squares, len(kinds))

    receptacles = []
    for name, (x, z) in zip(kinds, spots, strict=True):
        key = _draw_key(name, rng)
        rotation = rng.randint(0, 3)
        horizon = rng.choice((0, 30, 45, 60))
        receptacles.append(Receptacle(name, key, f"loc|{x}|{z}|{rotation}|{horizon}"))
    return Scene(number, kind, size, tuple(receptacles))


def list_room_kinds(task_type: str) -> list[str]:
    """The kinds of room in which a task can be done."""
    if task_type == LOOK_TASK:
        return [kind for kind, room in ROOM_KINDS.items() if room.lamp]
    station = STATIONS.get(task_type)
    if station is None:
        return list(ROOM_KINDS)
    return [kind for kind, room in ROOM_KINDS.items() if station.kind in room.always]


def list_goals(scene: Scene, task_type: str) -> list[Goal]:
    """Every goal of a task type that the room allows.

    The object of each fits somewhere else than where it must go.
    """
    room = ROOM_KINDS[scene.kind]
    if task_type == LOOK_TASK:
        seen = [name for name in room.objects if _list_places(scene, name)]
        return [Goal(task_type, name, "", room.lamp) for name in seen]

    able = set(room.objects)
    destinations = {receptacle.kind for receptacle in scene.receptacles}
    # What is to be cleaned must be washable, and its sink is no place to put it.
    station = STATIONS.get(task_type)
    if station is not None:
        able &= constants.VAL_ACTION_OBJECTS[station.affordance]
        destinations.discard(station.kind)

    goals = []
    for name, destination in itertools.product(sorted(able), sorted(destinations)):
        is_fit = name in constants.VAL_RECEPTACLE_OBJECTS[destination]
        if is_fit and _list_places(scene, name, forbidden=destination):
            goals.append(Goal(task_type, name, destination, ""))
    return goals


def _list_places(scene: Scene, name: str, forbidden: str = "") -> list[Receptacle]:
    """The receptacles into which an object fits, less those of the forbidden kind."""
    fitting = [receptacle for receptacle in scene.receptacles if receptacle.fits(name)]
    return [receptacle for receptacle in fitting if receptacle.kind != forbidden]


def lay_out(scene: Scene, goal: Goal, rng: random.Random) -> RoomTask:
    """Put the goal's objects, its lamp and some others into a room.

    No target lies where it must go.
    """
    num_targets = rng.randint(2, 3) if goal.task_type == TWO_OBJECTS_TASK else rng.randint(1, 2)
    things = [_place(goal.target, scene, rng, goal.destination) for _ in range(num_targets)]

    if goal.lamp:
        surfaces = [place for place in scene.receptacles if place.kind in LAMP_SURFACES]
        surface = rng.choice(surfaces)
        things.append(Thing(goal.lamp, _draw_key(goal.lamp, rng), surface))

    others = [name for name in ROOM_KINDS[scene.kind].objects if name != goal.target]
    others = [name for name in others if _list_places(scene, name)]
    num_others = max(0, rng.randint(*ROOM_SIZES[scene.size].num_objects) - len(things))
    things += [_place(name, scene, rng) for name in rng.choices(others, k=num_others)]
    return RoomTask(scene, goal, tuple(things))


def _place(name: str, scene: Scene, rng: random.Random, forbidden: str = "") -> Thing:
    key = _draw_key(name, rng)
    return Thing(name, key, rng.choice(_list_places(scene, name, forbidden)))


def _draw_key(name: str, rng: random.Random) -> str:
    """An id as in ALFRED.

    A basin belongs to its sink, and ALFWorld names it by the `basin` at the end.
    """
    owner = name.removesuffix("Basin")
    spot = "|".join(f"{rng.uniform(-4, 4):+06.2f}" for _ in range(3))
    key = f"{owner}|{spot}"
    return key if owner == name else f"{key}|{name}"


def encode_key(key: str) -> str:
    return "".join(_ENCODED_LETTERS.get(letter, letter) for letter in key)


def describe(goal: Goal, rng: random.Random) -> str:
    """The goal's sentence, in one of ALFWorld's own wordings."""
    template = rng.choice(goal_library.gdict[goal.task_type]["templates"])
    sentence: str = template.format(
        obj=goal.target.lower(),
        recep=goal.destination.lower(),
        toggle=goal.lamp.lower(),
        mrecep="",
    )
    return sentence


def write_problem(task: RoomTask) -> str:
    """The PDDL problem of a task.

    Ids are encoded. ALFWorld's goals write `#` for the hyphen before a type.
    """
    goal = task.goal
    condition = goal_library.gdict[goal.task_type]["pddl"].format(
        obj=goal.target, recep=goal.destination, toggle=goal.lamp, mrecep=""
    )
    objects = "\n        ".join(_list_objects(task))
    facts = "\n        ".join(_list_facts(task))
    # The condition brings the problem's closing parenthesis with it.
    return (
        f"(define (problem scene_{task.scene.number})\n"
        "    (:domain alfred)\n"
        f"    (:objects\n        {objects}\n    )\n"
        f"    (:init\n        {facts}\n    )\n"
        f"{condition.replace('#', '-')}"
    )


_START = "loc|0|0|0|30"


def _list_objects(task: RoomTask) -> Iterator[str]:
    yield "agent1 - agent"
    for kind in _list_kinds(task.things):
        yield f"{kind}Type - otype"
    for kind in _list_kinds(task.scene.receptacles):
        yield f"{kind}Type - rtype"
    for thing in task.things:
        yield f"{encode_key(thing.key)} - object"
    for receptacle in task.scene.receptacles:
        yield f"{encode_key(receptacle.key)} - receptacle"
    yield f"{encode_key(_START)} - location"
    for receptacle in task.scene.receptacles:
        yield f"{encode_key(receptacle.location)} - location"


def _list_kinds(things: Iterable[Thing | Receptacle]) -> list[str]:
    """Each kind once, in an order that is the same in every process."""
    return sorted({thing.kind for thing in things})


def _list_facts(task: RoomTask) -> Iterator[str]:
    yield "(= (total-cost) 0)"
    yield f"(atLocation agent1 {encode_key(_START)})"
    for receptacle in task.scene.receptacles:
        key = encode_key(receptacle.key)
        yield f"(receptacleType {key} {receptacle.kind}Type)"
        yield f"(receptacleAtLocation {key} {encode_key(receptacle.location)})"
        if receptacle.is_openable:
            yield f"(openable {key})"

    for place in _list_kinds(task.scene.receptacles):
        for kind in _list_kinds(task.things):
            if kind in constants.VAL_RECEPTACLE_OBJECTS[place]:
                yield f"(canContain {place}Type {kind}Type)"

    for thing in task.things:
        yield from _list_thing_facts(thing)


def _list_thing_facts(thing: Thing) -> Iterator[str]:
    key = encode_key(thing.key)
    yield f"(objectType {key} {thing.kind}Type)"
    yield f"(inReceptacle {key} {encode_key(thing.place.key)})"
    yield f"(objectAtLocation {key} {encode_key(thing.place.location)})"
    if thing.kind in constants.VAL_ACTION_OBJECTS["Toggleable"]:
        yield f"(toggleable {key})"
    else:
        yield f"(pickupable {key})"
    if thing.kind in constants.MOVABLE_RECEPTACLES:
        yield f"(isReceptacleObject {key})"
    for affordance, predicate in _AFFORDANCES.items():
        if thing.kind in constants.VAL_ACTION_OBJECTS[affordance]:
            yield f"({predicate} {key})"
