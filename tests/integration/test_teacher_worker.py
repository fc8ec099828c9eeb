"""The teacher's process in this one: `serve` with Redis, a weight store, gRPC and probes."""

from __future__ import annotations

import asyncio
import os
import signal

import httpx
import numpy as np
import pytest
import torch
from transformers import Qwen2ForCausalLM

from sdar.bus.embedded_redis import EmbeddedRedis
from sdar.config import EnvironmentConfig, ModelConfig, RunConfig, TeacherConfig
from sdar.connect import build_bus, build_weight_store
from sdar.contracts import codec
from sdar.contracts.streams import ConsumerGroup, Stream
from sdar.model.causal_lm import export_tensors
from sdar.model.chat import ChatTokenizer, compute_model_identity
from sdar.process.settings import Settings
from sdar.v1 import teacher_pb2
from sdar.v1.teacher_pb2_grpc import TeacherServiceStub
from sdar.wire.rpc_client import call, connect
from services.envs.household import HouseholdEnvironment
from services.teacher.service import serve
from tests.unit.teacher.builders import RUN_ID, make_model_directory, play

TASK = next(task for task in HouseholdEnvironment().list_tasks("train") if task.task_type == "cook")


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory):
    return make_model_directory(tmp_path_factory.mktemp("tiny-model"))


@pytest.fixture
def config(model_directory):
    return RunConfig(
        name=RUN_ID,
        model=ModelConfig(path=model_directory, dtype="float32", max_sequence_tokens=600),
        environment=EnvironmentConfig(name="household"),
        teacher=TeacherConfig(max_lag=0),
    )


@pytest.fixture
def settings(tmp_path, unused_tcp_port_factory):
    with EmbeddedRedis(tmp_path / "redis") as redis:
        yield Settings(
            redis_url=redis.url,
            weights_url=str(tmp_path / "weights"),
            grpc_port=unused_tcp_port_factory(),
            probe_port=unused_tcp_port_factory(),
        )


async def until_ready(settings):
    async with httpx.AsyncClient() as client, asyncio.timeout(60):
        while True:
            try:
                if (
                    await client.get(f"http://127.0.0.1:{settings.probe_port}/readyz")
                ).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            await asyncio.sleep(0.05)


async def read_scored(bus, count):
    deliveries = []
    async with asyncio.timeout(60):
        while len(deliveries) < count:
            deliveries += await bus.read(
                Stream.SCORED, ConsumerGroup.LEARNER, "learner", 100, block_s=1.0
            )
    return [codec.decode_scored_trajectory(delivery.payload) for delivery in deliveries]


def score_plainly(model, chat, trajectory, skill):
    """Log-probs of the first response by one plain forward, the skill put in by hand."""
    asked = f"{skill} {trajectory.turns[0].messages[0].content}"
    text = f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n"
    prompt = chat.tokenizer.encode(text, add_special_tokens=False)
    ids = torch.tensor([[*prompt, *trajectory.turns[0].response_token_ids.tolist()]])
    with torch.no_grad():
        logprobs = torch.log_softmax(model(ids).logits[0], -1)
    return [float(logprobs[t - 1, ids[0, t]]) for t in range(len(prompt), ids.shape[1])]


async def test_a_teacher_scores_with_the_newest_published_weights_and_drains_on_sigterm(
    config, settings, model_directory
):
    chat = ChatTokenizer(model_directory)
    bus = build_bus(config, settings)
    store = build_weight_store(config, settings)
    serving = asyncio.create_task(serve(config, settings))
    await until_ready(settings)

    model = Qwen2ForCausalLM.from_pretrained(model_directory).eval()
    first = [play(chat, TASK, episode_index=index, seed=index) for index in range(4)]
    await bus.publish(
        Stream.TRAJECTORIES, [codec.encode_trajectory(trajectory) for trajectory in first]
    )
    before = await read_scored(bus, 4)

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    manifest = store.publish(1, export_tensors(model), compute_model_identity(model_directory))
    await bus.publish(Stream.POLICY_UPDATES, [codec.encode_weights_manifest(manifest)])
    await bus.publish(
        Stream.TRAJECTORIES, [codec.encode_trajectory(trajectory) for trajectory in first]
    )
    after = await read_scored(bus, 4)

    assert {item.score.teacher_version for item in before} == {0}
    assert {item.score.teacher_version for item in after} == {1}
    skill = "skill cook : first use sink . after sink use oven . after oven put ."
    for item in after:
        assert item.score.skill_ids == ("household-cook",)
        wanted = score_plainly(model, chat, item.trajectory, skill)
        np.testing.assert_allclose(item.score.turn_logprobs[0], wanted, atol=5e-5, rtol=0)

    channel = connect(f"127.0.0.1:{settings.grpc_port}")
    request = teacher_pb2.ScoreRequest(
        request_id="on-demand",
        trajectory=codec.trajectory_to_proto(first[0]),
        min_teacher_version=1,
    )
    response = await call(TeacherServiceStub(channel).Score, request, timeout_s=30)
    on_demand = codec.teacher_score_from_proto(response.score)
    for values, streamed in zip(on_demand.turn_logprobs, after[0].score.turn_logprobs, strict=True):
        np.testing.assert_allclose(values, streamed, atol=1e-5, rtol=0)
    await channel.close()

    async with httpx.AsyncClient() as client:
        metrics = (await client.get(f"http://127.0.0.1:{settings.probe_port}/metrics")).text
    assert "sdar_teacher_scored_trajectories_total 9.0" in metrics
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.wait_for(serving, 30)
    lag = await bus.stream_lag(Stream.TRAJECTORIES, ConsumerGroup.TEACHER)
    assert (lag.num_undelivered, lag.num_pending) == (0, 0)
    await bus.close()
