"""Text of others made fit to be shown: no control characters, no password in a URL."""

from __future__ import annotations

import re

# Control characters, marks that turn the direction of writing, line and paragraph separators, and
# lone surrogates, which cannot be encoded.
_CONTROL = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
_SCHEME = re.compile(r"[A-Za-z0-9+.-]+://")


def hide_credentials(url: str) -> str:
    """A URL fit to be shown: without user, password and what follows a question mark."""
    scheme = match[0] if (match := _SCHEME.match(url)) else ""
    place, _, query = url[len(scheme) :].partition("?")
    if "@" in query:
        # A password may hold a question mark and a query an at sign, so both are hidden.
        return f"{scheme}***"
    if "@" in place:
        return f"{scheme}***@{place.rpartition('@')[2]}"
    return scheme + place


def escape_controls(text: str, *, keep: str = "") -> str:
    """Text safe to show on a terminal or a log line: no control, direction or line-separating
    characters save those kept.
    """

    def escape(match: re.Match[str]) -> str:
        # `ascii` writes a character as Python would, in quotes: these are cut off.
        return match[0] if match[0] in keep else ascii(match[0])[1:-1]

    return _CONTROL.sub(escape, text)
