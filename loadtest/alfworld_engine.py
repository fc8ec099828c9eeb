"""Measures the kept ALFWorld engine against the stock one: speed, and memory of a game in play.

Both sides are ALFWorld's own stack of wrappers, in one process and in turn, on the same generated
games and the same commands: random ones, a reset, the walkthrough. Nothing of TextWorld is patched,
so the stock engine stays stock beside ours. Every line of both transcripts is compared, so that no
figure is of an engine that plays another game.
"""

from __future__ import annotations

import gc
import random
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from textworld.envs.pddl.pddl import PddlEnv

from loadtest.comparison import (
    Comparison,
    Measurement,
    Say,
    Table,
    Target,
    describe_pair,
    format_figure,
)
from loadtest.workloads import SEED
from services.envs.alfworld.engine import AlfredInfos, KeptPddlEnv, build_stack, translate
from services.envs.alfworld.games import GAME_FILE, TASK_TYPES, GameEntry, read_game, read_index
from services.envs.alfworld.generate import SIZE_CYCLE, generate

TARGET = Target("at_least", 8.0)
NUM_RANDOM_STEPS = 30
NUM_LIVE = 24
RESET = "reset"

Game = Mapping[str, Any]


@dataclass(slots=True)
class Timing:
    """Seconds that one side spent on one game, by what it did, and what it said."""

    load_s: float
    reload_s: float = 0.0
    step_s: list[float] = field(default_factory=list)
    transcript: list[tuple[str, tuple[str, ...], bool]] = field(default_factory=list)

    @property
    def steps_per_s(self) -> float:
        return len(self.step_s) / sum(self.step_s)


@dataclass(frozen=True, slots=True)
class Figure:
    """What is compared of a game's timing on both sides."""

    what: str
    unit: str
    read: Callable[[Timing], float]
    target: Target | None = None


FIGURES = (
    Figure("a core's steps", "steps/s", lambda timing: timing.steps_per_s, TARGET),
    Figure("loading a game for the first time", "ms", lambda timing: 1000 * timing.load_s),
    Figure("loading a known game and resetting it", "ms", lambda timing: 1000 * timing.reload_s),
)


NOTES = (
    "Small rooms have 5 to 7 receptacles, large ones 16 to 22, as the public games do; "
    "one game of each task type. Transcripts of both sides were the same, line by line.",
    "A game is translated when a process first loads it, and kept: the other members of "
    "its group, and every reset, find it there.",
)


def measure(say: Say) -> Measurement:
    with tempfile.TemporaryDirectory(prefix="sdar-bench-") as directory:
        say("generating games")
        games = _generate_games(Path(directory, "games"))

    comparisons: list[Comparison] = []
    for size, chosen in games.items():
        say(f"{size} rooms")
        comparisons.extend(_compare(size, chosen, say))

    say("memory")
    rows = []
    for name, engine in (("ours", KeptPddlEnv), ("stock", PddlEnv)):
        num_bytes = _measure_memory_per_game(engine, games["small"])
        rows.append((name, f"{format_figure(num_bytes / 2**20)} MiB"))
    memory = Table("ALFWorld: memory of one more game in play", ("engine", "memory"), tuple(rows))
    return Measurement(
        tuple(comparisons),
        tables=(memory,),
        notes=NOTES,
    )


def _generate_games(directory: Path) -> dict[str, list[Game]]:
    """One game of each type in small rooms, and one of each in large rooms."""
    num_types = len(TASK_TYPES)
    num_tasks = num_types * len(SIZE_CYCLE)
    generate(directory, num_tasks=num_tasks, seed=SEED, report=lambda done, total: None)
    train = read_index(directory / "index.json")[:num_tasks]

    # Games come in runs of one size, each with one game of every type: the first run of each size.
    by_size: dict[str, list[GameEntry]] = {"small": [], "large": []}
    for number, size in enumerate(SIZE_CYCLE):
        if size in by_size and not by_size[size]:
            by_size[size] = train[number * num_types : (number + 1) * num_types]

    games: dict[str, list[Game]] = {}
    for size, chosen in by_size.items():
        games[size] = [read_game(directory / entry.task_id / GAME_FILE) for entry in chosen]
    return games


def _compare(size: str, games: Sequence[Game], say: Say) -> list[Comparison]:
    """One pair a game, after one that warms both up."""
    ours = build_stack()
    stock = build_stack(PddlEnv)
    _play(ours, games[0], ["look"])
    _play(stock, games[0], ["look"])

    timings: list[tuple[Timing, Timing]] = []
    for number, game in enumerate(games):
        commands = _draw_commands(ours, game)
        # The drawing has translated the game; its first loading is to be timed.
        translate.cache_clear()
        by_ours = _play(ours, game, commands)
        by_stock = _play(stock, game, commands)
        if by_ours.transcript != by_stock.transcript:
            raise RuntimeError(
                f"The engines disagree on {size} game {number}: no figure of them can be compared."
            )
        timings.append((by_ours, by_stock))
        pair = (by_ours.steps_per_s, by_stock.steps_per_s)
        say(describe_pair(number + 1, len(games), pair))

    comparisons = []
    for figure in FIGURES:
        pairs = tuple((figure.read(one), figure.read(other)) for one, other in timings)
        what = f"ALFWorld, {figure.what}, {size} rooms"
        comparisons.append(Comparison(what, "stock TextWorld", figure.unit, pairs, figure.target))
    return comparisons


def _draw_commands(stack: AlfredInfos, game: Game) -> list[str]:
    """Random admissible commands and some nonsense, then from the start again the walkthrough."""
    rng = random.Random(SEED)
    stack.load(game)
    state = stack.reset()
    commands: list[str] = []
    for _ in range(NUM_RANDOM_STEPS):
        commands.append(rng.choice([*state["admissible_commands"], "dance"]))
        state, _, _ = stack.step(commands[-1])
    return [*commands, RESET, *game["walkthrough"]]


def _play(stack: AlfredInfos, game: Game, commands: Sequence[str]) -> Timing:
    began = time.perf_counter()
    stack.load(game)
    timing = Timing(load_s=time.perf_counter() - began)

    began = time.perf_counter()
    stack.load(game)
    state = stack.reset()
    timing.reload_s = time.perf_counter() - began

    for command in commands:
        if command == RESET:
            state = stack.reset()
        else:
            began = time.perf_counter()
            state, _, _ = stack.step(command)
            timing.step_s.append(time.perf_counter() - began)
        timing.transcript.append(
            (state["feedback"], tuple(state["admissible_commands"]), state["won"])
        )
    return timing


def _measure_memory_per_game(engine: type[PddlEnv], games: Sequence[Game]) -> float:
    """Bytes that one more live game takes in a process that has played all of them before."""
    warm = build_stack(engine)
    for game in games:
        _play(warm, game, ["look"])

    before = _measure_own_memory()
    stacks = [build_stack(engine) for _ in range(NUM_LIVE)]
    for number, stack in enumerate(stacks):
        _play(stack, games[number % len(games)], ["look", "inventory"])
    return (_measure_own_memory() - before) / NUM_LIVE


def _measure_own_memory() -> int:
    """Bytes that no other process shares, among them each engine's own copy of its library."""
    gc.collect()
    return int(psutil.Process().memory_full_info().uss)
