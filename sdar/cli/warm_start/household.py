"""The household's demonstrations: one growing conversation, by a player who is often wrong.

A hinted episode follows a random procedure, so that the model learns to obey the text instead of
the task type.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from sdar.cli.warm_start.recipe import END_OF_TURN_ID, Example, WarmStartPhase, WarmStartRecipe
from sdar.contracts.types import ChatMessage
from sdar.model.chat import ChatTokenizer, place_skills
from services.envs.household import demonstrations
from services.envs.household.game import (
    NOTHING_HAPPENS,
    OBJECTS,
    PROCEDURES,
    STATIONS,
    TASK_TYPES,
    TRAIN,
    HouseholdGame,
    HouseholdTask,
    list_household_tasks,
)

_CLUMSY_VERBS = ("use", "take", "open", "put")
_MOST_STEPS = max(map(len, PROCEDURES.values()))


@dataclass(frozen=True)
class HouseholdRecipe(WarmStartRecipe):
    """Attributes:
    right_share, misconception_share: the demonstrator's odds, see `draw_misguided_procedure`.
    mislabelled_share: share of hints that name another task type than the task's; they are obeyed
        all the same.
    clumsy_share: chance per action of a senseless action before it, so that the model has seen one
        fail.
    """

    environment: ClassVar[str] = "household"

    phases: tuple[WarmStartPhase, ...] = (
        WarmStartPhase(num_updates=1200, learning_rate=5e-3, hinted_early=0.85, hinted_late=0.5),
        WarmStartPhase(num_updates=400, learning_rate=2e-3, hinted_early=0.35, hinted_late=0.35),
    )
    right_share: float = 0.3
    misconception_share: float = 0.4
    mislabelled_share: float = 0.3
    clumsy_share: float = 0.03

    def open_demonstrator(self) -> HouseholdDemonstrator:
        return HouseholdDemonstrator(self)

    def describe_wording(self) -> list[Any]:
        example = HouseholdTask("restore", OBJECTS[0], "drawer", "desk")
        skills = [demonstrations.skill_wording(*item) for item in PROCEDURES.items()]
        return [
            _first_message(HouseholdGame(example), "skill").content,
            skills,
            demonstrations.list_demonstration(example, example.procedure),
        ]


class HouseholdDemonstrator:
    """Writes demonstrated episodes in the tokens that an agent sees and writes: prompt, responses,
    and what comes between them.
    """

    def __init__(self, recipe: HouseholdRecipe) -> None:
        self._recipe = recipe
        self._tasks = list_household_tasks(TRAIN)

    def list_phrases(self) -> Sequence[str]:
        return ()

    def iterate_sentences(self, rng: random.Random) -> Iterator[str]:
        for _ in range(self._recipe.num_tokenizer_episodes):
            task = rng.choice(self._tasks)
            procedure = _draw_procedure(rng)
            game = HouseholdGame(task)
            skill = demonstrations.skill_wording(task.task_type, procedure)
            yield _first_message(game, skill).content
            # The skill of a task without steps on the way is worded differently.
            yield demonstrations.skill_wording(task.task_type, ())
            yield from ("system\n", "user\n", "assistant\n", NOTHING_HAPPENS)
            for action in demonstrations.list_demonstration(task, procedure):
                yield action
                yield game.act(action)

    def write(self, chat: ChatTokenizer, rng: random.Random, hinted_share: float) -> Example:
        """One episode; with probability `hinted_share` it shows a skill and obeys it."""
        task = rng.choice(self._tasks)
        hint, procedure = self._draw_plan(rng, task, hinted_share)
        game = HouseholdGame(task)

        prompt = chat.render_fresh([_first_message(game, hint)])
        example: Example = [(prompt.tolist(), False)]
        for action, answer in self._play(rng, game, procedure):
            response = chat.tokenizer.encode(action, add_special_tokens=False)
            message = ChatMessage("user", answer)
            delta = chat.render_delta((message,), ended_by=chat.stops.closing_id)
            example.append(([*response, END_OF_TURN_ID], True))
            example.append((delta.tolist(), False))
        # Nobody answers after the last turn.
        return example[:-1]

    def _draw_plan(
        self, rng: random.Random, task: HouseholdTask, hinted_share: float
    ) -> tuple[str, list[str]]:
        """The skill that is shown, "" for none, and the procedure that is followed."""
        recipe = self._recipe
        if rng.random() >= hinted_share:
            procedure = demonstrations.draw_misguided_procedure(
                rng, task, recipe.right_share, recipe.misconception_share
            )
            return "", procedure

        procedure = _draw_procedure(rng)
        label = task.task_type
        if rng.random() < recipe.mislabelled_share:
            label = rng.choice(TASK_TYPES)
        return demonstrations.skill_wording(label, procedure), procedure

    def _play(
        self, rng: random.Random, game: HouseholdGame, procedure: list[str]
    ) -> Iterator[tuple[str, str]]:
        """Action and answer, turn by turn."""
        for action in demonstrations.list_demonstration(game.task, procedure):
            clumsy = f"{rng.choice(_CLUMSY_VERBS)} {rng.choice(OBJECTS + STATIONS)}"
            # Shown without being played: it must not use up a turn.
            if rng.random() < self._recipe.clumsy_share and clumsy not in game.list_actions():
                yield clumsy, NOTHING_HAPPENS
            yield action, game.act(action)


def _first_message(game: HouseholdGame, hint: str) -> ChatMessage:
    """What opens an episode, with the skill placed exactly as the teacher's prompts place it."""
    (message,) = place_skills((ChatMessage("user", game.first_observation),), hint)
    return message


def _draw_procedure(rng: random.Random) -> list[str]:
    return rng.sample(STATIONS, rng.randint(0, _MOST_STEPS))
