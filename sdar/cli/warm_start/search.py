"""Search-QA's demonstrations: a player who reads, and often stops too early or takes a wrong name.

It learns from an invented world of its own, so that no question of a shipped data set, and no name
in one, is ever seen: what remains to be learnt is to copy names out of questions and passages.
"""

from __future__ import annotations

import random
import re
import tempfile
from collections.abc import Mapping, Sequence
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

_SEARCH, _ANSWER = (
    ("<think></think><search>", "</search>"),
    ("<think></think><answer>", "</answer>"),
)
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
        found = (
            read_fact(observation.text, self._thing, self._relations[0])
            if self._relations
            else None
        )
        if found is not None:
            self._thing, self._relations = found, self._relations[1:]
        expert = _write(_SEARCH if self._relations else _ANSWER, self._thing)
        titles = _TITLE.findall(observation.text)
        if not titles:
            return Choice(expert, _write(_SEARCH, self._thing.split()[-1]))
        is_hasty = bool(self._relations) and found is not None
        return Choice(expert, _write(_ANSWER, self._thing if is_hasty else rng.choice(titles)))


def _write(tags: tuple[str, str], words: str) -> str:
    # With a space before them, words are the same tokens as in the middle of a sentence, and can be
    # copied from there.
    return f"{tags[0]} {words}{tags[1]}"


def _list_own_phrases() -> list[str]:
    """What stands between the names in questions, passages and responses."""
    wordings = [
        *_flatten(world.QUESTIONS),
        *_flatten(world.STATEMENTS),
        *_flatten(world.ASIDES),
        *(sentence for _, _, sentences in world.DISTRACTORS for sentence in sentences),
    ]
    between = {part.strip() for wording in wordings for part in re.split(r"\{\w*\}", wording)}
    between -= {"", ".", "?", "The", "the"}
    shown = [
        '<information>\nDoc 1 (Title: "',
        '\nDoc 2 (Title: "',
        '")',
        ".\n</information>",
        search_environment.FIRST_OBSERVATION,
    ]
    return [*sorted(between), *shown, *_SEARCH, *_ANSWER]


def _flatten(wordings: Mapping[Any, Sequence[str]]) -> list[str]:
    return [wording for several in wordings.values() for wording in several]
