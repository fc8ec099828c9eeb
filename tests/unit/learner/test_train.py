"""The main loop with a trainer that only counts: order of effects, resuming, finishing. Three updates of two groups."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

import pytest

from sdar.contracts import codec
from sdar.contracts.errors import BusUnavailableError
from sdar.contracts.streams import Stream
from sdar.runtime.weights import WeightStore
from services.learner.checkpoint import CheckpointStore
from services.learner.progress import Progress
from services.learner.train import Learner
from tests.support import until
from tests.unit.learner.builders import CountingTrainer, count_pending, make_bus, make_config, make_group, read_ledger, send


class Rig:
    """One run's surroundings; `start` begins a life of the learner, `kill` ends it as SIGKILL would."""

    def __init__(self, path, **training):
        self.config = make_config(**training)
        self.bus = make_bus(self.config)
        self.weights = WeightStore(str(path / "weights"), self.config.name)
        self.directory = path / "checkpoints"
        self.thread = ThreadPoolExecutor(1)
        self.stopping = asyncio.Event()
        self.task = self.checkpoints = self.learner = self.trainer = None

    async def start(self):
        self.checkpoints = CheckpointStore(self.directory, self.config)
        found = self.checkpoints.find_newest()
        progress = Progress() if found is None else found.progress
        self.trainer = CountingTrainer(progress.num_updates)
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
        # A killed process takes its threads with it: what this one still saves must not meet the next learner.
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


@pytest.fixture
def rig(tmp_path):
    return Rig(tmp_path)


def groups(*names, **item):
    return [episode for name in names for episode in make_group(name, **item)]


async def test_version_0_is_published_before_anything_is_trained(rig):
    await rig.start()
    while await rig.announced() != [0]:  # noqa: ASYNC110  the bus offers no event
        await asyncio.sleep(0.01)
    assert rig.weight_of(0) == 0.0
    await rig.stop()


async def test_each_update_publishes_a_version_and_tells_ledger_and_metrics(rig):
    await rig.start()
    await send(rig.bus, *groups("a", "b", "c", "d"))
    await rig.reach(2)
    await rig.stop()
    assert await rig.announced() == [0, 1, 2]
    assert [rig.weight_of(version) for version in (1, 2)] == [1.0, 2.0]
    assert await read_ledger(rig.bus) == [(name, "trained") for name in "abcd"]
    first, second = await rig.records()
    assert (first.policy_version, second.policy_version) == (1, 2)
    assert first.values["success_mean"] == 0.5
    assert first.values["success_heat"] == 1.0
    assert first.values["num_trajectories_heat"] == 2
    assert second.values["staleness_max"] == 1
    assert second.values["staleness_tokens_1"] == second.values["num_tokens"]


async def test_entries_are_acknowledged_only_with_a_checkpoint(rig):
    rig.config = make_config(checkpoint_every=2)
    await rig.start()
    await send(rig.bus, *groups("a", "b"))
    await rig.reach(1)
    while len(await rig.records()) < 1:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    assert await count_pending(rig.bus) == 4
    await send(rig.bus, *groups("c", "d", version=1))
    while await count_pending(rig.bus):  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    assert rig.checkpoints.find_newest().progress.num_updates == 2
    await rig.stop()


async def test_being_stopped_makes_finished_updates_durable(rig):
    await rig.start()
    await send(rig.bus, *groups("a", "b"))
    await rig.reach(1)
    await rig.stop()
    assert await count_pending(rig.bus) == 0
    assert rig.learner.progress.trained_groups == (("a", "b"),)
    await rig.start()
    await send(rig.bus, *groups("c", "d", version=1))
    await rig.reach(2)
    await rig.stop()
    assert rig.trainer.batches == [["c", "d"]]
    assert await rig.announced() == [0, 1, 2], "nothing was lost, so versions and updates still agree"


async def test_after_a_kill_lost_updates_are_trained_again_under_new_versions(rig):
    rig.config = make_config(num_updates=4)  # update 3 is neither the last nor due for a checkpoint
    await rig.start()
    await send(rig.bus, *groups("a", "b", "c", "d"), *groups("e", "f", version=1))
    await rig.reach(3)
    await rig.kill()
    await rig.start()
    await rig.reach(3)
    await rig.stop()
    assert rig.learner.progress.num_updates == 3
    assert rig.learner.progress.trained_groups == (("a", "b"), ("c", "d"), ("e", "f"))
    versions = await rig.announced()
    assert len(versions) == len(set(versions))
    assert rig.weight_of(versions[-1]) == 3.0


@pytest.mark.parametrize("failing", ["publish", "commit", "acknowledge"])
async def test_a_crash_between_any_two_steps_trains_every_group_exactly_once(rig, failing):
    """The bus fails once at each kind of call, at every place of the loop in turn."""
    await send(rig.bus, *groups("a", "b", "c", "d", "e", "f"))
    original = getattr(rig.bus, failing)
    for place in range(4):
        calls = iter(range(1000))

        async def fail_at_place(*args, calls=calls, place=place, **kwargs):
            if next(calls) == place:
                raise BusUnavailableError("gone")
            return await original(*args, **kwargs)

        setattr(rig.bus, failing, fail_at_place)
        await rig.start()
        await until(lambda: rig.task.done() or rig.learner.is_finished)
        await rig.kill()
    setattr(rig.bus, failing, original)
    await rig.start()
    await rig.reach(3)
    await rig.stop()
    trained = [group_id for group_ids in rig.learner.progress.trained_groups for group_id in group_ids]
    assert sorted(trained) == list("abcdef")
    assert rig.weight_of((await rig.announced())[-1]) == 3.0
    assert {outcome for _, outcome in await read_ledger(rig.bus)} == {"trained"}
    assert await count_pending(rig.bus) == 0


async def test_a_finished_run_cancels_what_still_arrives_until_it_is_stopped(rig):
    await rig.start()
    await send(rig.bus, *groups("a", "b", "c", "d", "e", "f", "g"))
    await rig.reach(3)
    await send(rig.bus, *groups("h"))
    events = []
    async with asyncio.timeout(5):
        while len(events) < 8:
            events += await read_ledger(rig.bus)
            await asyncio.sleep(0.01)
    assert events[-2:] == [("g", "cancelled"), ("h", "cancelled")]
    assert not rig.task.done()
    await rig.stop()
    assert await count_pending(rig.bus) == 0


async def test_a_finished_run_that_starts_again_trains_nothing(rig):
    await send(rig.bus, *groups("a", "b", "c", "d", "e", "f"))
    await rig.start()
    await rig.reach(3)
    await rig.stop()
    await rig.start()
    await send(rig.bus, *groups("g", version=3))
    await until(lambda: rig.learner.is_finished)
    async with asyncio.timeout(5):
        while await count_pending(rig.bus):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    await rig.stop()
    assert rig.trainer.batches == []
    assert await rig.announced() == [0, 1, 2, 3]


async def test_old_versions_are_collected_and_version_0_stays(tmp_path):
    rig = Rig(tmp_path, num_updates=24, max_staleness=0, groups_per_update=1, checkpoint_every=30)
    await rig.start()
    for index in range(24):
        await send(rig.bus, *groups(f"g{index:02d}", version=index))
        await rig.reach(index + 1)
    await rig.stop()
    kept = rig.weights.list_versions()
    assert kept[0] == 0
    assert kept[1:] == list(range(17, 25))
