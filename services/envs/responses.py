"""Reads tags in an agent's raw text, in time linear in the text's length."""

from __future__ import annotations


def find_between(text: str, start: str, end: str) -> str | None:
    """What stands between two marks; None unless there is exactly one of each, in this order."""
    if text.count(start) != 1 or text.count(end) != 1:
        return None
    _, _, rest = text.partition(start)
    inner, found, _ = rest.partition(end)
    return inner if found else None
