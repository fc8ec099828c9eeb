"""Builds an episode's next prompt, in token ids, from what has happened in the episode so far."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from sdar.contracts.types import ChatMessage, StopReason, TokenIds
from sdar.model.chat import ChatTokenizer, place_skills

NOTHING_READ = "(no action that could be read)"
"""Stands in the history for a response in which the environment found no action."""
_OPENING = "<think>"
# What a chat template may write after the header of the response: thoughts that the response goes
# on with, or empty ones that spare it its own.
_BEGUN_THOUGHTS = re.compile(rf"{_OPENING}\s*(?P<end></think>\s*)?\Z")
_TAIL = 32
"""Tokens at a prompt's end that hold begun thoughts: a letter each and the white space."""
_TAG = re.compile(r"</?\w+>")


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """A prompt as the sampler sees it and as `Turn` records it.

    Attributes:
        token_ids: int32 [P], the whole prompt.
        messages: those that this prompt added to the one before; all of a fresh prompt's.
        extends_previous: it begins with the prompt before and the response to that.
        num_missing_turns: earlier turns that it should have shown and that did not fit.
    """

    token_ids: TokenIds
    messages: tuple[ChatMessage, ...]
    extends_previous: bool
    num_missing_turns: int = 0


@dataclass(frozen=True, slots=True)
class EpisodeSetting:
    """What stays the same over an episode. Empty texts are left out of prompts.

    Attributes:
        instructions: the system message.
        action_format: one sentence on how to write an action.
        task_description: the task's own sentence.
        skill_text: placed in the first user message of every fresh prompt.
    """

    instructions: str = ""
    action_format: str = ""
    task_description: str = ""
    skill_text: str = ""


class PromptStyle(Protocol):
    """One episode's prompts. An instance belongs to one episode."""

    def begin(self, observation: str, admissible_actions: Sequence[str] = ()) -> Prompt:
        """The prompt of turn 0."""

    def extend(
        self,
        response_token_ids: TokenIds,
        stop_reason: StopReason,
        action: str,
        observation: str,
        admissible_actions: Sequence[str] = (),
    ) -> Prompt:
        """The prompt after a response.

        Args:
            action: what the environment read out of the response; empty if it found none.
            observation: what the environment showed then.
        """


PromptStyleFactory = Callable[[EpisodeSetting], PromptStyle]


class Conversation:
    """One growing chat. Each prompt is the one before, the response as it was sampled, and the
    tokens between::

        begin    [system instructions] [user: {skills} {observation 0}] [assistant
        extend   ... response 0 <|im_end|>] [user: {observation 1}] [assistant

    Nothing sampled is ever tokenised anew, and the prefix cache serves everything but the last
    stretch. The task's sentence stands before observation 0 unless that holds it already, and the
    action format behind it unless the instructions or that say it already. Admissible actions
    follow each observation.
    """

    def __init__(self, tokenizer: ChatTokenizer, setting: EpisodeSetting) -> None:
        self._tokenizer = tokenizer
        self._setting = setting
        self._token_ids = np.empty(0, dtype=np.int32)

    def begin(self, observation: str, admissible_actions: Sequence[str] = ()) -> Prompt:
        task = self._setting.task_description
        lines = [
            observation if task in observation else f"Task: {task}\n{observation}",
            *_list_possible(admissible_actions),
            self._find_untold_format(observation),
        ]
        messages = _fresh_messages(self._setting, _join(lines))
        self._token_ids = self._tokenizer.render_fresh(messages)
        return Prompt(self._token_ids, messages, extends_previous=False)

    def extend(
        self,
        response_token_ids: TokenIds,
        stop_reason: StopReason,
        action: str,
        observation: str,
        admissible_actions: Sequence[str] = (),
    ) -> Prompt:
        text = _join([observation, *_list_possible(admissible_actions)])
        messages = (ChatMessage("user", text),)
        # A response that was cut off lacks the end-of-turn token: the tokens between supply it.
        is_ended = stop_reason is StopReason.END_OF_TURN
        ended_by = int(response_token_ids[-1]) if is_ended else None
        delta = self._tokenizer.render_delta(messages, ended_by=ended_by)
        self._token_ids = np.concatenate([self._token_ids, response_token_ids, delta])
        return Prompt(self._token_ids, messages, extends_previous=True)

    def _find_untold_format(self, observation: str) -> str:
        """The action format; empty where the instructions or the observation hold it, word by word
        or by all of its tags.
        """
        wanted = self._setting.action_format
        told = f"{self._setting.instructions}\n{observation}"
        tags = set(_TAG.findall(wanted))
        is_told = wanted in told or (tags and tags <= set(_TAG.findall(told)))
        return "" if is_told else wanted


class HistoryWindow:
    """A fresh prompt every turn, which shows the last turns only: episodes of 50 turns stay within
    a short context. Turn 3::

        [system instructions] [user: {skills}
        Task: put a clean mug on the desk
        Actions taken: 3. The last 2:
        Seen: On the shelf 1, you see a mug 1.
        Done: take mug 1 from shelf 1
        Seen: You pick up the mug 1 from the shelf 1.
        Done: go to sinkbasin 1
        Seen now: You arrive at sinkbasin 1. In it, you see nothing.
        Possible actions:
        clean mug 1 with sinkbasin 1
        go to desk 1
        {action_format}] [assistant

    Args:
        num_turns: earlier turns to show; the oldest are left out where the prompt would be too long
            with them.
        max_prompt_tokens: most tokens of a prompt that shows any earlier turn.
    """

    def __init__(
        self,
        tokenizer: ChatTokenizer,
        setting: EpisodeSetting,
        num_turns: int,
        max_prompt_tokens: int,
    ) -> None:
        self._tokenizer = tokenizer
        self._setting = setting
        self._max_prompt_tokens = max_prompt_tokens
        self._num_actions = 0
        self._seen = ""
        self._history: deque[str] = deque(maxlen=num_turns)

    def begin(self, observation: str, admissible_actions: Sequence[str] = ()) -> Prompt:
        self._seen = observation
        return self._render(admissible_actions)

    def extend(
        self,
        response_token_ids: TokenIds,
        stop_reason: StopReason,
        action: str,
        observation: str,
        admissible_actions: Sequence[str] = (),
    ) -> Prompt:
        self._history.append(f"Seen: {self._seen}\nDone: {action or NOTHING_READ}")
        self._num_actions += 1
        self._seen = observation
        return self._render(admissible_actions)

    def _render(self, admissible_actions: Sequence[str]) -> Prompt:
        # From all of the history to none. The last try is kept even if it is too long: whether an
        # episode goes on is the player's to judge.
        for num_missing in range(len(self._history) + 1):
            text = self._compose(list(self._history)[num_missing:], admissible_actions)
            messages = _fresh_messages(self._setting, text)
            token_ids = self._tokenizer.render_fresh(messages)
            if len(token_ids) <= self._max_prompt_tokens:
                break
        return Prompt(token_ids, messages, extends_previous=False, num_missing_turns=num_missing)

    def _compose(self, history: Sequence[str], admissible_actions: Sequence[str]) -> str:
        shown = f" The last {len(history)}:" if history else ""
        lines = [
            f"Task: {self._setting.task_description}" if self._setting.task_description else "",
            f"Actions taken: {self._num_actions}.{shown}" if self._num_actions else "",
            *history,
            f"Seen now: {self._seen}",
            *_list_possible(admissible_actions),
            self._setting.action_format,
        ]
        return _join(lines)


def complete_response(
    tokenizer: ChatTokenizer, prompt: Prompt, text: str, *, wants_thoughts: bool
) -> str:
    """A response's text with the thoughts that its prompt began, as the environment judges it.

    Templates of thinking models open `<think>` in the prompt, so the response holds only its end::

        ...assistant\\n<think>\\n                  to be gone on with: always completed
        ...assistant\\n<think>\\n\\n</think>\\n\\n    empty, thinking is off: completed where the
                                             environment asks for thoughts

    A response that opens thoughts of its own stays as it is.

    Args:
        wants_thoughts: the environment asks for thoughts.
    """
    tail = tokenizer.tokenizer.decode(prompt.token_ids[-_TAIL:].tolist())
    begun = _BEGUN_THOUGHTS.search(tail)
    if begun is None or _OPENING in text or (begun["end"] and not wants_thoughts):
        return text
    return begun[0] + text


def asks_for_thoughts(*texts: str) -> bool:
    """Whether an environment that says these texts wants to see thoughts in their tags."""
    return any(_OPENING in text for text in texts)


def _list_possible(admissible_actions: Sequence[str]) -> list[str]:
    return ["Possible actions:", *admissible_actions] if admissible_actions else []


def _join(lines: Sequence[str]) -> str:
    return "\n".join(line for line in lines if line)


def _fresh_messages(setting: EpisodeSetting, content: str) -> tuple[ChatMessage, ...]:
    system = (ChatMessage("system", setting.instructions),) if setting.instructions else ()
    return place_skills((*system, ChatMessage("user", content)), setting.skill_text)
