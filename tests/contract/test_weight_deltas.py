"""Versions published as deltas come back whole, and nothing damaged is taken for a policy."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterator
from pathlib import Path

import obstore
import pytest
import torch
from obstore.store import LocalStore
from torch import Tensor

from sdar.contracts.errors import ConflictError, CorruptionError, WeightsUnavailableError
from sdar.contracts.types import ModelIdentity, WeightsManifest
from sdar.weights.store import FULL_PUBLISH_EVERY, WeightStore
from tests.contract.weight_places import MODEL, Gathered, Place


def train(num_versions: int) -> Iterator[dict[str, Tensor]]:
    """Versions of a small bfloat16 policy, one usual AdamW update of float32 weights each."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Embedding(64, 32),
        torch.nn.Linear(32, 64),
        torch.nn.GELU(),
        torch.nn.Linear(64, 64),
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    for _ in range(num_versions):
        yield {name: value.detach().to(torch.bfloat16) for name, value in model.named_parameters()}
        tokens = torch.randint(64, (128,))
        torch.nn.functional.cross_entropy(model(tokens), tokens).backward()
        optimizer.step()
        optimizer.zero_grad()


def make_versions(num_versions: int) -> list[dict[str, Tensor]]:
    """Versions that change one element of each bfloat16 tensor and all of a float32 tensor."""
    embed, norm = (
        torch.arange(40, dtype=torch.bfloat16).reshape(8, 5),
        torch.ones(16, dtype=torch.bfloat16),
    )
    versions = []
    for version in range(num_versions):
        embed[version % 8, version % 5] += 100
        norm[version % 16] *= -3
        versions.append(
            {
                "embed": embed.clone(),
                "norm": norm.clone(),
                "scale": torch.full((2,), float(version)),
            }
        )
    return versions


def publish_all(store: WeightStore, versions: list[dict[str, Tensor]]) -> list[WeightsManifest]:
    return [
        store.publish(version, tensors, MODEL, num_updates=version)
        for version, tensors in enumerate(versions)
    ]


def read(store: WeightStore, manifest: WeightsManifest) -> dict[str, Tensor]:
    return dict(store.iter_tensors(manifest))


def assert_same_bits(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert list(got) == list(want)
    for name, tensor in want.items():
        assert (got[name].dtype, got[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(got[name].view(torch.uint8), tensor.view(torch.uint8)), name


def test_twenty_versions_as_deltas_are_bit_for_bit_those_published_whole(place: Place) -> None:
    publisher, follower = place.open("deltas"), place.open("deltas")
    total = {"deltas": 0, "whole": 0}
    for version, tensors in enumerate(train(20)):
        delta = publisher.publish(version, tensors, MODEL)
        whole = place.open("whole").publish(version, tensors, MODEL)
        total["deltas"] += delta.size_bytes
        total["whole"] += whole.size_bytes
        assert whole.base_version is None
        expected = [(entry.name, entry.sha256) for entry in whole.tensors]
        assert [(entry.name, entry.sha256) for entry in delta.tensors] == expected
        for got in (read(follower, delta), read(place.open(), delta), read(place.open(), whole)):
            assert_same_bits(got, tensors)
    assert total["deltas"] < total["whole"] / 4, (
        "two whole ones, and eighteen of which the largest changes a tenth"
    )


def test_a_chain_ends_after_ten_versions_and_a_new_one_begins_whole(place: Place) -> None:
    manifests = publish_all(place.open(), make_versions(FULL_PUBLISH_EVERY + 2))
    bases = [manifest.base_version for manifest in manifests]
    assert bases == [None, *range(FULL_PUBLISH_EVERY - 1), None, FULL_PUBLISH_EVERY]
    found = [(entry.name, entry.is_delta) for entry in manifests[1].tensors]
    assert found == [("embed", True), ("norm", True), ("scale", False)]
    assert manifests[1].size_bytes == (1 + 2) + (1 + 2) + 2 * 4, (
        "a gap and a value each, and the float32 tensor"
    )
    assert place.open().fetch_manifest(1) == manifests[1]


def test_a_reader_may_start_anywhere_and_skip_or_go_back(place: Place) -> None:
    versions = make_versions(2 * FULL_PUBLISH_EVERY)
    manifests = publish_all(place.open(), versions)
    reader = place.open()
    for version in (13, 14, 17, 18, 3, 9, 10, 19, 0, 2):
        assert_same_bits(read(reader, manifests[version]), versions[version])


def test_a_follower_needs_nothing_of_the_versions_it_has_read(place: Place) -> None:
    versions = make_versions(3)
    manifests = publish_all(place.open(), versions)
    follower = place.open()
    read(follower, manifests[1])
    for path in [path for path in place.paths() if "/v00000002/" not in path]:
        obstore.delete(place.objects, path)
    assert_same_bits(read(follower, manifests[2]), versions[2])
    with pytest.raises(WeightsUnavailableError, match=r"run/v00000001/manifest\.json is not in"):
        read(place.open(), manifests[2])


def test_a_follower_lets_go_of_its_base_as_it_reads_on(place: Place) -> None:
    """One copy of the weights, not two."""
    tensors = {str(index): torch.zeros(100, dtype=torch.bfloat16) for index in range(8)}
    publisher, follower = place.open(), place.open()
    first = publisher.publish(0, tensors, MODEL)
    bases = [weakref.ref(tensor) for tensor in read(follower, first).values()]
    assert sum(base() is not None for base in bases) == len(tensors), (
        "remembered by the follower alone"
    )
    tensors["0"][0] = 1
    for num_read, _ in enumerate(
        follower.iter_tensors(publisher.publish(1, tensors, MODEL)), start=1
    ):
        assert sum(base() is not None for base in bases) == len(tensors) - num_read


def test_float32_weights_are_published_whole(place: Place) -> None:
    store = place.open()
    assert [
        store.publish(version, {"a": torch.zeros(100)}, MODEL).base_version for version in range(3)
    ] == [None] * 3


def test_a_version_that_changes_more_than_half_is_whole_and_begins_a_chain(place: Place) -> None:
    store, base = place.open(), torch.zeros(100, dtype=torch.bfloat16)
    for version, (num_changed, base_version) in enumerate([(0, None), (33, 0), (34, None), (1, 2)]):
        base[:num_changed] += 1
        assert store.publish(version, {"a": base}, MODEL).base_version == base_version
        assert_same_bits(read(place.open(), store.fetch_manifest()), {"a": base})


def test_half_is_of_the_whole_version(place: Place) -> None:
    """A float32 tensor that is as large as all the rest leaves nothing to save."""
    store = place.open()
    small = torch.zeros(100, dtype=torch.bfloat16)
    large = torch.zeros(50)
    store.publish(0, {"small": small, "large": large}, MODEL)
    assert store.publish(1, {"small": small, "large": large}, MODEL).base_version == 0, (
        "exactly half"
    )
    small[0] = 1
    assert store.publish(2, {"small": small, "large": large}, MODEL).base_version is None


@pytest.mark.parametrize(
    "tensors",
    [
        {"embed": torch.zeros(8, 5, dtype=torch.bfloat16)},
        {
            "norm": torch.ones(16, dtype=torch.bfloat16),
            "embed": torch.zeros(8, 5, dtype=torch.bfloat16),
        },
        {
            "embed": torch.zeros(5, 8, dtype=torch.bfloat16),
            "norm": torch.ones(16, dtype=torch.bfloat16),
        },
        {
            "embed": torch.zeros(8, 5, dtype=torch.float16),
            "norm": torch.ones(16, dtype=torch.bfloat16),
        },
    ],
    ids=["one less", "other order", "other shape", "other type"],
)
def test_other_tensors_than_before_are_published_whole(
    place: Place, tensors: dict[str, Tensor]
) -> None:
    store = place.open()
    base = {
        "embed": torch.zeros(8, 5, dtype=torch.bfloat16),
        "norm": torch.ones(16, dtype=torch.bfloat16),
    }
    store.publish(0, base, MODEL)
    assert store.publish(1, tensors, MODEL).base_version is None
    assert_same_bits(read(place.open(), store.fetch_manifest(1)), tensors)


def test_a_restarted_publisher_begins_whole(place: Place) -> None:
    versions = make_versions(3)
    publish_all(place.open(), versions[:2])
    assert place.open().publish(2, versions[2], MODEL).base_version is None


def test_a_publication_that_failed_halfway_is_no_base(place: Place) -> None:
    versions = make_versions(3)
    store = place.open()
    store.publish(0, versions[0], MODEL)

    def gather(name: str) -> Tensor:
        if name == "scale":
            raise KeyboardInterrupt
        return versions[1][name]

    with pytest.raises(KeyboardInterrupt):
        store.publish(1, Gathered(list(versions[1]), gather), MODEL)
    assert store.publish(2, versions[2], MODEL).base_version is None


def test_a_base_that_somebody_removed_is_not_built_on(place: Place) -> None:
    versions = make_versions(2)
    store = place.open()
    store.publish(0, versions[0], MODEL)
    obstore.delete(place.objects, "run/v00000000/manifest.json")
    assert store.publish(1, versions[1], MODEL).base_version is None


def test_publishing_a_delta_again_changes_nothing(place: Place) -> None:
    versions = make_versions(3)
    store = place.open()
    manifests = publish_all(store, versions)
    before = place.paths()
    assert store.publish(2, versions[2], MODEL, num_updates=2) == manifests[2]
    assert place.open().publish(2, versions[2], MODEL, num_updates=2) == manifests[2], (
        "whole this time, and the same weights"
    )
    assert place.paths() == before
    with pytest.raises(ConflictError):
        place.open().publish(2, versions[1], MODEL, num_updates=2)
    assert place.paths() == before


def test_publishing_on_does_not_change_what_was_published(place: Place) -> None:
    """The publisher keeps its own copy: the caller's tensors go on being trained in place."""
    store = place.open()
    weights = torch.zeros(100, dtype=torch.bfloat16)
    manifests = []
    for version in range(3):
        weights[version] = 1
        manifests.append(store.publish(version, {"a": weights}, MODEL))
    for version, manifest in enumerate(manifests):
        assert read(place.open(), manifest)["a"].sum() == version + 1


def test_a_base_that_was_changed_in_memory_is_read_from_the_store_instead(place: Place) -> None:
    versions = make_versions(3)
    manifests = publish_all(place.open(), versions)
    reader = place.open()
    read(reader, manifests[0])["norm"].zero_()
    assert_same_bits(read(reader, manifests[1]), versions[1])
    assert_same_bits(read(reader, manifests[2]), versions[2])


@pytest.mark.parametrize("num_read", [0, 1])
def test_a_wrong_base_is_refused(place: Place, num_read: int) -> None:
    """With the base in memory, and without."""
    versions = make_versions(4)
    manifests = publish_all(place.open(), versions)
    reader = place.open()
    wrong = dataclasses.replace(manifests[3], base_version=1)
    for manifest in manifests[1 : 1 + num_read]:
        read(reader, manifest)
    with pytest.raises(
        CorruptionError, match=r"Tensor embed of version 3 .*put together on version 1, has SHA-256"
    ):
        read(reader, wrong)
    assert_same_bits(read(reader, manifests[1]), versions[1])


def test_a_base_with_other_tensors_is_refused(place: Place) -> None:
    versions = make_versions(2)
    manifests = publish_all(place.open(), versions)
    entries = tuple(
        dataclasses.replace(entry, name=f"other.{entry.name}") for entry in manifests[1].tensors
    )
    with pytest.raises(CorruptionError, match="delta on version 0, which has other tensors"):
        read(place.open(), dataclasses.replace(manifests[1], tensors=entries))


def test_a_delta_without_a_base_is_refused(place: Place) -> None:
    manifests = publish_all(place.open(), make_versions(2))
    with pytest.raises(
        CorruptionError, match=r"Tensor embed of version 1 .* there is nothing to apply it to"
    ):
        read(place.open(), dataclasses.replace(manifests[1], base_version=None))


@pytest.mark.parametrize("base_version", [3, 4, 2**31 - 1, -1])
def test_a_base_that_is_not_older_is_refused(place: Place, base_version: int) -> None:
    """Hence no circle of versions, each based on the next."""
    manifests = publish_all(place.open(), make_versions(4))
    with pytest.raises(CorruptionError, match="a base is older"):
        read(place.open(), dataclasses.replace(manifests[3], base_version=base_version))


def test_a_chain_longer_than_a_publisher_makes_is_refused(place: Place) -> None:
    manifests = publish_all(place.open(), make_versions(FULL_PUBLISH_EVERY + 1))
    last = manifests[-1]
    with pytest.raises(CorruptionError, match="based on 10 others; 9 is the most"):
        read(place.open(), dataclasses.replace(last, base_version=last.policy_version - 1))


def test_a_base_that_is_gone_makes_its_deltas_unavailable(place: Place) -> None:
    versions = make_versions(3)
    manifests = publish_all(place.open(), versions)
    obstore.delete(place.objects, f"{manifests[0].path}/{manifests[0].tensors[0].shard}")
    with pytest.raises(
        WeightsUnavailableError, match="it was never published or has been collected"
    ):
        read(place.open(), manifests[2])


@pytest.mark.parametrize("damage", ["torn", "flipped", "missing"])
def test_after_a_damaged_delta_a_follower_goes_on_with_what_it_can_read(
    place: Place, damage: str
) -> None:
    versions = make_versions(FULL_PUBLISH_EVERY + 2)
    manifests = publish_all(place.open(), versions)
    shard = f"{manifests[2].path}/{manifests[2].tensors[0].shard}"
    if damage == "missing":
        obstore.delete(place.objects, shard)
    else:
        place.damage(
            shard,
            lambda content: (
                content[:-1] if damage == "torn" else content[:-1] + bytes([content[-1] ^ 1])
            ),
        )
    follower = place.open()
    served = read(follower, manifests[1])
    for manifest in manifests[2:FULL_PUBLISH_EVERY]:
        with pytest.raises(WeightsUnavailableError if damage == "missing" else CorruptionError):
            read(follower, manifest)
    assert_same_bits(served, versions[1])
    for version in (1, FULL_PUBLISH_EVERY, FULL_PUBLISH_EVERY + 1):
        assert_same_bits(read(follower, manifests[version]), versions[version])


class Damage:
    """A small store with a whole version, a delta on it, and every way to read them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.place = Place(str(directory), LocalStore(prefix=directory, mkdir=True))
        weights = torch.arange(12, dtype=torch.bfloat16)
        self.versions = [
            {"a": weights, "b": torch.ones(1)},
            {"a": weights.clone(), "b": torch.ones(1)},
        ]
        self.versions[1]["a"][[3, 7]] *= -1
        self.manifests = publish_all(self.place.open(), self.versions)
        assert [manifest.base_version for manifest in self.manifests] == [None, 0]
        self.files = sorted(path for path in directory.rglob("*") if path.is_file())

    def read(self, version: int) -> dict[str, Tensor]:
        store = self.place.open()
        return read(store, store.fetch_manifest(version))

    def check(self, path: Path) -> None:
        """The file's own version is refused; a delta on it is too, or comes back whole."""
        own = int(path.parent.name.removeprefix("v"))
        with pytest.raises(CorruptionError):
            self.read(own)
        try:
            got = self.read(1)
        except CorruptionError:
            return
        assert_same_bits(got, self.versions[1])


def test_every_flipped_byte_of_every_file_is_found(tmp_path: Path) -> None:
    damage = Damage(tmp_path)
    assert [path.name.partition("-")[0] for path in damage.files] == ["manifest.json", "shard"] * 2
    for path in damage.files:
        content = path.read_bytes()
        for position, byte in enumerate(content):
            flipped = byte ^ (1 << position % 8)
            path.write_bytes(content[:position] + bytes([flipped]) + content[position + 1 :])
            damage.check(path)
        path.write_bytes(content)
    for version, tensors in enumerate(damage.versions):
        assert_same_bits(damage.read(version), tensors)


def test_every_cut_of_every_file_is_found_and_so_is_every_byte_more(tmp_path: Path) -> None:
    damage = Damage(tmp_path)
    for path in damage.files:
        content = path.read_bytes()
        for cut in (
            *(content[:length] for length in range(len(content))),
            content + b"\0",
            content + b"\n",
        ):
            path.write_bytes(cut)
            damage.check(path)
        path.write_bytes(content)


def test_a_shard_in_place_of_another_is_found(tmp_path: Path) -> None:
    damage = Damage(tmp_path)
    shards = [path for path in damage.files if path.suffix == ".safetensors"]
    contents = [path.read_bytes() for path in shards]
    for path, content in zip(shards, reversed(contents), strict=True):
        path.write_bytes(content)
    for version in (0, 1):
        with pytest.raises(CorruptionError):
            damage.read(version)


def test_a_manifest_can_be_read_by_eye(tmp_path: Path) -> None:
    text = Damage(tmp_path).files[2].read_text(encoding="utf-8")
    assert '\n "base_version": 0,\n "sha256": "' in text
    assert '\n   "name": "a",\n   "dtype": "bfloat16",\n' in text


def test_another_model_is_another_version_also_as_a_delta(place: Place) -> None:
    versions = make_versions(2)
    store = place.open()
    publish_all(store, versions)
    with pytest.raises(ConflictError):
        store.publish(1, versions[1], ModelIdentity("other", "f00d"), num_updates=1)
