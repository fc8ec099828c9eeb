"""A rollout worker as a process of its own, on a sampler that takes its time.

python -m tests.integration.rollout_process '{"redis_url": ..., ...}'   (the fields of `Order`)
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import sys
from pathlib import Path

from sdar.config import EnvironmentConfig, MethodConfig, ModelConfig, RolloutConfig, RunConfig
from sdar.connect import build_bus
from sdar.in_process.transformers_engine import TransformersEngine
from sdar.process.lifecycle import run_until_stopped
from sdar.process.settings import Settings
from sdar.process.telemetry import Health
from services.rollout.environment_client import GrpcEnvironmentDirectory
from services.rollout.metrics import RolloutMetrics
from services.rollout.service import build_rules
from services.rollout.worker import RolloutLimits, RolloutWorker

MODEL_PATH = Path(__file__).parents[2] / "examples" / "models" / "household-tiny"
RUN_ID = "recovery-test"
REPORT_INTERVAL_S = 0.2


@dataclasses.dataclass
class Order:
    """How the worker is to be."""

    redis_url: str
    instance: str
    lease_s: float
    think_s: float
    max_concurrent_episodes: int = 8


class ThoughtfulEngine(TransformersEngine):
    """Waits before it samples, as a large model would."""

    think_s = 0.0

    async def generate(self, prompt_token_ids, sampling):
        await asyncio.sleep(self.think_s)
        return await super().generate(prompt_token_ids, sampling)


def make_config() -> RunConfig:
    return RunConfig(
        name=RUN_ID,
        model=ModelConfig(path=MODEL_PATH, dtype="float32", max_sequence_tokens=384),
        method=MethodConfig(name="grpo"),
        environment=EnvironmentConfig(name="household"),
        rollout=RolloutConfig(max_response_tokens=10),
    )


async def work(order: Order) -> None:
    config = make_config()
    bus = build_bus(config, Settings(redis_url=order.redis_url, instance=order.instance))
    rules = build_rules(config)
    engine = ThoughtfulEngine(
        MODEL_PATH,
        dtype="float32",
        max_sequence_tokens=384,
        stop_token_ids=rules.tokenizer.stops.ids,
    )
    engine.think_s = order.think_s
    await engine.start()
    environments = GrpcEnvironmentDirectory(step_timeout_s=10.0)
    worker = RolloutWorker(
        bus,
        engine,
        environments,
        rules,
        run_id=RUN_ID,
        instance=order.instance,
        limits=RolloutLimits(
            max_concurrent_episodes=order.max_concurrent_episodes,
            lease_s=order.lease_s,
            report_interval_s=REPORT_INTERVAL_S,
        ),
        health=Health(),
        metrics=RolloutMetrics(),
    )
    await run_until_stopped(worker.run)
    await environments.close()
    await engine.stop()
    await bus.close()


if __name__ == "__main__":
    asyncio.run(work(Order(**json.loads(sys.argv[1]))))
