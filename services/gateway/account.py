"""Checks of the account of groups in Redis against what the gateway itself has issued."""

from __future__ import annotations

from collections import Counter

import structlog

from sdar.bus.ledger import CLOSING, LedgerAccount, format_group_id
from sdar.bus.protocol import Bus
from sdar.contracts.errors import CorruptionError

log = structlog.get_logger()

_MAX_NAMED = 1000
"""Enough to see what they have in common; the saved state and the log line stay small."""


async def find_unaccounted(bus: Bus, ledger: LedgerAccount, num_issued: int) -> list[int]:
    """Numbers of the groups that break the rule that each has exactly one outcome, logged as well.

    Groups open in `ledger` may still have none; numbers from `num_issued` on must have none. Of
    many, the first 1000.
    """
    closed = await _count_closings(bus)
    wrong = []
    for number in range(num_issued):
        is_open = closed[number] == 0 and number in ledger.open
        if closed[number] != 1 and not is_open:
            wrong.append(number)
    # Nobody issued these, so nobody may have closed them.
    wrong += sorted(number for number in closed if number >= num_issued)
    named = wrong[:_MAX_NAMED]
    if wrong:
        ids = [format_group_id(number) for number in named]
        log.error("ledger_gap", num_groups=len(wrong), group_ids=ids, ledger=ledger.counts())
    return named


async def _count_closings(bus: Bus) -> Counter[int]:
    """By group number, how many outcomes it has."""
    closed: Counter[int] = Counter()
    for outcome in CLOSING:
        closed.update(await bus.list_closed(outcome))
    return closed


def build_mismatch_error(num_in_account: int, num_issued: int) -> CorruptionError:
    """The account and the gateway's cursor differ, which only ever change together."""
    return CorruptionError(
        f"The account in Redis has {num_in_account} groups, this gateway issued {num_issued}: "
        "Redis lost confirmed writes, or somebody else wrote. The gateway ends, and begins again "
        "with what Redis holds. Give Redis an append-only file."
    )
