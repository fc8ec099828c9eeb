"""WebShop as an environment: makes tasks of goals, plays an agent's text, rewards a purchase."""

from __future__ import annotations

import dataclasses
import re
from functools import lru_cache
from pathlib import Path

from sdar.contracts.errors import ConfigurationError
from sdar.contracts.types import Task
from sdar.environments.base import Environment, Observation, StepResult
from sdar.process.settings import load_settings, read_variable
from services.envs.responses import find_between
from services.envs.webshop.goals import TEST, TRAIN, Goal, count_test_goals
from services.envs.webshop.nouns import load_noun_finder
from services.envs.webshop.pages import PageMachine
from services.envs.webshop.reward import compute_score
from services.envs.webshop.store import PreparedCatalogue, open_catalogue

DATA_VARIABLE = "WEBSHOP_DATA"
"""Directory of the catalogue, where the option data_dir is empty."""
MAX_TURNS = 15
REWARD_OF_SUCCESS = 10.0
GOAL_KINDS = {"auto": None, "human": True, "synthetic": False}

_ACTION = re.compile(r"(search|click)\[(.+)\]", re.DOTALL | re.IGNORECASE)


class WebShopEnvironment(Environment):
    """Buy what the instruction asks for.

    Reward 10 for a purchase of native score 1, otherwise 0. The seed changes nothing.

    A response is valid if it has one `<think>...</think>` and one `<action>...</action>` with an
    action that this page takes: a click on what is listed, or a search, which every page takes
    though only the start page shows a search bar, as published. An action without its reasoning is
    done, but counts as invalid; anything else changes nothing. Every response uses a turn.

    Options:
        data_dir: directory of the catalogue's files; empty: the one that $WEBSHOP_DATA names.
        goals: `human` or `synthetic` instructions; `auto` takes human ones where the full catalogue
            has them, and synthetic ones for the 1,000 products, where about ten are human.
        small: prefer the published files of 1,000 products where the full ones are there, too.
    """

    name = "webshop"
    version = "1"
    splits = (TRAIN, TEST)
    instructions = (
        "You are shopping in an online shop of text pages. Find a product that fits the "
        "instruction, choose the options that "
        "it asks for on the product's page, and buy it."
    )
    action_format = (
        "Think first, then give one action: <think>why</think><action>search[words of your "
        "own]</action>, which every page "
        "takes, or <action>click[one of those listed]</action>."
    )
    max_turns = MAX_TURNS

    def __init__(self, data_dir: str = "", goals: str = "auto", small: bool = False) -> None:
        if goals not in GOAL_KINDS:
            raise ConfigurationError(
                f"WebShop option goals is {goals!r}, expected one of {', '.join(GOAL_KINDS)}."
            )
        directory = _resolve_directory(data_dir)
        cache = load_settings().cache.expanduser().resolve()
        self.catalogue = open_catalogue(directory, cache, small, GOAL_KINDS[goals])
        self._nouns = load_noun_finder()
        # Scores of different catalogues or noun finders are not comparable, so they are different
        # versions.
        self.version = f"{type(self).version}-{self._nouns.name}-{self.catalogue.digest[:8]}"
        self._tasks, self._goals = _list_tasks(self.catalogue)
        self._pages = PageMachine(self.catalogue)
        self._num_turns = 0

    def list_tasks(self, split: str) -> tuple[Task, ...]:
        if split not in self.splits:
            raise self.unknown_split(split)
        return self._tasks[split]

    def get_task(self, task_id: str) -> Task:
        return self._find(task_id)[0]

    def get_goal(self, task_id: str) -> Goal:
        """What a task asks for, hidden parts included. Raises UnknownResourceError."""
        return self._find(task_id)[1]

    def _find(self, task_id: str) -> tuple[Task, Goal]:
        found = self._goals.get(task_id)
        if found is None:
            raise self.unknown_task(task_id)
        return found

    def reset(self, task_id: str, seed: int) -> Observation:
        self._goal = self.get_goal(task_id)
        self._pages = PageMachine(self.catalogue)
        self._num_turns = 0
        return self._observe(is_over=False)

    def step(self, text: str) -> StepResult:
        self._num_turns += 1
        action = (find_between(text, "<action>", "</action>") or "").strip()
        is_done = self._act(action)
        is_reasoned = find_between(text, "<think>", "</think>") is not None

        is_bought = self._pages.is_bought
        is_truncated = not is_bought and self._num_turns >= MAX_TURNS
        components: dict[str, float] = {}
        is_success = False
        if is_bought:
            components, is_success = self._score()

        return StepResult(
            observation=self._observe(is_over=is_bought or is_truncated),
            reward=REWARD_OF_SUCCESS if is_success else 0.0,
            reward_components=components,
            terminated=is_bought,
            truncated=is_truncated,
            action=action,
            is_action_valid=is_done and is_reasoned,
            is_success=is_success,
        )

    def _act(self, action: str) -> bool:
        """Do it; False, and nothing changes, if it is no action or cannot be done on this page."""
        parsed = _ACTION.match(action)
        if parsed is None:
            return False
        verb, argument = parsed[1].lower(), parsed[2].lower()
        if verb == "click":
            return self._pages.click(argument)
        self._pages.search(argument)
        return True

    def _score(self) -> tuple[dict[str, float], bool]:
        if self._pages.product is None:
            raise AssertionError("Bought without a product: the page machine lets nobody do that.")
        score = compute_score(
            self._pages.product, self._pages.chosen.values(), self._goal, self._nouns
        )
        return dataclasses.asdict(score), score.score == 1.0

    def _observe(self, *, is_over: bool) -> Observation:
        """The page, and its links as actions.

        A search has no literal form to list; `action_format` says that every page takes one.
        """
        if is_over:
            return Observation(self._pages.text)
        actions = tuple(f"click[{name}]" for name in self._pages.clickables)
        return Observation(self._pages.text, actions)


def _resolve_directory(data_dir: str) -> Path:
    directory = data_dir or read_variable(DATA_VARIABLE)
    if not directory:
        raise ConfigurationError(
            "WebShop does not know where its catalogue is. Set the option data_dir or the "
            f"variable {DATA_VARIABLE} to a directory with the published files, or make one: "
            "sdar env generate webshop DIRECTORY"
        )
    return Path(directory).expanduser().resolve()


@lru_cache
def _list_tasks(
    catalogue: PreparedCatalogue,
) -> tuple[dict[str, tuple[Task, ...]], dict[str, tuple[Task, Goal]]]:
    """The tasks of both splits, and every task with its goal by the task's id.

    The id is the goal's place in the fixed order of all goals.
    """
    num_test = count_test_goals(len(catalogue.goals))
    found = {}
    for number, goal in enumerate(catalogue.goals):
        split = TEST if number < num_test else TRAIN
        task = Task(
            WebShopEnvironment.name,
            split,
            f"goal-{number}",
            goal.category,
            goal.instruction,
            seed=0,
        )
        found[task.task_id] = (task, goal)

    tasks = [task for task, _ in found.values()]
    return {TRAIN: tuple(tasks[num_test:]), TEST: tuple(tasks[:num_test])}, found
