"""Which series a PromQL expression reads, by which labels it chooses and groups them. Knows enough
PromQL to be strict: what it takes for no metric's name is a function, an operator or a label list;
everything else counts as a name."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_TOKEN = re.compile(
    r'\s+|"(?:[^"\\]|\\.)*"|\[[^\]]*\]|[a-zA-Z_:][\w:]*|[0-9][\w.]*'
    r"|=~|!~|!=|>=|<=|==|[-+*/%^=<>(){},]"
)
_AGGREGATIONS = {
    "sum",
    "min",
    "max",
    "avg",
    "count",
    "group",
    "stddev",
    "topk",
    "bottomk",
    "quantile",
}
_LABEL_LISTS = {"by", "without", "on", "ignoring", "group_left", "group_right"}
_WORDS = {"and", "or", "unless", "bool", "offset", "inf", "nan"}


@dataclass
class Reading:
    """`selectors`: names with their matchers, label to (operator, value). `groupings`: labels of
    by, on and the like.
    """

    selectors: list[tuple[str, dict[str, tuple[str, str]]]] = field(default_factory=list)
    groupings: set[str] = field(default_factory=set)


def read(expression: str) -> Reading:
    """Raises ValueError for what it cannot read."""
    tokens = _tokenize(expression)
    found, place = Reading(), 0
    while place < len(tokens):
        token, after = tokens[place], tokens[place + 1] if place + 1 < len(tokens) else ""
        place += 1
        if token in _LABEL_LISTS:
            end = tokens.index(")", place) if after == "(" else place - 1
            found.groupings |= {name for name in tokens[place + 1 : end] if name != ","}
            place = end + 1
        elif token == "{":
            raise ValueError(f"a selector without a name in {expression}")
        elif (
            re.match(r"[a-zA-Z_:]", token) and token not in _AGGREGATIONS | _WORDS and after != "("
        ):
            matchers = {}
            if after == "{":
                end = tokens.index("}", place)
                inside = [part for part in tokens[place + 1 : end] if part != ","]
                matchers = {
                    name: (sign, value[1:-1])
                    for name, sign, value in zip(*[iter(inside)] * 3, strict=True)
                }
                place = end + 1
            found.selectors.append((token, matchers))
    return found


def _tokenize(expression: str) -> list[str]:
    tokens, place = [], 0
    while place < len(expression):
        match = _TOKEN.match(expression, place)
        if match is None:
            raise ValueError(f"cannot read {expression[place:]!r} of {expression}")
        tokens.append(match.group())
        place = match.end()
    return [token for token in tokens if not token.isspace()]
