"""The environment server over real gRPC, as any client in any language sees it."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from collections import Counter

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from sdar.config import EnvironmentConfig, ModelConfig, RolloutConfig, RunConfig
from sdar.contracts.codec import task_from_proto
from sdar.contracts.errors import (
    CapacityError,
    ConflictError,
    InvalidInputError,
    UnavailableError,
    UnknownResourceError,
)
from sdar.environments.server import SERVICE_NAME
from sdar.environments.sessions import SessionLimits
from sdar.process.settings import Settings
from sdar.v1 import environment_pb2 as pb
from sdar.v1 import environment_pb2_grpc
from sdar.wire.rpc_client import connect
from services.envs.household import HouseholdEnvironment
from services.envs.household.demonstrations import list_demonstration
from services.envs.household.game import parse_task_id
from services.envs.service import serve
from tests.integration.environment_server import TASK_ID, serving
from tests.support import until


@pytest.fixture
async def client():
    async with serving(drain_s=0.0) as (client, _, _):
        yield client


async def test_describe_tells_splits_limits_and_room(client):
    described = (await client.describe()).environments
    assert [one.name for one in described] == ["household"]
    household = described[0]
    assert {split.name: split.num_tasks for split in household.splits} == {
        "train": 7246,
        "heldout": 818,
    }
    found = (household.version, household.limits.max_turns, household.capacity.num_open_sessions)
    assert found == ("1", 8, 0)
    await client.open()
    assert (await client.describe("household")).environments[0].capacity.num_open_sessions == 1


async def test_pages_of_tasks_make_the_whole_split_in_order(client):
    tasks, token = [], ""
    while True:
        page = await client.list_tasks("heldout", page_size=300, page_token=token)
        tasks += map(task_from_proto, page.tasks)
        token = page.next_page_token
        if not token:
            break
    assert tuple(tasks) == HouseholdEnvironment().list_tasks("heldout")


async def test_the_server_bounds_a_page(client):
    page = await client.list_tasks("train")
    assert len(page.tasks) == 1000
    assert page.next_page_token


@pytest.mark.parametrize("token", ["x", "-1", "819", "9" * 40, "0" * 12 + "9" * 5000])
async def test_a_strange_page_token_is_refused(client, token):
    with pytest.raises(InvalidInputError, match="page_token"):
        await client.list_tasks("heldout", page_token=token)


async def test_an_expert_plays_to_the_reward(client):
    opened = await client.open(seed=3, lease_s=20)
    assert opened.observation.startswith("task : polish the apple")
    found = (opened.task.task_id, opened.task.task_type, opened.task.seed, opened.lease_s)
    assert found == (TASK_ID, "polish", 3, 20)
    assert list(opened.admissible_actions) == ["open drawer"]
    task = parse_task_id(TASK_ID)
    steps = [
        await client.step(opened.session_id, index, text)
        for index, text in enumerate(list_demonstration(task, task.procedure))
    ]
    assert [step.reward for step in steps] == [0, 0, 0, 0, 1]
    assert (steps[-1].terminated, steps[-1].truncated, steps[-1].is_success) == (True, False, True)
    assert dict(steps[-1].reward_components) == {"success": 1.0}
    await client.close(opened.session_id)
    await client.close(opened.session_id)


async def test_an_invalid_action_is_reported_not_raised(client):
    opened = await client.open()
    step = await client.step(opened.session_id, 0, "fly")
    found = (step.observation, step.action, step.is_action_valid)
    assert found == ("nothing happens .", "fly", False)


async def test_errors_keep_their_class_and_fields_on_the_wire(client):
    with pytest.raises(UnknownResourceError, match="no task"):
        await client.open("fly-apple-drawer-desk")
    with pytest.raises(UnknownResourceError, match="No environment 'chess'"):
        await client.open(environment="chess")
    with pytest.raises(UnknownResourceError, match="no split"):
        await client.list_tasks("test")
    opened = await client.open()
    with pytest.raises(ConflictError) as error:
        await client.step(opened.session_id, 4, "x")
    assert error.value.fields["next_step_index"] == "0"


async def test_open_and_step_can_be_repeated_after_a_lost_answer(client):
    first, second = [await client.open(idempotency_key="episode 1") for _ in range(2)]
    assert first == second
    answers = [await client.step(first.session_id, 0, "open drawer") for _ in range(2)]
    assert answers[0] == answers[1]
    assert (await client.step(first.session_id, 1, "take apple")).is_action_valid


async def test_a_full_server_says_so():
    async with serving(SessionLimits(max_sessions=1), drain_s=0.0) as (client, _, _):
        opened = await client.open()
        with pytest.raises(CapacityError):
            await client.open()
        await client.close(opened.session_id)
        await client.open()


async def test_a_forgotten_session_is_reaped():
    async with serving(SessionLimits(default_lease_s=0.01), reap_every_s=0.01) as (client, _, _):
        opened = await client.open()
        async with asyncio.timeout(5):
            while (await client.describe()).environments[0].capacity.num_open_sessions:
                pass
        with pytest.raises(UnknownResourceError):
            await client.step(opened.session_id, 0, "open drawer")


async def test_a_stopping_server_lets_open_episodes_finish_and_starts_none():
    async with serving(drain_s=5.0) as (client, stopping, health):
        opened = await client.open()
        assert health.is_ready
        stopping.set()
        async with asyncio.timeout(5):
            while health.is_ready:
                await client.describe()
        with pytest.raises(UnavailableError):
            await client.open()
        assert (await client.step(opened.session_id, 0, "open drawer")).is_action_valid
        await client.close(opened.session_id)


async def test_a_stopping_server_lives_and_waits_for_no_session_that_its_caller_forgot():
    async with serving(SessionLimits(default_lease_s=1.0), drain_s=60.0, reap_every_s=0.05) as (
        client,
        stopping,
        health,
    ):
        await client.open()
        stopping.set()
        health.max_silence_s = 0.5
        await until(lambda: not health.is_ready)
        await asyncio.sleep(0.6)
        assert health.is_alive
        began_s = time.monotonic()
    assert time.monotonic() - began_s < 10, "the lease ran out long before the drain"


async def test_standard_health_and_reflection_are_offered(client):
    stub = health_pb2_grpc.HealthStub(client.channel)
    answer = await stub.Check(health_pb2.HealthCheckRequest(service=SERVICE_NAME))
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
    requests = [reflection_pb2.ServerReflectionRequest(list_services="")]
    async for response in reflection_pb2_grpc.ServerReflectionStub(
        client.channel
    ).ServerReflectionInfo(iter(requests)):
        assert SERVICE_NAME in {service.name for service in response.list_services_response.service}


async def test_many_episodes_at_once_are_all_won_and_fast(client):
    """The demo's update takes about 600 steps; here 128 episodes play at once over one channel."""
    tasks = HouseholdEnvironment().list_tasks("heldout")[:128]

    async def play(task) -> tuple[bool, int]:
        opened = await client.open(task.task_id)
        known = parse_task_id(task.task_id)
        for index, text in enumerate(list_demonstration(known, known.procedure)):
            step = await client.step(opened.session_id, index, text)
        await client.close(opened.session_id)
        return step.is_success, index + 1

    began_s = time.perf_counter()
    results = await asyncio.gather(*map(play, tasks))
    assert Counter(won for won, _ in results) == {True: 128}
    num_calls = sum(turns + 2 for _, turns in results)
    assert (time.perf_counter() - began_s) / num_calls < 0.02


async def test_the_service_of_a_run_serves_its_environment_with_its_bounds_until_sigterm(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = RunConfig(
        name="run",
        model=ModelConfig(path=tmp_path),
        environment=EnvironmentConfig(name="household", capacity=3, step_timeout_s=7),
        rollout=RolloutConfig(max_response_tokens=16),
    )
    service = asyncio.create_task(serve(config, Settings(grpc_port=port, probe_port=0)))
    async with connect(f"127.0.0.1:{port}") as channel:
        stub = environment_pb2_grpc.EnvironmentServiceStub(channel)
        described = (
            await stub.Describe(pb.DescribeRequest(), timeout=10, wait_for_ready=True)
        ).environments[0]
    assert (described.capacity.max_sessions, described.limits.step_timeout_s) == (3, 7)
    # Safe: the server answered, so the service owns the signal by now.
    os.kill(os.getpid(), signal.SIGTERM)
    async with asyncio.timeout(10):
        await service
