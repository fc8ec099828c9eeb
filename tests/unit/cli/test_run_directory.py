from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from sdar.cli import run_directory
from sdar.cli.run_directory import RunDirectory, list_running
from sdar.config import EnvironmentConfig, ModelConfig, RunConfig, TrainingConfig
from sdar.contracts.errors import ConfigurationError, ConflictError, UnavailableError


def build_config(**training: int) -> RunConfig:
    return RunConfig(
        name="a",
        model=ModelConfig(path=Path("m")),
        environment=EnvironmentConfig(name="household"),
        training=TrainingConfig(**training),
    )


def test_a_second_run_on_the_same_directory_is_refused_while_the_first_lives(
    tmp_path: Path,
) -> None:
    with RunDirectory(tmp_path / "a") as first:
        second = RunDirectory(first.root)
        with pytest.raises(ConflictError, match="Another `sdar run`"):
            second.__enter__()
    with second:
        assert second.root.is_dir()  # free again


def test_a_run_is_running_while_its_directory_is_locked(tmp_path: Path) -> None:
    with RunDirectory(tmp_path / "a") as directory:
        assert list_running(tmp_path) == {}
        directory.write_json(directory.gateway, {"address": "127.0.0.1:1"})
        assert list_running(tmp_path) == {"a": "127.0.0.1:1"}
    assert list_running(tmp_path) == {}  # killed before it could clean up


def test_a_repeated_run_is_resumed(tmp_path: Path) -> None:
    with RunDirectory(tmp_path / "a") as directory:
        assert directory.prepare(build_config()) is False
        assert directory.prepare(build_config()) is True


def test_a_run_with_another_configuration_is_refused_with_the_keys_that_differ(
    tmp_path: Path,
) -> None:
    with RunDirectory(tmp_path / "a") as directory:
        directory.prepare(build_config(num_updates=5))
        with pytest.raises(ConflictError, match=r"training\.num_updates is 5 there and 6 here"):
            directory.prepare(build_config(num_updates=6))


def test_a_directory_that_cannot_be_made_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ConfigurationError, match="--runs-dir"),
        RunDirectory(tmp_path / "file" / "a"),
    ):
        pass


def test_a_full_disk_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A full file system can't be made without root; the operating system's answer is what is
    # replaced.
    full = SimpleNamespace(
        statvfs=lambda path: SimpleNamespace(f_bavail=1, f_frsize=4096),
        open=os.open,
        close=os.close,
    )
    full.O_RDWR, full.O_CREAT = os.O_RDWR, os.O_CREAT
    monkeypatch.setattr(run_directory, "os", full)
    with RunDirectory(tmp_path / "a") as directory:
        with pytest.raises(UnavailableError, match="Free some space"):
            directory.prepare(build_config())
        assert not directory.config.exists()
