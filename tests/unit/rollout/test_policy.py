"""Which version is served, with a scripted engine and the in-memory bus."""

from __future__ import annotations

import asyncio
import dataclasses
from contextlib import asynccontextmanager

import pytest
import torch

from sdar.contracts import codec
from sdar.contracts.errors import UnavailableError, WeightsUnavailableError
from sdar.contracts.streams import Stream
from sdar.contracts.types import SamplingParameters
from sdar.in_process.memory_bus import MemoryBus
from sdar.in_process.transformers_engine import TransformersEngine
from sdar.model.causal_lm import export_tensors, load_causal_lm
from sdar.model.chat import compute_model_identity
from sdar.weights.pins import PinnedVersions
from sdar.weights.store import WeightStore
from services.rollout.metrics import RolloutMetrics
from services.rollout.policy import ServedPolicy
from tests.support import until
from tests.unit.rollout.fakes import RUN_ID, ScriptedEngine, make_manifest


async def publish(bus, *versions):
    await bus.publish(
        Stream.POLICY_UPDATES,
        [codec.encode_weights_manifest(make_manifest(version)) for version in versions],
    )


def build_follower(bus, engine, *, metrics=None, **options):
    options = {"block_s": 0.01, "retry_delays_s": [0.0]} | options
    return ServedPolicy(
        bus, engine, PinnedVersions(bus, "me"), metrics or RolloutMetrics(), **options
    )


@asynccontextmanager
async def following(engine, *published):
    bus, stopping = MemoryBus({}), asyncio.Event()
    await publish(bus, *published)
    follower = build_follower(bus, engine)
    await follower.catch_up()
    running = asyncio.create_task(follower.run(stopping))
    try:
        yield bus, follower
    finally:
        stopping.set()
        await asyncio.wait([running])
        if (error := running.exception()) is not None:
            raise error


async def test_a_worker_that_joins_loads_only_the_newest_version():
    engine = ScriptedEngine()
    async with following(engine, 0, 1, 2, 3):
        assert engine.updates == [3]


async def test_the_newest_version_is_served():
    engine = ScriptedEngine()
    async with following(engine, 0) as (bus, follower):
        await publish(bus, 1)
        await until(lambda: engine.policy_version == 1)
        assert follower.newest_version == 1


async def test_the_pinned_version_is_served_until_the_evaluation_is_over_then_the_newest():
    engine = ScriptedEngine()
    async with following(engine, 0, 1) as (bus, follower):
        async with follower.pinned(1):
            await publish(bus, 2)
            await until(lambda: follower.newest_version == 2)
            assert engine.policy_version == 1
        await until(lambda: engine.policy_version == 2)


async def test_an_evaluation_of_an_older_version_goes_back_to_it():
    engine = ScriptedEngine()
    async with following(engine, 1, 2, 3) as (_, follower):
        async with follower.pinned(2):
            assert engine.policy_version == 2
        await until(lambda: engine.policy_version == 3)


async def test_an_evaluation_waits_for_a_version_that_is_not_published_yet():
    engine = ScriptedEngine()
    async with following(engine, 1) as (bus, follower):
        entering = asyncio.create_task(follower.pinned(2).__aenter__())
        await asyncio.sleep(0.03)
        assert not entering.done()
        await publish(bus, 2)
        await entering
        assert engine.policy_version == 2


async def test_pinned_versions_are_served_one_after_the_other_the_oldest_of_those_waiting_first():
    """In hand: 3. Waiting: 5, 2. Order: 3 (never interrupted), 2, 5."""
    engine, order = ScriptedEngine(), []
    async with following(engine, *range(1, 6)) as (_, follower):

        async def evaluate(version):
            async with follower.pinned(version):
                await asyncio.sleep(0.01)
                order.append((version, engine.policy_version))

        async with follower.pinned(3):
            waiting = [asyncio.create_task(evaluate(version)) for version in (5, 2, 2)]
            await asyncio.sleep(0.03)
            assert engine.policy_version == 3
        await asyncio.gather(*waiting)
    assert order == [(2, 2), (2, 2), (5, 5)]


async def test_a_version_that_is_gone_fails_its_evaluation_and_the_previous_one_serves_on():
    engine = ScriptedEngine(missing={2})
    async with following(engine, 1, 2) as (bus, follower):
        assert engine.policy_version == 0
        with pytest.raises(WeightsUnavailableError):
            async with follower.pinned(2):
                pass
        await publish(bus, 3)
        await until(lambda: engine.policy_version == 3)


async def test_a_cancelled_wait_does_not_hold_the_version():
    engine = ScriptedEngine()
    async with following(engine, 1, 2) as (bus, follower):
        waiting = asyncio.create_task(follower.pinned(9).__aenter__())
        await asyncio.sleep(0.01)
        waiting.cancel()
        await asyncio.wait([waiting])
        await publish(bus, 3)
        await until(lambda: engine.policy_version == 3)


async def test_a_dead_engine_ends_the_follower():
    engine, bus = ScriptedEngine(), MemoryBus({})
    running = asyncio.create_task(build_follower(bus, engine).run(asyncio.Event()))
    engine.is_alive = False
    await publish(bus, 1)
    with pytest.raises(UnavailableError):
        await running


async def test_a_training_group_waits_until_the_version_it_was_admitted_for_is_served():
    engine = ScriptedEngine()
    async with following(engine, 1) as (bus, follower):
        waiting = asyncio.create_task(follower.reached(2))
        async with follower.pinned(1):
            await publish(bus, 2)
            await until(lambda: follower.newest_version == 2)
            assert not waiting.done()
        await asyncio.wait_for(waiting, 5)
        assert engine.policy_version == 2


async def test_a_version_is_in_use_before_it_is_read_and_its_predecessor_until_it_is_served():
    class WatchedEngine(ScriptedEngine):
        async def update_weights(self, manifest):
            self.could_retire = [
                await self.bus.retire_versions([version])
                for version in (1, manifest.policy_version)
            ]
            await super().update_weights(manifest)

    engine = WatchedEngine()
    bus = engine.bus = MemoryBus({})
    follower = build_follower(bus, engine)
    await publish(bus, 1)
    await follower.catch_up()
    await publish(bus, 2)
    await follower.catch_up()
    assert (engine.updates, engine.could_retire) == ([1, 2], [False, False])
    assert await bus.retire_versions([1])
    assert not await bus.retire_versions([2])


async def test_a_first_load_that_outlasts_its_declaration_is_still_in_use():
    class SlowEngine(ScriptedEngine):
        async def update_weights(self, manifest):
            await asyncio.sleep(3 * ttl_s)
            assert not await bus.retire_versions([manifest.policy_version])
            await super().update_weights(manifest)

    ttl_s = 0.2
    bus = MemoryBus({})
    engine = SlowEngine()
    await publish(bus, 1)
    follower = ServedPolicy(bus, engine, PinnedVersions(bus, "me", ttl_s), RolloutMetrics())
    await follower.catch_up()
    assert engine.policy_version == 1


async def test_a_version_that_is_being_deleted_is_refused_and_the_newest_other_one_is_taken():
    engine = ScriptedEngine()
    bus = MemoryBus({})
    await publish(bus, 1, 2)
    await bus.retire_versions([2])
    metrics = RolloutMetrics()
    follower = build_follower(bus, engine, metrics=metrics)
    running = asyncio.create_task(follower.run(stopping := asyncio.Event()))
    await until(lambda: engine.policy_version == 1)
    with pytest.raises(WeightsUnavailableError, match="being deleted"):
        async with follower.pinned(2):
            pass
    stopping.set()
    await running
    assert engine.updates == [1]
    assert metrics.registry.get_sample_value("sdar_rollout_refused_policies_total") >= 1


async def test_a_version_that_could_not_be_read_is_tried_again_later():
    engine = ScriptedEngine(missing={1})
    bus = MemoryBus({})
    await publish(bus, 1)
    follower = build_follower(bus, engine, refusal_s=0.05)
    running = asyncio.create_task(follower.run(stopping := asyncio.Event()))
    await follower.reached(1)  # refused: groups admitted for it are played all the same
    assert engine.policy_version == 0
    engine.missing.clear()
    await until(lambda: engine.policy_version == 1)
    stopping.set()
    await running


async def test_only_the_newest_versions_and_the_first_are_kept_in_mind():
    engine = ScriptedEngine()
    async with following(engine, *range(300)) as (_, follower):
        async with follower.pinned(0):
            assert engine.policy_version == 0
        async with follower.pinned(250):
            assert engine.policy_version == 250
        with pytest.raises(WeightsUnavailableError, match="not in the stream of updates any more"):
            async with follower.pinned(150):
                pass


# ---- publications that are broken, in a real store, read by a real engine


def tear_shard(store_path, manifest):
    path = store_path / manifest.path / manifest.tensors[-1].shard
    path.write_bytes(path.read_bytes()[:-10])
    return manifest


def flip_bit(store_path, manifest):
    path = store_path / manifest.path / manifest.tensors[-1].shard
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    return manifest


def lose_shard(store_path, manifest):
    (store_path / manifest.path / manifest.tensors[0].shard).unlink()
    return manifest


def tear_manifest(store_path, manifest):
    return dataclasses.replace(manifest, tensors=manifest.tensors[:-1])


def name_a_missing_base(store_path, manifest):
    tensors = tuple(dataclasses.replace(entry, is_delta=True) for entry in manifest.tensors)
    return dataclasses.replace(manifest, tensors=tensors, base_version=77)


def lead_outside(store_path, manifest):
    return dataclasses.replace(manifest, path="../elsewhere/v00000002")


@pytest.mark.parametrize(
    "spoil", [tear_shard, flip_bit, lose_shard, tear_manifest, name_a_missing_base, lead_outside]
)
async def test_a_broken_publication_leaves_the_last_good_version_serving_and_the_next_one_is_taken(
    model_path, tokenizer, tmp_path, spoil
):
    store = WeightStore(str(tmp_path), RUN_ID)
    model, identity = load_causal_lm(model_path, "float32"), compute_model_identity(model_path)
    engine = TransformersEngine(
        model_path,
        dtype="float32",
        max_sequence_tokens=64,
        stop_token_ids=tokenizer.stops.ids,
        store=store,
    )
    bus = MemoryBus({})
    metrics = RolloutMetrics()
    stopping = asyncio.Event()
    await engine.start()
    follower = build_follower(bus, engine, metrics=metrics)
    running = asyncio.create_task(follower.run(stopping))
    for version in (1, 2, 3):
        with torch.no_grad():
            model.model.embed_tokens.weight.mul_(1.1)
        manifest = store.publish(version, export_tensors(model), identity)
        if version == 2:
            manifest = spoil(tmp_path, manifest)
        await bus.publish(Stream.POLICY_UPDATES, [codec.encode_weights_manifest(manifest)])
        if version == 2:
            await until(
                lambda: metrics.registry.get_sample_value("sdar_rollout_refused_policies_total") > 0
            )
            generation = await engine.generate([5, 6], SamplingParameters(1.0, 1.0, 2))
            assert set(generation.policy_versions) == {1}
        else:
            await until(lambda version=version: engine.policy_version == version)
    stopping.set()
    await running
    await engine.stop()
