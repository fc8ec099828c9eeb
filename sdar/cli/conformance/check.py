"""A check: a claim about every environment server, the code that tries it, and the remedy."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import StrEnum

from sdar.cli.conformance.bench import Bench


class Verdict(StrEnum):
    PASS = "PASS"
    FAIL = "FAIL"
    NOT_RUN = "NOT RUN"


@dataclass(frozen=True, slots=True)
class Check:
    """`run` returns if the claim holds, and raises FailedCheck or CheckNotRun."""

    check_id: str
    claim: str
    remedy: str
    run: Callable[[Bench], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one check. `got` is the reason of a check that was not run; a passed one has
    neither text.
    """

    check: Check
    verdict: Verdict
    seconds: float
    expected: str = ""
    got: str = ""


def check(
    check_id: str, claim: str, remedy: str
) -> Callable[[Callable[[Bench], Awaitable[None]]], Check]:
    """Make a Check of a function."""
    return lambda run: Check(check_id, claim, remedy, run)
