"""The account of training groups: its rules, its numbers, and the names of groups. Pure.

The bus keeps it.

    issued    = running + generated
    generated = trained + skipped + stale + failed + cancelled + buffered

`running`: being played, or waiting to be. `generated`: its playing is over, with episodes or
without. `buffered`: on its way to a durable optimizer step; TRAINED is booked in the transaction
that acknowledges a group's entries, hence never before a checkpoint holds its effect. Every number
changes in the transaction of what it counts: both equations hold at every moment.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from sdar.contracts.types import GroupOutcome

CLOSING = (
    GroupOutcome.TRAINED,
    GroupOutcome.SKIPPED,
    GroupOutcome.STALE,
    GroupOutcome.FAILED,
    GroupOutcome.CANCELLED,
)
"""The outcomes that end a group. Each group ends in exactly one of them."""

MAX_GROUP_NUMBER = 2**32 - 1
"""The last number an account has room for: it keeps closed groups in bitmaps."""

_GROUP_ID = re.compile(r"group-(\d{8,10})", re.ASCII)


def format_group_id(number: int) -> str:
    """The id of the run's training group with this number."""
    return f"group-{number:08d}"


def parse_group_number(group_id: str) -> int | None:
    """Inverse of `format_group_id`; None for any other id, such as those of an evaluation."""
    match = _GROUP_ID.fullmatch(group_id)
    number = int(match[1]) if match else MAX_GROUP_NUMBER + 1
    # Formatted again: a number with more zeros than the run writes is another id, not this group.
    return number if number <= MAX_GROUP_NUMBER and format_group_id(number) == group_id else None


@dataclass
class LedgerAccount:
    """The account at one moment.

    Attributes:
        num_issued, num_generated: see the module.
        closed: groups by the outcome that closed them.
        open: group number -> whether its playing is over: True is buffered, False running.
        ended: the closed groups and what closed them. `Bus.read_ledger` leaves it out.
    """

    num_issued: int = 0
    num_generated: int = 0
    closed: dict[GroupOutcome, int] = field(default_factory=lambda: dict.fromkeys(CLOSING, 0))
    open: dict[int, bool] = field(default_factory=dict)
    ended: dict[int, GroupOutcome] = field(default_factory=dict, compare=False, repr=False)

    def apply(self, number: int, outcome: GroupOutcome) -> bool:
        """Book one transition; returns whether it changed anything.

        A repeat changes nothing, nor does what comes before ISSUED or after the group's end.
        `redis_scripts.COMMIT` has the same rules in Lua.
        """
        if outcome is GroupOutcome.ISSUED:
            return self._issue(number)
        is_generated = self.open.get(number)
        if is_generated is None or (is_generated and outcome is GroupOutcome.GENERATED):
            return False
        # Whatever closes a group that is still running ends its playing too.
        self.num_generated += not is_generated
        if outcome is GroupOutcome.GENERATED:
            self.open[number] = True
        else:
            del self.open[number]
            self.closed[outcome] += 1
            self.ended[number] = outcome
        return True

    def _issue(self, number: int) -> bool:
        if number in self.open or number in self.ended:
            return False
        self.num_issued += 1
        self.open[number] = False
        return True

    @property
    def num_running(self) -> int:
        return sum(not is_generated for is_generated in self.open.values())

    @property
    def num_buffered(self) -> int:
        return len(self.open) - self.num_running

    @property
    def num_trained(self) -> int:
        return self.closed[GroupOutcome.TRAINED]

    def counts(self) -> dict[str, int]:
        """Every number of the account, by name."""
        return {
            "issued": self.num_issued,
            "running": self.num_running,
            "generated": self.num_generated,
            **{outcome.value: self.closed[outcome] for outcome in CLOSING},
            "buffered": self.num_buffered,
        }

    def find_gap(self) -> int:
        """Groups that one of the two equations misses.

        It is 0 unless something wrote to the account without the bus.
        """
        # Absolute values: two errors of opposite sign must not look like none.
        missing_issued = self.num_issued - self.num_running - self.num_generated
        missing_generated = self.num_generated - sum(self.closed.values()) - self.num_buffered
        return abs(missing_issued) + abs(missing_generated)
