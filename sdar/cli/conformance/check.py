"""Owns what a check is: a claim about every environment server, the code that tries it, and how a failure is mended."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sdar.cli.conformance.bench import Bench


class FailedCheck(Exception):
    """The server does not do what the contract says."""

    def __init__(self, expected: str, got: str) -> None:
        super().__init__(f"expected {expected}; got {got}")
        self.expected, self.got = expected, got


class CheckNotRun(Exception):
    """The server is set up so that the claim cannot be tried; the text says how to set it up otherwise."""


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
    """What came of one check. `got` is the reason of a check that was not run; a passed one has neither text."""

    check: Check
    verdict: Verdict
    seconds: float
    expected: str = ""
    got: str = ""


def check(check_id: str, claim: str, remedy: str) -> Callable[[Callable[[Bench], Awaitable[None]]], Check]:
    """Make a Check of a function."""
    return lambda run: Check(check_id, claim, remedy, run)


def expect(holds: bool, expected: str, got: object) -> None:
    if not holds:
        raise FailedCheck(expected, str(got))
