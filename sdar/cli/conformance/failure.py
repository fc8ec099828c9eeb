"""How a check says that its claim does not hold, or that it cannot be tried."""

from __future__ import annotations


class FailedCheck(Exception):
    """The server does not do what the contract says."""

    def __init__(self, expected: str, got: str) -> None:
        super().__init__(f"expected {expected}; got {got}")
        self.expected, self.got = expected, got


class CheckNotRun(Exception):
    """The server is set up so that the claim cannot be tried; the text says how to set it up
    otherwise.
    """


def expect(holds: bool, expected: str, got: object) -> None:
    if not holds:
        raise FailedCheck(expected, str(got))
