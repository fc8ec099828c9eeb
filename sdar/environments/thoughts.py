"""What an agent's text holds beside its thoughts."""

from __future__ import annotations

_OPENING, _CLOSING = "<think>", "</think>"


def drop_thoughts(text: str) -> str:
    """What follows the last `</think>`; empty if thoughts were begun and never closed.

    For an environment that takes the whole text for the action: a thinking model's text begins with
    its thoughts.
    """
    rest = text.rpartition(_CLOSING)[2]
    return "" if _OPENING in rest else rest
