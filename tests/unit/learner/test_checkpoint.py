"""Checkpoints of a small invented shard: what is found, what is skipped, what a full disk leaves behind."""

from __future__ import annotations

import errno
import json

import pytest
import torch

from sdar.contracts.errors import CapacityError, ConfigurationError, ConflictError
from services.learner.checkpoint import CheckpointStore, read_rank_shard, write_rank_shard
from services.learner.progress import Progress
from tests.unit.learner.builders import make_config

CPU = torch.device("cpu")


class OneRank:
    rank, world_size, is_leader = 0, 1, True


def write_shards(value):
    def write(directory):
        tensors = {"0.master": torch.tensor([value])}
        write_rank_shard(directory, OneRank(), {"w": torch.tensor([value])}, tensors, 3, CPU)

    return write


@pytest.fixture
def store(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints", make_config(keep_checkpoints=2))
    yield store
    store.close()


def write(store, *updates):
    progress, path = Progress(), None
    for index in range(1, max(updates) + 1):
        progress = progress.after_update([f"g{index}"])
        if index in updates:
            path = store.write(progress, write_shards(float(index)))
    return path


def test_nothing_is_found_in_an_empty_directory(store):
    assert store.find_newest() is None


def test_the_newest_is_found_with_its_progress(store):
    path = write(store, 1, 2)
    found = store.find_newest()
    assert found.path == path
    assert found.progress.num_updates == 2
    assert found.progress.trained_groups == (("g1",), ("g2",))


def test_a_shard_comes_back_with_the_random_state(store):
    torch.manual_seed(7)
    path = write(store, 1)
    expected = torch.rand(3)
    torch.manual_seed(0)
    tensors, num_steps = read_rank_shard(path, OneRank(), CPU)
    assert num_steps == 3
    assert tensors.keys() == {"0.master"}
    assert torch.equal(torch.rand(3), expected)


def test_only_the_newest_are_kept(store, tmp_path):
    write(store, 1, 2, 3)
    assert sorted(p.name for p in (tmp_path / "checkpoints").glob("update*")) == ["update-00000002", "update-00000003"]


def test_every_flipped_byte_is_noticed_and_the_one_before_is_used(store):
    path = write(store, 1, 2)
    for file in sorted(path.iterdir()):
        whole = file.read_bytes()
        for position in {0, len(whole) // 2, len(whole) - 2}:
            broken = bytearray(whole)
            broken[position] ^= 1
            file.write_bytes(bytes(broken))
            assert store.find_newest().progress.num_updates == 1, f"{file.name} byte {position}"
        file.write_bytes(whole)
    assert store.find_newest().progress.num_updates == 2


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "weights.safetensors", "optimizer-00000-of-00001.safetensors"])
def test_a_missing_file_makes_a_checkpoint_unusable(store, name):
    path = write(store, 1, 2)
    (path / name).unlink()
    assert store.find_newest().progress.num_updates == 1


def test_a_half_written_checkpoint_is_not_looked_at_and_removed_at_the_next_start(tmp_path):
    directory = tmp_path / "checkpoints"
    first = CheckpointStore(directory, make_config())
    write(first, 1)
    first.close()
    (directory / "update-00000002.partial").mkdir()
    second = CheckpointStore(directory, make_config())
    assert second.find_newest().progress.num_updates == 1
    assert not list(directory.glob("*.partial"))
    second.close()


def test_a_full_disk_leaves_nothing_behind_and_the_earlier_checkpoint_stands(store, tmp_path):
    write(store, 1)

    def run_full(directory):
        (directory / "half").write_bytes(b"x")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(CapacityError, match="No space left"):
        store.write(Progress().after_update(["a"]).after_update(["b"]), run_full)
    assert [p.name for p in (tmp_path / "checkpoints").glob("update*")] == ["update-00000001"]
    assert store.find_newest().progress.num_updates == 1


def test_a_checkpoint_of_other_ranks_is_refused_with_both_numbers(tmp_path):
    first = CheckpointStore(tmp_path, make_config())
    write(first, 1)
    first.close()
    other = CheckpointStore(tmp_path, make_config(zero_stage=2))
    with pytest.raises(ConfigurationError, match=r"zero_stage 0 \(now 2\)"):
        other.find_newest()
    other.close()


def test_two_learners_never_share_a_directory(store, tmp_path):
    with pytest.raises(ConflictError, match="Another learner"):
        CheckpointStore(tmp_path / "checkpoints", make_config())


def test_the_manifest_names_every_other_file(store):
    path = write(store, 1)
    files = json.loads((path / "manifest.json").read_text())["files"]
    assert set(files) == {p.name for p in path.iterdir()} - {"manifest.json"}
