"""Commits to Redis: one script each, applied whole or not at all, and exactly once.

A commit's id leaves a mark that outlives every retry: one whose reply was lost is recognised when
it comes again. How long a stream is comes back with each commit, so one that finds room costs one
round trip.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from sdar.bus import redis_scripts
from sdar.bus.ledger import CLOSING, parse_group_number
from sdar.bus.protocol import (
    DEAD_LETTERS_MAX_ENTRIES,
    DeadLetter,
    Delivery,
    Publications,
    build_lease_error,
    build_letter_error,
    format_capacity_message,
    has_effects,
    is_entry_id,
)
from sdar.bus.redis_session import PAYLOAD, Argument, RedisSession, Request
from sdar.bus.redis_trimming import RedisTrimming
from sdar.contracts.codec import encode_ledger_event
from sdar.contracts.errors import CapacityError
from sdar.contracts.streams import BROADCAST_MAX_ENTRIES, ConsumerGroup, Stream
from sdar.contracts.types import LedgerEvent

# A stream that is only just full has room again soon; one whose consumers are slow is not asked
# more than four times a second.
_FIRST_POLL_S = 0.01
_MAX_POLL_S = 0.25
_LEAST_MARK_S = 600.0
"""Least life of a commit's mark. It is longer than any retry of one reply goes on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """What one transaction does, see `Bus.commit`.

    Attributes:
        dead_letters: entries with their reasons; they are among the acknowledgements.
    """

    publications: Publications = field(default_factory=dict)
    acknowledgements: Sequence[Delivery] = ()
    state: Mapping[str, bytes] = field(default_factory=dict)
    transitions: Sequence[LedgerEvent] = ()
    retired_letters: Sequence[str] = ()
    dead_letters: Sequence[tuple[Delivery, str]] = ()

    @property
    def has_effects(self) -> bool:
        """Whether it does more than acknowledge."""
        if self.dead_letters:
            return True
        return has_effects(self.publications, self.state, self.transitions, self.retired_letters)


class RedisCommitting:
    """The writing half of a `RedisBus`."""

    def __init__(self, session: RedisSession, trimming: RedisTrimming) -> None:
        self._session = session
        self._trimming = trimming
        self._known_length: dict[Stream, int] = {}

    async def commit(self, commit: Commit) -> None:
        """Apply a commit once each stream that it publishes to has room.

        Raises:
            LeaseLostError, CapacityError: see `Bus.commit`; nothing was done.
        """
        bounded = self._session.wiring.bounded(commit.publications)
        for stream in bounded:
            await self._wait_for_room(stream)
        # Before the transaction: a trim that fails after it would make a commit that happened look
        # as if it had not.
        read_from = {delivery.stream for delivery in commit.acknowledgements}
        await self._trimming.trim_now_and_then(read_from)
        await self.apply(commit)

    async def apply(self, commit: Commit) -> None:
        """Apply a commit at once, whether there is room or not."""
        # Redis would refuse an id of another form in the middle of the script.
        for letter_id in commit.retired_letters:
            if not is_entry_id(letter_id):
                raise build_letter_error(letter_id)
        bounded = self._session.wiring.bounded(commit.publications)
        request = self._build_request(commit, bounded)
        status, *details = await self._session.run_in_role(redis_scripts.COMMIT, request)
        if status == b"lost":
            raise build_lease_error(commit.acknowledgements[details[0]])
        if status == b"gone":
            raise build_letter_error(details[0].decode())
        # Lengths come back with the commit: the next one knows whether there is room.
        self._known_length.update(zip(bounded, details, strict=True))

    def _build_request(self, commit: Commit, measured: Sequence[Stream]) -> Request:
        """Keys and arguments in the order of `redis_scripts.COMMIT`, under a new commit's id."""
        # A retry comes at most one outage later; its mark must still be there.
        mark_s = max(_LEAST_MARK_S, 2 * self._session.limits.outage_tolerance_s)
        request = Request(self._name_keys())
        request.add_list([self._index(request, stream)] for stream in measured)
        request.add(int(1000 * mark_s))
        self._session.add_roles(request)
        request.add(int(commit.has_effects))
        request.add_list(self._lay_out_lease(request, lent) for lent in commit.acknowledgements)
        request.add_list([letter_id] for letter_id in commit.retired_letters)
        request.add_list(
            self._lay_out_publication(request, stream, payloads)
            for stream, payloads in commit.publications.items()
        )
        request.add_list(commit.state.items())
        request.add_list(_lay_out_transition(event) for event in commit.transitions)
        request.add_list(_lay_out_dead_letter(*letter) for letter in commit.dead_letters)
        return request

    def _name_keys(self) -> list[str]:
        names = self._session.keys
        # The id of this commit. Retries send the same request, hence the same mark.
        mark = names.commit(secrets.token_hex(8))
        closed = [names.closed_groups(outcome) for outcome in CLOSING]
        account = [names.ledger(), names.open_groups(), names.stream(Stream.LEDGER)]
        return [mark, names.states(), names.dead_letters(), *account, *closed]

    def _index(self, request: Request, stream: Stream) -> int:
        return request.index(self._session.keys.stream(stream))

    def _lay_out_lease(self, request: Request, lent: Delivery) -> list[Argument]:
        index = self._index(request, lent.stream)
        return [index, lent.group, lent.consumer, lent.entry_id, lent.num_deliveries]

    def _lay_out_publication(
        self, request: Request, stream: Stream, payloads: Sequence[bytes]
    ) -> list[Argument]:
        bound = BROADCAST_MAX_ENTRIES.get(stream, "")
        return [self._index(request, stream), bound, len(payloads), *payloads]

    async def _wait_for_room(self, stream: Stream) -> None:
        """Return when the stream is below its bound.

        Raises:
            CapacityError: it is still full after `publish_timeout_s`.
        """
        limits = self._session.limits
        poll_s = _FIRST_POLL_S
        deadline = time.monotonic() + limits.publish_timeout_s
        while self._known_length.get(stream, 0) >= limits.max_entries:
            # Its consumers trim only now and then, so what looks full may only be untrimmed.
            await self._trimming.trim_streams([stream])
            length = await self._measure(stream)
            if length < limits.max_entries:
                return
            if time.monotonic() >= deadline:
                message = format_capacity_message(stream, length, limits)
                raise CapacityError(message, stream=stream, num_entries=length)
            await asyncio.sleep(poll_s)
            poll_s = min(2 * poll_s, _MAX_POLL_S)

    async def _measure(self, stream: Stream) -> int:
        key = self._session.keys.stream(stream)
        length = int(await self._session.run(lambda: self._session.client.xlen(key)))
        self._known_length[stream] = length
        return length


def _lay_out_transition(event: LedgerEvent) -> list[Argument]:
    """An event, with the number of its group; "" for one without an account."""
    number = parse_group_number(event.group_id)
    return ["" if number is None else number, event.outcome, encode_ledger_event(event)]


def _lay_out_dead_letter(delivery: Delivery, reason: str) -> list[Argument]:
    fields: dict[bytes, Argument] = {
        b"stream": delivery.stream,
        b"group": delivery.group,
        b"entry_id": delivery.entry_id,
        b"num_deliveries": delivery.num_deliveries,
        b"reason": reason,
        b"at_s": time.time(),
        PAYLOAD: delivery.payload,
    }
    flat: list[Argument] = []
    for name, value in fields.items():
        flat += [name, value]
    return [DEAD_LETTERS_MAX_ENTRIES, len(flat), *flat]


def parse_dead_letter(letter_id: bytes, fields: Mapping[bytes, bytes]) -> DeadLetter:
    """A dead letter as Redis keeps it."""
    return DeadLetter(
        letter_id=letter_id.decode(),
        stream=Stream(fields[b"stream"].decode()),
        group=ConsumerGroup(fields[b"group"].decode()),
        entry_id=fields[b"entry_id"].decode(),
        payload=fields[PAYLOAD],
        num_deliveries=int(fields[b"num_deliveries"]),
        reason=fields[b"reason"].decode(),
        at_s=float(fields[b"at_s"]),
    )
