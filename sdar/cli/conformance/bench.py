"""How the checks reach a server: its calls with their refusals, and episodes from fixed seeds.

It knows the wire and no environment: actions are those that the server lists, written in the first
form that the server takes as valid.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf.message import Message

from sdar.cli.conformance.actions import ActionForm, choose_words, list_forms
from sdar.cli.conformance.failure import CheckNotRun, FailedCheck, expect
from sdar.v1 import environment_pb2, environment_pb2_grpc, task_pb2
from sdar.wire.rpc_errors import read_error_detail

SERVICE_NAME = "sdar.v1.EnvironmentService"
CALL_TIMEOUT_S = 60.0
"""Deadline of a call that should be answered: far above any step_timeout_s in use."""
SETTLE_TIMEOUT_S = 15.0
"""How long a reaper may take to notice: beyond it, a place that is not free again is lost."""
MAX_SCRIPT_TURNS = 30
"""Turns of the episodes that are repeated and compared."""
LEASE_S = 120.0
"""Lease of the sessions in which leases are not the point."""

_NUM_SCRIPTS_TRIED = 4
_POLL_EVERY_S = 0.05
_SHOWN_CHARACTERS = 160


class Refusal(Exception):
    """A call that ended with a status other than OK; `detail` is its typed detail, None without
    one.
    """

    def __init__(self, method: str, error: grpc.aio.AioRpcError) -> None:
        self.method = method
        self.code = error.code()
        self.detail = read_error_detail(error)
        message = shorten(error.details() or "") or "no message"
        super().__init__(f"{method} answered {self.code.name}: {message}")


@dataclass(frozen=True, slots=True)
class Script:
    """An episode played undisturbed: the texts sent and all answers; `answers[i]` belongs to
    `texts[i]`.
    """

    task: task_pb2.Task
    seed: int
    opened: environment_pb2.OpenSessionResponse
    texts: tuple[str, ...]
    answers: tuple[environment_pb2.StepResponse, ...]

    @property
    def is_over(self) -> bool:
        return bool(self.answers) and is_over(self.answers[-1])


Chooser = Callable[[int, Sequence[str]], str]
"""The text of a turn, from its index and the actions listed as possible."""


@dataclass
class Bench:
    """One environment of one server, under test. Sessions opened here are remembered, so that none
    outlives its check.
    """

    channel: grpc.aio.Channel
    described: environment_pb2.EnvironmentDescription
    settle_timeout_s: float = SETTLE_TIMEOUT_S
    action_form: ActionForm = field(default_factory=ActionForm)
    is_action_known: bool = False
    refusals: list[Refusal] = field(default_factory=list)
    _opened: set[str] = field(default_factory=set)
    _tasks: dict[str, list[task_pb2.Task]] = field(default_factory=dict)
    _scripts: dict[tuple[str, int], Script] = field(default_factory=dict)
    _tour: list[Script] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._stub: Any = environment_pb2_grpc.EnvironmentServiceStub(self.channel)

    @property
    def environment(self) -> str:
        return self.described.name

    @property
    def first_split(self) -> str:
        expect(bool(self.described.splits), "at least one split in Describe", "none")
        return next(iter(self.described.splits)).name

    @property
    def max_turns(self) -> int:
        """As described; at least 1, so that a server that leaves it out is tried like any other.
        The check describe.complete fails it.
        """
        return max(1, self.described.limits.max_turns)

    # ---- calls

    async def describe(self) -> environment_pb2.EnvironmentDescription:
        """The environment as it is described now; the other environments of the server are left
        out.
        """
        request = environment_pb2.DescribeRequest(environment=self.environment)
        response: environment_pb2.DescribeResponse = await self.call("Describe", request)
        names = [one.name for one in response.environments]
        expect(
            names == [self.environment],
            f"Describe({self.environment!r}) with that environment alone",
            names,
        )
        return next(iter(response.environments))

    async def list_page(self, split: str, **fields: Any) -> environment_pb2.ListTasksResponse:
        fields = {"environment": self.environment, **fields}
        request = environment_pb2.ListTasksRequest(split=split, **fields)
        response: environment_pb2.ListTasksResponse = await self.call("ListTasks", request)
        return response

    async def open(
        self,
        task_id: str,
        *,
        seed: int = 0,
        key: str = "",
        lease_s: float = LEASE_S,
        environment: str | None = None,
    ) -> environment_pb2.OpenSessionResponse:
        name = self.environment if environment is None else environment
        request = environment_pb2.OpenSessionRequest(
            environment=name, task_id=task_id, seed=seed, idempotency_key=key, lease_s=lease_s
        )
        response: environment_pb2.OpenSessionResponse = await self.call("OpenSession", request)
        self._opened.add(response.session_id)
        return response

    async def step(
        self, session_id: str, step_index: int, text: str, *, timeout_s: float = CALL_TIMEOUT_S
    ) -> environment_pb2.StepResponse:
        request = environment_pb2.StepRequest(
            session_id=session_id, step_index=step_index, text=text
        )
        response: environment_pb2.StepResponse = await self.call(
            "Step", request, timeout_s=timeout_s
        )
        return response

    async def step_bytes(self, request: bytes) -> None:
        """A Step whose request was serialised by hand. Raises Refusal."""
        step = self.channel.unary_unary(f"/{SERVICE_NAME}/Step", None, None)
        try:
            await step(request, timeout=CALL_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise Refusal("Step", error) from error

    async def close(self, session_id: str) -> None:
        await self.call("CloseSession", environment_pb2.CloseSessionRequest(session_id=session_id))
        self._opened.discard(session_id)

    async def call(
        self, method: str, request: Message, *, timeout_s: float = CALL_TIMEOUT_S
    ) -> Any:
        """One call. Raises Refusal."""
        try:
            return await getattr(self._stub, method)(request, timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            refusal = Refusal(method, error)
            self.refusals.append(refusal)
            raise refusal from error

    async def close_opened(self) -> None:
        """Close what is still open of the sessions opened here; a server that refuses this has
        failed a check already.
        """
        for session_id in list(self._opened):
            # Forgotten first: one that cannot be closed is not tried again after every check.
            self._opened.discard(session_id)
            with contextlib.suppress(Refusal):
                await self.close(session_id)

    # ---- tasks

    async def list_tasks(self, split: str) -> list[task_pb2.Task]:
        """All tasks of a split, asked for once."""
        if split not in self._tasks:
            self._tasks[split] = await self.read_pages(split)
        return self._tasks[split]

    async def read_pages(self, split: str) -> list[task_pb2.Task]:
        tasks: list[task_pb2.Task] = []
        tokens = {""}
        token = ""
        while True:
            page = await self.list_page(split, page_token=token)
            tasks.extend(page.tasks)
            token = page.next_page_token
            if not token:
                return tasks
            expect(
                token not in tokens,
                f"a new next_page_token on every page of split {split!r}",
                f"{token!r} again",
            )
            tokens.add(token)

    async def first_task(self) -> task_pb2.Task:
        return (await self.some_tasks(1))[0]

    async def some_tasks(self, count: int) -> list[task_pb2.Task]:
        """The first tasks of the first split, over again if they are fewer."""
        split = self.first_split
        tasks = await self.list_tasks(split)
        expect(bool(tasks), f"tasks in split {split!r}", "none")
        return [tasks[i % len(tasks)] for i in range(count)]

    # ---- episodes

    async def need_places(self, count: int) -> None:
        """Raise CheckNotRun where so many sessions cannot be open at once."""
        capacity = (await self.describe()).capacity
        free = capacity.max_sessions - capacity.num_open_sessions
        if free < count:
            raise CheckNotRun(
                f"it needs {count} sessions at once, {free} are free: serve with --capacity 16 to "
                "run it"
            )

    async def find_action_form(self) -> None:
        """Try the ways an action might be written, with the first step of the first task."""
        task = await self.first_task()
        opened = await self.open(task.task_id)
        is_listed = bool(opened.admissible_actions)
        await self.close(opened.session_id)
        going_on: list[ActionForm] = []
        ending: list[ActionForm] = []
        for form in list_forms(self.described.action_format, is_listed=is_listed):
            self.action_form = form
            script = await self.play(task, 0, self.actor(task, 0), max_turns=1)
            (answer,) = script.answers
            if answer.is_action_valid and is_over(answer):
                ending.append(form)
            elif answer.is_action_valid:
                going_on.append(form)

        # A form that goes on shows more than one that ends the episode.
        valid = [*going_on, *ending]
        self.is_action_known = bool(valid)
        self.action_form = valid[0] if valid else ActionForm()

    def actor(self, task: task_pb2.Task, seed: int) -> Chooser:
        """A chooser of listed actions at random, the same ones every time; of words of the task
        where none are listed.
        """
        dice = random.Random(f"{task.task_id} {seed}")

        def choose(turn: int, actions: Sequence[str]) -> str:
            if actions:
                return self.action_form.write(dice.choice(actions))
            return self.action_form.write_words(choose_words(task.description, turn))

        return choose

    async def play(self, task: task_pb2.Task, seed: int, choose: Chooser, max_turns: int) -> Script:
        """One episode in a session of its own, closed at the end."""
        opened = await self.open(task.task_id, seed=seed)
        texts: list[str] = []
        answers: list[environment_pb2.StepResponse] = []
        actions = opened.admissible_actions
        for index in range(max_turns):
            text = choose(index, actions)
            answer = await self.step(opened.session_id, index, text)
            texts.append(text)
            answers.append(answer)
            if is_over(answer):
                break
            actions = answer.admissible_actions
        await self.close(opened.session_id)
        return Script(task, seed, opened, tuple(texts), tuple(answers))

    async def script(self, task: task_pb2.Task | None = None, seed: int = 0) -> Script:
        """An undisturbed episode to compare others with; played at the first use. Without a task,
        the longest of some.

        Raises:
            CheckNotRun: it does not go the same way twice, so a comparison would blame what is not
                at fault.
        """
        if task is None:
            scripts = [await self.script(one) for one in await self.some_tasks(_NUM_SCRIPTS_TRIED)]
            # The longer it lasts, the more of a step too many or too few it shows.
            return max(scripts, key=lambda script: len(script.texts))
        key = (task.task_id, seed)
        if key not in self._scripts:
            script = await self.play_prefix(task, seed)
            again = await self.play_prefix(task, seed)
            if compare_scripts(script, again):
                raise CheckNotRun(
                    "the same episode goes differently each time: see episode.deterministic"
                )
            self._scripts[key] = script
        return self._scripts[key]

    async def play_prefix(self, task: task_pb2.Task, seed: int) -> Script:
        """As much of an episode as is repeated and compared."""
        turns = min(self.max_turns, MAX_SCRIPT_TURNS)
        return await self.play(task, seed, self.actor(task, seed), turns)

    async def tour(self) -> list[Script]:
        """Whole episodes of the first and the last task of every split, with possible actions and
        with nonsense.
        """
        if self._tour:
            return self._tour
        for split in self.described.splits:
            tasks = await self.list_tasks(split.name)
            if not tasks:
                continue
            for task in (tasks[0], tasks[-1]):
                for choose in (self.actor(task, 1), speak_nonsense):
                    script = await self.play(task, 1, choose, self.max_turns)
                    self._tour.append(script)
        return self._tour

    async def replay(self, script: Script, session_id: str, begin: int = 0) -> None:
        """Play the rest of a script in a session. Raises FailedCheck where an answer differs."""
        for index in range(begin, len(script.texts)):
            answer = await self.step(session_id, index, script.texts[index])
            self.compare(script, index, answer)

    def compare(self, script: Script, index: int, answer: environment_pb2.StepResponse) -> None:
        """Raises FailedCheck where the answer to a step differs from the script's."""
        change = difference(script.answers[index], answer)
        if change:
            expected, got = change
            what = (
                f"step {index} of task {script.task.task_id!r}, seed {script.seed}, as in an "
                "undisturbed episode"
            )
            raise FailedCheck(f"{what}: {expected}", got)


def speak_nonsense(turn: int, actions: Sequence[str]) -> str:
    return f"xyzzy {turn}"


def is_over(answer: environment_pb2.StepResponse) -> bool:
    return answer.terminated or answer.truncated


def difference(
    expected: Message, got: Message, ignore: Sequence[str] = ("session_id", "info")
) -> tuple[str, str] | None:
    """The first field in which two messages differ, as (expected, got); None if they are the same.

    Between episodes, `info` may differ: it is for logs. Nothing else may.
    """
    for name in expected.DESCRIPTOR.fields_by_name:
        if name in ignore:
            continue
        one = _show(getattr(expected, name))
        other = _show(getattr(got, name))
        if one != other:
            return f"{name} {shorten(one)}", f"{name} {shorten(other)}"
    return None


def compare_scripts(script: Script, other: Script) -> tuple[str, str] | None:
    """The first difference of two episodes that should be the same, as (expected, got); None if
    there is none.
    """
    what = f"of task {script.task.task_id!r}, seed {script.seed}, as the first time"
    change = difference(script.opened, other.opened)
    if change:
        expected, got = change
        return f"the opening {what}: {expected}", got

    # Not strict: an episode that ends earlier differs in its last answer.
    for index, (one, two) in enumerate(zip(script.answers, other.answers, strict=False)):
        change = difference(one, two)
        if change:
            expected, got = change
            return f"step {index} {what}: {expected}", got
    return None


def _show(value: Any) -> str:
    """A field's value as text: so a NaN equals another one, and maps have an order."""
    if hasattr(value, "items"):
        return repr(dict(sorted(value.items())))
    if isinstance(value, str) or not isinstance(value, Sequence):
        return repr(value)
    # Repeated fields.
    return repr(list(value))


def shorten(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 1] + "…"


async def expect_refusal(calling: Awaitable[Any], code: grpc.StatusCode, what: str) -> Refusal:
    """The refusal of a call that must be refused with `code`."""
    try:
        await calling
    except Refusal as refusal:
        expect(refusal.code is code, f"{what}: {code.name}", refusal)
        return refusal
    raise FailedCheck(f"{what}: {code.name}", "an answer with status OK")


async def poll(is_reached: Callable[[], Awaitable[bool]], timeout_s: float) -> bool:
    """Ask until it is so, or until the time is over; returns whether it came to be so."""
    deadline = time.monotonic() + timeout_s
    while not await is_reached():
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(_POLL_EVERY_S)
    return True
