"""What events do to a draft: reasons and lengths of training groups, results of evaluations."""

from __future__ import annotations

from collections.abc import Sequence

import structlog

from sdar.bus.ledger import parse_group_number
from sdar.bus.protocol import Bus, Delivery
from sdar.contracts import codec
from sdar.contracts.errors import SdarError
from sdar.contracts.streams import Stream
from sdar.contracts.types import GroupOutcome, LedgerEvent

from .commit import Draft
from .evaluator import Evaluator
from .lengths import EpisodeLengths
from .metrics import UNREADABLE_EVENTS, GatewayMetrics
from .state import GatewayState

log = structlog.get_logger()


class Bookkeeper:
    """Books events; what the account of groups itself holds is the bus's."""

    def __init__(
        self, bus: Bus, evaluator: Evaluator, lengths: EpisodeLengths, metrics: GatewayMetrics
    ) -> None:
        self._bus = bus
        self._evaluator = evaluator
        self._lengths = lengths
        self._metrics = metrics

    async def book(self, draft: Draft, events: Sequence[Delivery]) -> None:
        """Take events into the draft, which acknowledges them. What cannot be read is set aside."""
        for delivery in events:
            try:
                self._book(draft, delivery)
            except SdarError as error:
                log.error(
                    "event_unreadable",
                    stream=delivery.stream,
                    entry_id=delivery.entry_id,
                    error=str(error),
                )
                self._metrics.count(UNREADABLE_EVENTS)
                await self._bus.dead_letter(delivery, str(error))
            else:
                draft.events.append(delivery)

    def _book(self, draft: Draft, delivery: Delivery) -> None:
        if delivery.stream is Stream.EVALUATIONS:
            trajectory = codec.decode_trajectory(delivery.payload, delivery.stream)
            self._evaluator.count(draft, trajectory)
            return
        event = codec.decode_ledger_event(delivery.payload)
        if parse_group_number(event.group_id) is not None:
            self._book_training(draft.state, event)
        # Of an evaluation only failures come here; episodes have a stream of their own.
        elif event.outcome is GroupOutcome.FAILED:
            self._evaluator.count_failure(draft, event)

    def _book_training(self, state: GatewayState, event: LedgerEvent) -> None:
        state.apply(event)
        self._lengths.apply(event)
        self._metrics.observe_lengths(event)
        if event.outcome in (GroupOutcome.FAILED, GroupOutcome.CANCELLED):
            log.info(
                "group_closed",
                group_id=event.group_id,
                outcome=event.outcome,
                reason=event.reason,
            )
