"""The rules between sections of a run: rows that RunConfig and the chart judge alike.

Python judges them by `find_broken`; `make docs` writes them into helm/files/rules.yaml, where one
template judges the same rows. A new rule is a new row; a relation that is missing here needs one
branch in each of the two judges. In a sentence `{section.key}` stands for the key and its value.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from sdar.contracts.methods import METHODS

Read = Callable[[str], object]
"""Gives the value of a dotted key of the run."""


@dataclass(frozen=True)
class Comparison:
    """Two numbers: the one at `key` is at most, or is below, the one at `other`."""

    key: str
    relation: Literal["at most", "below"]
    other: str
    sentence: str

    def holds(self, read: Read) -> bool:
        left = _number(self.key, read)
        right = _number(self.other, read)
        return left < right if self.relation == "below" else left <= right


@dataclass(frozen=True)
class Combination:
    """Where `key` has `value`, it requires, or excludes, that `other` has one of `values`."""

    key: str
    value: str
    relation: Literal["requires", "excludes"]
    other: str
    values: tuple[str | float, ...]
    sentence: str

    def holds(self, read: Read) -> bool:
        if read(self.key) != self.value:
            return True
        # "requires" holds where the value is one of those, "excludes" where it is not.
        return (read(self.other) in self.values) == (self.relation == "requires")


Rule = Comparison | Combination

_NEVER_SCORED = tuple(
    name for name, row in METHODS.items() if row.runs_teacher and not row.needs_teacher
)
"""Methods whose teacher hands out skills and sees no episode."""

RULES: tuple[Rule, ...] = (
    Comparison(
        "training.group_size",
        "at most",
        "rollout.max_concurrent_episodes",
        "{rollout.max_concurrent_episodes} is below {training.group_size}: a group would never "
        "fit. Raise the first or lower the second.",
    ),
    Comparison(
        "rollout.max_response_tokens",
        "below",
        "model.max_sequence_tokens",
        "{rollout.max_response_tokens} leaves no room for a prompt within "
        "{model.max_sequence_tokens}. Lower the first or raise the second.",
    ),
    Comparison(
        "training.num_minibatches",
        "at most",
        "training.groups_per_update",
        "{training.num_minibatches} exceeds {training.groups_per_update}. Lower it.",
    ),
    Combination(
        "teacher.retrieval",
        "ucb",
        "excludes",
        "method.name",
        _NEVER_SCORED,
        "{teacher.retrieval} learns from episodes that pass the teacher, and {method.name} sends "
        "it none. Use another retrieval or another method.",
    ),
    Combination(
        "teacher.scorer",
        "vllm",
        "requires",
        "rollout.temperature",
        (1,),
        "{teacher.scorer} scores at temperature 1 only, not at {rollout.temperature}. Use the "
        "transformers scorer, or temperature 1.",
    ),
    Combination(
        "teacher.scorer",
        "transformers",
        "requires",
        "teacher.tensor_parallel_size",
        (1,),
        "{teacher.scorer} uses one GPU, not {teacher.tensor_parallel_size}. Lower the second, or "
        "use the vllm scorer.",
    ),
)


def find_broken(read: Read) -> list[str]:
    """The sentences of the rules that a run breaks, in the order of `RULES`."""
    return [_describe(rule, read) for rule in RULES if not rule.holds(read)]


def _describe(rule: Rule, read: Read) -> str:
    sentence = rule.sentence
    # Not by str.format, which takes the point in a key for an attribute.
    for key in (rule.key, rule.other):
        sentence = sentence.replace(f"{{{key}}}", f"{key} {read(key)}")
    return sentence


def _number(key: str, read: Read) -> float:
    value = read(key)
    if not isinstance(value, (int, float)):
        raise TypeError(f"{key} holds {value!r}, but RULES compares it with a number.")
    return value
