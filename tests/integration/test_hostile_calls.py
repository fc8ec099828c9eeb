"""Every gRPC method of the contract against hostile requests, on real servers and parts.

Methods are found in the descriptors: a new one is called without a word here, a new service fails
until it has a server here. Thousands of requests from fixed seeds: random bytes, good requests with
bytes or fields changed, every field at its extremes. An answer is OK or a typed refusal, never
INTERNAL or UNKNOWN, and not silence; afterwards a good request is answered as before.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import pkgutil
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
import structlog
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message_factory import GetMessageClass
from prometheus_client import CollectorRegistry

import sdar.v1
from sdar.config import EnvironmentConfig, MethodConfig, ModelConfig, RunConfig, TrainingConfig
from sdar.contracts import codec
from sdar.contracts.streams import Stream
from sdar.contracts.types import ModelIdentity, SamplingParameters
from sdar.environments.registry import load_environment
from sdar.environments.sessions import SessionLimits
from sdar.environments.workers import WorkerHost
from sdar.in_process.memory_bus import MemoryBus
from sdar.in_process.transformers_engine import TransformersEngine
from sdar.model.causal_lm import load_causal_lm
from sdar.model.chat import ChatTokenizer
from sdar.process.telemetry import Health
from sdar.v1 import (
    environment_pb2,
    gateway_pb2_grpc,
    policy_pb2,
    policy_pb2_grpc,
    teacher_pb2,
    teacher_pb2_grpc,
)
from sdar.wire.rpc_client import connect
from sdar.wire.rpc_errors import read_error_detail
from sdar.wire.rpc_server import RpcService, build_server
from services.gateway.environments import GrpcEnvironmentCatalog
from services.gateway.grpc_service import GatewayServicer
from services.gateway.history import History
from services.gateway.metrics import GatewayMetrics
from services.gateway.scheduler import Scheduler
from services.rollout.policy_service import PolicyServicer
from services.teacher.context import ContextBuilder
from services.teacher.metrics import TeacherMetrics
from services.teacher.retrieval import Retriever
from services.teacher.scorer import TransformersScorer
from services.teacher.teacher import Teacher
from services.teacher.teacher_service import TeacherServicer
from tests.fuzzing import Fuzzer, hostile_inputs, resident_bytes
from tests.integration.environment_server import TASK_ID, serving
from tests.support import EXAMPLES, until
from tests.unit.teacher.builders import LIBRARY, MemoryWeights, build_follower, play

MODEL_PATH = EXAMPLES / "models" / "household-tiny"
MODEL = ModelIdentity("household-tiny", "f00d")
MAX_MODEL_TOKENS = 384
REQUESTS_PER_METHOD = 300
CONCURRENT_REQUESTS = 25
ANSWER_WITHIN_S = 30.0
MAX_GROWTH_BYTES = 256 << 20
"""What server and client, which share this process, may keep after all requests to one service."""
SHOWN_DEFECTS = 10
DEFECTS = {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.DEADLINE_EXCEEDED}


def list_services() -> dict[str, ServiceDescriptor]:
    modules = [
        importlib.import_module(f"sdar.v1.{module.name}")
        for module in pkgutil.iter_modules(sdar.v1.__path__)
    ]
    files = [module.DESCRIPTOR for module in modules if module.__name__.endswith("_pb2")]
    return {
        service.full_name: service for file in files for service in file.services_by_name.values()
    }


@dataclass
class Target:
    """A running server.

    Attributes:
        texts: names and ids that lead past the first check.
        good: method name -> a request that is answered with OK.
    """

    address: str
    texts: tuple[str, ...]
    good: dict[str, Callable[[], Any]] = field(default_factory=dict)


@contextlib.asynccontextmanager
async def serve(name: str, add: Callable[[Any, Any], None], servicer: object) -> AsyncIterator[str]:
    server = build_server("127.0.0.1", 0, [RpcService(name, add, servicer)])
    await server.start()
    try:
        yield f"127.0.0.1:{server.port}"
    finally:
        await server.stop(0)


@contextlib.asynccontextmanager
async def environment() -> AsyncIterator[Target]:
    host = WorkerHost({"household": load_environment("household")}, num_workers=1)
    limits = SessionLimits(max_sessions=64, default_lease_s=1.0, max_lease_s=2.0)
    async with serving(limits, host, drain_s=0.0) as (client, _, _):
        opened = await client.open(lease_s=2.0)
        yield Target(
            client.address,
            ("household", "train", "heldout", TASK_ID, opened.session_id, "open drawer", "100"),
            {
                "Describe": lambda: environment_pb2.DescribeRequest(environment="household"),
                "ListTasks": lambda: environment_pb2.ListTasksRequest(
                    environment="household", split="heldout", page_size=5
                ),
                "OpenSession": lambda: environment_pb2.OpenSessionRequest(
                    environment="household", task_id=TASK_ID, lease_s=1.0
                ),
                "Step": lambda: environment_pb2.StepRequest(
                    session_id=opened.session_id, text="open drawer"
                ),
                "CloseSession": lambda: environment_pb2.CloseSessionRequest(session_id="nobody"),
            },
        )


@contextlib.asynccontextmanager
async def teacher() -> AsyncIterator[Target]:
    chat, bus = ChatTokenizer(MODEL_PATH), MemoryBus({})
    scorer = TransformersScorer(
        load_causal_lm(MODEL_PATH, "float32"),
        MemoryWeights({}),
        batch_tokens=4096,
        chunk_tokens=512,
    )
    contexts = ContextBuilder(
        chat, Retriever(LIBRARY, kind="task_type", num_skills=3), MAX_MODEL_TOKENS
    )
    metrics = TeacherMetrics(CollectorRegistry())
    servicer = TeacherServicer(
        Teacher(contexts, scorer, build_follower(bus, scorer, 2), metrics, max_lag=2)
    )
    trajectory = codec.trajectory_to_proto(play(chat))
    add = teacher_pb2_grpc.add_TeacherServiceServicer_to_server
    async with serve("sdar.v1.TeacherService", add, servicer) as address:
        yield Target(
            address,
            ("clean", "household", "g0", "assistant", "user"),
            {
                "Score": lambda: teacher_pb2.ScoreRequest(trajectory=trajectory),
                "RetrieveSkills": lambda: teacher_pb2.RetrieveSkillsRequest(
                    task=trajectory.task, key="g0"
                ),
            },
        )
    await scorer.stop()


@contextlib.asynccontextmanager
async def policy() -> AsyncIterator[Target]:
    tokenizer = ChatTokenizer(MODEL_PATH)
    stops = tokenizer.stops.ids
    engine = TransformersEngine(
        MODEL_PATH, dtype="float32", max_sequence_tokens=MAX_MODEL_TOKENS, stop_token_ids=stops
    )
    await engine.start()
    servicer = PolicyServicer(
        engine,
        tokenizer,
        run_id="run",
        model=MODEL,
        max_model_tokens=MAX_MODEL_TOKENS,
        max_requests=CONCURRENT_REQUESTS,
    )
    sampling = codec.sampling_to_proto(SamplingParameters(1.0, 1.0, 4))
    messages = [{"role": "user", "content": "clean the mug ."}]
    async with serve(
        "sdar.v1.PolicyService", policy_pb2_grpc.add_PolicyServiceServicer_to_server, servicer
    ) as address:
        yield Target(
            address,
            ("user", "assistant", "system"),
            {
                "Generate": lambda: policy_pb2.GenerateRequest(
                    chat={"messages": messages}, sampling=sampling
                ),
                "GetPolicy": policy_pb2.GetPolicyRequest,
            },
        )
    await engine.stop()


@contextlib.asynccontextmanager
async def gateway() -> AsyncIterator[Target]:
    config = RunConfig(
        name="hostile",
        model=ModelConfig(path=MODEL_PATH),
        environment=EnvironmentConfig(name="household"),
        method=MethodConfig(name="grpo"),
        training=TrainingConfig(num_updates=2, groups_per_update=2, group_size=2),
    )
    async with environment() as played:
        bus = MemoryBus(config.stream_consumers)
        scheduler = Scheduler(
            config,
            bus,
            GrpcEnvironmentCatalog(),
            History(Stream.TRAJECTORIES),
            Health(),
            default_address=played.address,
            metrics=GatewayMetrics(CollectorRegistry()),
        )
        stopping = asyncio.Event()
        running = asyncio.create_task(scheduler.run(stopping))
        add = gateway_pb2_grpc.add_GatewayServiceServicer_to_server
        await until(lambda: bool(scheduler.environments))
        async with serve("sdar.v1.GatewayService", add, GatewayServicer(scheduler)) as address:
            good = {"name": "household", "address": played.address}
            request = GetMessageClass(
                list_services()["sdar.v1.GatewayService"]
                .methods_by_name["RegisterEnvironment"]
                .input_type
            )
            yield Target(
                address,
                ("household", played.address),
                {"RegisterEnvironment": lambda: request(**good)},
            )
        stopping.set()
        await running


@pytest.fixture(autouse=True)
def log_events():
    """What was logged, instead of its text on the terminal."""
    with structlog.testing.capture_logs() as events:
        yield events


SERVERS: dict[str, Callable[[], contextlib.AbstractAsyncContextManager[Target]]] = {
    "sdar.v1.EnvironmentService": environment,
    "sdar.v1.TeacherService": teacher,
    "sdar.v1.PolicyService": policy,
    "sdar.v1.GatewayService": gateway,
}


async def send(
    channel: grpc.aio.Channel, path: str, data: bytes
) -> tuple[grpc.StatusCode, str, bool]:
    """Status, details and whether they have a type, of one call with these bytes as its request."""
    try:
        await channel.unary_unary(path)(data, timeout=ANSWER_WITHIN_S)
        return grpc.StatusCode.OK, "", True
    except grpc.aio.AioRpcError as error:
        return error.code(), error.details() or "", read_error_detail(error) is not None


async def attack(
    target: Target, method: MethodDescriptor, channel: grpc.aio.Channel
) -> Counter[grpc.StatusCode]:
    path = f"/{method.containing_service.full_name}/{method.name}"
    fuzzer = Fuzzer(zlib.crc32(path.encode()), target.texts)
    good = target.good.get(method.name, lambda: None)
    inputs = list(
        hostile_inputs(fuzzer, GetMessageClass(method.input_type), REQUESTS_PER_METHOD, good)
    )
    seen: Counter[grpc.StatusCode] = Counter()
    defects: list[str] = []
    for start in range(0, len(inputs), CONCURRENT_REQUESTS):
        batch = inputs[start : start + CONCURRENT_REQUESTS]
        for data, (code, details, is_typed) in zip(
            batch, await asyncio.gather(*(send(channel, path, data) for data in batch)), strict=True
        ):
            seen[code] += 1
            if code in DEFECTS or not is_typed:
                defects.append(f"{code} {details!r} for {data[:300]!r} ({len(data)} bytes)")
    assert not defects, f"{path}: {len(defects)} defects, first: " + "\n".join(
        defects[:SHOWN_DEFECTS]
    )
    return seen


@pytest.mark.parametrize("name", sorted(list_services()))
async def test_a_service_answers_or_refuses_by_type_whatever_it_is_sent_and_goes_on(
    name: str,
) -> None:
    service = list_services()[name]
    async with SERVERS[name]() as target, connect(target.address) as channel:
        for method in service.methods:  # Warm: what a first call loads and caches is no growth.
            good = target.good.get(method.name, GetMessageClass(method.input_type))()
            await send(channel, f"/{name}/{method.name}", good.SerializeToString())
        before = resident_bytes()
        for method in service.methods:
            seen = await attack(target, method, channel)
            assert sum(seen.values()) == REQUESTS_PER_METHOD
            assert seen[grpc.StatusCode.INVALID_ARGUMENT], (
                f"{method.name} took random bytes for a request: {seen}"
            )
        for method in service.methods:
            good = target.good.get(method.name, GetMessageClass(method.input_type))()
            if method.name != "Step":
                code, details, _ = await send(
                    channel, f"/{name}/{method.name}", good.SerializeToString()
                )
                assert code in (grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED), (
                    f"{method.name}: {code} {details}"
                )
        assert resident_bytes() - before < MAX_GROWTH_BYTES
