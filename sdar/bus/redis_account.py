"""The account of groups as Redis keeps it, and snapshots of it with the small states."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from sdar.bus import redis_scripts
from sdar.bus.ledger import CLOSING, LedgerAccount
from sdar.bus.redis_session import RedisSession, Request, pairs
from sdar.bus.snapshot import (
    BusSnapshot,
    build_account,
    decode_snapshot,
    encode_snapshot,
    unpack_numbers,
)
from sdar.contracts.types import GroupOutcome

_BUFFERED = b"b"


class RedisAccount:
    """The account's part of a `RedisBus`; its methods are those of `Bus`."""

    def __init__(self, session: RedisSession) -> None:
        self._session = session

    async def read_ledger(self) -> LedgerAccount:
        numbers, open_groups = await self._read_together(self._account_reads(), in_role=False)
        totals = _parse_numbers(numbers)
        counts = {outcome: totals.get(outcome, 0) for outcome in CLOSING}
        return LedgerAccount(
            totals.get("issued", 0), totals.get("generated", 0), counts, _parse_open(open_groups)
        )

    async def list_closed(self, outcome: GroupOutcome) -> list[int]:
        key = self._session.keys.closed_groups(outcome)
        bitmap = await self._session.run(lambda: self._session.client.get(key))
        return unpack_numbers(bitmap or b"")

    async def take_snapshot(self) -> bytes:
        # In one script, and in role: a superseded learner must not put its successor's account
        # into a checkpoint of its own.
        reads = [*self._account_reads(), ("HGETALL", self._session.keys.states())]
        reads += [("GET", self._session.keys.closed_groups(outcome)) for outcome in CLOSING]
        numbers, open_groups, states, *closed = await self._read_together(reads, in_role=True)
        totals = _parse_numbers(numbers)
        bitmaps = [bitmap or b"" for bitmap in closed]
        account = build_account(
            totals.get("issued", 0),
            totals.get("generated", 0),
            _parse_open(open_groups),
            dict(zip(CLOSING, bitmaps, strict=True)),
        )
        saved = {name.decode(): value for name, value in pairs(states)}
        return encode_snapshot(BusSnapshot(saved, account))

    async def restore_snapshot(self, snapshot: bytes, trained: Collection[int]) -> bool:
        restored = decode_snapshot(snapshot)
        restored.begin_again(trained)
        account = restored.account
        totals: dict[str, int] = {"issued": account.num_issued, "generated": account.num_generated}
        totals |= {outcome.value: number for outcome, number in account.closed.items()}
        request = Request([self._session.keys.ledger(), self._session.keys.states()])
        self._session.add_roles(request)
        request.add_list(
            (request.index(self._session.keys.closed_groups(outcome)), bitmap)
            for outcome, bitmap in restored.pack_closed().items()
            if bitmap
        )
        request.add_list(totals.items())
        request.add_list(restored.states.items())
        [status] = await self._session.run_in_role(redis_scripts.RESTORE, request)
        return bool(status == b"done")

    def _account_reads(self) -> list[tuple[str, str]]:
        return [
            ("HGETALL", self._session.keys.ledger()),
            ("HGETALL", self._session.keys.open_groups()),
        ]

    async def _read_together(self, reads: Sequence[tuple[str, str]], *, in_role: bool) -> list[Any]:
        """The replies to reading commands of one key each, as of one moment."""
        request = Request([])
        # The script reads a list of roles in any case.
        if in_role:
            self._session.add_roles(request)
        else:
            request.add_list([])
        request.add_list((command, request.index(key)) for command, key in reads)
        _, *replies = await self._session.run_in_role(redis_scripts.READ_TOGETHER, request)
        return replies


def _parse_numbers(fields: Sequence[bytes]) -> dict[str, int]:
    return {name.decode(): int(number) for name, number in pairs(fields)}


def _parse_open(fields: Sequence[bytes]) -> dict[int, bool]:
    return {int(number): standing == _BUFFERED for number, standing in pairs(fields)}
