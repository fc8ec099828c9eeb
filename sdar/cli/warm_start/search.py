"""Search-QA's demonstrations: a player who reads, and often stops too early or takes a wrong name.

It learns from an invented world of its own, so that no question of a shipped data set, and no name
in one, is ever seen: what remains to be learnt is to copy names out of questions and passages.
"""

from __future__ import annotations

import itertools
import random
import re
import tempfile
from collections.abc import Iterable, Sequence
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
from services.envs.search import environment as search_environment
from services.envs.search import world
from services.envs.search.demonstrations import parse_question, read_fact
from services.envs.search.environment import SearchEnvironment
from services.envs.search.generate import generate

_SEARCH = ("<think></think><search>", "</search>")
_ANSWER = ("<think></think><answer>", "</answer>")
_TITLE = re.compile(r'^Doc \d+ \(Title: "(.*?)"\)', re.MULTILINE)


@dataclass(frozen=True)
class SearchRecipe(WindowRecipe):
    """Attributes:
    world_seed, num_questions: of the invented world; no shipped data set has that seed.
    topk: passages shown for a search.
    """

    environment: ClassVar[str] = "search"

    num_layers: int = 3
    vocabulary_limit: int = 896
    num_tokenizer_episodes: int = 3000
    max_positions: int = 512
    history_turns: int = 0
    max_turns: int = 4
    expert_share: float = 0.65
    phases: tuple[WarmStartPhase, ...] = (WarmStartPhase(2500, 3e-3, 0.4, 0.4),)
    world_seed: int = 20_000
    num_questions: int = 5000
    topk: int = 2

    def open_demonstrator(self) -> SearchDemonstrator:
        with tempfile.TemporaryDirectory(prefix="sdar-warm-start-") as directory:
            data = Path(directory) / "search"
            generate(
                data,
                num_tasks=self.num_questions,
                seed=self.world_seed,
                report=lambda done, total: None,
            )
            environment = SearchEnvironment(data_dir=str(data), topk=self.topk)
            return SearchDemonstrator(self, environment)

    def describe_wording(self) -> list[Any]:
        return [describe_prompts(SearchEnvironment), _list_own_phrases()]


class SearchDemonstrator(WindowDemonstrator):
    def list_phrases(self) -> Sequence[str]:
        return [*self.list_common_phrases(), *_list_own_phrases()]

    def open_player(self, task: Task) -> Player:
        return _Reader(task)


class _Reader:
    """Follows the question's relations as far as the passages shown allow."""

    def __init__(self, task: Task) -> None:
        self._thing, self._relations = parse_question(task.description)

    def __call__(self, observation: Observation, rng: random.Random) -> Choice:
        has_found = False
        if self._relations:
            found = read_fact(observation.text, self._thing, self._relations[0])
            has_found = found is not None
            if found is not None:
                self._thing = found
                self._relations = self._relations[1:]
        expert = _write(_SEARCH if self._relations else _ANSWER, self._thing)

        titles = _TITLE.findall(observation.text)
        if not titles:
            # Half a name finds many things.
            return Choice(expert, _write(_SEARCH, self._thing.split()[-1]))
        # Too early: a step on the way to the answer is taken for the answer.
        if has_found and self._relations:
            return Choice(expert, _write(_ANSWER, self._thing))
        return Choice(expert, _write(_ANSWER, rng.choice(titles)))


def _write(tags: tuple[str, str], words: str) -> str:
    # With a space before them, words are the same tokens as in the middle of a sentence, and can be
    # copied from there.
    return f"{tags[0]} {words}{tags[1]}"


def _list_own_phrases() -> list[str]:
    """What stands between the names in questions, passages and responses."""
    wordings = [
        *_flatten(world.QUESTIONS.values()),
        *_flatten(world.STATEMENTS.values()),
        *_flatten(world.ASIDES.values()),
        *_flatten(sentences for _, _, sentences in world.DISTRACTORS),
    ]
    between: set[str] = set()
    for wording in wordings:
        between.update(map(str.strip, re.split(r"\{\w*\}", wording)))
    # These stand in front of a name or inside it as well, where they would cut it up.
    between -= {"", ".", "?", "The", "the"}
    shown = [
        '<information>\nDoc 1 (Title: "',
        '\nDoc 2 (Title: "',
        '")',
        ".\n</information>",
        search_environment.FIRST_OBSERVATION,
    ]
    return [*sorted(between), *shown, *_SEARCH, *_ANSWER]


def _flatten(wordings: Iterable[Sequence[str]]) -> list[str]:
    return list(itertools.chain.from_iterable(wordings))
