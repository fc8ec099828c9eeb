"""Hostile input from a seed: random bytes, mutated bytes, messages made from their descriptors.

What is built from descriptors covers a new field, message or method by itself. It knows no service.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import psutil
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import EncodeError
from google.protobuf.message_factory import GetMessageClass

HUGE_CHARACTERS = 1 << 20
HUGE_ITEMS = 20_000
MAX_RANDOM_BYTES = 4096

_TEXTS = (
    "",
    "\0",
    "a",
    "0",
    "-1",
    " ",
    "\n",
    "\r\nX-Header: 1",
    "'; DROP TABLE",
    "{}",
    "%s%n",
    "<script>alert(1)</script>",
    "../../etc/passwd",
    "/",
    "unix:/tmp/x",
    "a:1",
    ":",
    "nobody.invalid:1",
    "group-00000001",
    "group-99999999",
    "eval",
    "é",
    "日本語",
    "\u202etxt",
    "\U0001f600" * 7,
    "\ufeff",
    "\uffff",
    "a\u0301" * 40,
    "9" * 5000,
)
_INTEGERS = {
    FieldDescriptor.CPPTYPE_INT32: (0, 1, -1, 2, 7, 2**31 - 1, -(2**31)),
    FieldDescriptor.CPPTYPE_INT64: (0, 1, -1, 2, 7, 2**31, 2**63 - 1, -(2**63)),
    FieldDescriptor.CPPTYPE_UINT32: (0, 1, 2, 7, 1000, 2**31, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 1, 2, 7, 2**32, 2**63, 2**64 - 1),
}
_FLOATS = (0.0, -0.0, 1.0, 0.5, -1.0, 1e-300, 1e38, -1e38, math.inf, -math.inf, math.nan)
_DOUBLES = (*_FLOATS, 1e308, -1e308)
_FLOAT_KINDS = {FieldDescriptor.CPPTYPE_FLOAT: _FLOATS, FieldDescriptor.CPPTYPE_DOUBLE: _DOUBLES}


class Fuzzer:
    """One seeded source of hostile input.

    Args:
        texts: strings that mean something to what is tested (names, ids), mixed among the hostile
            ones.
    """

    def __init__(self, seed: int, texts: tuple[str, ...] = ()) -> None:
        self.random = random.Random(seed)
        self.texts = [*_TEXTS, *texts * 4]

    def make_bytes(self) -> bytes:
        """Of any length up to `MAX_RANDOM_BYTES`, short ones mostly."""
        return self.random.randbytes(int(MAX_RANDOM_BYTES ** self.random.random()))

    def mutate(self, data: bytes) -> bytes:
        """A few edits: flipped bits, cut, repeated, inserted and overwritten pieces."""
        value = bytearray(data)
        for _ in range(self.random.randint(1, 6)):
            start = self.random.randint(0, len(value))
            end = min(len(value), start + self.random.choice((1, 1, 2, 4, 16, 256)))
            match self.random.randrange(6):
                case 0 if start < len(value):
                    value[start] ^= 1 << self.random.randrange(8)
                case 1:
                    del value[start:end]
                case 2:
                    value[start:start] = value[start:end]
                case 3:
                    value[start:start] = self.random.randbytes(self.random.randint(1, 8))
                case 4:
                    value[start:end] = self.random.choice((b"\xff", b"\x00", b"\x80", b"\x7f")) * (
                        end - start
                    )
                case 5 if self.random.random() < 0.2:
                    del value[start:]
        return bytes(value)

    def make_message(self, kind: type[Any]) -> Any:
        """A well-formed message whose fields are missing, extreme or huge."""
        message = kind()
        for field in kind.DESCRIPTOR.fields:
            if self.random.random() < 0.8:
                self._fill(message, field)
        return message

    def vary_message(self, message: Any) -> Any:
        """A copy of a good message with one or two fields missing, extreme or huge."""
        copy = type(message)()
        copy.CopyFrom(message)
        for _ in range(self.random.randint(1, 2)):
            target = copy
            while True:
                inner = [
                    value
                    for field, value in target.ListFields()
                    if field.message_type and not _is_map(field)
                ]
                candidates = [
                    one for value in inner for one in (value if _is_sequence(value) else [value])
                ]
                if not candidates or self.random.random() < 0.4:
                    break
                target = self.random.choice(candidates)
            if fields := target.DESCRIPTOR.fields:
                field = self.random.choice(fields)
                target.ClearField(field.name)
                if self.random.random() < 0.85:
                    self._fill(target, field)
        return copy

    def _fill(self, message: Any, field: FieldDescriptor) -> None:
        holder = getattr(message, field.name)
        if _is_map(field):
            key, value = (
                field.message_type.fields_by_name["key"],
                field.message_type.fields_by_name["value"],
            )
            for _ in range(self._count(is_scalar=True)):
                holder[self._scalar(key)] = self._scalar(value)
        elif field.is_repeated and field.message_type:
            for _ in range(self._count(is_scalar=False)):
                holder.append(self.make_message(GetMessageClass(field.message_type)))
        elif field.is_repeated:
            count = self._count(is_scalar=True)
            holder.extend(
                [self._scalar(field) for _ in range(min(count, 64))] * max(1, count // 64)
                if count
                else []
            )
        elif field.message_type:
            holder.CopyFrom(self.make_message(type(holder)))
            holder.SetInParent()
        else:
            setattr(message, field.name, self._scalar(field))

    def _count(self, *, is_scalar: bool) -> int:
        if is_scalar and self.random.random() < 0.005:
            return HUGE_ITEMS
        return self.random.choice((0, 1, 1, 2, 3, 40 if is_scalar else 6))

    def _scalar(self, field: FieldDescriptor) -> Any:
        kind = field.cpp_type
        if kind == FieldDescriptor.CPPTYPE_STRING:
            text = self._text()
            return text.encode() if field.type == FieldDescriptor.TYPE_BYTES else text
        if kind == FieldDescriptor.CPPTYPE_BOOL:
            return self.random.random() < 0.5
        if kind == FieldDescriptor.CPPTYPE_ENUM:
            # Enumerations are open in proto3: a newer writer's member arrives as a number.
            return self.random.choice((*(value.number for value in field.enum_type.values), 99, -1))
        if kind in _FLOAT_KINDS:
            return self.random.choice(_FLOAT_KINDS[kind])
        return self.random.choice(_INTEGERS[kind])

    def _text(self) -> str:
        if self.random.random() < 0.001:
            return self.random.choice(("x", "é", "\0", "<")) * HUGE_CHARACTERS
        return self.random.choice(self.texts)


def _is_map(field: FieldDescriptor) -> bool:
    return bool(field.message_type and field.message_type.GetOptions().map_entry)


def _is_sequence(value: Any) -> bool:
    return hasattr(value, "__len__")


def hostile_inputs(
    fuzzer: Fuzzer, kind: type[Any], number: int, good: Callable[[], Any | None] = lambda: None
) -> Iterator[bytes]:
    """`number` inputs: rubbish, structured, and `good()` varied in its fields and its bytes."""
    for index in range(number):
        base = good() or fuzzer.make_message(kind)
        match index % 5:
            case 0:
                yield fuzzer.make_bytes()
            case 1:
                yield _serialize(fuzzer.make_message(kind))
            case 2:
                yield _serialize(fuzzer.vary_message(base))
            case _:
                yield fuzzer.mutate(_serialize(base))


def _serialize(message: Any) -> bytes:
    try:
        return bytes(message.SerializeToString())
    except EncodeError as error:
        # A descriptor this fuzzer does not understand: a defect of the fuzzer.
        raise AssertionError(f"{message.DESCRIPTOR.full_name} cannot be made") from error


def resident_bytes() -> int:
    """Memory of this process and its children."""
    process = psutil.Process()
    return sum(one.memory_info().rss for one in (process, *process.children(recursive=True)))
