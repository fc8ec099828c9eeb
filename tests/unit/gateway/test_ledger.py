from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from sdar.contracts.types import GroupOutcome, LedgerEvent
from services.gateway.ledger import Ledger


def event(group_id: str, outcome: GroupOutcome) -> LedgerEvent:
    return LedgerEvent("run", group_id, outcome, 8, 0)


def test_a_group_goes_from_running_over_buffered_to_trained() -> None:
    ledger = Ledger()
    ledger.open_group("a")
    assert (ledger.num_running, ledger.num_buffered, ledger.num_trained) == (1, 0, 0)
    ledger.apply(event("a", GroupOutcome.GENERATED))
    assert (ledger.num_running, ledger.num_buffered, ledger.num_trained) == (0, 1, 0)
    ledger.apply(event("a", GroupOutcome.TRAINED))
    assert (ledger.num_running, ledger.num_buffered, ledger.num_trained) == (0, 0, 1)


def test_an_outcome_that_overtakes_its_generation_counts_both_once() -> None:
    ledger = Ledger()
    ledger.open_group("a")
    ledger.apply(event("a", GroupOutcome.TRAINED))
    assert not ledger.apply(event("a", GroupOutcome.GENERATED))
    assert ledger.num_generated == 1
    assert ledger.num_trained == 1


def test_a_closed_group_stays_closed() -> None:
    ledger = Ledger()
    ledger.open_group("a")
    ledger.apply(event("a", GroupOutcome.STALE))
    assert not ledger.apply(event("a", GroupOutcome.TRAINED))
    assert ledger.closed[GroupOutcome.STALE] == 1
    assert ledger.num_trained == 0


def test_a_group_that_failed_before_it_was_generated_is_not_counted_as_generated() -> None:
    ledger = Ledger()
    ledger.open_group("a")
    ledger.apply(event("a", GroupOutcome.FAILED))
    assert ledger.num_generated == 0
    assert ledger.closed[GroupOutcome.FAILED] == 1


@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from(list(GroupOutcome))), max_size=60), st.integers(0, 2**32))
def test_the_account_closes_whatever_arrives_in_whatever_order_how_often(
    events: list[tuple[int, GroupOutcome]], seed: int
) -> None:
    ledger = Ledger()
    for number in range(4):  # ids 4 and 5 are never issued: strangers' events must not count
        ledger.open_group(str(number))
    random.Random(seed).shuffle(events)
    for number, outcome in events + events:
        ledger.apply(event(str(number), outcome))
        counts = ledger.counts()
        assert ledger.find_gap() == 0
        assert counts["issued"] == 4
        closed = sum(counts[outcome] for outcome in ledger.closed)
        assert counts["running"] + counts["buffered"] + closed == 4
        assert counts["generated"] <= 4
