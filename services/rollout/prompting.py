"""Owns how an episode so far becomes the next prompt. Never samples, never talks to an environment."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from sdar.contracts.types import ChatMessage, StopReason, TokenIds
from sdar.runtime.chat import ChatTokenizer, place_skills


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """A prompt as the sampler sees it and as `Turn` records it: [P] token ids, the messages it added, how it came to be."""

    token_ids: TokenIds
    messages: tuple[ChatMessage, ...]
    extends_previous: bool


class PromptStyle(Protocol):
    """One episode's prompts. An instance belongs to one episode."""

    def begin(self, observation: str) -> Prompt:
        """The prompt of turn 0."""

    def extend(self, response_token_ids: TokenIds, stop_reason: StopReason, observation: str) -> Prompt:
        """The prompt after a response and what the environment said to it."""


PromptStyleFactory = Callable[[str, str], PromptStyle]
"""(instructions, skill_text) -> a style for one episode."""


class Conversation:
    """One growing chat. Each prompt is the one before, the response as it was sampled, and the tokens between::

        begin    [system instructions] [user: {skills} {observation 0}] [assistant
        extend   ... response 0 <|im_end|>] [user: {observation 1}] [assistant

    Nothing sampled is ever tokenised anew, and the prefix cache serves everything but the last stretch.

    Args:
        instructions: the system message, none if empty.
        skill_text: placed in the first user message, nothing if empty.
    """

    def __init__(self, tokenizer: ChatTokenizer, instructions: str = "", skill_text: str = "") -> None:
        self._tokenizer = tokenizer
        self._instructions, self._skill_text = instructions, skill_text
        self._token_ids = np.empty(0, dtype=np.int32)

    def begin(self, observation: str) -> Prompt:
        system = (ChatMessage("system", self._instructions),) if self._instructions else ()
        messages = place_skills((*system, ChatMessage("user", observation)), self._skill_text)
        self._token_ids = self._tokenizer.render_fresh(messages)
        return Prompt(self._token_ids, messages, extends_previous=False)

    def extend(self, response_token_ids: TokenIds, stop_reason: StopReason, observation: str) -> Prompt:
        messages = (ChatMessage("user", observation),)
        delta = self._tokenizer.render_delta(messages, is_closed=stop_reason is StopReason.END_OF_TURN)
        self._token_ids = np.concatenate([self._token_ids, response_token_ids, delta])
        return Prompt(self._token_ids, messages, extends_previous=True)
