"""`sdar env generate search`: writes a corpus of an invented world, and questions on it.

The files have the form in which Search-R1 publishes both. The same arguments write the same bytes.
"""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sdar.contracts.errors import ConfigurationError, ConflictError
from services.envs.search.scoring import normalize_answer
from services.envs.search.world import (
    MAX_WORKS,
    QUESTIONS,
    World,
    build_world,
    write_distractor,
    write_passages,
)

THINGS_PER_TASK = {
    "work": 0.4,
    "person": 0.5,
    "company": 0.3,
    "town": 0.35,
    "river": 0.15,
    "mountain": 0.1,
}
"""Things of each kind for one training question; all but mountains have a passage.

They make twice the facts that are asked for.
"""
DISTRACTORS_PER_TASK = 0.3
TEST_SHARE = 0.3
"""Test questions for one training question."""
MIN_TASKS = 10
MAX_TASKS = int(MAX_WORKS / THINGS_PER_TASK["work"])
DATA_SOURCES = {1: "one_hop", 2: "two_hop"}
"""By the length of the chain of relations."""

_PROMPT = "Answer the given question. You can search. Question: {}"
_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("question", pa.string()),
        ("golden_answers", pa.list_(pa.string())),
        ("data_source", pa.string()),
        ("prompt", pa.list_(pa.struct([("content", pa.string()), ("role", pa.string())]))),
        ("ability", pa.string()),
        (
            "reward_model",
            pa.struct(
                [
                    ("ground_truth", pa.struct([("target", pa.list_(pa.string()))])),
                    ("style", pa.string()),
                ]
            ),
        ),
        ("extra_info", pa.struct([("index", pa.int64()), ("split", pa.string())])),
    ]
)

Asked = tuple[str, tuple[str, ...]]
"""A question without its wording: the thing named, and the chain of relations to look up."""


def generate(
    directory: Path, *, num_tasks: int, seed: int, report: Callable[[int, int], None]
) -> str:
    """Write corpus.jsonl, train.parquet with `num_tasks` questions, and test.parquet with fewer.

    Raises:
        ConflictError: the directory holds something. ConfigurationError: too few or too many
            questions for one world.
    """
    _check_request(directory, num_tasks)
    # All is drawn from one generator, so the order of what follows is part of what a seed means.
    rng = random.Random(seed)
    num_things = {kind: max(4, round(share * num_tasks)) for kind, share in THINGS_PER_TASK.items()}
    world = build_world(rng, num_things)
    check_world(world)
    passages = _draw_passages(rng, world, round(DISTRACTORS_PER_TASK * num_tasks))

    num_test = max(2, round(TEST_SHARE * num_tasks))
    asked = draw_questions(rng, world, num_tasks + num_test)
    train: list[dict[str, Any]] = []
    test: list[dict[str, Any]] = []
    for number, (thing, chain) in enumerate(asked, start=1):
        split, rows = ("train", train) if number <= num_tasks else ("test", test)
        rows.append(_write_row(rng, world, thing, chain, split, len(rows)))
        report(number, len(asked))

    directory.mkdir(parents=True, exist_ok=True)
    _write_corpus(directory / "corpus.jsonl", passages)
    _write_questions(directory / "train.parquet", train)
    _write_questions(directory / "test.parquet", test)
    return (
        f"{len(passages)} passages, {num_tasks} questions to train on and {num_test} to test, half "
        "of them of two hops."
    )


def _check_request(directory: Path, num_tasks: int) -> None:
    if directory.exists() and any(directory.iterdir()):
        raise ConflictError(f"{directory} is not empty. Remove it or choose another directory.")
    if not MIN_TASKS <= num_tasks <= MAX_TASKS:
        raise ConfigurationError(
            f"Search makes {MIN_TASKS} to {MAX_TASKS} training questions, asked for {num_tasks}."
        )


def _draw_passages(rng: random.Random, world: World, num_distractors: int) -> list[tuple[str, str]]:
    passages = write_passages(rng, world)
    passages += [write_distractor(rng, world, number) for number in range(num_distractors)]
    rng.shuffle(passages)
    return passages


def check_world(world: World) -> None:
    """Check that no two things share a name as answers are compared.

    Only then every question has exactly one answer.

    Raises:
        ConfigurationError: two things do; another seed helps.
    """
    names = itertools.chain.from_iterable(world.things.values())
    counts = Counter(map(normalize_answer, names))
    twice = [name for name, count in counts.items() if count > 1]
    if twice:
        raise ConfigurationError(
            f"Two things of the generated world are called {twice[0]!r}. Choose another seed."
        )


def draw_questions(rng: random.Random, world: World, num_questions: int) -> list[Asked]:
    """Different questions in a mixed order, half of them of each number of hops.

    Chains take turns, and there are fewer of two hops where the world has no more.
    """
    by_hops: dict[int, list[Asked]] = {}
    for hops in DATA_SOURCES:
        chains = [chain for chain in QUESTIONS if len(chain) == hops]
        by_hops[hops] = _take_turns([_list_askable(rng, world, chain) for chain in chains])

    half = num_questions // 2
    drawn = by_hops[1][: num_questions - half] + by_hops[2][:half]
    rng.shuffle(drawn)
    return drawn


def _list_askable(rng: random.Random, world: World, chain: tuple[str, ...]) -> list[Asked]:
    every = itertools.chain.from_iterable(world.things.values())
    things = [thing for thing in every if world.look_up(thing, chain) is not None]
    return [(thing, chain) for thing in rng.sample(things, len(things))]


def _take_turns(lists: Iterable[list[Asked]]) -> list[Asked]:
    # None stands in for questions of a chain that has no more of them.
    in_turn = itertools.chain.from_iterable(itertools.zip_longest(*lists))
    return [asked for asked in in_turn if asked is not None]


def _write_row(
    rng: random.Random, world: World, thing: str, chain: tuple[str, ...], split: str, index: int
) -> dict[str, Any]:
    question = rng.choice(QUESTIONS[chain]).format(thing)
    answers = [world.look_up(thing, chain)]
    return {
        "id": f"{split}_{index}",
        "question": question,
        "golden_answers": answers,
        "data_source": DATA_SOURCES[len(chain)],
        "prompt": [{"role": "user", "content": _PROMPT.format(question)}],
        "ability": "fact-reasoning",
        "reward_model": {"ground_truth": {"target": answers}, "style": "rule"},
        "extra_info": {"index": index, "split": split},
    }


def _write_corpus(path: Path, passages: Iterable[tuple[str, str]]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for number, (title, text) in enumerate(passages):
            entry = {"id": str(number), "contents": f'"{title}"\n{text}'}
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")


def _write_questions(path: Path, rows: list[dict[str, Any]]) -> None:
    table = pa.Table.from_pylist(rows, schema=_SCHEMA)
    # Without the schema of this library, which changes with its version: the bytes are to stay.
    pq.write_table(table, path, compression="zstd", store_schema=False)
