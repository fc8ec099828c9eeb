"""The rooms of generated games: receptacles, objects, sizes, and the PDDL problem of a task.

What fits where, what opens and what can be cleaned, heated or cooled is ALFWorld's own table; which
rooms there are is ours. It knows no engine and writes no file.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterator, Mapping
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
    """How much a room holds. `scenes` are the numbers of its rooms within their kind, the last few
    kept from training.
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
LOOK_TASK, TWO_OBJECTS_TASK = "look_at_obj_in_light", "pick_two_obj_and_place"
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
    """What a task asks for. `destination` is "" where the task has a lamp instead, `lamp`
    otherwise.
    """

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
    room, number = ROOM_KINDS[kind], ROOM_KINDS[kind].first_scene + index
    rng = random.Random(f"{seed} scene {number}")
    more = list(Counter(room.at_most).elements())
    num_more = rng.randint(*ROOM_SIZES[size].num_receptacles) - len(room.always)
    kinds = [*room.always, *sorted(rng.sample(more, num_more))]
    # The player starts at the origin: no receptacle stands there, and no two stand in one place.
    squares = itertools.product(range(-12, 13), repeat=2)
    spots = rng.sample([square for square in squares if square != (0, 0)], len(kinds))
    receptacles = tuple(
        Receptacle(
            name,
            _draw_key(name, rng),
            f"loc|{x}|{z}|{rng.randint(0, 3)}|{rng.choice((0, 30, 45, 60))}",
        )
        for name, (x, z) in zip(kinds, spots, strict=True)
    )
    return Scene(number, kind, size, receptacles)


def list_room_kinds(task_type: str) -> list[str]:
    """The kinds of room in which a task can be done."""
    if task_type == LOOK_TASK:
        return [kind for kind, room in ROOM_KINDS.items() if room.lamp]
    station = STATIONS.get(task_type)
    return [
        kind for kind, room in ROOM_KINDS.items() if station is None or station.kind in room.always
    ]


def list_goals(scene: Scene, task_type: str) -> list[Goal]:
    """Every goal of a task type that the room allows.

    The object of each fits somewhere else than where it must go.
    """
    room = ROOM_KINDS[scene.kind]
    if task_type == LOOK_TASK:
        seen = [name for name in room.objects if any(map_fits(scene, name))]
        return [Goal(task_type, name, "", room.lamp) for name in seen]
    able = set(room.objects)
    destinations = {receptacle.kind for receptacle in scene.receptacles}
    # What is to be cleaned must be washable, and its sink is no place to put it.
    if station := STATIONS.get(task_type):
        able &= constants.VAL_ACTION_OBJECTS[station.affordance]
        destinations.discard(station.kind)
    return [
        Goal(task_type, name, destination, "")
        for name, destination in itertools.product(sorted(able), sorted(destinations))
        if name in constants.VAL_RECEPTACLE_OBJECTS[destination]
        and _fits_elsewhere(scene, name, destination)
    ]


def _fits_elsewhere(scene: Scene, name: str, destination: str) -> bool:
    """Whether an object fits into some receptacle that is not of the destination's kind."""
    return any(
        receptacle.fits(name) and receptacle.kind != destination for receptacle in scene.receptacles
    )


def map_fits(scene: Scene, name: str) -> Iterator[bool]:
    return (receptacle.fits(name) for receptacle in scene.receptacles)


def lay_out(scene: Scene, goal: Goal, rng: random.Random) -> RoomTask:
    """Put the goal's objects, its lamp and some others into a room.

    No target lies where it must go.
    """
    room, size = ROOM_KINDS[scene.kind], ROOM_SIZES[scene.size]
    num_targets = rng.randint(2, 3) if goal.task_type == TWO_OBJECTS_TASK else rng.randint(1, 2)
    things = [
        _place(goal.target, scene, rng, forbidden=goal.destination) for _ in range(num_targets)
    ]
    if goal.lamp:
        surface = rng.choice(
            [receptacle for receptacle in scene.receptacles if receptacle.kind in LAMP_SURFACES]
        )
        things.append(Thing(goal.lamp, _draw_key(goal.lamp, rng), surface))
    others = [name for name in room.objects if name != goal.target and any(map_fits(scene, name))]
    num_others = max(0, rng.randint(*size.num_objects) - len(things))
    things.extend(_place(name, scene, rng) for name in rng.choices(others, k=num_others))
    return RoomTask(scene, goal, tuple(things))


def _place(name: str, scene: Scene, rng: random.Random, forbidden: str = "") -> Thing:
    places = [
        receptacle
        for receptacle in scene.receptacles
        if receptacle.fits(name) and receptacle.kind != forbidden
    ]
    return Thing(name, _draw_key(name, rng), rng.choice(places))


def _draw_key(name: str, rng: random.Random) -> str:
    """An id as in ALFRED.

    A basin belongs to its sink, and ALFWorld names it by the `basin` at the end.
    """
    owner = name.removesuffix("Basin")
    spot = "|".join(f"{rng.uniform(-4, 4):+06.2f}" for _ in range(3))
    return f"{owner}|{spot}" if owner == name else f"{owner}|{spot}|{name}"


def encode_key(key: str) -> str:
    return "".join(_ENCODED_LETTERS.get(letter, letter) for letter in key)


def describe(goal: Goal, rng: random.Random) -> str:
    """The goal's sentence, in one of ALFWorld's own wordings."""
    template = rng.choice(goal_library.gdict[goal.task_type]["templates"])
    return str(
        template.format(
            obj=goal.target.lower(),
            recep=goal.destination.lower(),
            toggle=goal.lamp.lower(),
            mrecep="",
        )
    )


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
    return (
        f"(define (problem scene_{task.scene.number})\n    (:domain alfred)\n    (:objects\n       "
        f" {objects}\n    )\n"
        f"    (:init\n        {facts}\n    )\n{condition.replace('#', '-')}"
    )


_START = "loc|0|0|0|30"


def _list_objects(task: RoomTask) -> Iterator[str]:
    yield "agent1 - agent"
    object_kinds = {thing.kind for thing in task.things}
    yield from (f"{kind}Type - otype" for kind in sorted(object_kinds))
    receptacle_kinds = {receptacle.kind for receptacle in task.scene.receptacles}
    yield from (f"{kind}Type - rtype" for kind in sorted(receptacle_kinds))
    yield from (f"{encode_key(thing.key)} - object" for thing in task.things)
    yield from (
        f"{encode_key(receptacle.key)} - receptacle" for receptacle in task.scene.receptacles
    )
    yield from (
        f"{encode_key(location)} - location" for location in (_START, *_locations(task.scene))
    )


def _locations(scene: Scene) -> list[str]:
    return [receptacle.location for receptacle in scene.receptacles]


def _list_facts(task: RoomTask) -> Iterator[str]:
    yield "(= (total-cost) 0)"
    yield f"(atLocation agent1 {encode_key(_START)})"
    kinds = sorted({thing.kind for thing in task.things})
    for receptacle in task.scene.receptacles:
        key = encode_key(receptacle.key)
        yield f"(receptacleType {key} {receptacle.kind}Type)"
        yield f"(receptacleAtLocation {key} {encode_key(receptacle.location)})"
        if receptacle.is_openable:
            yield f"(openable {key})"
    for place in sorted({receptacle.kind for receptacle in task.scene.receptacles}):
        allowed = constants.VAL_RECEPTACLE_OBJECTS[place]
        yield from (f"(canContain {place}Type {kind}Type)" for kind in kinds if kind in allowed)
    for thing in task.things:
        yield from _list_thing_facts(thing)


def _list_thing_facts(thing: Thing) -> Iterator[str]:
    key = encode_key(thing.key)
    yield f"(objectType {key} {thing.kind}Type)"
    yield f"(inReceptacle {key} {encode_key(thing.place.key)})"
    yield f"(objectAtLocation {key} {encode_key(thing.place.location)})"
    yield (
        f"(toggleable {key})"
        if thing.kind in constants.VAL_ACTION_OBJECTS["Toggleable"]
        else f"(pickupable {key})"
    )
    if thing.kind in constants.MOVABLE_RECEPTACLES:
        yield f"(isReceptacleObject {key})"
    for affordance, predicate in _AFFORDANCES.items():
        if thing.kind in constants.VAL_ACTION_OBJECTS[affordance]:
            yield f"({predicate} {key})"
