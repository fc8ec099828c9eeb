"""Measures what the guarantees cost the rollout path: sampled tokens per second with and without.

Two rollout workers, 32 episodes each, share one AsyncLLM and one Redis and take turns at the same
groups; each has an environment server of its own, a process that answers at once, over gRPC. The
figure is the ratio of their rates.

    with       a fenced commit of one script with an exactly-once mark and the account's
               transitions, policy versions declared in use, mutual TLS and a token at every call
               to the environment
    without    one pipeline that publishes and acknowledges, the ledger's events published by hand,
               nothing declared, plaintext

What both do alike is left in: reading, leases that are renewed, the codec. Every response has the
full length on both sides (see `rollout_throughput`), and an episode ends after a fixed number of
turns, so both sides do the same work.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from loadtest.comparison import Comparison, Measurement, Say, Target, describe_pair
from loadtest.instant import ShortEpisodes
from loadtest.rollout_throughput import (
    CONSUMERS,
    GROUP_SIZE,
    MAX_MODEL_LEN,
    NUM_CONCURRENT,
    build_engine,
    check_count,
    copy_model_without_end,
    log_to,
)
from loadtest.workloads import MODEL_PATH, RUN_ID
from sdar.bus.embedded_redis import EmbeddedRedis
from sdar.bus.ledger import format_group_id
from sdar.bus.protocol import Bus, Delivery, Publications
from sdar.bus.redis import RedisBus
from sdar.bus.redis_session import PAYLOAD
from sdar.contracts import codec
from sdar.contracts.streams import BROADCAST_MAX_ENTRIES, ConsumerGroup, Stream
from sdar.contracts.types import GroupOutcome, LedgerEvent, Purpose, SamplingParameters, TaskGroup
from sdar.engines.vllm_weights import vllm_environment
from sdar.model.chat import ChatTokenizer, compute_model_identity
from sdar.process.settings import Settings, apply_environment
from sdar.process.telemetry import Health
from sdar.wire.security import OPEN, Security
from services.rollout.engine import VllmEngine
from services.rollout.environment_client import GrpcEnvironmentDirectory
from services.rollout.episode import EpisodeRules
from services.rollout.metrics import RolloutMetrics
from services.rollout.prompting import Conversation
from services.rollout.worker import RolloutLimits, RolloutWorker
from tests.certificates import Authority

NUM_PAIRS = 15
NUM_GROUPS = 32
NUM_RESPONSE_TOKENS = 12
STEP_TIMEOUT_S = 30.0
TARGET = Target("at_least", 0.95)
SERVER = """
from loadtest.instant import ShortEpisodes
from sdar.environments import serve
serve(ShortEpisodes, port=0)
"""


def measure(say: Say, num_pairs: int = NUM_PAIRS, num_groups: int = NUM_GROUPS) -> Measurement:
    return asyncio.run(_measure(say, num_pairs, num_groups))


async def _measure(say: Say, num_pairs: int, num_groups: int) -> Measurement:
    apply_environment(vllm_environment(1))
    async with contextlib.AsyncExitStack() as cleanup:
        directory = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="sdar-bench-")))
        redis = cleanup.enter_context(EmbeddedRedis(directory / "redis"))
        log_to(cleanup.enter_context((directory / "log").open("w")))

        say("starting vLLM")
        model_path = copy_model_without_end(directory / "household-tiny")
        engine = build_engine(model_path, directory / "weights")
        cleanup.push_async_callback(engine.stop)
        await engine.start()

        guarded = await cleanup.enter_async_context(
            _side(RedisBus, redis, engine, "with", *_lock(directory))
        )
        plain = await cleanup.enter_async_context(
            _side(PlainBus, redis, engine, "without", Settings(), OPEN)
        )
        pairs = await _play_pairs(guarded, plain, engine, num_pairs, num_groups, say)
    return _build_measurement(pairs)


async def _play_pairs(
    guarded: Side, plain: Side, engine: VllmEngine, num_pairs: int, num_groups: int, say: Say
) -> list[tuple[float, float]]:
    """Tokens per second of both sides, after a pair that warms up."""
    pairs = []
    for index in range(1 + num_pairs):
        # Who goes first changes with each pair: what the one leaves behind in the engine's
        # cache is the other's gain.
        sides = (guarded, plain) if index % 2 else (plain, guarded)
        rates = {side: await side.play(engine, num_groups) for side in sides}
        if index:
            pairs.append((rates[guarded], rates[plain]))
            say(describe_pair(index, num_pairs, pairs[-1]))
    return pairs


def _build_measurement(pairs: Sequence[tuple[float, float]]) -> Measurement:
    what = f"throughput with leases, ledger, checksums, TLS and tokens, {NUM_CONCURRENT} episodes"
    return Measurement(
        (Comparison(what, "without", "tokens/s", tuple(pairs), TARGET),),
        notes=(
            f"{NUM_CONCURRENT} episodes in flight, groups of {GROUP_SIZE}, "
            f"{ShortEpisodes.num_turns} turns of "
            f"{NUM_RESPONSE_TOKENS} tokens, examples/models/household-tiny in float32. With so "
            "small a model the work around the engine has the largest share that it can have. "
            "Peer: the same workers with commits as one plain pipeline, no account, no declared "
            "versions, no TLS, no tokens. Both have an environment server process, and Redis with "
            "its append-only file.",
        ),
    )


def _lock(directory: Path) -> tuple[Settings, Security]:
    """Mutual TLS and tokens for both ends of a connection."""
    authority = Authority(directory)
    files = authority.issue("bench")
    tokens = directory / "tokens"
    tokens.write_text(f"operate:{secrets.token_urlsafe(32)}\n")
    settings = Settings(
        tls_cert=files.certificate,
        tls_key=files.key,
        tls_ca=authority.certificate,
        tls_client_auth="grpc",
        tokens_file=tokens,
    )
    return settings, Security.from_settings(settings)


@contextlib.contextmanager
def _environment_server(settings: Settings, log: Path) -> Iterator[str]:
    """Address of an environment server, a process of its own."""
    values = _name_variables(settings)
    with log.open("wb") as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            stdout=subprocess.PIPE,
            stderr=errors,
            env={**os.environ, **values},
            text=True,
        )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(
                f"The environment server did not start: {log.read_text(errors='replace')[-500:]}"
            )
        yield line.split(" on ")[1].split(". ")[0]
    finally:
        process.terminate()
        process.wait()


def _name_variables(settings: Settings) -> dict[str, str]:
    """The settings of the door as environment variables."""
    # More calls a second than the door's usual rate: one client here does the work of a fleet's.
    variables = {"SDAR_MAX_CALLS_PER_S": "1000000"}
    for name in ("tls_cert", "tls_key", "tls_ca", "tls_client_auth", "tokens_file"):
        value = getattr(settings, name)
        if value:
            variables[f"SDAR_{name.upper()}"] = str(value)
    return variables


class PlainBus(RedisBus):
    """A bus without the guarantees: one pipeline publishes and acknowledges, held or not."""

    async def commit(
        self,
        publications: Publications,
        acknowledgements: Sequence[Delivery] = (),
        state: Mapping[str, bytes] | None = None,
        transitions: Sequence[LedgerEvent] = (),
        retired_letters: Sequence[str] = (),
    ) -> None:
        keys = self._session.keys
        # The gateway issues groups itself and needs no event of it.
        booked = [event for event in transitions if event.outcome is not GroupOutcome.ISSUED]
        events = list(map(codec.encode_ledger_event, booked))

        pipeline = self._session.client.pipeline(transaction=True)
        for stream, payloads in {**publications, Stream.LEDGER: events}.items():
            for payload in payloads:
                pipeline.xadd(
                    keys.stream(stream),
                    {PAYLOAD: payload},
                    maxlen=BROADCAST_MAX_ENTRIES.get(stream),
                )
        for delivery in acknowledgements:
            pipeline.xack(keys.stream(delivery.stream), delivery.group, delivery.entry_id)
        await pipeline.execute()
        await self._trimming.trim_now_and_then({delivery.stream for delivery in acknowledgements})

    async def pin_versions(self, reader: str, versions: Collection[int], ttl_s: float) -> bool:
        return True


@dataclass(eq=False)
class Side:
    """A rollout worker at work, and the gateway's and learner's side of it."""

    bus: Bus
    address: str
    run_id: str
    worker: asyncio.Task[None]
    next_group: int = 0

    async def play(self, engine: VllmEngine, num_groups: int) -> float:
        """Tokens per second from issuing all groups to the last ledger event."""
        tasks = []
        issued = []
        for number in range(self.next_group, self.next_group + num_groups):
            group = self._group(number)
            tasks.append(codec.encode_task_group(group))
            issued.append(LedgerEvent(self.run_id, group.group_id, GroupOutcome.ISSUED, 0, 0))
        self.next_group += num_groups

        before = engine.stats.num_generated_tokens
        began = time.perf_counter()
        await self.bus.commit({Stream.TASKS: tasks}, transitions=issued)
        await self._collect(Stream.LEDGER, ConsumerGroup.GATEWAY, num_groups)
        duration_s = time.perf_counter() - began

        await self._collect(Stream.TRAJECTORIES, ConsumerGroup.LEARNER, GROUP_SIZE * num_groups)
        num_tokens = num_groups * GROUP_SIZE * ShortEpisodes.num_turns * NUM_RESPONSE_TOKENS
        check_count(engine.stats.num_generated_tokens - before, num_tokens)
        return num_tokens / duration_s

    def _group(self, number: int) -> TaskGroup:
        tasks = ShortEpisodes.tasks["train"]
        return TaskGroup(
            self.run_id,
            format_group_id(number),
            tasks[number % len(tasks)],
            GROUP_SIZE,
            Purpose.TRAIN,
            admitted_version=0,
            sampling=SamplingParameters(1.0, 1.0, NUM_RESPONSE_TOKENS),
            max_turns=ShortEpisodes.num_turns,
            environment_address=self.address,
        )

    async def _collect(self, stream: Stream, group: ConsumerGroup, count: int) -> None:
        while count > 0:
            deliveries = await self.bus.read(stream, group, "bench", count, block_s=1.0)
            await self.bus.acknowledge(deliveries)
            count -= len(deliveries)
            if self.worker.done():
                self.worker.result()
                raise RuntimeError("The rollout worker stopped before its groups were played.")


@contextlib.asynccontextmanager
async def _side(
    kind: type[RedisBus],
    redis: EmbeddedRedis,
    engine: VllmEngine,
    name: str,
    settings: Settings,
    security: Security,
) -> AsyncIterator[Side]:
    run_id = f"{RUN_ID}-{name}"
    bus = kind(redis.url, run_id, CONSUMERS)
    environments = GrpcEnvironmentDirectory(security, step_timeout_s=STEP_TIMEOUT_S)
    worker = RolloutWorker(
        bus,
        engine,
        environments,
        _build_rules(),
        run_id=run_id,
        instance=name,
        limits=RolloutLimits(max_concurrent_episodes=NUM_CONCURRENT),
        health=Health(),
        metrics=RolloutMetrics(),
    )
    stopping = asyncio.Event()
    with _environment_server(settings, Path(redis.log_path).with_name(f"{name}.log")) as address:
        task = asyncio.create_task(worker.run(stopping), name=f"rollout_worker_{name}")
        try:
            yield Side(bus, address, run_id, task)
        finally:
            stopping.set()
            await task
            await environments.close()
            await bus.close()


def _build_rules() -> EpisodeRules:
    tokenizer = ChatTokenizer(MODEL_PATH)
    return EpisodeRules(
        tokenizer=tokenizer,
        build_prompts=lambda setting: Conversation(tokenizer, setting),
        model=compute_model_identity(MODEL_PATH),
        max_sequence_tokens=MAX_MODEL_LEN,
        invalid_action_penalty=0.1,
        shows_actions=False,
    )
