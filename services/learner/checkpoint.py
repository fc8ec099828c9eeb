"""Owns checkpoints on disk: written whole or not at all, verified before use, old ones removed. Safetensors and JSON only.

    checkpoints/
      update-00000020/                     appears under this name by one rename, when everything in it is on the disk
        weights.safetensors                the policy, by Hugging Face names
        optimizer-00000-of-00001.safetensors   each rank's shard: master weights, AdamW moments, random state
        state.json                         progress, and what the shards were made for
        manifest.json                      size and sha256 of every other file; written last
      update-00000030.partial/             being written; removed at the next start

It never decides when to write one, and never acknowledges anything.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
import torch
from torch import Tensor

from sdar.config import RunConfig
from sdar.contracts.errors import CapacityError, ConfigurationError, ConflictError, CorruptionError
from sdar.runtime.chat import compute_model_identity
from services.learner.progress import Progress
from services.learner.ranks import Ranks

log = structlog.get_logger()

_PARTIAL = ".partial"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An intact checkpoint."""

    path: Path
    progress: Progress


class CheckpointStore:
    """The checkpoint directory of one run, held by one learner at a time. Lives on rank 0.

    Raises:
        ConflictError: another learner holds the directory.
    """

    def __init__(self, directory: Path, config: RunConfig) -> None:
        self._directory = directory
        self._config = config
        self._lock = _lock_directory(directory)
        for leftover in directory.glob(f"*{_PARTIAL}"):
            shutil.rmtree(leftover)

    def find_newest(self) -> Checkpoint | None:
        """The newest intact checkpoint; logs which newer ones were skipped and why.

        Raises:
            ConfigurationError: it was made for other ranks, another ZeRO stage, number format or model.
        """
        for path in sorted(self._directory.glob("update-" + "[0-9]" * 8), reverse=True):
            try:
                state = _verify(path)
                progress = Progress.from_json(state["progress"])
            except CorruptionError as error:
                log.warning("checkpoint_skipped", path=str(path), reason=str(error))
                continue
            self._check_fits(path, state["made_for"])
            log.info("checkpoint_found", path=str(path), num_updates=progress.num_updates, version=progress.policy_version)
            return Checkpoint(path, progress)
        return None

    def write(self, progress: Progress, write_shards: Callable[[Path], None]) -> Path:
        """Make `progress` durable; `write_shards` puts every rank's files into the directory it is given.

        Raises:
            CapacityError: the disk is full; nothing is left behind and earlier checkpoints stand.
        """
        final = self._directory / f"update-{progress.num_updates:08d}"
        partial = final.with_name(final.name + _PARTIAL)
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            write_shards(partial)
            _write_json(partial / "state.json", {"progress": progress.to_json(), "made_for": self._made_for()})
            files = {path.name: _describe(path) for path in sorted(partial.iterdir())}
            _write_json(partial / "manifest.json", {"files": files})
            _sync(partial)
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            _sync(self._directory)
        except BaseException as error:
            shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, OSError):
                raise _disk_error(final, error) from error
            raise
        self._remove_old()
        return final

    def close(self) -> None:
        """Let another learner have the directory."""
        os.close(self._lock)

    def _remove_old(self) -> None:
        paths = sorted(self._directory.glob("update-" + "[0-9]" * 8))
        for path in paths[: -self._config.training.keep_checkpoints]:
            shutil.rmtree(path)

    def _made_for(self) -> dict[str, Any]:
        training = self._config.training
        return {
            "num_ranks": training.num_ranks,
            "zero_stage": training.zero_stage,
            "dtype": self._config.model.dtype,
            "model": compute_model_identity(self._config.model.path).fingerprint,
        }

    def _check_fits(self, path: Path, made_for: dict[str, Any]) -> None:
        different = {name: (made_for.get(name), now) for name, now in self._made_for().items() if made_for.get(name) != now}
        if different:
            changes = ", ".join(f"{name} {was} (now {now})" for name, (was, now) in different.items())
            raise ConfigurationError(
                f"Checkpoint {path} was made with {changes}. Continue with the same values, or start another run."
            )


def write_rank_shard(
    directory: Path,
    ranks: Ranks,
    weights: dict[str, Tensor],
    optimizer: dict[str, Tensor],
    num_steps: int,
    device: torch.device,
) -> None:
    """One rank's files of a checkpoint, on the disk when this returns.

    Raises:
        CapacityError: the disk is full.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    shard = {**optimizer, "random.cpu": torch.get_rng_state()}
    if device.type == "cuda":
        shard["random.cuda"] = torch.cuda.get_rng_state(device)
    path = directory / _shard_name(ranks)
    try:
        save_file(shard, path, metadata={"num_steps": str(num_steps)})
        _sync(path)
        if ranks.is_leader:
            save_file(weights, directory / "weights.safetensors", metadata={"format": "pt"})
            _sync(directory / "weights.safetensors")
    except (OSError, SafetensorError) as error:
        raise _disk_error(path, error) from error


def read_rank_shard(directory: Path, ranks: Ranks, device: torch.device) -> tuple[dict[str, Tensor], int]:
    """This rank's optimizer tensors and step count; the random state is put in place."""
    from safetensors import safe_open

    with safe_open(directory / _shard_name(ranks), framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        num_steps = int(file.metadata()["num_steps"])
    torch.set_rng_state(tensors.pop("random.cpu"))
    if (cuda_state := tensors.pop("random.cuda", None)) is not None and device.type == "cuda":
        torch.cuda.set_rng_state(cuda_state, device)
    return tensors, num_steps


def _shard_name(ranks: Ranks) -> str:
    return f"optimizer-{ranks.rank:05d}-of-{ranks.world_size:05d}.safetensors"


def _lock_directory(directory: Path) -> int:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        handle = os.open(directory / ".lock", os.O_CREAT | os.O_RDWR, 0o644)
    except OSError as error:
        raise ConfigurationError(
            f"Cannot use checkpoint directory {directory}: {error.strerror}. Make it writable or set SDAR_CHECKPOINTS."
        ) from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        raise ConflictError(
            f"Another learner holds checkpoint directory {directory}. Stop it first, or give this run a directory of its own."
        ) from error
    return handle


def _verify(path: Path) -> dict[str, Any]:
    """The state of a checkpoint whose every file is what its manifest says."""
    try:
        files = json.loads((path / "manifest.json").read_bytes())["files"]
        for name, expected in files.items():
            found = _describe(path / name)
            if found != expected:
                raise CorruptionError(f"{name} is {found}, its manifest says {expected}.")
        state: dict[str, Any] = json.loads((path / "state.json").read_bytes())
        return {"progress": state["progress"], "made_for": state["made_for"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptionError(f"unreadable: {error!r}") from error


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"size_bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True), encoding="utf-8")
    _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _disk_error(path: Path, error: Exception) -> CapacityError:
    return CapacityError(
        f"Cannot write {path}: {error}. Nothing was half-written and earlier checkpoints stand; free space or set "
        "SDAR_CHECKPOINTS to a larger disk, then start again."
    )
