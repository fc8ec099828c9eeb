"""The promises of `WeightStore`, kept on a directory and on S3 (moto's server)."""

from __future__ import annotations

import dataclasses
import threading
import weakref
from pathlib import Path

import obstore
import pytest
import torch
from torch import Tensor

from sdar.contracts.errors import (
    ConfigurationError,
    ConflictError,
    ContractError,
    CorruptionError,
    WeightsUnavailableError,
)
from sdar.contracts.types import ModelIdentity, WeightsManifest
from sdar.weights.manifests import manifest_from_json, manifest_to_json
from sdar.weights.store import WeightStore
from tests.contract.weight_places import MODEL, Gathered, Place, assert_same, make_tensors


def test_tensors_come_back_bit_for_bit_and_in_order(place: Place) -> None:
    tensors = {
        "z.float32": torch.tensor([1.0, -0.0, float("inf"), 1e-45]),
        "a.bfloat16": torch.arange(12, dtype=torch.bfloat16).reshape(3, 4),
        "b.float16": torch.tensor([[65504.0]], dtype=torch.float16),
        "c.int64": torch.tensor([-(2**62)]),
        "d.bool": torch.tensor([True, False]),
        "e.scalar": torch.tensor(3.5),
        "f.empty": torch.zeros(0, 3),
        "g.transposed": torch.arange(6.0).reshape(2, 3).T,
        "h.parameter": torch.nn.Parameter(torch.ones(2)),
    }
    tensors["i.tied"] = tensors["z.float32"]
    manifest = place.open().publish(3, tensors, MODEL)
    got = dict(place.open().iter_tensors(manifest))
    assert_same(got, {name: tensor.detach() for name, tensor in tensors.items()})
    assert manifest.size_bytes == sum(
        tensor.numel() * tensor.element_size() for tensor in tensors.values()
    )
    assert (manifest.run_id, manifest.policy_version, manifest.path) == ("run", 3, "run/v00000003")


def test_shards_are_bounded_and_a_larger_tensor_gets_its_own(place: Place) -> None:
    sizes = {"a": 5, "b": 5, "c": 30, "d": 10, "e": 1}
    tensors = {name: torch.full((size,), 7, dtype=torch.uint8) for name, size in sizes.items()}
    manifest = place.open(max_shard_bytes=10).publish(0, tensors, MODEL)
    shards: dict[str, list[str]] = {}
    for entry in manifest.tensors:
        shards.setdefault(entry.shard, []).append(entry.name)
    assert list(shards.values()) == [["a", "b"], ["c"], ["d"], ["e"]]
    assert_same(dict(place.open().iter_tensors(manifest)), tensors)


def test_publishing_whole_keeps_no_more_than_a_shard_in_memory(place: Place) -> None:
    alive: list[weakref.ref[Tensor]] = []
    most_alive = 0

    def gather(name: str) -> Tensor:
        nonlocal most_alive
        most_alive = max(most_alive, sum(reference() is not None for reference in alive))
        tensor = torch.full((10,), int(name), dtype=torch.uint8)
        alive.append(weakref.ref(tensor.untyped_storage()))
        return tensor

    place.open(max_shard_bytes=30).publish(
        0, Gathered([str(index) for index in range(12)], gather), MODEL
    )
    assert most_alive <= 4, "three tensors of a shard and the next one"


def test_the_newest_version_is_the_default_and_each_keeps_its_content(place: Place) -> None:
    store = place.open()
    published = {
        version: store.publish(version, make_tensors(version), MODEL) for version in (9, 10, 2)
    }
    assert store.list_versions() == [2, 9, 10]
    assert store.fetch_manifest() == published[10]
    assert store.fetch_manifest(9) == published[9]
    for version, manifest in published.items():
        assert_same(dict(store.iter_tensors(manifest)), make_tensors(version))


def test_what_was_never_published_is_unavailable(place: Place) -> None:
    store = place.open()
    assert store.list_versions() == []
    with pytest.raises(WeightsUnavailableError, match=r"has no weights in .* yet"):
        store.fetch_manifest()
    with pytest.raises(WeightsUnavailableError, match=r"run/v00000005/manifest\.json is not in"):
        store.fetch_manifest(5)


def test_a_version_exists_only_once_its_manifest_does(place: Place) -> None:
    def gather(name: str) -> Tensor:
        if name == "c":
            raise KeyboardInterrupt
        return torch.zeros(4)

    store = place.open(max_shard_bytes=16)
    with pytest.raises(KeyboardInterrupt):
        store.publish(1, Gathered(["a", "b", "c"], gather), MODEL)
    assert [path.rpartition("/")[2][:11] for path in place.paths()] == ["shard-00000"]
    assert store.list_versions() == []
    assert_same(dict(store.iter_tensors(store.publish(1, make_tensors(), MODEL))), make_tensors())


def test_publishing_the_same_again_changes_nothing(place: Place) -> None:
    first = place.open().publish(1, make_tensors(), MODEL)
    before = place.paths()
    assert place.open().publish(1, make_tensors(), MODEL) == first
    assert place.paths() == before


def test_a_version_is_never_overwritten_with_other_content(place: Place) -> None:
    store = place.open()
    first = store.publish(1, make_tensors(1.0), MODEL)
    before = place.paths()
    with pytest.raises(ConflictError, match="Version 1 of run run already names other weights"):
        store.publish(1, make_tensors(2.0), MODEL)
    with pytest.raises(ConflictError):
        store.publish(1, make_tensors(1.0), ModelIdentity("other", "f00d"))
    with pytest.raises(ConflictError):
        store.publish(1, make_tensors(1.0), MODEL, num_updates=1)
    assert_same(dict(store.iter_tensors(first)), make_tensors(1.0))
    assert place.paths() == before


def test_of_publishers_racing_for_a_version_one_wins_whole(place: Place) -> None:
    outcomes: list[float | ConflictError] = []

    def publish(value: float) -> None:
        try:
            place.open(max_shard_bytes=20).publish(1, make_tensors(value), MODEL)
            outcomes.append(value)
        except ConflictError as error:
            outcomes.append(error)

    threads = [threading.Thread(target=publish, args=(float(value),)) for value in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    [winner] = [outcome for outcome in outcomes if isinstance(outcome, float)]
    assert len(outcomes) == 4
    store = place.open()
    assert_same(dict(store.iter_tensors(store.fetch_manifest(1))), make_tensors(winner))


def shard_path(manifest: WeightsManifest, index: int = 0) -> str:
    return f"{manifest.path}/{manifest.tensors[index].shard}"


def test_a_flipped_byte_is_found_and_its_tensor_named(place: Place) -> None:
    store = place.open()
    manifest = store.publish(1, {"only.weight": torch.ones(8)}, MODEL)
    place.damage(shard_path(manifest), lambda content: content[:-1] + b"\x01")
    with pytest.raises(
        CorruptionError, match=r"Tensor only\.weight of version 1 .* SHA-256"
    ) as caught:
        list(store.iter_tensors(manifest))
    assert caught.value.fields == {"tensor": "only.weight"}


def test_a_truncated_shard_is_found(place: Place) -> None:
    store = place.open()
    manifest = store.publish(1, make_tensors(), MODEL)
    place.damage(shard_path(manifest), lambda content: content[:-1])
    with pytest.raises(CorruptionError, match=r"embed\.weight.*cannot be decoded"):
        list(store.iter_tensors(manifest))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "int32"}, "dtype float32, not int32"),
        ({"shape": (12,)}, r"shape \(4, 3\), not \(12,\)"),
        ({"name": "x"}, "missing"),
    ],
)
def test_a_tensor_that_contradicts_its_manifest_is_refused(
    place: Place, change: dict[str, object], message: str
) -> None:
    store = place.open()
    manifest = store.publish(1, make_tensors(), MODEL)
    entries = (dataclasses.replace(manifest.tensors[0], **change), *manifest.tensors[1:])
    with pytest.raises(CorruptionError, match=message):
        list(store.iter_tensors(dataclasses.replace(manifest, tensors=entries)))


def test_a_shard_that_is_gone_makes_its_version_unavailable(place: Place) -> None:
    store = place.open()
    manifest = store.publish(1, make_tensors(), MODEL)
    obstore.delete(place.objects, shard_path(manifest))
    with pytest.raises(WeightsUnavailableError, match=r"collected\. Fetch the newest version"):
        list(store.iter_tensors(manifest))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"tensors": [1]}', b"\xff\xfe"])
def test_a_manifest_that_cannot_be_decoded_is_corrupt(place: Place, content: bytes) -> None:
    store = place.open()
    place.damage(f"{store.publish(1, make_tensors(), MODEL).path}/manifest.json", lambda _: content)
    with pytest.raises(CorruptionError, match="does not match the checksum at its end"):
        store.fetch_manifest(1)


def test_a_manifest_moved_to_another_version_is_corrupt(place: Place) -> None:
    store = place.open()
    store.publish(1, make_tensors(), MODEL)
    moved = bytes(obstore.get(place.objects, "run/v00000001/manifest.json").bytes())
    obstore.put(place.objects, "run/v00000002/manifest.json", moved)
    with pytest.raises(CorruptionError, match="describes run/v00000001, version 1"):
        store.fetch_manifest(2)


@pytest.mark.parametrize(
    "path",
    [
        "../run/v00000001",
        "/etc",
        "run/v00000001/..",
        "run",
        "../../v00000001",
        "a/b/v00000001",
        "run/v00000002",
    ],
)
def test_a_manifest_cannot_lead_out_of_the_store(place: Place, path: str) -> None:
    store = place.open()
    manifest = store.publish(1, make_tensors(), MODEL)
    with pytest.raises(CorruptionError, match="no path this store makes"):
        list(store.iter_tensors(dataclasses.replace(manifest, path=path)))
    entry = dataclasses.replace(manifest.tensors[0], shard=f"../{manifest.tensors[0].shard}")
    with pytest.raises(CorruptionError, match="no path this store makes"):
        list(store.iter_tensors(dataclasses.replace(manifest, tensors=(entry,))))


@pytest.mark.parametrize("run_id", ["", ".", "..", "../run", "/etc", "a/b"])
def test_a_run_id_in_a_manifest_cannot_lead_out_of_the_store(place: Place, run_id: str) -> None:
    store = place.open()
    manifest = store.publish(1, make_tensors(), MODEL)
    with pytest.raises(CorruptionError, match="no path this store makes"):
        list(
            store.iter_tensors(
                dataclasses.replace(manifest, run_id=run_id, path=f"{run_id}/v00000001")
            )
        )


def test_garbage_collection_keeps_the_newest_and_those_in_use(place: Place) -> None:
    store = place.open()
    for version in range(6):
        store.publish(version, make_tensors(version), MODEL)
    assert store.collect_garbage(keep_newest=2, in_use={1, 77}) == [0, 2, 3]
    assert store.list_versions() == [1, 4, 5]
    assert {path.split("/")[1] for path in place.paths()} == {"v00000001", "v00000004", "v00000005"}
    assert store.collect_garbage(keep_newest=2, in_use={1}) == []
    with pytest.raises(ConfigurationError, match="Keep at least 1"):
        store.collect_garbage(keep_newest=0)


def test_garbage_collection_clears_what_a_crash_left_but_not_a_version_being_written(
    place: Place,
) -> None:
    store = place.open()
    for version in (1, 3):
        obstore.put(
            place.objects, f"run/v{version:08d}/shard-00000-{'0' * 16}.safetensors", b"half"
        )
    assert store.collect_garbage(keep_newest=1) == []
    assert len(place.paths()) == 2, "nothing newer is published"
    store.publish(2, make_tensors(), MODEL)
    assert store.collect_garbage(keep_newest=1) == []
    assert {path.split("/")[1] for path in place.paths()} == {"v00000002", "v00000003"}


def test_runs_share_a_store_without_touching_each_other(place: Place) -> None:
    mine, theirs = place.open("run"), place.open("run-2")
    manifest = theirs.publish(1, make_tensors(), MODEL)
    assert mine.list_versions() == []
    mine.publish(7, make_tensors(), MODEL)
    mine.collect_garbage(keep_newest=1)
    assert theirs.list_versions() == [1]
    assert_same(dict(mine.iter_tensors(manifest)), make_tensors())


def test_a_manifest_survives_its_json(place: Place) -> None:
    manifest = place.open().publish(1, make_tensors(), MODEL)
    text = manifest_to_json(manifest)
    assert manifest_from_json(text) == manifest
    assert '"name": "embed.weight"' in text


@pytest.mark.parametrize("tensors", [{}, {"a:gaps": torch.zeros(1)}, {"": torch.zeros(1)}])
def test_a_version_has_tensors_with_names_that_no_delta_needs(
    place: Place, tensors: dict[str, Tensor]
) -> None:
    with pytest.raises(ContractError, match="Publish at least one, and no ':' in a name"):
        place.open().publish(1, tensors, MODEL)


@pytest.mark.parametrize("run_id", ["", "..", "a/b", "../other", ".hidden", "a b"])
def test_a_run_id_that_is_no_directory_name_is_refused(tmp_path: Path, run_id: str) -> None:
    with pytest.raises(ConfigurationError, match="cannot name a directory"):
        WeightStore(str(tmp_path), run_id)


@pytest.mark.parametrize(
    "url", ["", "http://host/path", "s3://", "file://host/path", "gs://bucket"]
)
def test_an_address_that_is_no_store_is_refused(url: str) -> None:
    with pytest.raises(ConfigurationError, match="Give a directory"):
        WeightStore(url, "run")


def test_a_file_url_is_the_same_store_as_its_directory(tmp_path: Path) -> None:
    directory = tmp_path / "with space"
    manifest = WeightStore(directory.as_uri(), "run").publish(1, make_tensors(), MODEL)
    assert WeightStore(str(directory), "run").fetch_manifest() == manifest


def test_a_store_that_cannot_be_opened_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(WeightsUnavailableError, match="Opening the weight store"):
        WeightStore(str(tmp_path / "file" / "store"), "run")
