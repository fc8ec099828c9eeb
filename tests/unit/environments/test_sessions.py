"""Sessions on fake environments and a fake clock: who gets a place, loses it, may retry."""

from __future__ import annotations

import asyncio
import threading

import pytest

from sdar.contracts.errors import (
    CapacityError,
    ConflictError,
    EnvironmentFailedError,
    InvalidInputError,
    UnavailableError,
    UnknownResourceError,
)
from sdar.contracts.types import Task
from sdar.environments.base import Environment, Observation, StepResult
from sdar.environments.sessions import SessionLimits, SessionManager
from sdar.in_process.environment_host import InProcessHost
from tests.support import until


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class Counting(Environment):
    """Answers the number of steps taken; each text is a command to misbehave."""

    name = "counting"
    version = "7"
    splits = ("train",)
    max_turns = 3

    def __init__(self) -> None:
        self.num_steps = 0
        self.is_closed = False

    def list_tasks(self, split):
        if split != "train":
            raise self.unknown_split(split)
        return (
            Task("counting", "train", "count", "", "count .", 0),
            Task("counting", "train", "broken", "", ".", 0),
        )

    def reset(self, task_id, seed):
        if task_id == "broken":
            raise OSError("no such file")
        return Observation(f"count from {seed}")

    def step(self, text):
        self.num_steps += 1
        if text == "crash":
            raise ZeroDivisionError("by zero")
        reward = float("nan") if text == "nan" else 1.0
        return StepResult(
            Observation(str(self.num_steps)), reward, text == "end", False, text, True
        )

    def close(self):
        self.is_closed = True


class Slow(Counting):
    """Waits in a thread until the test, or `close`, lets it go."""

    name, is_blocking = "slow", True
    started = threading.Event()
    go_on = threading.Event()

    def list_tasks(self, split):
        return (*super().list_tasks(split), Task("slow", split, "slow", "", ".", 0))

    def reset(self, task_id, seed):
        if task_id == "slow":
            self.started.set()
            self.go_on.wait()
        return super().reset(task_id, seed)

    def step(self, text):
        self.started.set()
        self.go_on.wait()
        return super().step(text)

    def close(self):
        super().close()
        self.go_on.set()


@pytest.fixture
def made():
    return []


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
async def sessions(made, clock):
    Slow.started, Slow.go_on = threading.Event(), threading.Event()

    def factory(cls):
        def build():
            made.append(cls())
            return made[-1]

        return build

    manager = SessionManager(
        InProcessHost({"counting": factory(Counting), "slow": factory(Slow)}),
        SessionLimits(
            max_sessions=2, max_text_bytes=10, step_timeout_s=5, default_lease_s=60, max_lease_s=100
        ),
        clock,
    )
    await manager.start()
    yield manager
    Slow.go_on.set()
    await manager.close_all()
    assert all(game.is_closed for game in made)
    assert manager.num_sessions == 0


async def test_an_episode_is_opened_stepped_and_closed(sessions):
    opened = await sessions.open("counting", "count", 5)
    assert (opened.observation.text, opened.task.seed, opened.lease_s) == ("count from 5", 5, 60)
    assert (await sessions.step(opened.session_id, 0, "a")).observation.text == "1"
    assert (await sessions.step(opened.session_id, 1, "end")).terminated
    sessions.close(opened.session_id)
    sessions.close(opened.session_id)
    with pytest.raises(UnknownResourceError, match="Open another"):
        await sessions.step(opened.session_id, 2, "b")


async def test_a_retried_step_gets_the_same_answer_and_moves_nothing(sessions, made):
    opened = await sessions.open("counting", "count", 0)
    answers = [await sessions.step(opened.session_id, 0, "a") for _ in range(3)]
    assert answers[0] == answers[1] == answers[2]
    assert made[-1].num_steps == 1


async def test_the_last_step_can_be_retried_after_the_end_and_no_other_taken(sessions):
    opened = await sessions.open("counting", "count", 0)
    end = await sessions.step(opened.session_id, 0, "end")
    assert await sessions.step(opened.session_id, 0, "end") == end
    with pytest.raises(ConflictError, match="after the end"):
        await sessions.step(opened.session_id, 1, "more")


@pytest.mark.parametrize("step_index", [0, 3])
async def test_a_step_out_of_order_is_refused(sessions, step_index):
    opened = await sessions.open("counting", "count", 0)
    await sessions.step(opened.session_id, 0, "a")
    await sessions.step(opened.session_id, 1, "b")
    with pytest.raises(ConflictError, match="expected 2") as error:
        await sessions.step(opened.session_id, step_index, "a")
    assert error.value.fields["next_step_index"] == "2"


async def test_a_retry_with_another_text_is_refused(sessions):
    opened = await sessions.open("counting", "count", 0)
    await sessions.step(opened.session_id, 0, "a")
    with pytest.raises(ConflictError, match="another text"):
        await sessions.step(opened.session_id, 0, "b")


async def test_a_text_over_the_limit_is_refused_in_bytes(sessions):
    opened = await sessions.open("counting", "count", 0)
    with pytest.raises(InvalidInputError, match="12 bytes"):
        await sessions.step(opened.session_id, 0, "é" * 6)


async def test_the_turn_limit_truncates_an_environment_that_does_not(sessions):
    opened = await sessions.open("counting", "count", 0)
    results = [await sessions.step(opened.session_id, index, "a") for index in range(3)]
    assert [result.truncated for result in results] == [False, False, True]


async def test_sessions_beyond_the_capacity_are_refused_until_one_closes(sessions):
    first = await sessions.open("counting", "count", 0)
    await sessions.open("counting", "count", 0)
    with pytest.raises(CapacityError, match="All 2 sessions are taken"):
        await sessions.open("counting", "count", 0)
    sessions.close(first.session_id)
    await sessions.open("counting", "count", 0)


async def test_concurrent_opens_never_pass_the_capacity(sessions):
    results = await asyncio.gather(
        *(sessions.open("slow", "count", 0) for _ in range(5)), return_exceptions=True
    )
    assert sum(isinstance(result, CapacityError) for result in results) == 3
    assert sessions.num_sessions == 2


async def test_an_environment_that_does_not_start_gives_its_place_back(sessions, made):
    for _ in range(3):
        with pytest.raises(EnvironmentFailedError, match="OSError: no such file in reset"):
            await sessions.open("counting", "broken", 0, idempotency_key="k")
    assert sessions.num_sessions == 0
    assert made[-1].is_closed


async def test_a_key_opens_one_session_however_often_it_is_used(sessions):
    opened = await asyncio.gather(
        *(sessions.open("slow", "count", 1, idempotency_key="k") for _ in range(4))
    )
    assert len({one.session_id for one in opened}) == 1
    assert sessions.num_sessions == 1


async def test_a_key_used_for_another_episode_is_refused(sessions):
    await sessions.open("counting", "count", 1, idempotency_key="k")
    with pytest.raises(ConflictError, match="fresh key"):
        await sessions.open("counting", "count", 2, idempotency_key="k")


async def test_a_key_is_free_again_once_its_session_is_closed_or_expired(sessions, clock):
    first = await sessions.open("counting", "count", 1, idempotency_key="k")
    sessions.close(first.session_id)
    second = await sessions.open("counting", "count", 1, idempotency_key="k")
    clock.now_s = 60
    third = await sessions.open("counting", "count", 1, idempotency_key="k")
    assert len({first.session_id, second.session_id, third.session_id}) == 3


async def test_an_overlong_key_is_refused(sessions):
    with pytest.raises(InvalidInputError, match="129 characters"):
        await sessions.open("counting", "count", 0, idempotency_key="k" * 129)


async def test_an_idle_session_is_reaped_and_its_place_given_to_another(sessions, clock, made):
    idle = await sessions.open("counting", "count", 0)
    busy = await sessions.open("counting", "count", 0)
    clock.now_s = 59
    await sessions.step(busy.session_id, 0, "a")
    clock.now_s = 60
    with pytest.raises(UnknownResourceError):
        await sessions.step(idle.session_id, 0, "a")
    assert sessions.reap() == 1
    await sessions.step(busy.session_id, 1, "a")
    assert sessions.num_sessions == 1
    assert sum(game.is_closed for game in made) == 1


async def test_a_full_server_reaps_before_it_refuses(sessions, clock):
    for _ in range(2):
        await sessions.open("counting", "count", 0)
    clock.now_s = 60
    await sessions.open("counting", "count", 0)
    assert sessions.num_sessions == 1


@pytest.mark.parametrize(("asked_s", "granted_s"), [(0, 60), (7, 7), (1000, 100)])
async def test_a_lease_is_granted_up_to_the_longest(sessions, asked_s, granted_s):
    assert (await sessions.open("counting", "count", 0, lease_s=asked_s)).lease_s == granted_s


@pytest.mark.parametrize("lease_s", [-1.0, float("nan"), float("inf")])
async def test_a_senseless_lease_is_refused(sessions, lease_s):
    with pytest.raises(InvalidInputError, match="lease_s"):
        await sessions.open("counting", "count", 0, lease_s=lease_s)


@pytest.mark.parametrize(
    ("text", "why"), [("crash", "ZeroDivisionError: by zero"), ("nan", "finite")]
)
async def test_an_environment_that_breaks_loses_its_session_only(sessions, text, why):
    broken = await sessions.open("counting", "count", 0)
    whole = await sessions.open("counting", "count", 0)
    with pytest.raises(EnvironmentFailedError, match=why):
        await sessions.step(broken.session_id, 0, text)
    assert sessions.num_sessions == 1
    await sessions.step(whole.session_id, 0, "a")


async def test_a_session_that_failed_says_so_for_its_lease_and_is_then_forgotten(sessions, clock):
    broken = await sessions.open("counting", "count", 0)
    for _ in range(2):
        with pytest.raises(EnvironmentFailedError, match="by zero"):
            await sessions.step(broken.session_id, 0, "crash")
    clock.now_s = 60
    sessions.reap()
    with pytest.raises(UnknownResourceError):
        await sessions.step(broken.session_id, 0, "crash")


async def test_a_session_that_failed_is_forgotten_once_it_is_closed(sessions):
    broken = await sessions.open("counting", "count", 0)
    with pytest.raises(EnvironmentFailedError):
        await sessions.step(broken.session_id, 0, "crash")
    sessions.close(broken.session_id)
    with pytest.raises(UnknownResourceError):
        await sessions.step(broken.session_id, 0, "crash")


async def test_a_caller_that_gives_up_gets_its_answer_on_retry(sessions, made):
    opened = await sessions.open("slow", "count", 0)
    first = asyncio.create_task(sessions.step(opened.session_id, 0, "a"))
    await asyncio.to_thread(Slow.started.wait)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    retry = asyncio.create_task(sessions.step(opened.session_id, 0, "a"))
    Slow.go_on.set()
    assert (await retry).observation.text == "1"
    assert made[-1].num_steps == 1


async def test_an_opening_without_a_key_is_undone_when_its_caller_gives_up(sessions):
    giving_up, kept = (
        asyncio.create_task(sessions.open("slow", "slow", 0, idempotency_key=key))
        for key in ("", "mine")
    )
    await asyncio.to_thread(Slow.started.wait)
    assert sessions.num_sessions == 2
    for opening in (giving_up, kept):
        opening.cancel()
    await asyncio.gather(giving_up, kept, return_exceptions=True)
    Slow.go_on.set()
    await sessions.open("slow", "slow", 0, idempotency_key="mine")
    await until(lambda: sessions.num_sessions == 1)


async def test_what_is_still_being_opened_at_the_end_is_given_up(sessions):
    opening = asyncio.create_task(sessions.open("slow", "slow", 0))
    await asyncio.to_thread(Slow.started.wait)
    closing = asyncio.create_task(sessions.close_all())
    with pytest.raises(asyncio.CancelledError):
        await opening
    assert sessions.num_sessions == 0
    Slow.go_on.set()
    await closing


async def test_a_session_is_neither_reaped_nor_overtaken_in_the_middle_of_a_step(sessions, clock):
    opened = await sessions.open("slow", "count", 0)
    step = asyncio.create_task(sessions.step(opened.session_id, 0, "a"))
    await asyncio.to_thread(Slow.started.wait)
    clock.now_s = 1000
    assert sessions.reap() == 0
    with pytest.raises(ConflictError, match="still being played"):
        await sessions.step(opened.session_id, 1, "b")
    Slow.go_on.set()
    await step
    await sessions.step(opened.session_id, 1, "b")


async def test_a_step_that_hangs_fails_at_its_deadline_and_frees_the_thread(made):
    Slow.started, Slow.go_on = threading.Event(), threading.Event()
    sessions = SessionManager(InProcessHost({"slow": Slow}), SessionLimits(step_timeout_s=0.5))
    await sessions.start()
    opened = await sessions.open("slow", "count", 0)
    with pytest.raises(EnvironmentFailedError, match=r"hung for 0\.5 s in step"):
        await sessions.step(opened.session_id, 0, "a")
    await until(Slow.go_on.is_set)  # by the close, which has a thread of its own
    assert sessions.num_sessions == 0
    await sessions.close_all()


async def test_unknown_environments_tasks_and_splits_are_named(sessions):
    with pytest.raises(UnknownResourceError, match="Use one of counting, slow"):
        sessions.describe("chess")
    with pytest.raises(UnknownResourceError, match="no task 'chess'"):
        await sessions.open("counting", "chess", 0)
    with pytest.raises(UnknownResourceError, match="no split 'test'"):
        await sessions.list_tasks("counting", "test")


async def test_draining_refuses_new_sessions_and_waits_for_the_open_ones(sessions):
    opened = await sessions.open("counting", "count", 0)
    draining = asyncio.create_task(sessions.drain(timeout_s=5))
    await asyncio.sleep(0)
    with pytest.raises(UnavailableError, match="shutting down"):
        await sessions.open("counting", "count", 0)
    await sessions.step(opened.session_id, 0, "end")
    assert not draining.done()
    sessions.close(opened.session_id)
    await draining


async def test_draining_gives_up_on_sessions_nobody_closes(sessions):
    await sessions.open("counting", "count", 0)
    await sessions.drain(timeout_s=0.01)
    assert sessions.num_sessions == 1
