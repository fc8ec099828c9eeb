"""Owns the rules of Search-QA on text: what an agent's response means, and whether an answer is right. Pure functions."""

from __future__ import annotations

import re
import string
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

_BLOCK = re.compile(r"<(search|answer)>(.*?)</\1>", re.IGNORECASE | re.DOTALL)
_OPENING = re.compile(r"<(?:search|answer)>", re.IGNORECASE)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


class ActionKind(StrEnum):
    SEARCH = "search"
    ANSWER = "answer"


@dataclass(frozen=True, slots=True)
class Action:
    """What a response asks for. `is_valid` is false for one that is played, but written with more tags than the one."""

    kind: ActionKind
    content: str
    is_valid: bool

    def __str__(self) -> str:
        return f"<{self.kind}>{self.content}</{self.kind}>"


def parse_action(text: str) -> Action | None:
    """The first complete search or answer of a response, None if there is none.

    Whatever follows it does not count, so an answer after a search is never scored. Valid is a response with exactly one of
    the two tags, once.
    """
    block = _BLOCK.search(text)
    if block is None:
        return None
    return Action(ActionKind(block[1].lower()), block[2].strip(), is_valid=len(_OPENING.findall(text)) == 1)


def normalize_answer(text: str) -> str:
    """Lower case, without punctuation, articles and superfluous white space."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def is_exact_match(answer: str, targets: Iterable[str]) -> bool:
    """Whether an answer is one of the targets once both are normalised."""
    normalized = normalize_answer(answer)
    return any(normalized == normalize_answer(target) for target in targets)
