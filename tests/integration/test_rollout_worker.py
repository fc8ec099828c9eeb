"""The rollout service on real parts: household over gRPC, demo's model, weight store."""

from __future__ import annotations

import asyncio
import math
import os
import signal
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from sdar.bus.protocol import BEFORE_FIRST
from sdar.config import EnvironmentConfig, ModelConfig, RolloutConfig, RunConfig
from sdar.contracts import codec
from sdar.contracts.errors import (
    CapacityError,
    ConflictError,
    EnvironmentFailedError,
    InvalidInputError,
    StaleError,
)
from sdar.contracts.streams import ConsumerGroup, Stream
from sdar.contracts.types import GroupOutcome, Purpose, SamplingParameters, Task, TaskGroup
from sdar.environments.server import build_environment_server
from sdar.environments.sessions import SessionManager
from sdar.in_process.environment_host import InProcessHost
from sdar.in_process.memory_bus import MemoryBus
from sdar.in_process.transformers_engine import TransformersEngine
from sdar.model.causal_lm import export_tensors, load_causal_lm
from sdar.model.chat import ChatTokenizer, compute_model_identity
from sdar.process.settings import Settings
from sdar.process.telemetry import Health
from sdar.v1 import environment_pb2, environment_pb2_grpc, policy_pb2, policy_pb2_grpc
from sdar.weights.store import WeightStore
from sdar.wire.rpc_client import call, connect
from sdar.wire.rpc_server import RpcService, build_server
from services.envs.household import HouseholdEnvironment
from services.rollout.environment_client import GrpcEnvironmentClient, GrpcEnvironmentDirectory
from services.rollout.metrics import RolloutMetrics
from services.rollout.policy_service import SERVICE_NAME, PolicyServicer
from services.rollout.service import run_worker
from tests.support import until

MODEL_PATH = Path(__file__).parents[2] / "examples" / "models" / "household-tiny"
TASK = Task("nonsense", "train", "t0", "clean", "clean the mug .", 0)


@pytest.fixture(scope="module")
def tokenizer():
    return ChatTokenizer(MODEL_PATH)


@asynccontextmanager
async def household():
    """Address and sessions of a running environment server."""
    sessions = SessionManager(InProcessHost({"household": HouseholdEnvironment}))
    await sessions.start()
    server = build_environment_server(sessions, "127.0.0.1", 0)
    await server.start()
    try:
        yield f"127.0.0.1:{server.port}", sessions
    finally:
        await server.stop(grace_s=0.0)
        await sessions.close_all()


@asynccontextmanager
async def sampling(tokenizer, **options):
    engine = TransformersEngine(
        MODEL_PATH,
        dtype="float32",
        max_sequence_tokens=384,
        stop_token_ids=tokenizer.stops.ids,
        **options,
    )
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


def make_config() -> RunConfig:
    return RunConfig(
        name="rollout-test",
        model=ModelConfig(path=MODEL_PATH, dtype="float32", max_sequence_tokens=384),
        environment=EnvironmentConfig(name="household"),
        rollout=RolloutConfig(
            max_response_tokens=10, max_concurrent_episodes=32, show_actions=False
        ),
    )


def make_group(config, address, number, purpose=Purpose.TRAIN, version=0, size=4) -> TaskGroup:
    return TaskGroup(
        run_id=config.name,
        group_id=f"group-{number}",
        task=HouseholdEnvironment().list_tasks("train")[number],
        group_size=size,
        purpose=purpose,
        admitted_version=version,
        sampling=config.train_sampling,
        max_turns=8,
        environment_address=address,
    )


async def fetch(bus, stream):
    return [entry.payload for entry in await bus.tail(stream, BEFORE_FIRST, 10_000)]


@torch.inference_mode()
def expected_logprobs(model, turn) -> np.ndarray:
    prompt, response = turn.prompt_token_ids.tolist(), turn.response_token_ids.tolist()
    logits = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(response)[:, None])[:, 0].numpy()


def check_tokens(trajectory, models):
    """Each turn is of one version, whose plain forward gives its tokens the same log-probs."""
    for turn in trajectory.turns:
        (version,) = set(turn.policy_versions.tolist())
        expected = expected_logprobs(models[version], turn)
        np.testing.assert_allclose(turn.behavior_logprobs, expected, atol=1e-4)


async def test_every_token_played_over_grpc_scores_under_the_version_it_is_stamped_with(
    tmp_path, tokenizer
):
    config = make_config()
    consumers = {**config.stream_consumers, Stream.TRAJECTORIES: (ConsumerGroup.LEARNER,)}
    bus, store = MemoryBus(consumers), WeightStore(str(tmp_path), config.name)
    identity = compute_model_identity(MODEL_PATH)
    models = {version: load_causal_lm(MODEL_PATH, "float32") for version in (0, 1)}
    with torch.no_grad():
        models[1].model.embed_tokens.weight.mul_(1.1)

    async def publish(version):
        manifest = store.publish(version, export_tensors(models[version]), identity)
        await bus.publish(Stream.POLICY_UPDATES, [codec.encode_weights_manifest(manifest)])

    async def issue(*groups):
        await bus.publish(Stream.TASKS, [codec.encode_task_group(group) for group in groups])

    async def count(stream, number):
        async with asyncio.timeout(30):
            # The bus offers no event for it.
            while len(await fetch(bus, stream)) < number:  # noqa: ASYNC110
                await asyncio.sleep(0.02)

    settings = Settings(grpc_port=0, instance="worker-1")
    async with household() as (address, sessions), sampling(tokenizer, store=store) as engine:
        environments = GrpcEnvironmentDirectory(step_timeout_s=5.0)
        health = Health()
        worker = asyncio.create_task(
            run_worker(config, settings, bus, engine, environments, health, RolloutMetrics())
        )
        await publish(0)
        await until(lambda: health.is_ready)
        await issue(*(make_group(config, address, number) for number in range(4)))
        await count(Stream.TRAJECTORIES, 16)
        await publish(1)
        await until(lambda: engine.policy_version == 1)
        await issue(*(make_group(config, address, number) for number in range(4, 6)))
        await count(Stream.TRAJECTORIES, 24)
        await issue(make_group(config, address, 6, Purpose.EVALUATION, version=0, size=8))
        await count(Stream.EVALUATIONS, 8)
        os.kill(os.getpid(), signal.SIGTERM)
        await worker
        assert sessions.num_sessions == 0
        await environments.close()

    trained = [
        codec.decode_trajectory(payload) for payload in await fetch(bus, Stream.TRAJECTORIES)
    ]
    evaluated = [
        codec.decode_trajectory(payload, Stream.EVALUATIONS)
        for payload in await fetch(bus, Stream.EVALUATIONS)
    ]
    assert {trajectory.min_policy_version for trajectory in trained} == {0, 1}
    assert {trajectory.max_policy_version for trajectory in evaluated} == {0}
    for trajectory in trained + evaluated:
        check_tokens(trajectory, models)
    ledger = [codec.decode_ledger_event(payload) for payload in await fetch(bus, Stream.LEDGER)]
    expected = [f"group-{number}" for number in range(6)]
    assert sorted(event.group_id for event in ledger) == expected
    assert {event.outcome for event in ledger} == {GroupOutcome.GENERATED}
    assert sum(turn.is_action_valid for trajectory in trained for turn in trajectory.turns) > 40


# ---- an environment that answers nonsense


class Nonsense(environment_pb2_grpc.EnvironmentServiceServicer):
    """Answers what it is given; counts calls."""

    def __init__(self, step=None, opened=None, num_full=0, gate=None) -> None:
        self.step = step or environment_pb2.StepResponse(observation="seen")
        self.opened = opened or environment_pb2.OpenSessionResponse(
            session_id="s", observation="start"
        )
        self.num_full, self.num_opens = num_full, 0
        self.gate, self.closed = gate, []

    async def Describe(self, request, context):
        return environment_pb2.DescribeResponse()

    async def OpenSession(self, request, context):
        self.num_opens += 1
        if self.gate is not None:
            await self.gate.wait()
        if self.num_opens <= self.num_full:
            raise CapacityError("All sessions are taken.")
        return self.opened

    async def CloseSession(self, request, context):
        self.closed.append(request.session_id)
        return environment_pb2.CloseSessionResponse()

    async def Step(self, request, context):
        if isinstance(self.step, Exception):
            raise self.step
        return self.step


@asynccontextmanager
async def client_of(servicer, **options):
    add = environment_pb2_grpc.add_EnvironmentServiceServicer_to_server
    server = build_server("127.0.0.1", 0, [RpcService("sdar.v1.EnvironmentService", add, servicer)])
    await server.start()
    options = {"step_timeout_s": 2.0, "open_patience_s": 2.0} | options
    client = GrpcEnvironmentClient(f"127.0.0.1:{server.port}", **options)
    try:
        yield client
    finally:
        await client.close()
        await server.stop(grace_s=0.0)


@pytest.mark.parametrize(
    ("response", "match"),
    [
        (environment_pb2.StepResponse(observation="seen", reward=math.nan), "reward nan"),
        (environment_pb2.StepResponse(observation="seen", reward=-math.inf), "reward -inf"),
        (
            environment_pb2.StepResponse(observation="seen", reward_components={"speed": math.nan}),
            "speed nan",
        ),
        (environment_pb2.StepResponse(reward=1.0), "without an observation"),
    ],
)
async def test_a_step_that_makes_no_sense_fails_the_episode(response, match):
    async with client_of(Nonsense(step=response)) as client:
        session = await client.open_session(TASK, "key")
        with pytest.raises(EnvironmentFailedError, match=match):
            await client.step(session.session_id, 0, "look")


async def test_the_last_step_may_come_without_an_observation():
    async with client_of(
        Nonsense(step=environment_pb2.StepResponse(terminated=True, is_success=True))
    ) as client:
        session = await client.open_session(TASK, "key")
        assert (await client.step(session.session_id, 0, "look")).is_success


async def test_a_session_without_an_observation_fails_the_episode():
    async with client_of(
        Nonsense(opened=environment_pb2.OpenSessionResponse(session_id="s"))
    ) as client:
        with pytest.raises(EnvironmentFailedError, match="without session_id or observation"):
            await client.open_session(TASK, "key")


async def test_a_description_without_the_environment_fails_the_episode():
    async with client_of(Nonsense()) as client:
        with pytest.raises(EnvironmentFailedError, match="Run `sdar env check"):
            await client.describe("household")


async def test_a_defect_of_the_server_fails_the_episode():
    async with client_of(Nonsense(step=ZeroDivisionError("oops"))) as client:
        session = await client.open_session(TASK, "key")
        with pytest.raises(EnvironmentFailedError, match="correlation id"):
            await client.step(session.session_id, 0, "look")


async def test_a_session_that_is_gone_fails_the_episode_but_an_unknown_task_is_the_task_s_fault():
    async with household() as (address, sessions):
        client = GrpcEnvironmentClient(address, step_timeout_s=2.0, open_patience_s=1.0)
        with pytest.raises(EnvironmentFailedError, match="Session lost"):
            await client.step("nobody", 0, "look")
        [task] = await sessions.list_tasks("household", "train", 0, 1)
        session = await client.open_session(task, "lost")
        sessions.close(session.session_id.partition("@")[0])
        with pytest.raises(EnvironmentFailedError, match="Session lost"):
            await client.step(session.session_id, 0, "look")
        with pytest.raises(InvalidInputError):
            await client.open_session(Task("household", "train", "no-such-task", "", "", 0), "key")
        await client.close()


async def test_a_full_server_is_waited_for():
    servicer = Nonsense(num_full=3)
    async with client_of(servicer) as client:
        assert (await client.open_session(TASK, "key")).observation == "start"
    assert servicer.num_opens == 4


@pytest.mark.parametrize("is_client_closed", [False, True])
async def test_a_session_that_opens_after_its_caller_gave_up_is_closed(is_client_closed):
    servicer = Nonsense(gate=asyncio.Event())
    async with client_of(servicer) as client:
        opening = asyncio.create_task(client.open_session(TASK, "key"))
        await until(lambda: servicer.num_opens == 1)
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening
        closing = asyncio.create_task(client.close()) if is_client_closed else None
        asyncio.get_running_loop().call_later(0.05, servicer.gate.set)
        await until(lambda: servicer.closed == ["s"])
        if closing:
            await closing


async def test_a_server_that_stays_away_fails_the_episode_after_a_while():
    client = GrpcEnvironmentClient("127.0.0.1:1", step_timeout_s=1.0, open_patience_s=0.3)
    with pytest.raises(EnvironmentFailedError, match=r"within 0\.3 s"):
        await client.open_session(TASK, "key")
    await client.close_session("s")
    await client.close()


# ---- the policy for agents outside


class Outside:
    """A client of a PolicyService."""

    def __init__(self, stub, engine) -> None:
        self.stub, self.engine = stub, engine

    async def generate(self, **fields):
        sampling = codec.sampling_to_proto(SamplingParameters(1.0, 1.0, 8))
        request = policy_pb2.GenerateRequest(**{"sampling": sampling, **fields})
        return await call(self.stub.Generate, request, timeout_s=5)


@pytest.fixture
async def outside(tokenizer):
    async with sampling(tokenizer) as engine:
        servicer = PolicyServicer(
            engine,
            tokenizer,
            run_id="run",
            model=compute_model_identity(MODEL_PATH),
            max_model_tokens=384,
            max_requests=4,
        )
        service = RpcService(
            SERVICE_NAME, policy_pb2_grpc.add_PolicyServiceServicer_to_server, servicer
        )
        server = build_server("127.0.0.1", 0, [service])
        await server.start()
        async with connect(f"127.0.0.1:{server.port}") as channel:
            yield Outside(policy_pb2_grpc.PolicyServiceStub(channel), engine)
        await server.stop(grace_s=0.0)


def chat(text):
    return policy_pb2.ChatPrompt(messages=[{"role": "user", "content": text}])


async def test_a_chat_is_rendered_and_a_token_prompt_is_taken_as_it_is(outside, tokenizer):
    first = await outside.generate(chat=chat("task"))
    found = tokenizer.tokenizer.decode(first.prompt_token_ids)
    assert found == "<|im_start|>user\ntask<|im_end|>\n<|im_start|>assistant\n"
    again = await outside.generate(tokens={"token_ids": first.prompt_token_ids})
    assert again.prompt_token_ids == first.prompt_token_ids
    num_tokens = len(again.response_token_ids)
    assert 0 < num_tokens == len(again.behavior_logprobs) == len(again.policy_versions) <= 8


async def test_a_repeated_request_id_gets_the_same_response_and_samples_once(outside):
    answers = await asyncio.gather(
        *(outside.generate(request_id="r", chat=chat("task")) for _ in range(3))
    )
    assert (
        answers[0]
        == answers[1]
        == answers[2]
        == await outside.generate(request_id="r", chat=chat("task"))
    )
    assert outside.engine.stats.num_generated_tokens == len(answers[0].response_token_ids)


async def test_a_request_id_used_for_something_else_is_a_conflict(outside):
    await outside.generate(request_id="r", chat=chat("task"))
    with pytest.raises(ConflictError, match="another request"):
        await outside.generate(request_id="r", chat=chat("other"))


async def test_a_request_that_failed_may_be_repeated_under_its_id(outside):
    with pytest.raises(StaleError, match="version 0"):
        await outside.generate(request_id="r", chat=chat("task"), min_policy_version=1)
    outside.engine.install(1, export_tensors(load_causal_lm(MODEL_PATH, "float32")))
    answer = await outside.generate(request_id="r", chat=chat("task"), min_policy_version=1)
    assert set(answer.policy_versions) == {1}


async def test_a_request_without_a_prompt_or_out_of_bounds_is_refused(outside):
    with pytest.raises(InvalidInputError, match="no prompt"):
        await outside.generate()
    with pytest.raises(InvalidInputError, match="token ids outside"):
        await outside.generate(tokens={"token_ids": [99_999]})
    with pytest.raises(InvalidInputError, match="128"):
        await outside.generate(request_id="x" * 129, chat=chat("task"))


async def test_the_policy_tells_its_version_and_model(outside):
    policy = await outside.stub.GetPolicy(policy_pb2.GetPolicyRequest())
    assert (policy.run_id, policy.policy_version, policy.max_model_tokens) == ("run", 0, 384)
    assert policy.model.name == "household-tiny"
