"""Old versions are collected by whole chains, never while one is in use, crash or no crash."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import shutil
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path

import obstore
import pytest
import torch
from obstore.store import LocalStore
from torch import Tensor

from sdar.bus.embedded_redis import EmbeddedRedis
from sdar.bus.protocol import Bus
from sdar.bus.redis import RedisBus
from sdar.contracts.types import WeightsManifest
from sdar.weights.objects import ObjectStore
from sdar.weights.store import FULL_PUBLISH_EVERY, WeightStore
from tests.contract.weight_places import MODEL, Place


def make_weights(version: int) -> dict[str, Tensor]:
    """bfloat16, one more element changed in each version: deltas follow a whole version."""
    weights = torch.zeros(200, dtype=torch.bfloat16)
    weights[:version] = 7
    return {"weights": weights}


def publish(store: WeightStore, *versions: int) -> list[WeightsManifest]:
    return [store.publish(version, make_weights(version), MODEL) for version in versions]


def check_readable(store: WeightStore) -> list[int]:
    """Every version that exists can be read; returns them."""
    versions = store.list_versions()
    for version in versions:
        assert torch.equal(
            dict(store.iter_tensors(store.fetch_manifest(version)))["weights"],
            make_weights(version)["weights"],
        )
    return versions


def list_directories(place: Place) -> list[int]:
    return sorted({int(path.split("/")[1][1:]) for path in place.paths()})


def test_chains_go_whole(place: Place) -> None:
    """0 to 9, 10 to 19 and 20 to 24, of which the newest two and 13 are wanted."""
    publish(place.open(), *range(25))
    asked: list[Sequence[int]] = []

    def retire(versions: Sequence[int]) -> bool:
        asked.append(versions)
        return True

    store = place.open()
    assert store.collect_garbage(2, in_use={13, 77}, retire=retire) == list(range(10))
    assert asked == [list(range(10))]
    assert check_readable(store) == list_directories(place) == list(range(10, 25))
    assert store.collect_garbage(2, retire=retire) == list(range(10, 20))
    assert check_readable(store) == list_directories(place) == list(range(20, 25))
    assert store.collect_garbage(1, retire=retire) == []
    assert len(asked) == 2


def test_a_chain_that_may_not_be_retired_stays_whole(place: Place) -> None:
    store = place.open()
    publish(store, *range(21))
    assert store.collect_garbage(1, retire=lambda versions: 10 in versions) == list(range(10, 20))
    assert check_readable(store) == [*range(10), 20]


def test_what_the_publisher_builds_on_stays(place: Place) -> None:
    """Another publisher's versions are newer: the bus allows two learners for a moment."""
    mine, theirs = place.open(), place.open()
    publish(mine, 0, 1)
    publish(theirs, 50)
    assert mine.collect_garbage(1) == []
    [manifest] = publish(mine, 51)
    assert manifest.base_version == 1
    assert check_readable(place.open()) == [0, 1, 50, 51]
    assert place.open().collect_garbage(1) == [50]
    assert check_readable(place.open()) == [0, 1, 51]


def test_a_damaged_manifest_keeps_the_chain_it_may_belong_to(place: Place) -> None:
    store = place.open()
    publish(store, *range(12))
    place.damage("run/v00000005/manifest.json", lambda content: content[:-3])
    assert place.open().collect_garbage(1, in_use={7}) == []
    assert place.open().collect_garbage(1) == list(range(10))


class Mortal:
    """An object store whose process dies after so many changes."""

    def __init__(self, store: ObjectStore, num_changes: int) -> None:
        self._store = store
        self._left = num_changes
        self.get, self.list = store.get, store.list

    def put(self, path: str, content: bytes) -> None:
        self._live()
        self._store.put(path, content)

    def create(self, path: str, content: bytes) -> bool:
        self._live()
        return self._store.create(path, content)

    def delete(self, path: str) -> None:
        self._live()
        self._store.delete(path)

    def _live(self) -> None:
        if not self._left:
            raise KeyboardInterrupt
        self._left -= 1


def open_directory(path: Path) -> Place:
    return Place(str(path), LocalStore(prefix=path, mkdir=True))


def dies(work: Callable[[WeightStore], object], place: Place, num_changes: int) -> bool:
    """Do it with a store that dies after so many changes; tells whether it did."""
    store = place.open(max_shard_bytes=20)
    store._objects.store = Mortal(store._objects.store, num_changes)
    try:
        work(store)
    except KeyboardInterrupt:
        return True
    return False


def count_up_to_death(
    work: Callable[[WeightStore], object], places: Iterator[Place]
) -> Iterator[tuple[Place, int]]:
    """Places in which `work` died after 0, 1, 2, ... changes, until it lives."""
    for num_changes, place in enumerate(places):
        if not dies(work, place, num_changes):
            assert num_changes
            return
        yield place, num_changes


def test_a_collector_killed_between_any_two_deletions_leaves_versions_that_can_be_read(
    tmp_path: Path,
) -> None:
    publish(open_directory(tmp_path / "published").open(), *range(FULL_PUBLISH_EVERY + 2))

    def places() -> Iterator[Place]:
        for index in itertools.count():
            shutil.copytree(tmp_path / "published", tmp_path / str(index))
            yield open_directory(tmp_path / str(index))

    num_deaths = 0
    for place, num_changes in count_up_to_death(lambda store: store.collect_garbage(1), places()):
        left = check_readable(place.open())
        assert left == [
            *range(max(0, FULL_PUBLISH_EVERY - num_changes)),
            FULL_PUBLISH_EVERY,
            FULL_PUBLISH_EVERY + 1,
        ]
        place.open().collect_garbage(1)
        assert list_directories(place) == [FULL_PUBLISH_EVERY, FULL_PUBLISH_EVERY + 1]
        num_deaths += 1
    assert num_deaths == 2 * FULL_PUBLISH_EVERY, "a manifest and a shard of each version"


def test_a_publisher_killed_between_any_two_writes_leaves_versions_that_can_be_read(
    tmp_path: Path,
) -> None:
    for place, num_changes in count_up_to_death(
        lambda store: publish(store, *range(3)),
        (open_directory(tmp_path / str(index)) for index in itertools.count()),
    ):
        versions = check_readable(place.open())
        assert versions == list(range(num_changes // 2)), "a shard and a manifest each"
        successor = place.open()
        publish(successor, 3)
        successor.collect_garbage(keep_newest=5)
        assert list_directories(place) == [*versions, 3], "the shard without a manifest is gone"
        assert check_readable(place.open()) == [*versions, 3]


def test_a_publisher_killed_at_any_moment_leaves_versions_that_can_be_read(tmp_path: Path) -> None:
    """A real SIGKILL, wherever it strikes, also while a file is half written."""
    place = open_directory(tmp_path / "store")
    chance = random.Random(0)
    first = 0
    for _ in range(6):
        child = fork_publisher(place, first)
        wait_for_version(place, first + chance.randrange(1, 8), child)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        versions = check_readable(place.open())
        first = versions[-1] + 1
    publish(place.open(), first)
    publish(place.open(), first + 1)
    place.open().collect_garbage(1)
    files = [path.name for path in (tmp_path / "store").rglob("*") if path.is_file()]
    assert sorted(name.partition("-")[0] for name in files) == ["manifest.json", "shard"], (
        "nothing half written is left either"
    )


def fork_publisher(place: Place, first: int) -> int:
    child = os.fork()
    if child:
        return child
    try:  # nothing of the child may come back into the test
        store = place.open(max_shard_bytes=20)
        for version in itertools.count(first):
            publish(store, version)
    finally:
        os._exit(1)


def wait_for_version(place: Place, version: int, child: int) -> None:
    store, deadline = place.open(), time.monotonic() + 30
    while version not in store.list_versions():
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "the publisher has died"
        assert time.monotonic() < deadline, "the publisher hangs"


@pytest.fixture
async def bus(tmp_path: Path) -> AsyncIterator[Bus]:
    with EmbeddedRedis(tmp_path / "redis") as server:
        bus = RedisBus(server.url, "run", {})
        yield bus
        await bus.close()


async def test_no_load_of_a_version_that_a_reader_has_declared_ever_fails(
    place: Place, bus: Bus
) -> None:
    """A publisher that collects after each version against readers that load any they know."""
    num_versions = 4 * FULL_PUBLISH_EVERY
    loop = asyncio.get_running_loop()
    manifests: list[WeightsManifest] = []
    collected: list[int] = []

    def retire(versions: Sequence[int]) -> bool:
        return asyncio.run_coroutine_threadsafe(bus.retire_versions(versions), loop).result()

    def publish_and_collect() -> None:
        store = place.open()
        for version in range(num_versions):
            manifests.extend(publish(store, version))
            collected.extend(store.collect_garbage(keep_newest=2, retire=retire))

    publishing = asyncio.create_task(asyncio.to_thread(publish_and_collect))
    readers = [
        asyncio.create_task(keep_reading(f"reader-{seed}", bus, place, manifests, publishing))
        for seed in range(4)
    ]
    await publishing
    outcomes = [await reader for reader in readers]
    num_loaded, num_refused = (sum(column) for column in zip(*outcomes, strict=True))
    assert num_loaded > 20
    assert num_refused > 0, "some were retired when a reader asked for them"
    assert len(collected) >= FULL_PUBLISH_EVERY
    store = place.open()
    remaining = [version for version in range(num_versions) if version not in collected]
    assert await asyncio.to_thread(check_readable, store) == remaining
    found = await asyncio.to_thread(store.collect_garbage, 2, (), retire)
    assert found == remaining[:-FULL_PUBLISH_EVERY], "all let go"


async def keep_reading(
    name: str,
    bus: Bus,
    place: Place,
    manifests: list[WeightsManifest],
    publishing: asyncio.Task[None],
) -> tuple[int, int]:
    """Load random versions until no more come; returns how many loaded and how many retired."""
    chance, store = random.Random(name), place.open()
    num_loaded, num_refused = 0, 0
    while not publishing.done():
        known = manifests[-2 * FULL_PUBLISH_EVERY :]
        if not known:
            await asyncio.sleep(0)
            continue
        manifest = chance.choice(known)
        if not await bus.pin_versions(name, [manifest.policy_version], ttl_s=60.0):
            num_refused += 1
            continue
        tensors = await asyncio.to_thread(lambda chosen=manifest: dict(store.iter_tensors(chosen)))
        assert torch.equal(tensors["weights"], make_weights(manifest.policy_version)["weights"])
        num_loaded += 1
    await bus.pin_versions(name, (), ttl_s=60.0)
    return num_loaded, num_refused


def test_leftovers_of_another_run_are_left_alone(place: Place) -> None:
    obstore.put(place.objects, "other/v00000001/shard-00000.safetensors", b"half")
    store = place.open()
    publish(store, 5)
    store.collect_garbage(1)
    assert "other/v00000001/shard-00000.safetensors" in place.paths()
