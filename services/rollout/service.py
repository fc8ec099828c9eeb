"""The rollout process: builds its parts from a run's configuration and serves until stopped."""

from __future__ import annotations

import asyncio
import contextlib
import zlib
from pathlib import Path

from sdar.bus.protocol import Bus
from sdar.config import RunConfig
from sdar.connect import build_bus
from sdar.engines.vllm_weights import vllm_environment
from sdar.model.chat import ChatTokenizer, compute_model_identity
from sdar.model.gpus import count_gpus
from sdar.process.gpu_time import GpuTime
from sdar.process.lifecycle import run_until_stopped
from sdar.process.settings import Settings, apply_environment
from sdar.process.telemetry import Health, serve_probes
from sdar.v1.policy_pb2_grpc import add_PolicyServiceServicer_to_server
from sdar.wire.rpc_server import RpcService, build_server
from sdar.wire.security import Security
from services.rollout.engine import Engine, VllmEngine
from services.rollout.environment_client import EnvironmentDirectory, GrpcEnvironmentDirectory
from services.rollout.episode import EpisodeRules
from services.rollout.metrics import RolloutMetrics
from services.rollout.policy_service import SERVICE_NAME, PolicyServicer
from services.rollout.prompting import Conversation, HistoryWindow, PromptStyleFactory
from services.rollout.skill_client import GrpcSkillSource, SkillSource
from services.rollout.worker import RolloutLimits, RolloutWorker

_MAX_SILENCE_S = 300.0
"""Longest healthy silence of the main loop: an engine on a GPU may take minutes to start."""
_DRAIN_S = 5.0


async def serve(config: RunConfig, settings: Settings) -> None:
    """Play for a run until SIGTERM.

    Raises:
        ConfigurationError: the model cannot be used.
        ConflictError: a port is taken.
        EngineFailedError: the engine died.
    """
    health = Health(max_silence_s=_MAX_SILENCE_S)
    security = Security.from_settings(settings)
    # Closed in the opposite order: the engine first, the bus late; the probes answer to the end.
    async with contextlib.AsyncExitStack() as cleanup:
        registry = cleanup.enter_context(serve_probes(settings.host, settings.probe_port, health))
        bus = build_bus(config, settings, on_blocked=health.report_blocked)
        cleanup.push_async_callback(bus.close)
        # Before the engine, which takes minutes: a wrong address shows at once.
        await bus.ping()
        environments = GrpcEnvironmentDirectory(
            security, step_timeout_s=config.environment.step_timeout_s
        )
        cleanup.push_async_callback(environments.close)
        skills = None
        if config.method.row.student_sees_skills:
            skills = GrpcSkillSource(settings.teacher_address, security)
            cleanup.push_async_callback(skills.close)
        engine = build_engine(config, settings)
        registry.register(GpuTime(count_gpus(config.rollout.tensor_parallel_size)))
        # Before it is started: a start that fails halfway leaves processes of vLLM to end.
        cleanup.push_async_callback(engine.stop)
        await engine.start()
        await run_worker(
            config, settings, bus, engine, environments, health, RolloutMetrics(registry), skills
        )


def build_engine(config: RunConfig, settings: Settings) -> Engine:
    """The engine a configuration asks for, not started."""
    apply_environment(vllm_environment(config.rollout.num_threads))
    return VllmEngine(
        config.model.path,
        dtype=config.model.dtype,
        max_model_len=config.model.max_sequence_tokens,
        max_num_seqs=config.rollout.max_concurrent_episodes,
        stop_token_ids=ChatTokenizer(config.model.path).stops.ids,
        weight_store_url=settings.weights_url,
        run_id=config.name,
        tensor_parallel_size=config.rollout.tensor_parallel_size,
        kv_cache_gib=config.rollout.kv_cache_gib,
        gpu_memory_utilization=config.rollout.gpu_memory_utilization,
        # Each worker draws its own tokens: members of a group that all begin alike would otherwise
        # repeat across workers.
        seed=zlib.crc32(f"{config.seed}.{settings.instance}".encode()) % 2**31,
    )


def build_rules(config: RunConfig) -> EpisodeRules:
    """What all episodes of a run have in common."""
    tokenizer = ChatTokenizer(config.model.path, config.model.template_date)
    is_turn_level = config.method.advantage_level == "turn"
    return EpisodeRules(
        tokenizer=tokenizer,
        build_prompts=_choose_prompts(config, tokenizer),
        model=compute_model_identity(Path(config.model.path)),
        max_sequence_tokens=config.model.max_sequence_tokens,
        # With advantages per turn each invalid turn is penalised on its own, which the learner
        # does.
        invalid_action_penalty=0.0 if is_turn_level else config.environment.invalid_action_penalty,
        shows_actions=config.rollout.show_actions,
    )


def _choose_prompts(config: RunConfig, tokenizer: ChatTokenizer) -> PromptStyleFactory:
    num_turns = config.rollout.history_turns
    if num_turns is None:
        return lambda setting: Conversation(tokenizer, setting)
    max_prompt_tokens = config.model.max_sequence_tokens - config.rollout.max_response_tokens
    return lambda setting: HistoryWindow(tokenizer, setting, num_turns, max_prompt_tokens)


async def run_worker(
    config: RunConfig,
    settings: Settings,
    bus: Bus,
    engine: Engine,
    environments: EnvironmentDirectory,
    health: Health,
    metrics: RolloutMetrics,
    skills: SkillSource | None = None,
) -> None:
    """Run one worker with its gRPC server on parts that are ready, until stopped."""
    rules = build_rules(config)
    worker = RolloutWorker(
        bus,
        engine,
        environments,
        rules,
        run_id=config.name,
        instance=settings.instance,
        limits=RolloutLimits(
            max_concurrent_episodes=config.rollout.max_concurrent_episodes,
            max_attempts=config.rollout.max_group_attempts,
            grace_s=settings.drain_s,
        ),
        health=health,
        metrics=metrics,
        skills=skills,
    )
    servicer = _build_servicer(config, engine, rules)
    service = RpcService(SERVICE_NAME, add_PolicyServiceServicer_to_server, servicer)
    server = build_server(
        settings.host, settings.grpc_port, [service], Security.from_settings(settings)
    )

    async def answer(stopping: asyncio.Event) -> None:
        await server.start()
        await server.set_ready(True)
        await stopping.wait()
        await server.stop(_DRAIN_S)

    await run_until_stopped(worker.run, answer, bus.hurry)


def _build_servicer(config: RunConfig, engine: Engine, rules: EpisodeRules) -> PolicyServicer:
    return PolicyServicer(
        engine,
        rules.tokenizer,
        run_id=config.name,
        model=rules.model,
        max_model_tokens=config.model.max_sequence_tokens,
        max_requests=config.rollout.max_concurrent_episodes,
    )
