"""Measures a step in the shop against the original's published figure, and a session's memory.

The environment class itself plays, without a server, on a generated catalogue of a few thousand
products: by a shopper who searches, chooses and buys, and at random over everything that can be
clicked. The original renders and parses HTML pages; its 11 to 12 ms a step were published, not
measured here, so they come from another machine.
"""

from __future__ import annotations

import gc
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from loadtest.comparison import Comparison, Measurement, Say, Table, Target, format_figure
from loadtest.workloads import SEED
from sdar.contracts.types import Task
from sdar.environments.base import Observation
from sdar.process.settings import apply_environment
from services.envs.webshop.demonstrations import Shopper, list_key_words, write_action
from services.envs.webshop.environment import WebShopEnvironment
from services.envs.webshop.generate import generate

NUM_TASKS = 4000
"""Goals to train on; there are 500 more to test and 5 products for every 4 goals."""
PUBLISHED_MS = 11.0
TARGET = Target("at_most", 0.1)
NUM_EPISODES = 300
NUM_ROUNDS = 5
NUM_QUERY_WORDS = 3
SEARCH_SHARE = 0.2
NUM_SESSIONS = 1000
NUM_TURNS_BEFORE = 3
"""Turns that each of those sessions has played when its memory is measured."""

Player = Callable[[Observation], str]


def measure(say: Say) -> Measurement:
    with tempfile.TemporaryDirectory(prefix="sdar-bench-") as directory:
        apply_environment({"SDAR_CACHE": f"{directory}/cache"})
        say("generating a catalogue")
        data = Path(directory, "data")
        made = generate(data, num_tasks=NUM_TASKS, seed=SEED, report=lambda done, total: None)

        empty_bytes = _measure_memory()
        began = time.perf_counter()
        environment = WebShopEnvironment(data_dir=str(data))
        seconds = time.perf_counter() - began
        added_bytes = _measure_memory() - empty_bytes

        comparisons = (
            _compare(environment, "a shopper", _build_shopper, say),
            _compare(environment, "random clicks and searches", _build_random_player, say),
        )
        session_bytes = _measure_sessions(str(data))

    table = _build_table(seconds, empty_bytes, added_bytes, session_bytes)
    note = (
        f"The catalogue: {made} The peer's figure is the published one, from another machine, "
        "and the lower end of its range; the original's pages are HTML and longer."
    )
    return Measurement(comparisons, tables=(table,), notes=(note,))


def _build_table(seconds: float, empty: float, added: float, session: float) -> Table:
    """What it takes, from seconds and bytes."""
    rows = (
        ("prepare the catalogue, once per machine", f"{format_figure(seconds)} s"),
        (
            "memory of a process before it opens the catalogue",
            f"{format_figure(empty / 2**20)} MiB",
        ),
        ("memory that catalogue, index and goals add to it", f"{format_figure(added / 2**20)} MiB"),
        (
            "memory of a session in the middle of an episode",
            f"{format_figure(session / 2**10)} KiB",
        ),
    )
    return Table("WebShop: what it takes", ("what", "figure"), rows)


def _compare(
    environment: WebShopEnvironment, name: str, build: Callable[[Task], Player], say: Say
) -> Comparison:
    pairs = []
    for number in range(NUM_ROUNDS):
        pairs.append((_play_episodes(environment, build), PUBLISHED_MS))
        say(f"{name}: round {number + 1} of {NUM_ROUNDS}, {format_figure(pairs[-1][0])} ms a step")
    return Comparison(
        f"a step of WebShop, {name}", "the original, as published", "ms", tuple(pairs), TARGET
    )


def _play_episodes(environment: WebShopEnvironment, build: Callable[[Task], Player]) -> float:
    """Milliseconds per step, the player's own time not counted."""
    num_steps = 0
    spent_s = 0.0
    for task in environment.list_tasks("test")[:NUM_EPISODES]:
        player = build(task)
        observation = environment.reset(task.task_id, SEED)
        is_over = False
        while not is_over:
            text = player(observation)
            began = time.perf_counter()
            result = environment.step(text)
            spent_s += time.perf_counter() - began
            num_steps += 1
            observation = result.observation
            is_over = result.is_over
    return 1000 * spent_s / num_steps


def _build_shopper(task: Task) -> Player:
    shopper = Shopper()
    return lambda seen: shopper.next_action(
        task.description, task.task_type, seen.text, seen.admissible_actions
    )


def _build_random_player(task: Task) -> Player:
    rng = random.Random(f"{SEED} {task.task_id}")
    words = list_key_words(task.description)

    def play(seen: Observation) -> str:
        if not seen.admissible_actions or rng.random() < SEARCH_SHARE:
            return write_action(f"search[{_draw_query(rng, words)}]", "anything")
        return write_action(rng.choice(seen.admissible_actions), "anything")

    return play


def _draw_query(rng: random.Random, words: Sequence[str]) -> str:
    return " ".join(rng.sample(words, min(NUM_QUERY_WORDS, len(words))))


def _measure_sessions(data_dir: str) -> float:
    """Bytes per session, from a thousand of them that are each a few turns into an episode."""
    before = _measure_memory()
    environments = [WebShopEnvironment(data_dir=data_dir) for _ in range(NUM_SESSIONS)]
    tasks = environments[0].list_tasks("train")
    for environment, task in zip(environments, tasks, strict=False):
        player = _build_shopper(task)
        observation = environment.reset(task.task_id, SEED)
        for _ in range(NUM_TURNS_BEFORE):
            observation = environment.step(player(observation)).observation
    return (_measure_memory() - before) / len(environments)


def _measure_memory() -> int:
    """Bytes of this process's own memory, without shared pages of files and libraries."""
    gc.collect()
    memory = psutil.Process().memory_info()
    return int(memory.rss - memory.shared)
