"""Demonstrations for prompts with a window of history: one example per turn.

Episodes are played on the real environment by a player who errs, since that is where a policy in
training finds itself. What is imitated depends on the prompt: the expert's next action where a
skill is shown, what the erring player did where none is.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sdar.cli.warm_start.recipe import END_OF_TURN_ID, Example, WarmStartRecipe
from sdar.contracts.types import StopReason, Task
from sdar.environments.base import Environment, Observation
from sdar.model.chat import ChatTokenizer
from services.rollout.prompting import EpisodeSetting, HistoryWindow
from services.teacher.skills import SHIPPED_LIBRARIES, Skill, format_skills, load_skill_library

TRAIN_SPLIT = "train"
_WINDOW_WORDS = (
    "system\n",
    "user\n",
    "assistant\n",
    "Task: ",
    "\nActions taken: ",
    "\nSeen: ",
    "\nDone: ",
    "\nSeen now: ",
    ".\nSeen now: ",
    ". The last 1:\nSeen: ",
    ". The last 2:\nSeen: ",
    "\nPossible actions:\n",
)
_NUM_OTHERS = 2
_NOTHING = np.empty(0, dtype=np.int32)


@dataclass(frozen=True)
class WindowRecipe(WarmStartRecipe):
    """Attributes:
    history_turns, max_turns: as in the run configuration that the model is for.
    expert_share: chance per turn that the player acts as the expert would.
    thinned_share: chance per turn that only a few possible actions are shown, so that copying one
        from the list pays early.
    num_mixed_episodes: episodes whose turns are shuffled together, so that a batch holds many
        tasks.
    """

    history_turns: int = 1
    max_turns: int = 10
    expert_share: float = 0.5
    thinned_share: float = 0.0
    num_mixed_episodes: int = 64


def describe_prompts(environment: type[Environment]) -> list[Any]:
    """What the prompts of an environment say whatever the task, as a recipe's digest needs it;
    JSON.
    """
    library = load_skill_library(SHIPPED_LIBRARIES / environment.name)
    return [
        environment.version,
        environment.instructions,
        environment.action_format,
        library.content_hash,
        _WINDOW_WORDS,
    ]


@dataclass(frozen=True, slots=True)
class Choice:
    """What the two players would answer now, as the environment reads it."""

    expert: str
    erring: str


Player = Callable[[Observation, random.Random], Choice]
"""Both players of one episode. It is called once per turn, and knows nothing but what the prompts
have said so far.
"""


@dataclass(frozen=True, slots=True)
class PlayedTurn:
    """One turn before its answer.

    Args:
        previous_action: what the environment read out of the last response; None at the first turn.
        played: which of the choice is played.
    """

    previous_action: str | None
    observation: Observation
    choice: Choice
    played: str


class WindowDemonstrator(ABC):
    """Writes one turn at a time: the prompt with its window of history, and the response."""

    def __init__(self, recipe: WindowRecipe, environment: Environment) -> None:
        self.recipe = recipe
        self.environment = environment
        self.tasks: Sequence[Task] = environment.list_tasks(TRAIN_SPLIT)
        self.skill_library = load_skill_library(SHIPPED_LIBRARIES / recipe.environment)
        # Turns of several episodes, shuffled, of which each call of `write` takes one.
        self._written: list[Example] = []

    @abstractmethod
    def list_phrases(self) -> Sequence[str]: ...

    def list_common_phrases(self) -> list[str]:
        """What every prompt says in the same words: instructions, format, the window's own words,
        and skills.
        """
        texts = [self.environment.instructions, self.environment.action_format, *_WINDOW_WORDS]
        return [*filter(None, texts), *(skill.text for skill in self.skill_library.skills)]

    @abstractmethod
    def open_player(self, task: Task) -> Player: ...

    def draw_task(self, rng: random.Random) -> Task:
        return rng.choice(self.tasks)

    def iterate_sentences(self, rng: random.Random) -> Iterator[str]:
        for _ in range(self.recipe.num_tokenizer_episodes):
            task = self.draw_task(rng)
            yield f"Task: {task.description}\n"
            for turn in self._play(task, rng):
                seen = turn.observation
                yield "\n".join([f"Seen: {seen.text}", *seen.admissible_actions, turn.played])

    def write(self, chat: ChatTokenizer, rng: random.Random, hinted_share: float) -> Example:
        if not self._written:
            for _ in range(self.recipe.num_mixed_episodes):
                is_hinted = rng.random() < hinted_share
                self._written.extend(self._write_episode(chat, rng, is_hinted=is_hinted))
            rng.shuffle(self._written)
        return self._written.pop()

    def _write_episode(
        self, chat: ChatTokenizer, rng: random.Random, *, is_hinted: bool
    ) -> Iterator[Example]:
        task = self.draw_task(rng)
        setting = self._describe(task, is_hinted=is_hinted)
        window = HistoryWindow(chat, setting, self.recipe.history_turns, self.recipe.max_positions)
        for turn in self._play(task, rng):
            # With a skill in sight the expert is imitated, also where the erring player played on.
            response = turn.choice.expert if is_hinted else turn.played
            text = turn.observation.text
            actions = self._thin_out(turn.observation.admissible_actions, response, rng)
            if turn.previous_action is None:
                prompt = window.begin(text, actions)
            else:
                # A window keeps the texts of earlier turns and not their tokens.
                prompt = window.extend(
                    _NOTHING, StopReason.END_OF_TURN, turn.previous_action, text, actions
                )

            ids = chat.tokenizer.encode(response, add_special_tokens=False)
            yield [(prompt.token_ids.tolist(), False), ([*ids, END_OF_TURN_ID], True)]

    def _thin_out(
        self, admissible: Sequence[str], response: str, rng: random.Random
    ) -> Sequence[str]:
        """The list of possible actions, sometimes cut to the response's own and a few others, in
        their order.
        """
        if not admissible or rng.random() >= self.recipe.thinned_share:
            return admissible
        num_others = min(len(admissible), _NUM_OTHERS)
        others = rng.sample(admissible, num_others)
        return [action for action in admissible if action in others or f">{action}<" in response]

    def _play(self, task: Task, rng: random.Random) -> Iterator[PlayedTurn]:
        """Play one episode, the expert's choice or the other one at random."""
        player = self.open_player(task)
        observation = self.environment.reset(task.task_id, task.seed)
        previous_action = None
        for _ in range(self.recipe.max_turns):
            choice = player(observation, rng)
            is_expert = rng.random() < self.recipe.expert_share
            played = choice.expert if is_expert else choice.erring
            yield PlayedTurn(previous_action, observation, choice, played)
            result = self.environment.step(played)
            if result.is_over:
                return
            observation = result.observation
            previous_action = result.action

    def _describe(self, task: Task, *, is_hinted: bool) -> EpisodeSetting:
        skill_text = ""
        if is_hinted:
            skill_text = format_skills(self._list_skills(task.task_type))
        return EpisodeSetting(
            instructions=self.environment.instructions,
            action_format=self.environment.action_format,
            task_description=task.description,
            skill_text=skill_text,
        )

    def _list_skills(self, task_type: str) -> list[Skill]:
        """The general skills, and those for this kind of task."""
        skills = self.skill_library.skills
        return [one for one in skills if not one.is_specific or task_type in one.task_types]
