"""What the gateway reads: journal entries of the account and finished evaluation episodes."""

from __future__ import annotations

from sdar.bus.leases import Leases
from sdar.bus.protocol import Bus, Delivery
from sdar.contracts.streams import ConsumerGroup, Stream

_CONSUMER = "gateway"
_MAX_EVENTS = 2000
"""Of each stream in one round: what one transaction acknowledges stays small."""
_POLL_S = 0.2
"""Longest wait for an event, and so about the time between two rounds of an idle run."""


class Inbox:
    """Reads both streams for the run's only gateway."""

    def __init__(self, bus: Bus) -> None:
        self._ledger = Leases(bus, Stream.LEDGER, ConsumerGroup.GATEWAY, _CONSUMER)
        self._evaluations = Leases(bus, Stream.EVALUATIONS, ConsumerGroup.GATEWAY, _CONSUMER)
        self._taken_over: list[Delivery] = []

    async def take_over(self) -> None:
        """Take what was read and never acknowledged, by this gateway or one before it, to be read
        again.
        """
        events = await self._ledger.take_all(_MAX_EVENTS)
        episodes = await self._evaluations.take_all(_MAX_EVENTS)
        self._taken_over = [*events, *episodes]

    async def read(self) -> list[Delivery]:
        """What was taken over; else what is new, for which it waits a moment."""
        if self._taken_over:
            taken_over = self._taken_over
            self._taken_over = []
            return taken_over
        events = await self._ledger.read(_MAX_EVENTS, _POLL_S)
        # Without waiting again: one wait a round is enough.
        episodes = await self._evaluations.read(_MAX_EVENTS)
        return [*events, *episodes]
