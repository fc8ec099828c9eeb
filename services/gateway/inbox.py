"""What the gateway reads: journal entries of the account and finished evaluation episodes."""

from __future__ import annotations

from sdar.bus.protocol import BEFORE_FIRST, Bus, Delivery
from sdar.contracts.streams import ConsumerGroup, Stream

_CONSUMER = "gateway"
_MAX_EVENTS = 2000
_POLL_S = 0.2


class Inbox:
    """Reads both streams for the run's only gateway."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._taken_over: list[Delivery] = []

    async def take_over(self) -> None:
        """Take what was read and never acknowledged, by this gateway or one before it, to be read
        again.
        """
        pending: list[Delivery] = []
        for stream in (Stream.LEDGER, Stream.EVALUATIONS):
            after = BEFORE_FIRST
            # There is one gateway, so nothing is too fresh to be taken.
            while page := await self._bus.reclaim(
                stream, ConsumerGroup.GATEWAY, _CONSUMER, 0.0, _MAX_EVENTS, after
            ):
                pending.extend(page)
                after = page[-1].entry_id
        self._taken_over = pending

    async def read(self) -> list[Delivery]:
        """What was taken over; else what is new, for which it waits a moment."""
        if self._taken_over:
            taken_over = self._taken_over
            self._taken_over = []
            return taken_over
        ledger = await self._bus.read(
            Stream.LEDGER, ConsumerGroup.GATEWAY, _CONSUMER, _MAX_EVENTS, block_s=_POLL_S
        )
        evaluations = await self._bus.read(
            Stream.EVALUATIONS, ConsumerGroup.GATEWAY, _CONSUMER, _MAX_EVENTS
        )
        return [*ledger, *evaluations]
