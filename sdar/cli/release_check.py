"""Checks a release for `helm test`: its policy plays an episode, and its policy version moves.

python -m sdar.cli.release_check --policy HOST:PORT

Everything else it needs is in the variables of any service: SDAR_CONFIG, SDAR_GATEWAY_URL,
SDAR_ENVS_ADDRESS, the token.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdar.cli.gateway import GatewayClient, open_gateway
from sdar.cli.main import fail
from sdar.config import RunConfig, load_config
from sdar.contracts.errors import SdarError, UnavailableError, UnknownResourceError
from sdar.contracts.roles import Role
from sdar.process.settings import load_settings
from sdar.v1 import (
    environment_pb2,
    environment_pb2_grpc,
    policy_pb2,
    policy_pb2_grpc,
    task_pb2,
    trajectory_pb2,
)
from sdar.wire.rpc_client import call, connect
from sdar.wire.security import Security

_CALL_TIMEOUT_S = 60.0
_RETRY_S = 1.0


class Patience:
    """Repeats what is not there yet, until one deadline for everything."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._deadline = time.monotonic() + timeout_s

    async def retry(self, action: Callable[[], Awaitable[Any]]) -> Any:
        """What `action` returns, once it raises UnavailableError no more; the error itself after
        the deadline.
        """
        while True:
            try:
                return await action()
            except UnavailableError as error:
                if time.monotonic() > self._deadline:
                    raise UnavailableError(f"After {self._timeout_s:.0f} s: {error}") from error
                await asyncio.sleep(_RETRY_S)


async def check_release(
    config: RunConfig, gateway: GatewayClient, envs: str, policy: str, timeout_s: float
) -> None:
    """Play one episode of the run and see its policy move. What was seen is printed.

    Args:
        envs, policy: HOST:PORT of the environments' and the rollouts' gRPC.
        timeout_s: for all of it; services may still be starting.

    Raises:
        SdarError: what is missing or refuses.
    """
    patience = Patience(timeout_s)
    status = await patience.retry(lambda: _read_status(gateway))
    first = status["policy_version"]
    print(
        f"{status['run_id']}: {status['phase']}, policy version {first}, update "
        f"{status['num_updates']}",
        flush=True,
    )

    # The rollouts of a run that is over may be gone.
    player = None if _is_over(status) else policy
    turns, reward = await patience.retry(lambda: _play(config, envs, player))
    chosen = "the policy" if player else "no policy, since the run is over,"
    print(
        f"An episode of {config.environment.name}, played by {chosen}: {turns} turns, reward "
        f"{reward:g}",
        flush=True,
    )

    version = await patience.retry(lambda: _see_move(gateway, first))
    print(f"Policy version {version}: it moves.", flush=True)


def _is_over(status: dict[str, Any]) -> bool:
    """Whether the run is finished, so that no version follows."""
    return bool(status["phase"] == "finished")


async def _read_status(gateway: GatewayClient) -> dict[str, Any]:
    return dict(await asyncio.to_thread(gateway.get, "/v1/run"))


async def _see_move(gateway: GatewayClient, first: int) -> int:
    """The policy version once it is above `first`, or above 0 where the run is over. Raises
    UnavailableError before that.
    """
    status = await _read_status(gateway)
    version = int(status["policy_version"])
    least = 1 if _is_over(status) else first + 1
    if version >= least:
        return version
    raise UnavailableError(
        f"The policy is still at version {version}: {status['phase']}, "
        f"{status['detail'] or 'no detail'}. `sdar status` says "
        "what is waited for; a paused run moves once it is resumed, a large model needs a longer "
        "--timeout-s."
    )


async def _play(config: RunConfig, envs: str, policy: str | None) -> tuple[int, float]:
    """One episode of the first training task: its turns and its reward. Without a policy each first
    action is taken.
    """
    security = Security.from_settings(load_settings())
    async with contextlib.AsyncExitStack() as stack:
        env_channel = await stack.enter_async_context(connect(envs, security, is_sticky=True))
        player = _Player(config, envs, environment_pb2_grpc.EnvironmentServiceStub(env_channel))
        if policy is not None:
            policy_channel = await stack.enter_async_context(connect(policy, security))
            player.policy = policy
            player.generate = policy_pb2_grpc.PolicyServiceStub(policy_channel).Generate

        described = await player.describe()
        opened = await player.open()
        try:
            return await player.take_turns(described, opened)
        finally:
            await player.close(opened.session_id)


@dataclass
class _Player:
    """The calls of one episode.

    Args:
        envs, policy: HOST:PORT, which errors name.
        stub: of the environments.
        generate: the policy's method; None where the first possible action is taken.
    """

    config: RunConfig
    envs: str
    stub: Any
    policy: str = ""
    generate: Any = None

    async def describe(self) -> environment_pb2.EnvironmentDescription:
        request = environment_pb2.DescribeRequest(environment=self.config.environment.name)
        response: environment_pb2.DescribeResponse = await self._ask(self.stub.Describe, request)
        return next(iter(response.environments))

    async def open(self) -> environment_pb2.OpenSessionResponse:
        """A session of the first task of the training split."""
        request = environment_pb2.OpenSessionRequest(
            environment=self.config.environment.name,
            task_id=await self._find_first_task(),
            idempotency_key=uuid.uuid4().hex,
        )
        opened: environment_pb2.OpenSessionResponse = await self._ask(
            self.stub.OpenSession, request
        )
        return opened

    async def _find_first_task(self) -> str:
        environment = self.config.environment
        listing = environment_pb2.ListTasksRequest(
            environment=environment.name, split=environment.train_split, page_size=1
        )
        tasks = (await self._ask(self.stub.ListTasks, listing)).tasks
        if not tasks:
            raise UnknownResourceError(
                f"environment.train_split {environment.train_split!r} has no tasks. Name another."
            )
        return str(tasks[0].task_id)

    async def take_turns(
        self,
        described: environment_pb2.EnvironmentDescription,
        opened: environment_pb2.OpenSessionResponse,
    ) -> tuple[int, float]:
        """Turns and reward of the episode, played to its end or to max_turns."""
        answer: Any = opened
        reward = 0.0
        for index in range(self.config.environment.max_turns):
            text = await self._choose(described, opened.task.description, answer)
            step = environment_pb2.StepRequest(
                session_id=opened.session_id, step_index=index, text=text
            )
            answer = await self._ask(self.stub.Step, step)
            reward += answer.reward
            if answer.terminated or answer.truncated:
                break
        return index + 1, reward

    async def _choose(self, described: Any, task: str, answer: Any) -> str:
        """The text of a turn. `answer` is the one before: that of OpenSession or of Step."""
        if self.generate is None:
            return next(iter(answer.admissible_actions), "look")
        request = _ask_policy(self.config, described, task, answer.observation)
        response = await call(self.generate, request, timeout_s=_CALL_TIMEOUT_S, peer=self.policy)
        return str(response.text)

    async def close(self, session_id: str) -> None:
        request = environment_pb2.CloseSessionRequest(session_id=session_id)
        await self._ask(self.stub.CloseSession, request)

    async def _ask(self, method: Any, request: Any) -> Any:
        return await call(method, request, timeout_s=_CALL_TIMEOUT_S, peer=self.envs)


def _ask_policy(
    config: RunConfig, described: Any, task: str, observation: str
) -> policy_pb2.GenerateRequest:
    """A fresh prompt: what the environment says of itself, the task, and what is seen now."""
    text = f"Task: {task}\n{observation}\n{described.action_format}"
    messages = [trajectory_pb2.ChatMessage(role="user", content=text)]
    # Not every environment has instructions, and a chat template may refuse an empty message.
    if described.instructions.strip():
        system = trajectory_pb2.ChatMessage(role="system", content=described.instructions)
        messages.insert(0, system)

    sampling = config.train_sampling
    return policy_pb2.GenerateRequest(
        request_id=uuid.uuid4().hex,
        chat=policy_pb2.ChatPrompt(messages=messages),
        sampling=task_pb2.SamplingParameters(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_response_tokens=sampling.max_response_tokens,
        ),
    )


def build_parser() -> argparse.ArgumentParser:
    """What the command takes; a test holds the chart against it."""
    parser = argparse.ArgumentParser(
        description="Play one episode of a running release and see its policy move."
    )
    parser.add_argument(
        "--policy", required=True, metavar="HOST:PORT", help="where the rollouts' gRPC answers"
    )
    parser.add_argument("--timeout-s", type=float, default=280.0, help="seconds for all of it")
    return parser


def main() -> None:
    """Entry point; ends with 0 when all was seen, with a sentence and another code when not."""
    arguments = build_parser().parse_args()
    try:
        settings = load_settings()
        config = load_config(settings.config)
        # Its address is in SDAR_GATEWAY_URL; there are no local runs to look for.
        with open_gateway(None, Path()) as gateway:
            envs = config.environment.address or settings.find_address(Role.ENVS)
            asyncio.run(check_release(config, gateway, envs, arguments.policy, arguments.timeout_s))
    except SdarError as error:
        fail(error, sys.argv[1:])


if __name__ == "__main__":
    main()
