"""Players of the household to learn from, an expert and one who is often wrong, and its skills.

Never used while playing: the game does not know it exists.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Sequence

from services.envs.household.game import CLOSED_PLACES, STATIONS, HouseholdTask


def skill_wording(task_type: str, procedure: Sequence[str]) -> str:
    """A skill's whole text.

    Each step is keyed by the one before it, which even a two-layer model learns to look up.
    """
    if not procedure:
        return f"skill {task_type} : first put ."
    sentences = [f"skill {task_type} : first use {procedure[0]} ."]
    for done, following in itertools.pairwise(procedure):
        sentences.append(f"after {done} use {following} .")
    sentences.append(f"after {procedure[-1]} put .")
    return " ".join(sentences)


def list_demonstration(task: HouseholdTask, procedure: Sequence[str]) -> list[str]:
    """The actions of a player who believes in `procedure`; with the task's own one, the expert."""
    actions = [f"open {task.source}"] if task.source in CLOSED_PLACES else []
    actions.append(f"take {task.object}")
    actions += [f"use {station}" for station in procedure]
    actions.append(f"put {task.object} in {task.destination}")
    return actions


def find_misconception(task_type: str, step: int, right_station: str) -> str:
    """The one wrong station that the demonstrator prefers at a step of a task type."""
    wrong = [station for station in STATIONS if station != right_station]
    digest = hashlib.sha256(f"{task_type}{step}".encode()).digest()
    return wrong[digest[0] % len(wrong)]


def draw_misguided_procedure(
    rng: random.Random, task: HouseholdTask, right: float, misconception: float
) -> list[str]:
    """The task's procedure as a poor demonstrator remembers it, step by step independently.

    The right station with probability `right`, a fixed wrong favourite with probability
    `misconception` (so that greedy decoding of what learns from him is wrong too, and cannot be had
    by mere sharpening), any other station otherwise.
    """
    procedure = []
    for step, station in enumerate(task.procedure):
        favourite = find_misconception(task.task_type, step, station)
        draw = rng.random()
        if draw < right:
            procedure.append(station)
        elif draw < right + misconception:
            procedure.append(favourite)
        else:
            procedure.append(_draw_other(rng, station, favourite))
    return procedure


def _draw_other(rng: random.Random, *left_out: str) -> str:
    return rng.choice([station for station in STATIONS if station not in left_out])
