"""The bytes of a bus's snapshot: a run's small states and account, as a checkpoint carries them.

JSON, with base64 for bytes. Closed groups are one bitmap per outcome, the first bit of the first
byte being group 0. It never talks to a bus.
"""

from __future__ import annotations

import base64
import binascii
import json
import uuid
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sdar.bus.ledger import CLOSING, MAX_GROUP_NUMBER, LedgerAccount
from sdar.contracts.errors import CorruptionError
from sdar.contracts.types import GroupOutcome

RESTORATION = "restoration"
"""Name of the state that differs after every restored snapshot. Whoever published what was on its
way compares it with the value known before, and publishes again.
"""
_FORMAT = 1
_MAX_BYTES = 256 << 20
"""Far beyond any run's snapshot: it holds one bit a closed group and outcome, and small states."""
_NO_SNAPSHOT = (
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    RecursionError,
    binascii.Error,
)
"""What decoding raises for bytes that are no snapshot: JSON may nest too deep or hold any type."""


def pack_numbers(numbers: Iterable[int]) -> bytes:
    """A bitmap of these numbers."""
    indices = np.fromiter(numbers, np.int64)
    bits = np.zeros(int(indices.max()) + 1 if len(indices) else 0, np.uint8)
    bits[indices] = 1
    return np.packbits(bits).tobytes()


def unpack_numbers(bitmap: bytes) -> list[int]:
    """The numbers in a bitmap, ascending."""
    found: list[int] = np.flatnonzero(np.unpackbits(np.frombuffer(bitmap, np.uint8))).tolist()
    return found


@dataclass(frozen=True, slots=True)
class BusSnapshot:
    """States by name, and an account that knows its closed groups (`LedgerAccount.ended`)."""

    states: dict[str, bytes]
    account: LedgerAccount

    def begin_again(self, trained: Collection[int]) -> None:
        """Make it what a server without streams begins with: see `Bus.restore_snapshot`."""
        for number in list(self.account.open):
            self.account.apply(
                number, GroupOutcome.TRAINED if number in trained else GroupOutcome.CANCELLED
            )
        self.states[RESTORATION] = uuid.uuid4().hex.encode()

    def pack_closed(self) -> dict[GroupOutcome, bytes]:
        """One bitmap per closing outcome."""
        numbers: dict[GroupOutcome, list[int]] = {outcome: [] for outcome in CLOSING}
        for number, outcome in self.account.ended.items():
            numbers[outcome].append(number)
        return {outcome: pack_numbers(members) for outcome, members in numbers.items()}


def build_account(
    num_issued: int,
    num_generated: int,
    open_groups: Mapping[int, bool],
    closed: Mapping[GroupOutcome, bytes],
) -> LedgerAccount:
    """An account from its numbers and the bitmaps of its closed groups."""
    ended = {
        number: outcome for outcome, bitmap in closed.items() for number in unpack_numbers(bitmap)
    }
    counts = {outcome: len(unpack_numbers(closed.get(outcome, b""))) for outcome in CLOSING}
    return LedgerAccount(num_issued, num_generated, counts, dict(open_groups), ended)


def encode_snapshot(snapshot: BusSnapshot) -> bytes:
    account = snapshot.account
    document = {
        "format": _FORMAT,
        "states": _encode_values(snapshot.states.items()),
        "issued": account.num_issued,
        "generated": account.num_generated,
        "open": {str(number): is_generated for number, is_generated in account.open.items()},
        "closed": _encode_values(snapshot.pack_closed().items()),
    }
    # Sorted: the same snapshot has the same bytes, whatever it was built from.
    return json.dumps(document, sort_keys=True).encode()


def _encode_values(values: Iterable[tuple[str, bytes]]) -> dict[str, str]:
    return {name: base64.b64encode(value).decode() for name, value in values}


def _decode_values(values: dict[str, str]) -> dict[str, bytes]:
    return {name: base64.b64decode(value, validate=True) for name, value in values.items()}


def decode_snapshot(data: bytes) -> BusSnapshot:
    """Inverse of `encode_snapshot`.

    Raises:
        CorruptionError: it is no snapshot, or one whose account does not add up.
    """
    if len(data) > _MAX_BYTES:
        raise CorruptionError(
            f"Bus snapshot of {len(data)} bytes; at most {_MAX_BYTES} are read. Use another "
            "checkpoint."
        )
    try:
        snapshot = _parse(json.loads(data))
    except _NO_SNAPSHOT as error:
        raise CorruptionError(
            f"Bus snapshot cannot be read: {error!r}. Use another checkpoint."
        ) from error
    if gap := snapshot.account.find_gap():
        raise CorruptionError(
            f"Bus snapshot's account misses {gap} groups. Use another checkpoint."
        )
    return snapshot


def _parse(document: dict[str, Any]) -> BusSnapshot:
    if document["format"] != _FORMAT:
        raise ValueError(f"format {document['format']!r}, expected {_FORMAT}")
    num_issued = _parse_count(document["issued"])
    num_generated = _parse_count(document["generated"])
    open_groups = {
        _parse_number(number): is_generated is True
        for number, is_generated in document["open"].items()
    }
    closed = _decode_values(document["closed"])
    if closed.keys() != set(CLOSING):
        raise ValueError(f"closed groups by {sorted(closed)}, expected {sorted(CLOSING)}")
    bitmaps = {GroupOutcome(name): bitmap for name, bitmap in closed.items()}
    account = build_account(num_issued, num_generated, open_groups, bitmaps)
    # `closed` counts bits, `ended` has each number once: they differ where two bitmaps share one.
    num_closed = sum(account.closed.values())
    if len(account.ended) != num_closed or account.ended.keys() & open_groups.keys():
        raise ValueError("a group stands in two places")
    return BusSnapshot(_decode_values(document["states"]), account)


def _parse_number(text: str) -> int:
    number = int(text)
    # Beyond it `pack_numbers` would allocate whatever a damaged snapshot asks for.
    if not 0 <= number <= MAX_GROUP_NUMBER:
        raise ValueError(f"group number {text}")
    return number


def _parse_count(value: object) -> int:
    # The type itself: True is an int too.
    if type(value) is not int or value < 0:
        raise ValueError(f"count {value!r}")
    return value
