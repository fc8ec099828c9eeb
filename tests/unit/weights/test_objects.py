"""A directory of objects: what is on the disk when, and that nothing leads out of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sdar.contracts.errors import CorruptionError
from sdar.weights.objects import DirectoryStore


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "root"


@pytest.fixture
def store(root: Path) -> DirectoryStore:
    return DirectoryStore(root)


def test_an_object_is_on_the_disk_before_its_name_appears(
    root: Path, store: DirectoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is flushed, and which names exist by then, as the system call shows."""
    flushed: list[tuple[str, list[str]]] = []
    flush = os.fsync

    def record(handle: int) -> None:
        flushed.append(
            (
                Path(os.readlink(f"/proc/self/fd/{handle}")).name,
                sorted(path.name for path in root.glob("run/v1/[!.]*")),
            )
        )
        flush(handle)

    monkeypatch.setattr(os, "fsync", record)
    store.put("run/v1/shard", b"weights")
    assert store.create("run/v1/manifest", b"names")
    files = [
        (name.split(".")[1] if name.startswith(".") else name, names) for name, names in flushed
    ]
    both = ["manifest", "shard"]
    assert files == [
        ("shard", []),
        ("manifest", ["shard"]),
        ("v1", both),
        ("run", both),
        ("root", both),
    ]


def test_what_was_put_comes_back_and_leaves_nothing_else(root: Path, store: DirectoryStore) -> None:
    store.put("run/v1/a", b"old")
    store.put("run/v1/a", b"new")
    assert store.get("run/v1/a") == b"new"
    assert store.list("run") == ["run/v1/a"]
    assert [path.name for path in root.rglob("*") if path.is_file()] == ["a"]


def test_only_the_first_creation_succeeds(root: Path, store: DirectoryStore) -> None:
    assert [store.create("run/a", content) for content in (b"first", b"second")] == [True, False]
    assert store.get("run/a") == b"first"
    assert [path.name for path in (root / "run").iterdir()] == ["a"]


def test_a_directory_without_objects_goes_with_its_last_one(
    root: Path, store: DirectoryStore
) -> None:
    store.put("run/v1/a", b"")
    store.put("run/v1/b", b"")
    store.delete("run/v1/a")
    assert store.list("run") == ["run/v1/b"]
    store.delete("run/v1/b")
    store.delete("run/v1/b")
    assert not (root / "run" / "v1").exists()


def test_what_is_not_there_is_not_found(store: DirectoryStore) -> None:
    assert store.list("nobody") == []
    with pytest.raises(FileNotFoundError):
        store.get("nobody/a")


@pytest.mark.parametrize(
    "path", ["../secret", "run/../../secret", "run/..", "/etc/passwd", "run/.", "run/", ".."]
)
def test_a_path_cannot_lead_out(store: DirectoryStore, path: str) -> None:
    for call in (
        store.get,
        store.delete,
        lambda where: store.put(where, b""),
        lambda where: store.create(where, b""),
    ):
        with pytest.raises(CorruptionError, match="leads out of"):
            call(path)


def test_a_linked_directory_is_not_followed(
    tmp_path: Path, root: Path, store: DirectoryStore
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "a").write_bytes(b"secret")
    (root / "run").mkdir()
    (root / "run" / "v1").symlink_to(outside)
    for call in (store.get, store.delete, lambda where: store.put(where, b"")):
        with pytest.raises(CorruptionError, match="put a link there, remove it"):
            call("run/v1/a")
    assert store.list("run") == []
    assert (outside / "a").read_bytes() == b"secret"


def test_a_linked_file_is_not_read_and_deleting_it_deletes_the_link(
    tmp_path: Path, root: Path, store: DirectoryStore
) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    (root / "run").mkdir()
    (root / "run" / "a").symlink_to(tmp_path / "secret")
    with pytest.raises(OSError, match="symbolic links"):
        store.get("run/a")
    store.delete("run/a")
    assert store.list("run") == []
    assert (tmp_path / "secret").exists()


def test_the_root_itself_may_be_reached_by_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    store = DirectoryStore(tmp_path / "link")
    store.put("run/a", b"here")
    assert store.get("run/a") == b"here"
