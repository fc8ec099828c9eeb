"""The teacher process: builds its parts from a run's configuration and serves until stopped."""

from __future__ import annotations

import asyncio
import contextlib

import torch

from sdar.algorithms.scorer_check import require_exact_scorer
from sdar.bus.protocol import Bus
from sdar.config import RunConfig
from sdar.connect import build_bus, build_weight_store
from sdar.contracts.streams import ConsumerGroup
from sdar.model.causal_lm import load_causal_lm
from sdar.model.chat import ChatTokenizer
from sdar.model.gpus import count_gpus
from sdar.process.gpu_time import GpuTime
from sdar.process.lifecycle import retry_while_unavailable, run_until_stopped, wait_or_stop
from sdar.process.settings import Settings
from sdar.process.telemetry import Health, serve_probes
from sdar.v1.teacher_pb2_grpc import add_TeacherServiceServicer_to_server
from sdar.weights.pins import PinnedVersions
from sdar.wire.rpc_server import RpcService, build_server
from sdar.wire.security import Security
from services.teacher.context import ContextBuilder
from services.teacher.embedding import SentenceEncoder, SkillIndex
from services.teacher.metrics import TeacherMetrics
from services.teacher.policy import ScoringPolicy
from services.teacher.retrieval import Retriever
from services.teacher.retrieval_kinds import RETRIEVAL_KINDS
from services.teacher.scorer import Scorer, TransformersScorer, WeightReader
from services.teacher.skills import open_skill_library
from services.teacher.teacher import Teacher
from services.teacher.teacher_service import SERVICE_NAME, TeacherServicer
from services.teacher.utility import SkillUtility
from services.teacher.vllm_scorer import VllmScorer
from services.teacher.worker import TeacherLimits, TeacherWorker

_MAX_SILENCE_S = 300.0
"""Longest healthy silence of the main loop: a commit may wait two minutes for the learner."""
_FORWARDS_PER_BATCH = 4
"""Forward passes of one batch of the main loop, see `TeacherLimits.batch_tokens`."""
_DRAIN_S = 5.0


async def serve(config: RunConfig, settings: Settings) -> None:
    """Score for a run until SIGTERM.

    A method without a teacher still has skills handed out and scores made on demand.

    Raises:
        ConfigurationError: model or skill library cannot be used.
        ConflictError: a port is taken.
    """
    health = Health(max_silence_s=_MAX_SILENCE_S)
    async with contextlib.AsyncExitStack() as cleanup:
        registry = cleanup.enter_context(serve_probes(settings.host, settings.probe_port, health))
        registry.register(GpuTime(count_gpus(config.teacher.tensor_parallel_size)))
        bus = build_bus(config, settings, on_blocked=health.report_blocked)
        cleanup.push_async_callback(bus.close)
        scorer = build_scorer(config, build_weight_store(config, settings), settings)
        cleanup.push_async_callback(scorer.stop)
        teacher = build_teacher(config, settings, bus, scorer, TeacherMetrics(registry))
        await scorer.start()
        await _run(config, settings, bus, teacher, health)


def build_scorer(config: RunConfig, weights: WeightReader, settings: Settings) -> Scorer:
    """The scorer a configuration asks for, with the base weights.

    Args:
        weights: read by the transformers scorer; vLLM's processes open the store themselves.
    """
    teacher = config.teacher
    if teacher.scorer == "vllm":
        return _build_vllm_scorer(config, settings)
    torch.set_num_threads(teacher.num_threads)
    model = load_causal_lm(config.model.path, config.model.dtype)
    if torch.cuda.is_available():
        model = model.to("cuda")
    require_exact_scorer(model)
    chunk_tokens = config.training.logprob_chunk_tokens
    return TransformersScorer(
        model, weights, batch_tokens=teacher.batch_tokens, chunk_tokens=chunk_tokens
    )


def _build_vllm_scorer(config: RunConfig, settings: Settings) -> VllmScorer:
    return VllmScorer(
        config.model.path,
        dtype=config.model.dtype,
        max_sequence_tokens=config.model.max_sequence_tokens,
        batch_tokens=config.teacher.batch_tokens,
        weight_store_url=settings.weights_url,
        run_id=config.name,
        tensor_parallel_size=config.teacher.tensor_parallel_size,
        kv_cache_gib=config.rollout.kv_cache_gib,
        gpu_memory_utilization=config.rollout.gpu_memory_utilization,
    )


def build_retriever(config: RunConfig, settings: Settings, bus: Bus) -> Retriever:
    """The retriever a configuration asks for, with its sentence model if it needs one.

    Raises:
        ConfigurationError: library or sentence model cannot be used, or options contradict each
            other.
    """
    teacher = config.teacher
    library = open_skill_library(config)
    index = None
    utility = None
    kind = RETRIEVAL_KINDS[teacher.retrieval]
    if kind.needs_index:
        index = SkillIndex(
            library.specific, SentenceEncoder(teacher.embedding_model), settings.cache / "skills"
        )
    if kind.learns:
        utility = SkillUtility(bus, teacher.ucb_exploration)
    return Retriever(
        library,
        kind=teacher.retrieval,
        num_skills=teacher.num_skills,
        wrong_skill_fraction=teacher.wrong_skill_fraction,
        index=index,
        utility=utility,
    )


def build_teacher(
    config: RunConfig, settings: Settings, bus: Bus, scorer: Scorer, metrics: TeacherMetrics
) -> Teacher:
    """A teacher by configuration; bus and scorer may be any."""
    retriever = build_retriever(config, settings, bus)
    contexts = ContextBuilder(
        ChatTokenizer(config.model.path, config.model.template_date),
        retriever,
        config.model.max_sequence_tokens,
    )
    pins = PinnedVersions(bus, f"{ConsumerGroup.TEACHER}.{settings.instance}")
    policy = ScoringPolicy(bus, scorer, pins, metrics, config.teacher.max_lag)
    return Teacher(contexts, scorer, policy, metrics, config.teacher.max_lag)


async def _run(
    config: RunConfig, settings: Settings, bus: Bus, teacher: Teacher, health: Health
) -> None:
    server = build_server(
        settings.host,
        settings.grpc_port,
        [RpcService(SERVICE_NAME, add_TeacherServiceServicer_to_server, TeacherServicer(teacher))],
        Security.from_settings(settings),
    )
    worker = TeacherWorker(
        bus,
        teacher,
        run_id=config.name,
        instance=settings.instance,
        health=health,
        limits=TeacherLimits(batch_tokens=_FORWARDS_PER_BATCH * config.teacher.batch_tokens),
    )

    async def answer(stopping: asyncio.Event) -> None:
        # Ready only with weights within the lag bound: what asks meanwhile would have to wait.
        await server.start()
        await retry_while_unavailable(teacher.catch_up, stopping, what="policy weights")
        health.mark_ready()
        await server.set_ready(True)
        await stopping.wait()
        await server.stop(_DRAIN_S)

    async def idle(stopping: asyncio.Event) -> None:
        while not await wait_or_stop(stopping, 1.0):
            health.beat()

    main = worker.run if config.needs_teacher else idle
    await run_until_stopped(main, worker.report, teacher.keep_pins, answer, bus.hurry)
