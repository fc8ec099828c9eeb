"""How a check writes an action for an environment it doesn't know: from what the server lists."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

_BLANK = "{}"
_THOUGHT = "<think>On we go.</think>"
_NUMBER = "1"
_NUM_WORDS = 4


@dataclass(frozen=True, slots=True)
class ActionForm:
    """A way to write actions. The blank of `outer` takes the action; where none is listed, `inner`
    with words makes one.
    """

    outer: str = _BLANK
    inner: str = _BLANK

    @property
    def is_bare(self) -> bool:
        return self.outer == _BLANK

    def write(self, action: str) -> str:
        return self.outer.replace(_BLANK, action)

    def write_words(self, words: str) -> str:
        return self.write(self.inner.replace(_BLANK, words))


def list_forms(action_format: str, *, is_listed: bool) -> list[ActionForm]:
    """The ways worth trying: bare, or in a tag that action_format names; if unlisted, as words,
    `verb[words]` or a number.
    """
    tags = [tag for tag in dict.fromkeys(re.findall(r"<(\w+)>", action_format)) if tag != "think"]
    outer = [_BLANK, *(f"{_THOUGHT}<{tag}>{_BLANK}</{tag}>" for tag in tags)]
    verbs = dict.fromkeys(re.findall(r"(\w+)\[", action_format))
    inner = [_BLANK] if is_listed else [_BLANK, *(f"{verb}[{_BLANK}]" for verb in verbs), _NUMBER]
    return [ActionForm(one, other) for one in outer for other in inner]


def choose_words(description: str, turn: int) -> str:
    """Some words of the task, others on every turn."""
    words: Sequence[str] = description.split() or ["anything"]
    return " ".join(words[turn % len(words) :][:_NUM_WORDS])
