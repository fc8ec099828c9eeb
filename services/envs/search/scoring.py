"""The rules of Search-QA: what an agent's response means, and whether an answer is right."""

from __future__ import annotations

import re
import string
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

# ASCII: otherwise the long s of old prints is an s, too, and names no kind.
_OPENING = re.compile(r"<(search|answer)>", re.IGNORECASE | re.ASCII)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


class ActionKind(StrEnum):
    SEARCH = "search"
    ANSWER = "answer"


_CLOSINGS = {kind: re.compile(f"</{kind}>", re.IGNORECASE | re.ASCII) for kind in ActionKind}


@dataclass(frozen=True, slots=True)
class Action:
    """What a response asks for.

    `is_valid` is false where the response has more tags than this one; it is still played.
    """

    kind: ActionKind
    content: str
    is_valid: bool

    def __str__(self) -> str:
        return f"<{self.kind}>{self.content}</{self.kind}>"


def parse_action(text: str) -> Action | None:
    """The first complete search or answer of a response, None if there is none.

    Whatever comes after it does not count, so an answer after a search is never scored. A response
    is valid if it has one of the two tags, once. It takes time linear in the text.
    """
    openings = list(_OPENING.finditer(text))
    firsts: dict[ActionKind, re.Match[str]] = {}
    for opening in openings:
        firsts.setdefault(ActionKind(opening[1].lower()), opening)
    # Of each kind the first alone: what closes a later one closes it, too.
    for kind, opening in firsts.items():
        closing = _CLOSINGS[kind].search(text, opening.end())
        if closing is not None:
            content = text[opening.end() : closing.start()].strip()
            return Action(kind, content, is_valid=len(openings) == 1)
    return None


def normalize_answer(text: str) -> str:
    """The text in lower case, without punctuation, articles and superfluous white space."""
    # In the order of SQuAD's script, whose scores are compared with: punctuation goes first, so
    # that "a." is an article.
    bare = text.lower().translate(_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", bare).split())


def is_exact_match(answer: str, targets: Iterable[str]) -> bool:
    """Whether an answer is one of the targets once both are normalised."""
    normalized = normalize_answer(answer)
    return any(normalized == normalize_answer(target) for target in targets)
