"""Writes actions for an environment that nothing is known of but what its server says."""

from __future__ import annotations

import itertools
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
    """The ways worth trying: bare, or in a tag that `action_format` names. Where the server lists
    no actions, each of them with words, with `verb[words]` and with a number.
    """
    tags = _find_distinct(r"<(\w+)>", action_format)
    # What is in <think> is no action.
    outer = [f"{_THOUGHT}<{tag}>{_BLANK}</{tag}>" for tag in tags if tag != "think"]
    outer.insert(0, _BLANK)

    inner = [_BLANK]
    if not is_listed:
        verbs = _find_distinct(r"(\w+)\[", action_format)
        inner += [f"{verb}[{_BLANK}]" for verb in verbs]
        inner.append(_NUMBER)

    return [ActionForm(*form) for form in itertools.product(outer, inner)]


def _find_distinct(pattern: str, text: str) -> list[str]:
    """What the pattern finds, each once, in the order of the text."""
    return list(dict.fromkeys(re.findall(pattern, text)))


def choose_words(description: str, turn: int) -> str:
    """Some words of the task, others on every turn."""
    words: Sequence[str] = description.split() or ["anything"]
    begin = turn % len(words)
    return " ".join(words[begin : begin + _NUM_WORDS])
