"""Answers kept by request id: a call that is repeated gets the answer of the first."""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from google.protobuf.message import Message

from sdar.contracts.errors import CapacityError, ConflictError, InvalidInputError

T = TypeVar("T")

MAX_REQUEST_ID_CHARACTERS = 128


@dataclass(frozen=True, slots=True)
class _Kept(Generic[T]):
    """An answer that was given or is being made, and the hash of its request.

    The request itself may be large and isn't kept.
    """

    content: bytes
    task: asyncio.Task[T]


class KeptAnswers(Generic[T]):
    """Answers by request id, at most `capacity` of them.

    An answer that is being made is never forgotten, even if its callers hang up: whoever repeats
    the request waits for it. The answer that nobody has asked for longest makes room for a new one.
    While all of them are still being made, a new id is refused. Failures are not kept: a request
    that failed may be repeated under its id.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._kept: OrderedDict[str, _Kept[T]] = OrderedDict()

    async def get_or_make(
        self, request_id: str, request: Message, make: Callable[[], Coroutine[Any, Any, T]]
    ) -> T:
        """The answer kept for the id, else what `make` returns or raises.

        Without an id nothing is kept, and a caller that hangs up cancels `make`.

        Raises:
            InvalidInputError: the id is too long.
            ConflictError: the id was used for another request.
            CapacityError: `capacity` other answers are being made.
        """
        if not request_id:
            return await make()
        # Shielded: a caller that hangs up and repeats finds the answer it missed.
        return await asyncio.shield(self._find_or_start(request_id, request, make))

    def _find_or_start(
        self, request_id: str, request: Message, make: Callable[[], Coroutine[Any, Any, T]]
    ) -> asyncio.Task[T]:
        if len(request_id) > MAX_REQUEST_ID_CHARACTERS:
            raise InvalidInputError(
                f"request_id has {len(request_id)} characters, the limit is "
                f"{MAX_REQUEST_ID_CHARACTERS}. Shorten it."
            )
        content = hashlib.sha256(request.SerializeToString(deterministic=True)).digest()
        if request_id not in self._kept:
            self._make_room()
            task = asyncio.create_task(self._make(request_id, make))
            task.add_done_callback(_read_failure)
            self._kept[request_id] = _Kept(content, task)
        elif self._kept[request_id].content != content:
            raise ConflictError(
                f"Request id {request_id!r} was used for another request. Choose a new one for "
                "each request.",
                request_id=request_id,
            )
        self._kept.move_to_end(request_id)
        return self._kept[request_id].task

    async def _make(self, request_id: str, make: Callable[[], Coroutine[Any, Any, T]]) -> T:
        try:
            return await make()
        except BaseException:
            del self._kept[request_id]
            raise

    def _make_room(self) -> None:
        if len(self._kept) < self._capacity:
            return
        finished = (key for key, kept in self._kept.items() if kept.task.done())
        oldest = next(finished, None)
        if oldest is None:
            raise CapacityError(
                f"{self._capacity} requests are being answered, the limit for those with an id. "
                "Retry after a while.",
                limit=self._capacity,
            )
        del self._kept[oldest]


def _read_failure(task: asyncio.Task[Any]) -> None:
    # asyncio logs a failure that nobody reads, and here all callers may have hung up.
    if not task.cancelled():
        task.exception()
