"""Owns the account of every training group: issued, generated, closed by exactly one outcome. Pure; its caller persists it.

    issued = running + generated                      running: no outcome yet
    generated = trained + skipped + stale + cancelled + failed_late + buffered
A group that fails is closed whether or not it was generated before; `counts` keeps `failed` as one number and `num_generated`
counts what was really generated, so that both equations are checked by `find_gap`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import structlog

from sdar.contracts.types import GroupOutcome, LedgerEvent

log = structlog.get_logger()

_CLOSED = (
    GroupOutcome.TRAINED,
    GroupOutcome.SKIPPED,
    GroupOutcome.STALE,
    GroupOutcome.FAILED,
    GroupOutcome.CANCELLED,
)


@dataclass
class Ledger:
    """Counts by outcome and the set of open groups. Events may repeat and cross; a closed group stays closed.

    `open` maps group id to whether it was generated already. Group ids must be issued in increasing `group_number` order, so
    that an id which is not open is known to be closed without remembering it. `num_failed_in_a_row` counts failures since a
    group was last generated.
    """

    num_issued: int = 0
    num_generated: int = 0
    closed: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_CLOSED, 0))
    open: dict[str, bool] = field(default_factory=dict)
    failure_reasons: dict[str, str] = field(default_factory=dict)
    num_failed_in_a_row: int = 0

    def open_group(self, group_id: str) -> None:
        self.num_issued += 1
        self.open[group_id] = False

    def apply(self, event: LedgerEvent) -> bool:
        """Book one event; tells whether it changed anything."""
        if event.group_id not in self.open:
            return False
        if not self.open[event.group_id] and event.outcome is not GroupOutcome.FAILED:
            # Services report over one stream but from different processes: TRAINED may come before its GENERATED.
            self.open[event.group_id] = True
            self.num_generated += 1
            self.num_failed_in_a_row = 0
            if event.outcome is GroupOutcome.GENERATED:
                return True
        if event.outcome is GroupOutcome.GENERATED:
            return False
        del self.open[event.group_id]
        self.closed[event.outcome] += 1
        self.num_failed_in_a_row += event.outcome is GroupOutcome.FAILED
        if event.outcome in (GroupOutcome.FAILED, GroupOutcome.CANCELLED):
            self.failure_reasons[event.group_id] = event.reason
            log.info("group_closed", group_id=event.group_id, outcome=event.outcome, reason=event.reason)
            while len(self.failure_reasons) > 1000:
                self.failure_reasons.pop(next(iter(self.failure_reasons)))
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
            **{str(outcome): number for outcome, number in self.closed.items()},
            "buffered": self.num_buffered,
        }

    def find_gap(self) -> int:
        """Groups that the account cannot explain: 0 when `issued` equals the sum of open and closed groups."""
        return self.num_issued - len(self.open) - sum(self.closed.values())
