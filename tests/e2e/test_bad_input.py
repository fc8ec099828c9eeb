"""`sdar run` against bad input: one sentence, an exit code, nothing half-written or running."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import psutil
import pytest

from sdar.cli.main import main
from sdar.cli.run_directory import RunDirectory

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "household.yaml"
MODEL = ROOT / "examples" / "models" / "household-tiny"


@dataclass
class Refusal:
    code: int
    stdout: str
    stderr: str


class Command(Protocol):
    def __call__(self, *arguments: str) -> Refusal: ...


@pytest.fixture
def run_sdar(capfd: pytest.CaptureFixture[str]) -> Command:
    """The `sdar run` command in this process: it refuses before it starts another one."""

    def run(*arguments: str) -> Refusal:
        with pytest.raises(SystemExit) as ended:
            main(["run", *arguments])
        assert isinstance(ended.value.code, int)
        return Refusal(ended.value.code, *capfd.readouterr())

    return run


def assert_refused(done: Refusal, *parts: str) -> None:
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.code in (1, 2), done.stderr
    assert len(errors) == 1, done.stderr
    for part in parts:
        assert part in errors[0]


def assert_nothing_remains(runs_dir: Path) -> None:
    assert not list(runs_dir.rglob("config.yaml")), "a refused run must not leave a run behind"
    commands = [read_command(process) for process in psutil.Process().children(recursive=True)]
    assert [command for command in commands if "sdar.cli.main" in command] == []


def read_command(process: psutil.Process) -> list[str]:
    """A process's command line; empty for one that has ended, reaped or not."""
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["training.nm_updates=6"], ["training.nm_updates", "Did you mean num_updates?"]),
        (["training.max_staleness=-1"], ["training.max_staleness", "-1"]),
        (["model.path=no/such/model"], ["no/such/model", "sdar model create"]),
        (["nonsense"], ["KEY=VALUE", "nonsense"]),
    ],
)
def test_a_bad_configuration_is_one_sentence(
    run_sdar: Command, tmp_path: Path, overrides: list[str], parts: list[str]
) -> None:
    options = [text for override in overrides for text in ("--set", override)]
    done = run_sdar(str(EXAMPLE), "--runs-dir", str(tmp_path / "runs"), *options)
    assert_refused(done, *parts)
    assert_nothing_remains(tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "part"),
    [
        ("model.safetensors", b"\x00" * 100, "model.safetensors"),
        ("config.json", b"{", "config.json"),
        ("tokenizer.json", None, "tokenizer.json"),
    ],
)
def test_a_malformed_model_is_found_before_anything_starts(
    run_sdar: Command, tmp_path: Path, file: str, content: bytes | None, part: str
) -> None:
    model = tmp_path / "model"
    shutil.copytree(MODEL, model)
    (model / file).unlink()
    if content is not None:
        (model / file).write_bytes(content)
    done = run_sdar(
        str(EXAMPLE), "--runs-dir", str(tmp_path / "runs"), "--set", f"model.path={model}"
    )
    assert_refused(done, part)
    assert_nothing_remains(tmp_path)


def test_a_busy_port_is_named(run_sdar: Command, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = run_sdar(str(EXAMPLE), "--runs-dir", str(tmp_path / "runs"), "--port", str(port))
    assert_refused(done, f"Port {port}", "--port")
    assert_nothing_remains(tmp_path)


def test_an_absent_redis_is_named(run_sdar: Command, tmp_path: Path) -> None:
    done = run_sdar(
        str(EXAMPLE), "--runs-dir", str(tmp_path / "runs"), "--redis", "redis://127.0.0.1:1/0"
    )
    assert_refused(done, "redis://127.0.0.1:1/0", "Start one")
    assert_nothing_remains(tmp_path)


def test_a_second_run_on_the_same_directory_is_refused(run_sdar: Command, tmp_path: Path) -> None:
    with RunDirectory(tmp_path / "household"):
        done = run_sdar(str(EXAMPLE), "--runs-dir", str(tmp_path))
    assert_refused(done, "Another `sdar run`", "another name")
    assert_nothing_remains(tmp_path)


def test_errors_reach_programs_as_json(run_sdar: Command, tmp_path: Path) -> None:
    done = run_sdar(
        str(EXAMPLE), "--runs-dir", str(tmp_path), "--set", "seed=-1", "--output", "json"
    )
    assert done.code == 2
    assert '"reason": "CONFIGURATION"' in done.stdout


def test_the_installed_command_refuses_with_an_exit_code_and_no_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sdar.cli.main", "run", str(tmp_path / "missing.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr.startswith("error: Cannot read the run configuration")
    assert "Traceback" not in done.stderr
