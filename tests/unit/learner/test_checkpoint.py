"""Checkpoints of a small invented shard: found, skipped, on a full disk, after a kill."""

from __future__ import annotations

import errno
import itertools
import json
import os
import resource
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
import structlog
import torch

from sdar.contracts.errors import CapacityError, ConfigurationError, ConflictError, CorruptionError
from services.learner import checkpoint as checkpoint_module
from services.learner.checkpoint import (
    CheckpointStore,
    _describe_all,
    _seal,
    _verify,
    read_rank_shard,
    read_trained_groups,
    write_rank_shard,
)
from services.learner.progress import Progress
from tests.faults import KILLED, die, run_forked, trace_lines
from tests.unit.learner.builders import make_config

CPU = torch.device("cpu")
SNAPSHOT = b"what the bus was"


class OneRank:
    rank = 0
    world_size = 1
    is_leader = True


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
            path = store.write(progress, SNAPSHOT, write_shards(float(index)))
    return path


def test_nothing_is_found_in_an_empty_directory(store):
    assert store.find_newest() is None


def test_the_newest_is_found_with_its_progress(store):
    path = write(store, 1, 2)
    found = store.find_newest()
    assert found.path == path
    assert found.progress.num_updates == 2
    assert found.progress.trained_groups == (("g1",), ("g2",))
    assert found.snapshot == SNAPSHOT


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
    found = sorted(p.name for p in (tmp_path / "checkpoints").glob("update*"))
    assert found == ["update-00000002", "update-00000003"]


FILES = [
    "bus.snapshot",
    "manifest.json",
    "optimizer-00000-of-00001.safetensors",
    "state.json",
    "weights.safetensors",
]


@pytest.fixture
def checkpoint(store):
    """An intact checkpoint and its files as written."""
    path = write(store, 1)
    whole = {file.name: file.read_bytes() for file in path.iterdir()}
    assert sorted(whole) == FILES
    return path, whole


def is_intact(path):
    try:
        return bool(_verify(path))
    except CorruptionError:
        return False


def assert_damaged(path, what):
    assert not is_intact(path), f"not noticed: {what}"


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("bits", [0x01, 0xFF])
def test_every_single_byte_that_is_not_as_written_is_noticed(checkpoint, name, bits):
    """One bit, and all of them, of every byte of every file in turn."""
    path, whole = checkpoint
    with (path / name).open("r+b", buffering=0) as file:
        for position, byte in enumerate(whole[name]):
            file.seek(position)
            file.write(bytes([byte ^ bits]))
            assert_damaged(path, f"{name} byte {position} ^ {bits}")
            file.seek(position)
            file.write(bytes([byte]))
    assert _verify(path)["progress"]["num_updates"] == 1


@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_at_any_length_or_longer_by_a_byte_is_noticed(checkpoint, name):
    path, whole = checkpoint
    for length in reversed(range(len(whole[name]))):
        os.truncate(path / name, length)
        assert_damaged(path, f"{name} cut to {length}")
    for more in (b"\0", b" ", b"\n"):
        (path / name).write_bytes(whole[name] + more)
        assert_damaged(path, f"{name} with {more!r} behind it")


def test_each_value_of_each_byte_of_the_manifest_is_noticed(checkpoint):
    """The file that vouches for the others vouches for itself, even if it reads the same."""
    path, whole = checkpoint
    name = "manifest.json"
    spread = range(0, len(whole[name]), 13)
    with (path / name).open("r+b", buffering=0) as file:
        for position in spread:
            for value in set(range(256)) - {whole[name][position]}:
                file.seek(position)
                file.write(bytes([value]))
                assert_damaged(path, f"{name} byte {position} = {value}")
            file.seek(position)
            file.write(whole[name][position : position + 1])
    assert _verify(path)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_makes_a_checkpoint_unusable_and_the_one_before_is_used(store, name):
    path = write(store, 1, 2)
    (path / name).unlink()
    assert store.find_newest().progress.num_updates == 1


def test_a_file_or_directory_too_many_makes_a_checkpoint_unusable(checkpoint):
    path, _ = checkpoint
    (path / "weights-2.safetensors").write_bytes(b"")
    assert_damaged(path, "a file too many")
    (path / "weights-2.safetensors").unlink()
    (path / "more").mkdir()
    assert_damaged(path, "a directory too many")


def test_a_manifest_that_is_whole_but_names_a_file_elsewhere_is_refused(checkpoint, tmp_path):
    path, whole = checkpoint
    (tmp_path / "elsewhere").write_bytes(whole["state.json"])
    files = json.loads(whole["manifest.json"])["files"]
    files["../../elsewhere"] = files.pop("state.json")
    (path / "manifest.json").write_bytes(_seal(files))
    assert_damaged(path, "a path out of the checkpoint")


@pytest.mark.parametrize(
    "content", [b"[" * 100_000, b'{"progress": {}, "made_for": 3}', b"[]", b"{}"]
)
@pytest.mark.parametrize("name", ["manifest.json", "state.json"])
def test_hostile_content_under_fitting_checksums_is_refused_as_corrupt(checkpoint, name, content):
    path, _ = checkpoint
    (path / name).write_bytes(content)
    if name == "state.json":
        (path / "manifest.json").unlink()
        (path / "manifest.json").write_bytes(_describe_all(path))
    assert_damaged(path, content[:20])


def test_files_of_two_checkpoints_never_pass_for_one(store, tmp_path):
    first = write(store, 1)
    kept = (first / "weights.safetensors").read_bytes()
    second = write(store, 1, 2)
    (second / "weights.safetensors").write_bytes(kept)
    assert_damaged(second, "weights of another update, as long as its own")


def test_what_was_skipped_is_logged_with_its_reason(store):
    path = write(store, 1, 2)
    (path / "state.json").write_bytes(b"{}")
    with structlog.testing.capture_logs() as logs:
        assert store.find_newest().progress.num_updates == 1
    [skipped] = [entry for entry in logs if entry["event"] == "checkpoint_skipped"]
    assert (skipped["path"], skipped["log_level"]) == (str(path), "error")
    assert "state.json is" in skipped["reason"]


def damage(path):
    (path / "weights.safetensors").write_bytes(b"")


def list_names(directory):
    return sorted(path.name for path in directory.glob("update*"))


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_from_zero(store):
    newest = write(store, 1, 2)
    for path in (newest, newest.with_name("update-00000001")):
        damage(path)
    with pytest.raises(
        CorruptionError, match=r"update-00000002: weights\.safetensors is .* delete them \(rm -r"
    ):
        store.find_newest()


def test_a_damaged_checkpoint_is_replaced_and_never_counts_among_those_kept(tmp_path):
    """Updates 2 and 3 are damaged: the run goes on from 1, which goes when 3 is there."""
    store = CheckpointStore(tmp_path, make_config(keep_checkpoints=2))
    write(store, 1, 2)
    store.close()
    wider = CheckpointStore(tmp_path, make_config(keep_checkpoints=3))
    damage(write(wider, 1, 2, 3))
    damage(tmp_path / "update-00000002")
    wider.close()
    store = CheckpointStore(tmp_path, make_config(keep_checkpoints=2))
    found = store.find_newest()
    assert found.progress.num_updates == 1
    second = found.progress.after_update(["x"])
    store.write(second, SNAPSHOT, write_shards(2.0))
    assert list_names(tmp_path) == ["update-00000001", "update-00000002", "update-00000003"]
    assert store.find_newest().progress.trained_groups == (("g1",), ("x",))
    store.write(second.after_update(["y"]), SNAPSHOT, write_shards(3.0))
    assert list_names(tmp_path) == ["update-00000002", "update-00000003"]
    store.close()


def test_all_is_on_the_disk_before_it_gets_its_name_and_the_manifest_comes_last(
    store, tmp_path, monkeypatch
):
    """A power cut keeps what was synced: no name may be durable before what it names."""
    done, directory = [], tmp_path / "checkpoints"
    fsync, rename = os.fsync, Path.rename

    def fsync_and_tell(handle):
        done.append(("sync", Path(f"/proc/self/fd/{handle}").readlink()))
        fsync(handle)

    def rename_and_tell(path, target):
        done.append(("rename", path, target))
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", fsync_and_tell)
    monkeypatch.setattr(Path, "rename", rename_and_tell)
    final = write(store, 1)
    partial = directory / "update-00000001.partial"
    *files, last, in_partial, renamed, in_directory = done
    expected = {path.name for path in final.iterdir()}
    assert {path.name for _, path in files} | {"manifest.json"} == expected
    assert last == ("sync", partial / "manifest.json")
    assert in_partial == ("sync", partial)
    assert renamed == ("rename", partial, final)
    assert in_directory == ("sync", directory)


def write_and_die(directory, config, progress, place):
    """Write a checkpoint in this process, which ends before the module's line `place`."""
    store = CheckpointStore(directory, config)
    lines = itertools.count()
    trace_lines([checkpoint_module.__file__], lambda line: die() if next(lines) == place else None)
    store.write(progress, SNAPSHOT, write_shards(9.0))


def test_a_kill_between_any_two_lines_of_a_write_leaves_no_fewer_intact_checkpoints(tmp_path):
    """Of three, two are kept from now on; the new one takes the name of an intact one."""
    wider = make_config(keep_checkpoints=3)
    config = make_config(keep_checkpoints=2)
    prepared = tmp_path / "prepared"
    store = CheckpointStore(prepared, wider)
    write(store, 1, 2, 3)
    store.close()
    progress = Progress().after_update(["a"]).after_update(["b"]).after_update(["c"])
    for place in itertools.count():
        directory = tmp_path / str(place)
        shutil.copytree(prepared, directory)
        status = run_forked(partial(write_and_die, directory, config, progress, place))
        store = CheckpointStore(directory, config)
        assert store.find_newest().progress.num_updates == 3
        store.close()
        assert sum(is_intact(path) for path in directory.glob("update-*")) >= 2, f"line {place}"
        if status == 0:
            break
        assert status == KILLED
    assert place > 50
    assert read_trained_groups(directory) == [("a",), ("b",), ("c",)]


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


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
def test_a_disk_that_refuses_leaves_nothing_behind_and_the_earlier_checkpoint_stands(
    store, tmp_path, number
):
    write(store, 1)

    def refuse(directory):
        (directory / "half").write_bytes(b"x")
        raise OSError(number, os.strerror(number))

    with pytest.raises(CapacityError, match=os.strerror(number)):
        store.write(Progress().after_update(["a"]).after_update(["b"]), SNAPSHOT, refuse)
    assert list_names(tmp_path / "checkpoints") == ["update-00000001"]
    assert store.find_newest().progress.num_updates == 1


def test_a_real_limit_on_file_size_is_such_a_refusal(tmp_path):
    """In a process whose files may have 4 kB: the shard with the random state is larger."""
    store = CheckpointStore(tmp_path, make_config())
    write(store, 1)
    store.close()

    def write_under_limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        limited = CheckpointStore(tmp_path, make_config())
        with pytest.raises(CapacityError, match="File too large"):
            limited.write(
                Progress().after_update(["a"]).after_update(["b"]), SNAPSHOT, write_shards(2.0)
            )

    assert run_forked(write_under_limit) == 0
    assert list_names(tmp_path) == ["update-00000001"]


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


def test_whoever_checks_a_run_reads_the_groups_of_every_update_beside_its_learner(store, tmp_path):
    directory = tmp_path / "checkpoints"
    assert read_trained_groups(directory) == []
    damage(write(store, 1, 2))
    assert read_trained_groups(directory) == [("g1",)]
