"""What a server promises to those who repeat a request under its id."""

from __future__ import annotations

import asyncio
import gc

import pytest

from sdar.contracts.errors import CapacityError, ConflictError, InvalidInputError, StaleError
from sdar.v1 import policy_pb2
from sdar.wire.answers import MAX_REQUEST_ID_CHARACTERS, KeptAnswers
from tests.support import until


class Desk:
    """Answers each request with the number of answers begun so far, once `go` is set."""

    def __init__(self, capacity: int = 2) -> None:
        self.answers: KeptAnswers[int] = KeptAnswers(capacity)
        self.go = asyncio.Event()
        self.go.set()
        self.failure: Exception | None = None
        self.num_begun = 0
        self.num_ended = 0

    async def ask(self, request_id: str, min_version: int = 0) -> int:
        request = policy_pb2.GenerateRequest(request_id=request_id, min_policy_version=min_version)
        return await self.answers.get_or_make(request_id, request, self._make)

    async def begin(self, request_id: str) -> asyncio.Task[int]:
        """A call that waits; returns once its answer is begun or it has joined another's."""
        call = asyncio.create_task(self.ask(request_id))
        for _ in range(3):
            await asyncio.sleep(0)
        return call

    async def _make(self) -> int:
        self.num_begun += 1
        number = self.num_begun
        try:
            await self.go.wait()
            if self.failure:
                raise self.failure
        finally:
            self.num_ended += 1
        return number


async def test_a_repeated_id_gets_the_first_answer_while_it_is_made_and_afterwards():
    desk = Desk()
    assert await asyncio.gather(*(desk.ask("same") for _ in range(3))) == [1, 1, 1]
    assert await desk.ask("same") == 1
    assert await desk.ask("other") == 2


async def test_without_an_id_nothing_is_kept_and_the_work_ends_with_its_caller():
    desk = Desk(capacity=1)
    assert [await desk.ask(""), await desk.ask("")] == [1, 2]
    desk.go.clear()
    calls = [await desk.begin("") for _ in range(2)]
    calls[0].cancel()
    await asyncio.wait([calls[0]])
    assert (desk.num_begun, desk.num_ended) == (4, 3)
    desk.go.set()
    assert await calls[1] == 4


async def test_the_answer_that_nobody_asked_for_longest_is_forgotten():
    desk = Desk(capacity=2)
    assert [await desk.ask(key) for key in ("a", "b", "a", "c")] == [1, 2, 1, 3]
    assert await desk.ask("a") == 1
    assert await desk.ask("b") == 4


async def test_an_answer_in_progress_outlives_any_number_of_finished_ones():
    desk = Desk(capacity=2)
    desk.go.clear()
    slow = await desk.begin("slow")
    desk.go = asyncio.Event()
    desk.go.set()
    assert [await desk.ask(key) for key in ("a", "b", "c", "a")] == [2, 3, 4, 5]
    repeated = await desk.begin("slow")
    assert (desk.num_begun, repeated.done()) == (5, False)
    repeated.cancel()
    slow.cancel()


async def test_a_new_id_is_refused_while_all_that_are_kept_are_in_progress():
    desk = Desk(capacity=2)
    desk.go.clear()
    calls = [await desk.begin(key) for key in ("a", "b", "a")]
    with pytest.raises(CapacityError, match=r"2 requests are being answered.*Retry") as caught:
        await desk.ask("c")
    assert caught.value.fields["limit"] == "2"
    desk.go.set()
    assert await asyncio.gather(*calls) == [1, 2, 1]
    assert await desk.ask("c") == 3


async def test_callers_that_hang_up_find_the_answer_when_they_repeat():
    desk = Desk()
    desk.go.clear()
    calls = [await desk.begin("a") for _ in range(2)]
    for call in calls:
        call.cancel()
    await asyncio.wait(calls)
    assert desk.num_ended == 0
    desk.go.set()
    assert await desk.ask("a") == 1


async def test_a_caller_that_hangs_up_does_not_disturb_those_who_joined_it():
    desk = Desk()
    desk.go.clear()
    calls = [await desk.begin("a") for _ in range(2)]
    calls[0].cancel()
    await asyncio.wait([calls[0]])
    desk.go.set()
    assert await calls[1] == 1


async def test_a_failure_reaches_all_who_wait_and_is_not_kept():
    desk = Desk(capacity=1)
    desk.go.clear()
    calls = [await desk.begin("a") for _ in range(2)]
    desk.failure = StaleError("version 0")
    desk.go.set()
    assert await asyncio.gather(*calls, return_exceptions=True) == [desk.failure] * 2
    desk.failure = None
    # Under another content as well, and the failure takes no room.
    assert await desk.ask("a", min_version=1) == 2
    assert await desk.ask("b") == 3


async def test_a_failure_that_nobody_waits_for_takes_no_room_and_is_not_logged(caplog):
    desk = Desk(capacity=1)
    desk.go.clear()
    call = await desk.begin("a")
    call.cancel()
    await asyncio.wait([call])
    desk.failure = StaleError("version 0")
    desk.go.set()
    await until(lambda: desk.num_ended == 1)
    desk.failure = None
    assert await desk.ask("b") == 2
    gc.collect()
    assert not caplog.records


async def test_an_id_cannot_name_two_requests():
    desk = Desk()
    await desk.ask("a")
    with pytest.raises(ConflictError, match="'a' was used for another request"):
        await desk.ask("a", min_version=1)
    assert await desk.ask("a") == 1


async def test_an_id_over_the_limit_is_refused():
    desk = Desk()
    assert await desk.ask("x" * MAX_REQUEST_ID_CHARACTERS) == 1
    with pytest.raises(InvalidInputError, match="129 characters, the limit is 128"):
        await desk.ask("x" * (MAX_REQUEST_ID_CHARACTERS + 1))
    assert desk.num_begun == 1
