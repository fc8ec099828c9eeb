"""`sdar env play`: plays one episode of a running server by hand or through a pipe.

The event loop runs during calls only. While a line is read nothing else runs, so that Ctrl-C takes
effect at once and the session is still closed.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
import uuid
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import grpc.aio
from rich.console import Console

from sdar.cli.conformance.bench import Bench, Refusal
from sdar.cli.conformance.failure import FailedCheck
from sdar.cli.conformance.runner import find_environment
from sdar.contracts.errors import UnavailableError, UnknownResourceError
from sdar.process.settings import load_settings
from sdar.process.text import escape_controls
from sdar.v1 import environment_pb2, environment_pb2_grpc
from sdar.wire.rpc_client import call, connect
from sdar.wire.security import Security

_PROMPT = "> "
_MAX_NUMBER_CHARACTERS = 18
_LEASE_S = 3600.0
_CALL_TIMEOUT_S = 60.0


def play_task(address: str, environment: str, split: str, task_id: str, seed: int) -> None:
    """Play one task at `address` until it ends or the input does; the session is closed in any
    case.

    Args:
        split: where the first task is taken from if no task_id is given; "" for the first split.

    Raises:
        ConfigurationError: nobody answers, or there is no such environment.
        UnknownResourceError: there is no such split or task.
    """
    security = Security.from_settings(load_settings())
    with asyncio.Runner() as runner:

        async def begin() -> tuple[grpc.aio.Channel, Bench]:
            channel = connect(address, security, is_sticky=True)
            return channel, Bench(channel, await find_environment(channel, address, environment))

        channel, bench = runner.run(begin())
        try:
            runner.run(_find_action_form(bench, address))
            stub = environment_pb2_grpc.EnvironmentServiceStub(channel)
            game = _Game(runner, stub, address, bench)
            game.play(task_id or game.first_task(split), seed)
        finally:
            runner.run(channel.close(None))


async def _find_action_form(bench: Bench, address: str) -> None:
    try:
        await bench.find_action_form()
    except (Refusal, FailedCheck) as error:
        raise UnavailableError(
            f"No episode can be begun at {address}: {error}. `sdar env check {address}` says more."
        ) from error
    finally:
        await bench.close_opened()


class _Game:
    """One server's environment and the screen."""

    def __init__(self, runner: asyncio.Runner, stub: Any, address: str, bench: Bench) -> None:
        self._runner = runner
        self._stub = stub
        self._address = address
        self._described = bench.described
        self._action_form = bench.action_form
        self._first_split = bench.first_split
        # The texts are the environment's: never read as markup, never wrapped at a width that a
        # pipe does not have.
        self._console = Console(markup=False, highlight=False, emoji=False, soft_wrap=True)

    def first_task(self, split: str) -> str:
        """Id of the first task of a split; "" for the first split."""
        name = split or self._first_split
        request = environment_pb2.ListTasksRequest(
            environment=self._described.name, split=name, page_size=1
        )
        page: environment_pb2.ListTasksResponse = self._call(self._stub.ListTasks, request)
        if not page.tasks:
            raise UnknownResourceError(
                f"Split {name!r} of {self._described.name} has no tasks. Choose another with "
                "--split."
            )
        return next(iter(page.tasks)).task_id

    def play(self, task_id: str, seed: int) -> None:
        request = environment_pb2.OpenSessionRequest(
            environment=self._described.name,
            task_id=task_id,
            seed=seed,
            idempotency_key=uuid.uuid4().hex,
            lease_s=_LEASE_S,
        )
        opened: environment_pb2.OpenSessionResponse = self._call(self._stub.OpenSession, request)
        try:
            self._introduce(opened)
            self._take_turns(opened)
        finally:
            self._call(
                self._stub.CloseSession,
                environment_pb2.CloseSessionRequest(session_id=opened.session_id),
            )

    def _introduce(self, opened: environment_pb2.OpenSessionResponse) -> None:
        described = self._described
        task = opened.task
        self._say(
            f"{described.name}, version {described.version}: {task.split} task {task.task_id}, "
            f"seed {task.seed}",
            "bold",
        )
        for text in (described.instructions, task.description, described.action_format):
            if text:
                self._say(text)
        self._say("A number chooses an action of the list. Ctrl-D leaves the game.", "dim")
        if not self._action_form.is_bare:
            self._say(f"A line without a < is sent as {self._action_form.write('...')}", "dim")

    def _take_turns(self, opened: environment_pb2.OpenSessionResponse) -> None:
        observation = opened.observation
        actions = list(opened.admissible_actions)
        total = 0.0
        # The server ends the episode; one that never ends is left by Ctrl-D.
        for index in itertools.count():
            self._show(observation, actions)
            text = self._ask(actions)
            if text is None:
                self._say("Left the game before its end.", "yellow")
                return

            request = environment_pb2.StepRequest(
                session_id=opened.session_id, step_index=index, text=text
            )
            answer: environment_pb2.StepResponse = self._call(self._stub.Step, request)
            total += answer.reward
            observation = answer.observation
            actions = list(answer.admissible_actions)
            if not answer.is_action_valid:
                self._say("This was no valid action; it used a turn.", "yellow")
            if answer.terminated or answer.truncated:
                self._show(observation, [])
                self._end(answer, index + 1, total)
                return

    def _show(self, observation: str, actions: Sequence[str]) -> None:
        self._say("")
        if observation:
            self._say(observation)
        for number, action in enumerate(actions, start=1):
            self._say(f"{number:3}  {action}", "cyan")

    def _ask(self, actions: Sequence[str]) -> str | None:
        """The text to send; None at the end of the input. After a number that is not in the list,
        or bytes that are no text, the next line is read.
        """
        while True:
            try:
                line = input(_PROMPT if sys.stdin.isatty() else "")
                # By the locale, bytes that are no text may also be read as lone surrogates, which
                # no request can hold.
                line.encode()
            except EOFError:
                return None
            except UnicodeError:
                self._say("That was no text. Write UTF-8.", "yellow")
                continue

            if not actions or not line.strip().isdecimal():
                # A line with a tag is a whole response already.
                return line if "<" in line else self._action_form.write(line)
            # Python refuses to read a number of thousands of digits.
            number = int(line) if len(line) <= _MAX_NUMBER_CHARACTERS else sys.maxsize
            if 1 <= number <= len(actions):
                return self._action_form.write(actions[number - 1])
            self._say(f"No action {number}: choose 1 to {len(actions)}, or write one.", "yellow")

    def _end(self, answer: environment_pb2.StepResponse, num_turns: int, total: float) -> None:
        end = "not solved"
        if answer.is_success:
            end = "solved"
        elif answer.truncated:
            end = "out of turns"

        reward = f"{total:g}"
        components = sorted(answer.reward_components.items())
        if components:
            shown = ", ".join(f"{name} {value:g}" for name, value in components)
            reward += f" ({shown})"
        self._say(f"The end after {num_turns} turns: {end}, reward {reward}.", "bold")

    def _say(self, text: str, style: str = "") -> None:
        self._console.print(escape_controls(text, keep="\n\t"), style=style)

    def _call(self, method: Callable[..., Awaitable[Any]], request: Any) -> Any:
        return self._runner.run(
            call(method, request, timeout_s=_CALL_TIMEOUT_S, peer=self._address)
        )
