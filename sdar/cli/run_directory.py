"""The directory runs/<name>/: its layout, its lock, and what may be resumed there."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from sdar.cli.processes import choose_port
from sdar.config import RunConfig, load_config, save_config
from sdar.contracts.errors import ConfigurationError, ConflictError, UnavailableError

_LEAST_FREE_BYTES = 200 * 2**20
_MOST_DIFFERENCES_SHOWN = 5


@dataclass
class RunDirectory:
    """Paths of one run. Use as a context manager: inside, no other process can run in it."""

    root: Path
    _lock_fd: int = -1

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def weights(self) -> Path:
        return self.root / "weights"

    @property
    def redis(self) -> Path:
        return self.root / "redis"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def plots(self) -> Path:
        return self.root / "plots"

    @property
    def summary(self) -> Path:
        return self.root / "summary.json"

    @property
    def ports(self) -> Path:
        """Ports of the servers that tasks in flight name."""
        return self.root / "ports.json"

    @property
    def gateway(self) -> Path:
        """Where the gateway of the sitting in progress answers; it counts only while the directory
        is locked.
        """
        return self.root / "gateway.json"

    @property
    def wall_clock(self) -> Path:
        """Seconds of wall clock that earlier sittings spent in this run."""
        return self.root / "wall_s"

    def __enter__(self) -> Self:
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            # The kernel lets go of this lock however the process ends, so none is ever left behind.
            self._lock_fd = os.open(self.root / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._lock_fd)
            raise ConflictError(
                f"Another `sdar run` is using {self.root}. Wait for it, stop it with Ctrl-C, or "
                "give this run another name."
            ) from error
        except OSError as error:
            raise ConfigurationError(
                f"Cannot use {self.root} for the run: {error.strerror}. Choose another --runs-dir."
            ) from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._lock_fd)

    def prepare(self, config: RunConfig) -> bool:
        """Write the configuration of a new run, or check that of an old one.

        Returns:
            Whether the run is resumed.

        Raises:
            ConflictError: the directory holds a run that was configured otherwise; the message
                names the keys.
            UnavailableError: the disk is too full to begin.
        """
        self._check_space()
        for directory in (self.checkpoints, self.weights, self.logs, self.plots):
            directory.mkdir(exist_ok=True)

        if not self.config.exists():
            self._write_config(config)
            return False

        before = load_config(self.config).model_dump(mode="json")
        differing = _differences(before, config.model_dump(mode="json"))
        if differing:
            shown = "; ".join(differing[:_MOST_DIFFERENCES_SHOWN])
            raise ConflictError(
                f"{self.root} holds a run with another configuration: {shown}. "
                "Restore those keys to resume it, or change `name` to start a new run."
            )
        return True

    def _write_config(self, config: RunConfig) -> None:
        # Whole or not at all: half a configuration would keep the run from ever being resumed.
        with tempfile.NamedTemporaryFile(
            "w", dir=self.root, suffix=".yaml", delete=False
        ) as handle:
            temporary = Path(handle.name)
        save_config(config, temporary)
        temporary.rename(self.config)

    def choose_ports(self, host: str, names: Sequence[str]) -> dict[str, int]:
        """Ports for servers whose address others remember: those of the last sitting where they are
        still free.
        """
        before: dict[str, int] = {}
        if self.ports.exists():
            before = json.loads(self.ports.read_text())

        chosen = {}
        for name in names:
            try:
                chosen[name] = choose_port(host, before.get(name, 0))
            except ConflictError:
                # Somebody else took the port since.
                chosen[name] = choose_port(host)
        self.write_json(self.ports, chosen)
        return chosen

    def read_wall_s(self) -> float:
        """Seconds that earlier sittings took."""
        if not self.wall_clock.exists():
            return 0.0
        return float(self.wall_clock.read_text())

    def write_json(self, path: Path, value: Any) -> None:
        """Write a JSON file whole or not at all."""
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
        temporary.rename(path)

    def _check_space(self) -> None:
        stat = os.statvfs(self.root)
        # f_bavail leaves out what is kept for root.
        free = stat.f_bavail * stat.f_frsize
        if free < _LEAST_FREE_BYTES:
            raise UnavailableError(
                f"Only {free / 2**20:.0f} MiB are free under {self.root}; a run needs "
                f"{_LEAST_FREE_BYTES // 2**20} MiB to begin. Free some space or choose another "
                "--runs-dir."
            )


def list_running(runs_dir: Path) -> dict[str, str]:
    """Name and gateway address of every run under `runs_dir` whose `sdar run` is alive."""
    found = {}
    for path in sorted(runs_dir.glob("*/gateway.json")):
        # A run that was killed leaves its gateway.json behind, but never its lock.
        if not _is_locked(path.parent):
            continue
        # The file may go away at any moment, or be nothing that we wrote.
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            content = json.loads(path.read_text(encoding="utf-8"))
            found[path.parent.name] = str(content["address"])
    return found


def _is_locked(root: Path) -> bool:
    """Whether a process holds the directory's lock."""
    try:
        descriptor = os.open(root / ".lock", os.O_RDWR)
    except OSError:
        return False
    try:
        # Shared, so that two who look at once do not take each other for the run.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _differences(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> list[str]:
    """What differs between two configurations, key by key, in alphabetical order."""
    found = []
    for key in before.keys() | after.keys():
        old = before.get(key)
        new = after.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key} is {old!r} there and {new!r} here")
    return sorted(found)
