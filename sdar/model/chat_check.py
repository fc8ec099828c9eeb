"""Tries a model's tokenizer and chat template, and says what is right, wrong or worth knowing."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sdar.config import TEMPLATE_DATE
from sdar.contracts.errors import ConfigurationError, ContractError
from sdar.contracts.types import ChatMessage
from sdar.model.chat import ChatTokenizer
from sdar.model.template import mark_text

_PLAIN = "a mug ."


@dataclass(frozen=True, slots=True)
class Finding:
    """What a trial of one part found."""

    name: str
    is_right: bool
    detail: str


def check_chat(model_path: Path, date: datetime.date = TEMPLATE_DATE) -> list[Finding]:
    """Findings on tokenizer and chat template; raises nothing for what is wrong with the model.

    A first finding that is wrong is the only one: nothing else can be tried then. It is what
    `ChatTokenizer` refuses at the start of a service.
    """
    try:
        chat = ChatTokenizer(model_path, date)
    except ConfigurationError as error:
        return [Finding("chat", False, error.message)]
    trials: list[tuple[str, Callable[[ChatTokenizer], str]]] = [
        ("chat", lambda _: "tokenizer and template can be used, and text comes back unchanged"),
        ("stop", describe_stops),
        ("system role", describe_system_role),
        ("date", lambda chat: _describe_date(chat, date)),
        ("delta", _try_deltas),
        ("text is text", _try_control_texts),
        ("earlier turns", describe_earlier_turns),
    ]
    return [_try(name, trial, chat) for name, trial in trials]


def describe_stops(chat: ChatTokenizer) -> str:
    """The tokens that end a response, each with who names it."""
    added = chat.tokenizer.added_tokens_decoder
    sources = chat.stops.sources.items()
    return "; ".join(f"{added[i].content} ({', '.join(named)})" for i, named in sources)


def describe_system_role(chat: ChatTokenizer) -> str:
    """Where instructions stand."""
    if chat.template.takes_system:
        return "instructions are a system message"
    return "the template takes no system message: instructions begin the first user message"


def describe_earlier_turns(chat: ChatTokenizer) -> str:
    """What the template would change in earlier turns, and what a run keeps.

    A conversation is extended token by token, so training never depends on it. But who serves the
    trained model by rendering whole conversations shows it other prompts.
    """
    system, first, thought, second = map(mark_text, ("system", "first", "thought", "second"))
    answer = mark_text("answer")
    messages = [
        ChatMessage("system", system),
        ChatMessage("user", first),
        ChatMessage("assistant", f"<think>\n{thought}\n</think>\n\n{answer}"),
        ChatMessage("user", second),
    ]
    text = chat.template.render(messages)
    notes = []
    if text.find(system) > text.find(first):
        notes.append("the template moves instructions to the last user message; a run keeps them")
    if thought not in text:
        notes.append("the template drops the thoughts of earlier turns; a conversation keeps them")
    asked = chat.template.render([ChatMessage("user", first)])
    later = [*messages[1:2], ChatMessage("assistant", answer), *messages[3:]]
    if not chat.template.render(later).startswith(asked + answer):
        notes.append("the template writes an earlier response otherwise than it was asked for")
    return "; ".join(notes) or "the template keeps earlier turns as they were"


def _try(name: str, trial: Callable[[ChatTokenizer], str], chat: ChatTokenizer) -> Finding:
    try:
        return Finding(name, True, trial(chat))
    except (ConfigurationError, ContractError) as error:
        return Finding(name, False, error.message)


def _describe_date(chat: ChatTokenizer, date: datetime.date) -> str:
    if chat.template.reads_clock:
        return f"the template writes today's date: model.template_date, {date.isoformat()}"
    return "the template writes no date"


def _try_deltas(chat: ChatTokenizer) -> str:
    """Every way in which a response can end leads to the same next turn."""
    message = ChatMessage("user", _PLAIN)
    opened = chat.render_delta([message], ended_by=None).tolist()
    closed = chat.render_delta([message], ended_by=chat.stops.closing_id).tolist()
    cut = opened.index(chat.stops.closing_id) + 1
    if opened[cut:] != closed:
        raise ConfigurationError(
            f"Behind a response that was cut the template writes {opened}, and behind one that "
            f"closed itself {closed}: they differ by more than the closing token."
        )
    return "behind a response that ended or was cut, the next turn is the same"


def _try_control_texts(chat: ChatTokenizer) -> str:
    """No text of a control token in any message becomes the token."""
    controls = chat.control_ids
    added = chat.tokenizer.added_tokens_decoder
    hostile = " ".join(added[i].content for i in sorted(controls))
    roles = ("system", "user")

    def find_controls(text: str) -> list[int]:
        ids = chat.render_fresh([ChatMessage(role, text) for role in roles]).tolist()
        ids += chat.render_delta([ChatMessage("user", text)], ended_by=None).tolist()
        return [i for i in ids if i in controls]

    if find_controls(hostile) != find_controls(_PLAIN):
        raise ConfigurationError(
            "Texts of control tokens in a message become control tokens: the chat template changes "
            "what messages say. Use one that writes them as they are."
        )
    return f"texts of {len(controls)} control tokens stay text"
