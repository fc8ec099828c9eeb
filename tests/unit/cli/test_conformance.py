"""The conformance suite against a small correct server, and against servers that have one defect
each.

    0 -- 1 -- 2 -- ... -- 9
    start by seed, goal by task

`walk`: reach the goal on a line by "left" and "right" in six turns. A die of the episode's own
generator says what the weather is, so that a lost or doubled step shows.
"""

from __future__ import annotations

import asyncio
import dataclasses
import io
import json
import math
import random
import sys
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import pytest
from google.protobuf.message import DecodeError
from rich.console import Console

from sdar.cli.conformance import ALL_CHECKS, Report, check_server
from sdar.cli.conformance.check import Verdict
from sdar.cli.conformance.report import print_report, to_json
from sdar.contracts.errors import (
    CapacityError,
    ConfigurationError,
    ConflictError,
    CorruptionError,
    InvalidInputError,
    SdarError,
    UnknownResourceError,
)
from sdar.v1 import environment_pb2 as pb
from sdar.v1 import environment_pb2_grpc, task_pb2
from sdar.wire.rpc_server import RpcService, build_server

SERVICE_NAME = "sdar.v1.EnvironmentService"
MAX_TURNS = 6
MAX_TEXT_BYTES = 1 << 20
DEFAULT_LEASE_S, MAX_LEASE_S = 60.0, 600.0
LEASE_CHECKS = {"lease.expires", "lease.renewed"}


@dataclasses.dataclass
class Episode:
    """One session and its game. `last` is (index, text, answer) of the newest step."""

    task: task_pb2.Task
    dice: random.Random
    opened: pb.OpenSessionResponse
    key: str
    expires_at: float
    position: int = 0
    last: tuple[int, str, pb.StepResponse] | None = None
    lock: asyncio.Lock = dataclasses.field(default_factory=asyncio.Lock)

    @property
    def next_index(self) -> int:
        return 0 if self.last is None else self.last[0] + 1

    @property
    def is_over(self) -> bool:
        return self.last is not None and (self.last[2].terminated or self.last[2].truncated)


class Walk(environment_pb2_grpc.EnvironmentServiceServicer):
    """A server that keeps the contract, in one process and one event loop; defects override one of
    its parts.
    """

    version = "1"
    capacity = 8

    def __init__(self) -> None:
        self.episodes: dict[str, Episode] = {}
        self.num_listings = 0

    # ---- what is served

    def list_tasks(self, split: str) -> list[task_pb2.Task]:
        goals = {"train": range(1, 7), "heldout": range(7, 10)}
        if split not in goals:
            raise UnknownResourceError(f"No split {split!r}.")
        return [self.task(goal, split) for goal in goals[split]]

    def task(self, goal: int, split: str) -> task_pb2.Task:
        return task_pb2.Task(
            environment="walk", split=split, task_id=f"goal-{goal}", description=f"Walk to {goal}."
        )

    def find_task(self, task_id: str) -> task_pb2.Task:
        for task in (*self.list_tasks("train"), *self.list_tasks("heldout")):
            if task.task_id == task_id:
                return task
        raise UnknownResourceError(f"No task {task_id!r}.")

    def check_name(self, name: str) -> None:
        if name != "walk":
            raise UnknownResourceError(f"No environment {name!r}.")

    def parse_token(self, token: str, num_tasks: int) -> int:
        if token and not (token.isdigit() and int(token) < num_tasks):
            raise InvalidInputError(f"Bad page token {token!r}.")
        return int(token or 0)

    # ---- the game

    def build_dice(self, task: task_pb2.Task, seed: int) -> random.Random:
        return random.Random(f"{task.task_id} {seed}")

    def observe(self, episode: Episode) -> str:
        return f"You are at {episode.position}. Weather {episode.dice.randrange(1000)}."

    def play(self, episode: Episode, text: str) -> pb.StepResponse:
        goal = int(episode.task.task_id.removeprefix("goal-"))
        is_valid = text in ("left", "right")
        episode.position += {"left": -1, "right": 1}.get(text, 0)
        is_solved = episode.position == goal
        return pb.StepResponse(
            observation=self.observe(episode),
            admissible_actions=["left", "right"],
            reward=float(is_solved),
            reward_components={
                "success": float(is_solved),
                "distance": float(abs(goal - episode.position)),
            },
            terminated=is_solved,
            truncated=not is_solved and episode.next_index + 1 >= MAX_TURNS,
            action=text if is_valid else "",
            is_action_valid=is_valid,
            is_success=is_solved,
        )

    # ---- sessions

    def open(self, request: pb.OpenSessionRequest) -> pb.OpenSessionResponse:
        task = self.find_task(request.task_id)
        self.reap()
        known = next(
            (
                one
                for one in self.episodes.values()
                if one.key and one.key == request.idempotency_key
            ),
            None,
        )
        if known:
            return self.repeat_open(known, request)
        self.check_capacity()
        dice = self.build_dice(task, request.seed)
        opened = pb.OpenSessionResponse(
            session_id=uuid.uuid4().hex,
            task=task,
            lease_s=min(request.lease_s or DEFAULT_LEASE_S, MAX_LEASE_S),
        )
        opened.task.seed = request.seed
        episode = Episode(
            task, dice, opened, request.idempotency_key, time.monotonic() + opened.lease_s
        )
        episode.position = dice.randrange(-1, 1)
        opened.observation, opened.admissible_actions[:] = self.observe(episode), ["left", "right"]
        self.episodes[opened.session_id] = episode
        return opened

    def repeat_open(self, known: Episode, request: pb.OpenSessionRequest) -> pb.OpenSessionResponse:
        if (known.opened.task.task_id, known.opened.task.seed) != (request.task_id, request.seed):
            raise ConflictError("The key opened another task.")
        return known.opened

    def check_capacity(self) -> None:
        if self.count() >= self.capacity:
            raise CapacityError("All sessions are taken.")

    def find(self, session_id: str) -> Episode:
        self.reap()
        if session_id not in self.episodes:
            raise UnknownResourceError(f"No session {session_id!r}.")
        return self.episodes[session_id]

    async def step(self, episode: Episode, index: int, text: str) -> pb.StepResponse:
        async with episode.lock:
            if episode.last and index == episode.last[0]:
                self.repeat_step(episode, text)
            else:
                self.check_next(episode, index, text)
                episode.last = (index, text, self.play(episode, text))
        self.renew(episode)
        return episode.last[2]

    def repeat_step(self, episode: Episode, text: str) -> None:
        if text != episode.last[1]:
            raise ConflictError("This step was taken with another text.")

    def check_next(self, episode: Episode, index: int, text: str) -> None:
        if index != episode.next_index:
            raise ConflictError(f"Step {episode.next_index} is next.")
        self.check_not_over(episode)
        if self.measure(text) > MAX_TEXT_BYTES:
            raise InvalidInputError("The text is too long.")

    def check_not_over(self, episode: Episode) -> None:
        if episode.is_over:
            raise ConflictError("The episode is over.")

    def measure(self, text: str) -> int:
        return len(text.encode())

    def renew(self, episode: Episode) -> None:
        episode.expires_at = time.monotonic() + episode.opened.lease_s

    def reap(self) -> None:
        for session_id, episode in list(self.episodes.items()):
            if time.monotonic() >= episode.expires_at:
                del self.episodes[session_id]

    def count(self) -> int:
        self.reap()
        return len(self.episodes)

    # ---- the wire

    async def Describe(self, request, context):
        if request.environment:
            self.check_name(request.environment)
        splits = [
            pb.Split(name=name, num_tasks=len(self.list_tasks(name)))
            for name in ("train", "heldout")
        ]
        limits = pb.EnvironmentLimits(
            max_turns=MAX_TURNS,
            max_text_bytes=MAX_TEXT_BYTES,
            step_timeout_s=5,
            default_lease_s=DEFAULT_LEASE_S,
            max_lease_s=MAX_LEASE_S,
        )
        capacity = pb.EnvironmentCapacity(
            max_sessions=self.capacity, num_open_sessions=self.count()
        )
        one = pb.EnvironmentDescription(
            name="walk", version=self.version, splits=splits, limits=limits, capacity=capacity
        )
        return pb.DescribeResponse(environments=[one])

    async def ListTasks(self, request, context):
        self.check_name(request.environment)
        tasks = self.list_tasks(request.split)
        start = self.parse_token(request.page_token, len(tasks))
        end = start + (request.page_size or 4)
        return pb.ListTasksResponse(
            tasks=tasks[start:end], next_page_token=str(end) if end < len(tasks) else ""
        )

    async def OpenSession(self, request, context):
        self.check_name(request.environment)
        return self.open(request)

    async def Step(self, request, context):
        return await self.step(self.find(request.session_id), request.step_index, request.text)

    async def CloseSession(self, request, context):
        self.episodes.pop(request.session_id, None)
        return pb.CloseSessionResponse()


# ---- one defect each


class WithoutVersion(Walk):
    version = ""


class DescribedTwice(Walk):
    async def Describe(self, request, context):
        response = await super().Describe(request, context)
        if not request.environment:
            response.environments.append(response.environments[0])
        return response


class TaskTwiceInASplit(Walk):
    def list_tasks(self, split):
        tasks = super().list_tasks(split)
        return [*tasks, tasks[0]]


class TaskInTwoSplits(Walk):
    def task(self, goal, split):
        return super().task(goal if split == "train" else goal - 6, split)


class ShuffledTasks(Walk):
    async def ListTasks(self, request, context):
        response = await super().ListTasks(request, context)
        self.num_listings += 1
        if self.num_listings % 2:
            response.tasks.reverse()
        return response


class AnyPageToken(Walk):
    def parse_token(self, token, num_tasks):
        return int(token) if token.isdigit() and int(token) < num_tasks else 0


class UnknownNamesInvalid(Walk):
    def check_name(self, name):
        if name != "walk":
            raise InvalidInputError("What is that?")


class UnknownSessionConflict(Walk):
    def find(self, session_id):
        if session_id not in self.episodes and "nobody" in session_id:
            raise ConflictError("No such session.")
        return super().find(session_id)


class SameSessionId(Walk):
    def open(self, request):
        opened = super().open(request)
        episode = self.episodes.pop(opened.session_id)
        number = next(
            number for number in range(100) if f"{request.task_id} {number}" not in self.episodes
        )
        opened.session_id = request.task_id + f" {number}"
        self.episodes[opened.session_id] = episode
        opened.observation = ""
        return opened


class SeedIsADouble(Walk):
    def open(self, request):
        opened = super().open(request)
        opened.task.seed = int(max(-(2.0**63), min(float(request.seed), 2.0**62)))
        return opened


class ForgetsKeys(Walk):
    def repeat_open(self, known, request):
        super().repeat_open(known, request)
        known.key = ""
        return self.open(request)


class AnyTaskForAKey(Walk):
    def repeat_open(self, known, request):
        return known.opened


class UnknownCloseRefused(Walk):
    async def CloseSession(self, request, context):
        self.find(request.session_id)
        return await super().CloseSession(request, context)


class EternalLease(Walk):
    def reap(self):
        pass


class LeaseFromTheOpening(Walk):
    def renew(self, episode):
        pass


class Boundless(Walk):
    def check_capacity(self):
        pass


class RepeatedStepMoves(Walk):
    def repeat_step(self, episode, text):
        super().repeat_step(episode, text)
        self.play(episode, text)


class StepsAtOnce(Walk):
    """Plays to the end whatever the caller does, but without a thought of the same step coming
    twice meanwhile.
    """

    async def step(self, episode, index, text):
        if episode.last and index == episode.last[0]:
            self.repeat_step(episode, text)
            return episode.last[2]
        self.check_next(episode, index, text)
        return await asyncio.shield(asyncio.create_task(self.play_slowly(episode, index, text)))

    async def play_slowly(self, episode, index, text):
        answer = self.play(episode, text)
        await asyncio.sleep(0.01)
        episode.last = (index, text, answer)
        self.renew(episode)
        return answer


class LostWithItsCaller(Walk):
    async def step(self, episode, index, text):
        async with episode.lock:
            if episode.last and index == episode.last[0]:
                self.repeat_step(episode, text)
            else:
                self.check_next(episode, index, text)
                answer = self.play(episode, text)
                await asyncio.sleep(0.01)
                episode.last = (index, text, answer)
        self.renew(episode)
        return episode.last[2]


class AnyTextAgain(Walk):
    def repeat_step(self, episode, text):
        pass


class SkippedStep(Walk):
    def check_next(self, episode, index, text):
        super().check_next(
            episode,
            max(index, episode.next_index) if index > episode.next_index + 1 else index,
            text,
        )

    async def step(self, episode, index, text):
        if index == episode.next_index + 1:
            index -= 1
        return await super().step(episode, index, text)


class InvalidAfterTheEnd(Walk):
    def check_not_over(self, episode):
        if episode.is_over:
            raise InvalidInputError("The episode is over.")


class RaisesOnEmptyText(Walk):
    def play(self, episode, text):
        if not text:
            raise CorruptionError("The text is empty.")
        return super().play(episode, text)


class RaisesOnLargeText(Walk):
    def play(self, episode, text):
        if len(text) > 100_000:
            raise CorruptionError("The text is large.")
        return super().play(episode, text)


class CountsCharacters(Walk):
    def measure(self, text):
        return len(text)


class NotDeterministic(Walk):
    def build_dice(self, task, seed):
        return random.Random()


class SharedGame(Walk):
    """One game for all sessions: fine for one at a time."""

    dice = random.Random(0)

    def build_dice(self, task, seed):
        SharedGame.dice = super().build_dice(task, seed)
        return SharedGame.dice

    def observe(self, episode):
        return f"You are at {episode.position}. Weather {SharedGame.dice.randrange(1000)}."


class NeverTruncated(Walk):
    def play(self, episode, text):
        answer = super().play(episode, text)
        answer.truncated = False
        return answer


class EndsTwice(Walk):
    def play(self, episode, text):
        answer = super().play(episode, text)
        answer.truncated = answer.terminated = answer.truncated or answer.terminated
        return answer


class NanReward(Walk):
    def play(self, episode, text):
        answer = super().play(episode, text)
        if answer.truncated:
            answer.reward = math.nan
        return answer


class SilentOnInvalidActions(Walk):
    def play(self, episode, text):
        answer = super().play(episode, text)
        if not answer.is_action_valid:
            answer.observation = ""
        return answer


class PlainErrors(Walk):
    """Statuses without details, as most servers send them."""

    async def _plainly(self, method, request, context):
        try:
            return await method(request, context)
        except SdarError as error:
            await context.abort(grpc.StatusCode[error.grpc_status], error.message)

    async def ListTasks(self, request, context):
        return await self._plainly(super().ListTasks, request, context)

    async def OpenSession(self, request, context):
        return await self._plainly(super().OpenSession, request, context)


class LeaksEndedEpisodes(Walk):
    num_lost = 0

    async def CloseSession(self, request, context):
        episode = self.episodes.get(request.session_id)
        if episode and episode.is_over and not self.num_lost:
            self.num_lost = 1
        return await super().CloseSession(request, context)

    def count(self):
        return super().count() + self.num_lost


class NotReady(Walk):
    """Served, but its health never says so."""


class Unlisted(Walk):
    """Served under another name to reflection and health."""


class DropsSessionsOnBadBytes(Walk):
    """Its Step parses by hand."""

    async def step_bytes(self, data: bytes, context):
        try:
            return await self.Step(pb.StepRequest.FromString(data), context)
        except DecodeError:
            self.episodes.clear()
            raise InvalidInputError("Not a request.") from None


class CannotStep(Walk):
    def play(self, episode, text):
        raise CorruptionError("The game is broken.")


class Nondescript(Walk):
    """Lists no actions, finds none in any text, and has room for two: little can be tried."""

    capacity = 2

    def play(self, episode, text):
        return super().play(episode, "")

    def open(self, request):
        opened = super().open(request)
        del opened.admissible_actions[:]
        return opened


class HalfWritten(Walk):
    """Leaves a field of its description for later."""

    def __init__(self, field: str) -> None:
        super().__init__()
        self.field = field

    async def Describe(self, request, context):
        response = await super().Describe(request, context)
        for one in response.environments:
            one.ClearField(self.field)
        return response


class Vast(Walk):
    capacity = 100_000


DEFECTS: dict[type[Walk], set[str]] = {
    WithoutVersion: {"describe.complete"},
    DescribedTwice: {"describe.all"},
    NotReady: {"health.serving"},
    Unlisted: {"health.serving", "reflection.listed"},
    TaskTwiceInASplit: {"tasks.complete"},
    TaskInTwoSplits: {"tasks.unique"},
    ShuffledTasks: {"tasks.stable"},
    AnyPageToken: {"tasks.bad_token"},
    UnknownNamesInvalid: {"unknown.names"},
    UnknownSessionConflict: {"unknown.session"},
    SameSessionId: {"open.answer"},
    SeedIsADouble: {"open.seed"},
    ForgetsKeys: {"open.retry"},
    AnyTaskForAKey: {"open.key_conflict"},
    UnknownCloseRefused: {"close.twice"},
    EternalLease: {"lease.expires"},
    LeaseFromTheOpening: {"lease.renewed"},
    Boundless: {"capacity.bounded"},
    RepeatedStepMoves: {"step.retry", "step.retry_at_once", "step.deadline"},
    StepsAtOnce: {"step.retry_at_once", "step.deadline"},
    LostWithItsCaller: {"step.deadline"},
    AnyTextAgain: {"step.other_text"},
    SkippedStep: {"step.order"},
    InvalidAfterTheEnd: {"step.after_end"},
    RaisesOnEmptyText: {"text.strange"},
    RaisesOnLargeText: {"text.large"},
    CountsCharacters: {"text.over_limit"},
    DropsSessionsOnBadBytes: {"text.not_utf8"},
    NotDeterministic: {"episode.deterministic"},
    SharedGame: {"episode.interleaved", "episode.concurrent"},
    NeverTruncated: {"episode.ends"},
    EndsTwice: {"episode.one_end"},
    NanReward: {"episode.numbers"},
    SilentOnInvalidActions: {"episode.observations"},
    PlainErrors: {"errors.typed"},
    LeaksEndedEpisodes: {"sessions.none_left"},
}


@asynccontextmanager
async def serving(servicer: Walk) -> AsyncIterator[str]:
    def add(servicer: Walk, server: grpc.aio.Server) -> None:
        environment_pb2_grpc.add_EnvironmentServiceServicer_to_server(servicer, server)
        if isinstance(servicer, DropsSessionsOnBadBytes):
            step = grpc.unary_unary_rpc_method_handler(
                servicer.step_bytes, response_serializer=pb.StepResponse.SerializeToString
            )
            server.add_registered_method_handlers(SERVICE_NAME, {"Step": step})

    name = "sdar.v1.PolicyService" if isinstance(servicer, Unlisted) else SERVICE_NAME
    server = build_server("127.0.0.1", 0, [RpcService(name, add, servicer)])
    await server.start()
    await server.set_ready(not isinstance(servicer, NotReady))
    try:
        yield f"127.0.0.1:{server.port}"
    finally:
        await server.stop(0)


def failed(report: Report) -> set[str]:
    return {
        outcome.check.check_id for outcome in report.outcomes if outcome.verdict is Verdict.FAIL
    }


async def test_a_correct_server_passes_every_check() -> None:
    async with serving(Walk()) as address:
        report = await check_server(address)
    assert {outcome.verdict for outcome in report.outcomes} == {Verdict.PASS}, failed(report)
    assert len(report.outcomes) == len(ALL_CHECKS)
    assert report.is_passed
    assert report.is_action_known


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.__name__)
async def test_a_defect_fails_exactly_the_checks_that_it_breaks(defect: type[Walk]) -> None:
    # The checks of leases wait for seconds; each is run only for the defect that it finds.
    checks = [check for check in ALL_CHECKS if check.check_id not in LEASE_CHECKS - DEFECTS[defect]]
    async with serving(defect()) as address:
        report = await check_server(address, checks=checks, settle_timeout_s=1.0)
    assert failed(report) == DEFECTS[defect], [
        (o.check.check_id, o.expected, o.got) for o in report.outcomes if o.got
    ]
    assert not report.is_passed


def test_every_check_can_fail() -> None:
    assert set.union(*DEFECTS.values()) == {check.check_id for check in ALL_CHECKS}


async def test_what_a_small_server_cannot_show_is_not_run_and_no_pass() -> None:
    async with serving(Nondescript()) as address:
        report = await check_server(
            address, checks=[one for one in ALL_CHECKS if one.check_id not in LEASE_CHECKS]
        )
    not_run = {
        outcome.check.check_id: outcome.got
        for outcome in report.outcomes
        if outcome.verdict is Verdict.NOT_RUN
    }
    assert set(not_run) == {"open.retry", "episode.interleaved", "episode.concurrent"}
    assert "needs 3 sessions at once, 2 are free: serve with --capacity 16" in not_run["open.retry"]
    assert report.is_passed
    assert not report.is_action_known
    assert report.count(Verdict.PASS) + 3 == len(report.outcomes)


async def test_a_vast_server_is_not_filled() -> None:
    checks = [check for check in ALL_CHECKS if check.check_id == "capacity.bounded"]
    async with serving(Vast()) as address:
        outcome = (await check_server(address, checks=checks)).outcomes[0]
    assert outcome.verdict is Verdict.NOT_RUN
    assert "serve with --capacity 64 to run it" in outcome.got


async def test_an_environment_that_cannot_be_stepped_is_told_first() -> None:
    async with serving(CannotStep()) as address:
        report = await check_server(address, checks=ALL_CHECKS[:1])
    assert [outcome.check.check_id for outcome in report.outcomes] == [
        "episode.begins",
        "describe.complete",
    ]
    assert "The game is broken." in report.outcomes[0].got


@pytest.mark.parametrize("field", ["splits", "limits", "capacity"])
async def test_a_description_that_leaves_something_out_is_a_verdict_among_others(
    field: str,
) -> None:
    checks = [check for check in ALL_CHECKS if check.check_id not in LEASE_CHECKS]
    async with serving(HalfWritten(field)) as address:
        report = await check_server(address, checks=checks, settle_timeout_s=1.0)
    assert "describe.complete" in failed(report)
    assert report.count(Verdict.PASS) > 3


async def test_an_address_where_nobody_answers_is_told_in_one_sentence() -> None:
    async with serving(Walk()) as address:
        pass
    with pytest.raises(
        ConfigurationError, match=f"No environment server answers at {address}. Start one"
    ):
        await check_server(address)


async def test_another_grpc_service_is_not_taken_for_an_environment() -> None:
    server = build_server("127.0.0.1", 0, [])
    await server.start()
    with pytest.raises(
        ConfigurationError, match=r"does not answer sdar.v1.EnvironmentService.Describe"
    ):
        await check_server(f"127.0.0.1:{server.port}")
    await server.stop(0)


async def test_an_environment_that_is_not_served_is_refused_with_the_names_of_those_that_are() -> (
    None
):
    async with serving(Walk()) as address:
        with pytest.raises(
            ConfigurationError, match="serves walk; --environment 'chess' is not one of them"
        ):
            await check_server(address, "chess")


async def test_the_report_names_each_failure_with_its_remedy() -> None:
    checks = [
        check for check in ALL_CHECKS if check.check_id in ("episode.numbers", "episode.ends")
    ]
    async with serving(NanReward()) as address:
        report = await check_server(address, checks=checks)
    console = Console(width=200, record=True, file=io.StringIO())
    print_report(report, console)
    text = console.export_text()
    assert "walk, version 1, at 127.0.0.1:" in text
    assert (
        "FAIL episode.numbers\n  expected  a finite reward at step 5\n  got       nan\n  remedy    "
        "Check every number" in text
    )
    assert "1 passed, 1 failed, 0 not run, in" in text


async def test_the_report_for_programs_is_one_object() -> None:
    checks = [
        check
        for check in ALL_CHECKS
        if check.check_id in ("episode.numbers", "capacity.bounded", "episode.ends")
    ]
    servicer = NanReward()
    servicer.capacity = 1000
    async with serving(servicer) as address:
        told = json.loads(json.dumps(to_json(await check_server(address, checks=checks))))
    assert (told["environment"], told["is_passed"]) == ("walk", False)
    assert (told["num_passed"], told["num_failed"], told["num_not_run"]) == (1, 1, 1)
    by_id = {one["id"]: one for one in told["checks"]}
    assert by_id["episode.numbers"]["verdict"] == "FAIL"
    assert by_id["episode.numbers"]["remedy"]
    assert by_id["capacity.bounded"]["verdict"] == "NOT RUN"
    assert by_id["episode.ends"] | {"seconds": 0} == {
        "id": "episode.ends",
        "claim": by_id["episode.ends"]["claim"],
        "verdict": "PASS",
        "seconds": 0,
        "expected": "",
        "got": "",
        "remedy": "",
    }


async def test_the_command_ends_with_code_1_where_a_check_fails() -> None:
    async with serving(NanReward()) as address:
        command = (sys.executable, "-m", "sdar.cli.main", "env", "check", address)
        process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        stdout, _ = await process.communicate()
    assert process.returncode == 1
    assert "FAIL episode.numbers" in stdout.decode()
