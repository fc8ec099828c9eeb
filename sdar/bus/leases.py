"""One consumer's leases on the entries of a stream: read, renewed, taken back, handed back.

Who works on entries of the bus keeps to these rules, and this is the one place that spells them:

- What an earlier process of the same name held is begun again first, at once (`take_back`). A role
  that only one process may hold takes all that is lent to anybody (`take_all`).
- What is in hand is renewed four times as often as a lease lapses (`keep`, `holding`). An attempt
  whose lease is lost is another's: its worker drops it, and the bus refuses its results.
- What a dead peer held is taken over now and then (`take_over`).
- What a stop leaves unfinished is handed back, so that nobody waits for its lease to lapse.
- A stream without room is waited for; what was worked out is not thrown away because its readers
  are slow (`wait_for_room`).

What becomes of an entry is the caller's: this module looks into no payload.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass

import structlog

from sdar.bus.protocol import BEFORE_FIRST, Bus, Delivery, parse_entry_id
from sdar.contracts.errors import CapacityError, SdarError, UnavailableError
from sdar.contracts.streams import ConsumerGroup, Stream
from sdar.process.lifecycle import wait_or_stop

log = structlog.get_logger()

LEASE_S = 10.0
_RENEWALS_PER_LEASE = 4
"""A renewal may be late, or be lost, twice in a row before the lease lapses."""
_HAND_BACK_S = 5.0
"""Longest wait for the bus to take entries back: a stop must not hang on a Redis that is away."""
_LARGEST_SEQUENCE = 2**64 - 1
"""Of an entry id's second part."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerLimits:
    """Bounds of every worker that shares a stream with others of its kind.

    Attributes:
        read_block_s: how long a quiet stream is waited on; also how late a stop is noticed.
        lease_s: an entry that its worker has not renewed for so long is taken over, if that one is
            gone (see `Bus.reclaim`); renewals are four times as frequent.
        max_attempts: times an entry is begun in all, by whomever. One that is delivered once more
            is taken to kill whoever works on it, and set aside.
        report_interval_s: time between two records on the `metrics` stream.
    """

    read_block_s: float = 0.5
    lease_s: float = LEASE_S
    max_attempts: int = 5
    report_interval_s: float = 2.0


class Leases:
    """What one consumer holds of one stream.

    Args:
        consumer: unique name; a process that starts again under it takes back what it held.
        lease_s: see `WorkerLimits`. A role that only one process may hold does not need it.
    """

    def __init__(
        self,
        bus: Bus,
        stream: Stream,
        group: ConsumerGroup,
        consumer: str,
        lease_s: float = LEASE_S,
    ) -> None:
        self._bus = bus
        self._stream = stream
        self._group = group
        self._consumer = consumer
        self._lease_s = lease_s
        self._after_own: str | None = BEFORE_FIRST
        """Up to where what an earlier process held has been taken back; None once that is all."""

    @property
    def renewal_interval_s(self) -> float:
        return self._lease_s / _RENEWALS_PER_LEASE

    async def read(self, max_count: int, block_s: float = 0.0) -> list[Delivery]:
        """Entries new to the consumer group, oldest first; waits up to `block_s` for the first."""
        return await self._bus.read(self._stream, self._group, self._consumer, max_count, block_s)

    async def take_back(self, max_count: int) -> list[Delivery]:
        """The next page of what an earlier process of this name held, as another attempt.

        Results of the attempts before are refused from now on. Once a page was empty, there is
        nothing more to take back, and no later call asks the bus.
        """
        if self._after_own is None:
            return []
        page = await self._take_own(max_count, self._after_own)
        self._after_own = page[-1].entry_id if page else None
        return page

    async def take_all(self, page_size: int) -> list[Delivery]:
        """Everything that is lent to anybody, as another attempt, oldest first.

        Only for a role that a single process may hold: whoever held an entry before is gone.
        """
        taken: list[Delivery] = []
        after_id = BEFORE_FIRST
        while page := await self._reclaim(0.0, page_size, after_id):
            taken += page
            after_id = page[-1].entry_id
        return taken

    async def take_over(self, max_count: int) -> list[Delivery]:
        """What peers held that are dead or have handed it back, as another attempt."""
        return await self._reclaim(self._lease_s, max_count)

    async def begin_again(self, delivery: Delivery) -> Delivery | None:
        """Take an entry back from oneself as the next attempt; None if it is not held any more."""
        # Renewed first, which shows that it is held: the page below begins with whatever this
        # consumer holds after the id before.
        if not await self._bus.renew([delivery]):
            return None
        page = await self._take_own(1, _precede(delivery.entry_id))
        return page[0] if page else None

    async def renew(self, deliveries: Sequence[Delivery]) -> list[Delivery]:
        """Renew these leases; returns those that are still held, in the same order."""
        return await self._bus.renew(deliveries)

    async def keep(
        self, in_hand: Callable[[], Sequence[Delivery]], over: asyncio.Event
    ) -> AsyncIterator[Collection[Delivery]]:
        """Renew what is in hand, again and again until `over`; yields what was lost each time.

        An attempt that is finished while its renewal is under way is found lost as well: the caller
        knows which of its attempts are over.
        """
        while not await wait_or_stop(over, self.renewal_interval_s):
            deliveries = list(in_hand())
            held = await self._bus.renew(deliveries)
            yield set(deliveries).difference(held)

    @contextlib.asynccontextmanager
    async def holding(self, deliveries: Sequence[Delivery]) -> AsyncIterator[None]:
        """Renew these leases while the body works on them, so that no peer takes them over."""

        async def renew() -> None:
            async for _ in self.keep(lambda: deliveries, asyncio.Event()):
                pass  # The commit finds out what was lost.

        renewing = asyncio.create_task(renew(), name=f"leases_{self._stream}")
        try:
            yield
        finally:
            renewing.cancel()
            # Awaited, so that no renewal is under way when the caller goes on. One that failed is
            # no reason to throw finished work away: at worst a peer does it again.
            with contextlib.suppress(asyncio.CancelledError, UnavailableError):
                await renewing

    async def hand_back(self, deliveries: Sequence[Delivery]) -> None:
        """Leave to others at once what this consumer does not finish.

        What the bus does not take back in time reaches them when its lease lapses. Renew nothing
        from here on: that would undo it.
        """
        if not deliveries:
            return
        try:
            # Bounded here as well: the bus itself waits out an outage for minutes.
            async with asyncio.timeout(_HAND_BACK_S):
                await self._bus.hand_back(deliveries)
        except (SdarError, TimeoutError) as error:
            log.warning("entries_not_handed_back", num_entries=len(deliveries), error=str(error))
        else:
            log.info("entries_handed_back", num_entries=len(deliveries))

    async def _take_own(self, max_count: int, after_id: str) -> list[Delivery]:
        return await self._reclaim(0.0, max_count, after_id, held_by=self._consumer)

    async def _reclaim(
        self,
        min_idle_s: float,
        max_count: int,
        after_id: str = BEFORE_FIRST,
        held_by: str | None = None,
    ) -> list[Delivery]:
        return await self._bus.reclaim(
            self._stream,
            self._group,
            self._consumer,
            min_idle_s,
            max_count,
            after_id,
            held_by=held_by,
        )


async def wait_for_room(
    write: Callable[[], Awaitable[None]],
    stopping: asyncio.Event | None = None,
    beat: Callable[[], None] = lambda: None,
) -> bool:
    """Do `write`, a commit, again and again while a stream it publishes to is full.

    Args:
        write: called anew each time, so it may write what has changed since.
        stopping: give up once this is set; without it, only room ends the wait.
        beat: called before each try: waiting long is not being dead.

    Returns:
        Whether it was written. If not, nothing was, and what it acknowledges stays pending.
    """
    while True:
        beat()
        try:
            await write()
        except CapacityError as error:
            # The bus has waited already, for `BusLimits.publish_timeout_s`.
            log.warning("stream_full", error=str(error))
            if stopping is not None and stopping.is_set():
                return False
        else:
            return True


def _precede(entry_id: str) -> str:
    """The id right before an entry's: what comes after it begins with that entry."""
    milliseconds, sequence = parse_entry_id(entry_id)
    # Redis takes only what comes after an id, so the entry itself is reached from the one before.
    if sequence:
        return f"{milliseconds}-{sequence - 1}"
    return f"{milliseconds - 1}-{_LARGEST_SEQUENCE}"
