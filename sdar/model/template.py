"""A model's chat template: chosen, rendered with a fixed date, and taken apart by a trial."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sdar.contracts.errors import ConfigurationError, ContractError
from sdar.contracts.types import ChatMessage

ROLES = ("system", "user", "assistant")
"""Roles that a message may have. The templates write them as they come, so no others are read."""


def mark_text(name: str) -> str:
    """A text that no template contains or changes; it marks where a message is rendered."""
    return f"\u2060{name}\u2060"


class ChatTemplate:
    """Renders messages to text.

    A template that takes no system message (Gemma's first ones) gets its text at the head of the
    first user message, parted by an empty line.

    Args:
        date: what `strftime_now` shows, at midnight. The template would else read the clock: after
            midnight, or in another time zone, no prompt would be what it was.

    Raises:
        ConfigurationError: there is no template that can be used.
    """

    def __init__(self, tokenizer: Any, date: datetime.date) -> None:
        self.text = _choose_template(tokenizer.chat_template)
        self.reads_clock = "strftime_now" in self.text
        self._tokenizer = tokenizer
        self._now = datetime.datetime.combine(date, datetime.time())
        self.takes_system = self._find_whether_system_is_taken()
        self.turns = self._take_apart()

    def render(self, messages: Sequence[ChatMessage], *, add_generation_prompt: bool = True) -> str:
        """Text of a conversation.

        Raises:
            ContractError: the template refuses these messages.
        """
        unknown = sorted({message.role for message in messages}.difference(ROLES))
        if unknown:
            raise ContractError(f"Messages of roles {unknown}. Use {', '.join(ROLES)}.")
        if not self.takes_system:
            messages = _move_system_to_user(messages)
        return self._apply(messages, add_generation_prompt=add_generation_prompt)

    def _apply(self, messages: Sequence[ChatMessage], *, add_generation_prompt: bool) -> str:
        plain = [{"role": message.role, "content": message.content} for message in messages]
        try:
            text = self._tokenizer.apply_chat_template(
                plain,
                chat_template=self.text,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                strftime_now=self._now.strftime,
            )
        # A template is a program of others, and raises what it likes.
        except Exception as error:
            raise ContractError(
                f"The chat template refuses messages of roles {[m.role for m in messages]}: "
                f"{error}. Bring them into an order that it takes."
            ) from error
        return str(text)

    def _find_whether_system_is_taken(self) -> bool:
        system = mark_text("system")
        messages = (ChatMessage("system", system), ChatMessage("user", mark_text("user")))
        try:
            return system in self._apply(messages, add_generation_prompt=True)
        except ContractError:
            return False

    def _take_apart(self) -> TurnPieces:
        marks = [mark_text(name) for name in ("first", "response", "second")]
        roles = ("user", "assistant", "user")
        messages = [ChatMessage(*pair) for pair in zip(roles, marks, strict=True)]
        try:
            rest = self.render(messages, add_generation_prompt=False)
        except ContractError as error:
            raise ConfigurationError(
                f"This chat template holds no conversation of several turns. {error}"
            ) from error
        pieces: list[str] = []
        for message in messages:
            piece, found, rest = rest.partition(message.content)
            if not found or message.content in rest:
                raise ConfigurationError(
                    f"The chat template writes the text of a message of role {message.role} "
                    "changed, twice, out of order or not at all, so a conversation cannot be "
                    "extended token by token. Use a template that keeps messages as they are."
                )
            pieces.append(piece)
        head, answer, between = pieces
        return TurnPieces(head, answer, between, rest)


@dataclass(frozen=True, slots=True)
class TurnPieces:
    """What a template writes around the messages of a conversation.

    Attributes:
        head: before the first user message.
        answer: between it and the assistant's message.
        between: between that and the second user message.
        tail: behind the second user message.
    """

    head: str
    answer: str
    between: str
    tail: str


def _choose_template(template: Any) -> str:
    """The one template, or the one called "default" of several.

    Several come as a list of names in tokenizer_config.json (Hermes, Command-R), or as files of the
    folder additional_chat_templates beside chat_template.jinja, which is the default then.
    """
    if isinstance(template, dict):
        if "default" not in template:
            raise ConfigurationError(
                f"The model has chat templates named {sorted(template)}, and none is called "
                "'default'. Name the one to be used so, or put it into chat_template.jinja."
            )
        template = template["default"]
    if not template:
        raise ConfigurationError(
            "The tokenizer has no chat template, neither in tokenizer_config.json nor in "
            "chat_template.jinja. Use an instruction-tuned model's."
        )
    return str(template)


def _move_system_to_user(messages: Sequence[ChatMessage]) -> tuple[ChatMessage, ...]:
    """System messages at the head of the user message that follows each of them."""
    moved: list[ChatMessage] = []
    waiting: list[str] = []
    for message in messages:
        if message.role == "system":
            waiting.append(message.content)
        elif message.role == "user":
            moved.append(ChatMessage("user", "\n\n".join([*waiting, message.content])))
            waiting = []
        else:
            moved.append(message)
    if waiting:
        raise ContractError(
            "The chat template takes no system message, and there is no user message behind it "
            "that could hold its text. Add one."
        )
    return tuple(moved)
