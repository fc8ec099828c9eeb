"""Measures the rollout service's cost on top of vLLM: sampled tokens per second at 32 episodes.

One AsyncLLM serves both sides in turn, so the engine and its arguments are the same object. Ours is
a `RolloutWorker` with its engine, prompts, episodes, codec and bus on a real Redis: task groups in,
trajectories and ledger events out. The peer is 32 coroutines around `AsyncLLM.generate`, each an
episode at a time, with the same sampling parameters, feeding back the samples.

The environment answers at once from a script: the observations that an expert sees in household
tasks, for as many turns as he needs. The model's copy knows no end token, so every response has the
full length and both sides do the same work whatever is sampled; each round checks that.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from loadtest.comparison import Comparison, Measurement, Say, Target, describe_pair
from loadtest.workloads import MODEL_PATH, RUN_ID, SEED, Script, record_scripts
from sdar.bus.embedded_redis import EmbeddedRedis
from sdar.bus.redis import RedisBus
from sdar.contracts import codec
from sdar.contracts.streams import ConsumerGroup, Stream
from sdar.contracts.types import (
    ChatMessage,
    EnvironmentIdentity,
    Purpose,
    SamplingParameters,
    Task,
    TaskGroup,
)
from sdar.engines.vllm_weights import vllm_environment
from sdar.model.chat import ChatTokenizer, compute_model_identity
from sdar.process.settings import apply_environment
from sdar.process.telemetry import Health, configure_logging
from services.rollout.engine import VllmEngine
from services.rollout.environment_client import EnvironmentProfile, Session, StepOutcome
from services.rollout.episode import EpisodeRules
from services.rollout.metrics import RolloutMetrics
from services.rollout.prompting import Conversation
from services.rollout.worker import RolloutLimits, RolloutWorker

NUM_CONCURRENT = 32
GROUP_SIZE = 8
MAX_MODEL_LEN = 1024
TARGET = Target("at_least", 0.85)
CONSUMERS = {
    Stream.TASKS: (ConsumerGroup.ROLLOUT,),
    Stream.TRAJECTORIES: (ConsumerGroup.LEARNER,),
    Stream.LEDGER: (ConsumerGroup.GATEWAY,),
}


@dataclass(frozen=True, slots=True)
class Workload:
    """How many groups a round plays and how long each response is."""

    name: str
    num_groups: int
    num_response_tokens: int
    num_pairs: int


WORKLOADS = (
    Workload(
        "responses of 12 tokens, as in the demo", num_groups=16, num_response_tokens=12, num_pairs=9
    ),
    Workload("responses of 48 tokens", num_groups=8, num_response_tokens=48, num_pairs=3),
)


NOTES = (
    f"{NUM_CONCURRENT} episodes in flight, groups of {GROUP_SIZE}, 2 to 6 turns (the same "
    "within a group) of household texts, examples/models/household-tiny in float32, "
    "engine and service one thread each. With so small a model the engine computes next to "
    "nothing; with a larger one the service's share of the time is smaller.",
    "Both sides return the log-prob of every token.",
)


def measure(say: Say) -> Measurement:
    return asyncio.run(_measure(say))


async def _measure(say: Say) -> Measurement:
    apply_environment(vllm_environment(1))
    comparisons = []
    async with contextlib.AsyncExitStack() as cleanup:
        directory = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="sdar-bench-")))
        redis = cleanup.enter_context(EmbeddedRedis(directory / "redis"))
        bus = RedisBus(redis.url, RUN_ID, CONSUMERS)
        cleanup.push_async_callback(bus.close)
        log_to(cleanup.enter_context((directory / "log").open("w")))

        say("starting vLLM")
        model_path = copy_model_without_end(directory / "household-tiny")
        engine = build_engine(model_path, directory / "weights")
        cleanup.push_async_callback(engine.stop)
        await engine.start()

        for workload in WORKLOADS:
            say(workload.name)
            comparisons.append(await _compare(engine, bus, workload, say))
    return Measurement(tuple(comparisons), notes=NOTES)


def log_to(file: TextIO) -> None:
    """Log as a service does, into a file: its lines are part of its cost, a terminal is not."""
    with contextlib.redirect_stderr(file):
        configure_logging("rollout", "bench", "info", "text")


def copy_model_without_end(path: Path) -> Path:
    """The tiny model, less the end token that vLLM would read from its configuration."""
    shutil.copytree(MODEL_PATH, path)
    for name in ("config.json", "generation_config.json"):
        file = path / name
        content = json.loads(file.read_text(encoding="utf-8"))
        file.write_text(json.dumps({**content, "eos_token_id": None}), encoding="utf-8")
    return path


def build_engine(model_path: Path, weights: Path) -> VllmEngine:
    return VllmEngine(
        model_path,
        dtype="float32",
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=NUM_CONCURRENT,
        stop_token_ids=[],
        weight_store_url=str(weights),
        run_id=RUN_ID,
        kv_cache_gib=0.25,
        seed=SEED,
    )


async def _compare(engine: VllmEngine, bus: RedisBus, workload: Workload, say: Say) -> Comparison:
    scripts = record_scripts(workload.num_groups)
    num_turns = GROUP_SIZE * sum(len(script.actions) for script in scripts)
    num_tokens = num_turns * workload.num_response_tokens
    peer = BareClient(engine, scripts, workload.num_response_tokens)

    pairs = []
    async with _serving(engine, bus, scripts) as service:
        for index in range(1 + workload.num_pairs):
            before = engine.stats.num_generated_tokens
            ours = num_tokens / await service.play(workload, index)
            check_count(engine.stats.num_generated_tokens - before, num_tokens)
            theirs = num_tokens / await peer.play()
            check_count(peer.take_count(), num_tokens)
            if index:  # the first pair warms up
                pairs.append((ours, theirs))
                say(describe_pair(index, workload.num_pairs, (ours, theirs)))

    what = f"rollout service, {NUM_CONCURRENT} episodes, {workload.name}"
    return Comparison(what, "bare AsyncLLM", "tokens/s", tuple(pairs), TARGET)


def check_count(num_tokens: int, expected: int) -> None:
    if num_tokens != expected:
        raise RuntimeError(
            f"A round sampled {num_tokens} tokens instead of {expected}: "
            "the two sides would not compare."
        )


class InstantEnvironment:
    """An `EnvironmentClient` and its directory: answers from scripts without waiting."""

    def __init__(self, scripts: Sequence[Script]) -> None:
        self._scripts = {script.task.task_id: script for script in scripts}
        self._sessions: dict[str, Script] = {}
        self.num_waiting = 0
        self._profile = EnvironmentProfile(EnvironmentIdentity("household", "script"), "")

    def get(self, address: str) -> InstantEnvironment:
        return self

    async def close(self) -> None:
        """Nothing is open."""

    async def describe(self, environment: str) -> EnvironmentProfile:
        return self._profile

    async def open_session(self, task: Task, idempotency_key: str) -> Session:
        script = self._sessions[idempotency_key] = self._scripts[task.task_id]
        return Session(idempotency_key, script.observations[0])

    async def step(self, session_id: str, step_index: int, text: str) -> StepOutcome:
        observations = self._sessions[session_id].observations
        is_over = step_index + 1 == len(observations)
        return StepOutcome(
            observation="" if is_over else observations[step_index + 1],
            reward=float(is_over),
            reward_components={"success": float(is_over)},
            is_terminated=is_over,
            is_truncated=False,
            action=text,
            is_action_valid=True,
            is_success=is_over,
        )

    async def close_session(self, session_id: str) -> None:
        del self._sessions[session_id]


class Service:
    """Both sides of a rollout worker: issues groups as the gateway, waits for their accounts."""

    def __init__(
        self, bus: RedisBus, scripts: Sequence[Script], worker: asyncio.Task[None]
    ) -> None:
        self._bus = bus
        self._scripts = scripts
        self._worker = worker

    async def play(self, workload: Workload, number: int) -> float:
        """Seconds from issuing all groups to the last ledger event.

        What was published is then read and acknowledged.
        """
        payloads = []
        for index, script in enumerate(self._scripts):
            group_id = f"{number}-{workload.num_response_tokens}-{index}"
            group = _build_group(workload, group_id, script)
            payloads.append(codec.encode_task_group(group))

        began = time.perf_counter()
        await self._bus.publish(Stream.TASKS, payloads)
        await self._collect(Stream.LEDGER, ConsumerGroup.GATEWAY, len(payloads))
        duration_s = time.perf_counter() - began

        await self._collect(Stream.TRAJECTORIES, ConsumerGroup.LEARNER, GROUP_SIZE * len(payloads))
        return duration_s

    async def _collect(self, stream: Stream, group: ConsumerGroup, count: int) -> None:
        while count > 0:
            deliveries = await self._bus.read(stream, group, "bench", count, block_s=1.0)
            await self._bus.acknowledge(deliveries)
            count -= len(deliveries)
            if self._worker.done():
                self._worker.result()
                raise RuntimeError("The rollout worker stopped before its groups were played.")


def _build_group(workload: Workload, group_id: str, script: Script) -> TaskGroup:
    return TaskGroup(
        RUN_ID,
        group_id,
        script.task,
        GROUP_SIZE,
        Purpose.TRAIN,
        admitted_version=0,
        sampling=SamplingParameters(1.0, 1.0, workload.num_response_tokens),
        max_turns=len(script.actions),
        environment_address="here",
    )


@contextlib.asynccontextmanager
async def _serving(
    engine: VllmEngine, bus: RedisBus, scripts: Sequence[Script]
) -> AsyncIterator[Service]:
    """A rollout worker at work."""
    tokenizer = ChatTokenizer(MODEL_PATH)
    rules = EpisodeRules(
        tokenizer=tokenizer,
        build_prompts=lambda setting: Conversation(tokenizer, setting),
        model=compute_model_identity(MODEL_PATH),
        max_sequence_tokens=MAX_MODEL_LEN,
        invalid_action_penalty=0.1,
        shows_actions=False,
    )
    worker = RolloutWorker(
        bus,
        engine,
        InstantEnvironment(scripts),
        rules,
        run_id=RUN_ID,
        instance="bench",
        limits=RolloutLimits(max_concurrent_episodes=NUM_CONCURRENT),
        health=Health(),
        metrics=RolloutMetrics(),
    )
    stopping = asyncio.Event()
    task = asyncio.create_task(worker.run(stopping), name="rollout_worker")
    try:
        yield Service(bus, scripts, task)
    finally:
        stopping.set()
        await task


class BareClient:
    """The peer: requests to the very AsyncLLM that the engine holds, and nothing else."""

    def __init__(
        self, engine: VllmEngine, scripts: Sequence[Script], num_response_tokens: int
    ) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        # The engine's own, so that nothing but the way to it differs.
        self._llm: Any = engine._llm
        self._request_ids = map("bare-{}".format, itertools.count())
        self._num_tokens = 0
        self._chat = ChatTokenizer(MODEL_PATH)
        self._episodes: list[list[list[int]]] = []
        for script in scripts:
            self._episodes += [self._tokenize(script)] * GROUP_SIZE
        self._parameters = SamplingParams(
            temperature=1.0,
            max_tokens=num_response_tokens,
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _tokenize(self, script: Script) -> list[list[int]]:
        """The first prompt, then what follows each response."""
        first, *others = [ChatMessage("user", observation) for observation in script.observations]
        stretches = [self._chat.render_fresh((first,))]
        stretches += [self._chat.render_delta((other,), ended_by=None) for other in others]
        return [stretch.tolist() for stretch in stretches]

    async def play(self) -> float:
        """Seconds for all episodes."""
        # Shared: each place takes the next episode when it is done with one.
        waiting = iter(self._episodes)
        began = time.perf_counter()
        await asyncio.gather(*(self._keep_playing(waiting) for _ in range(NUM_CONCURRENT)))
        return time.perf_counter() - began

    def take_count(self) -> int:
        """Tokens sampled since the last call."""
        count = self._num_tokens
        self._num_tokens = 0
        return count

    async def _keep_playing(self, waiting: Iterator[list[list[int]]]) -> None:
        for stretches in waiting:
            prompt: list[int] = []
            for stretch in stretches:
                prompt = prompt + stretch
                outputs = self._llm.generate(
                    {"type": "token", "prompt_token_ids": prompt},
                    self._parameters,
                    next(self._request_ids),
                )
                async for output in outputs:
                    final = output
                response = list(final.outputs[0].token_ids)
                self._num_tokens += len(response)
                prompt = prompt + response
