"""A learner with a trainer that only counts, and what is around it."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

import prometheus_client

from sdar.contracts import codec
from sdar.contracts.streams import Stream
from sdar.process.telemetry import Health
from sdar.weights.store import WeightStore
from services.learner.checkpoint import CheckpointStore
from services.learner.metrics import LearnerMetrics
from services.learner.progress import Progress
from services.learner.train import Learner
from tests.support import until
from tests.unit.learner.builders import CountingTrainer, make_bus, make_config


class Rig:
    """One run's surroundings; `start` begins a life of the learner, `kill` ends it as SIGKILL
    would.

    `bus` may be replaced between two lives.
    """

    def __init__(self, path, **training):
        self.config = make_config(**training)
        self.bus = make_bus(self.config)
        self.weights = WeightStore(str(path / "weights"), self.config.name)
        self.directory = path / "checkpoints"
        self.thread = ThreadPoolExecutor(1)
        self.health, self.registry = Health(), prometheus_client.CollectorRegistry()
        self.metrics = LearnerMetrics(self.registry)
        self.poisoned = ()
        self.stopping = asyncio.Event()
        self.task = self.checkpoints = self.learner = self.trainer = None

    async def start(self):
        self.checkpoints = CheckpointStore(self.directory, self.config)
        found = self.checkpoints.find_newest()
        progress = Progress() if found is None else found.progress
        self.trainer = CountingTrainer(progress.num_updates)
        self.trainer.poisoned = self.poisoned
        self.stopping = asyncio.Event()
        self.learner = Learner(
            self.config,
            self.bus,
            self.weights,
            self.trainer,
            self.checkpoints,
            progress,
            torch_thread=self.thread,
            consumer="learner",
            snapshot=None if found is None else found.snapshot,
            health=self.health,
            metrics=self.metrics,
            storage_retry_s=0.01,
        )
        self.task = asyncio.create_task(self.learner.run(self.stopping))

    async def reach(self, num_updates):
        await until(lambda: self.task.done() or self.learner.progress.num_updates >= num_updates)

    async def stop(self):
        self.stopping.set()
        await self.task
        self.checkpoints.close()

    async def kill(self):
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        # A killed process takes its threads along: their saves must not meet the next learner.
        await asyncio.wrap_future(self.thread.submit(lambda: None))
        self.checkpoints.close()

    async def announced(self):
        entries = await self.bus.tail(Stream.POLICY_UPDATES, "0-0", 100)
        return [codec.decode_weights_manifest(entry.payload).policy_version for entry in entries]

    async def records(self):
        entries = await self.bus.tail(Stream.METRICS, "0-0", 100)
        return [codec.decode_metric_record(entry.payload) for entry in entries]

    def weight_of(self, version):
        return next(iter(self.weights.iter_tensors(self.weights.fetch_manifest(version))))[1].item()
