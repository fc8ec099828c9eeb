"""Checkpoints on disk: written whole or not at all, verified before use, old ones removed.

Safetensors and JSON only:

    checkpoints/
      update-00000020/             appears under this name by one rename, when all is on the disk
        weights.safetensors        the policy, by Hugging Face names
        optimizer-00000-of-00001.safetensors
                                   each rank's shard: master weights, AdamW moments, random state
        bus.snapshot               states and account of the bus, taken before; the gateway's
                                   cursor is one of the states
        state.json                 progress, and what the shards were made for
        manifest.json              size and sha256 of every other file, and its own; written last
      update-00000030.partial/     being written; removed at the next start
      update-00000030.replaced/    a damaged one of that name, until its successor is in place

The learning rate is a function of the update number (`Trainer`), so no scheduler has state to be
held. It never decides when to write a checkpoint, and never acknowledges anything.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
import torch
from torch import Tensor

from sdar.config import RunConfig
from sdar.contracts.errors import CapacityError, ConfigurationError, ConflictError, CorruptionError
from sdar.model.chat import compute_model_identity
from services.learner.progress import Progress
from services.learner.ranks import Ranks

log = structlog.get_logger()

_PARTIAL = ".partial"
_REPLACED = ".replaced"
_MANIFEST = "manifest.json"
_STATE = "state.json"
_SNAPSHOT = "bus.snapshot"
_WEIGHTS = "weights.safetensors"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An intact checkpoint. `snapshot` is what `Bus.restore_snapshot` takes."""

    path: Path
    progress: Progress
    snapshot: bytes


class CheckpointStore:
    """The checkpoint directory of one run, held by one learner at a time. Lives on rank 0.

    Raises:
        ConflictError: another learner holds the directory.
    """

    def __init__(self, directory: Path, config: RunConfig) -> None:
        self._directory = directory
        self._config = config
        self._lock = _lock_directory(directory)
        self._damaged: set[Path] = set()
        for leftover in directory.glob(f"*{_PARTIAL}"):
            shutil.rmtree(leftover)
        for replaced in directory.glob(f"*{_REPLACED}"):
            # A crash while one took another's place: it goes if the other is there, else returns.
            if replaced.with_suffix("").exists():
                shutil.rmtree(replaced)
            else:
                replaced.rename(replaced.with_suffix(""))

    def find_newest(self) -> Checkpoint | None:
        """The newest intact checkpoint, None where none was ever written.

        Logs which newer ones were skipped and why.

        Raises:
            CorruptionError: there are checkpoints, and all are damaged.
            ConfigurationError: it was made for other ranks, another ZeRO stage, number format or
                model.
        """
        skipped: dict[Path, str] = {}
        for path in _list_newest_first(self._directory):
            try:
                found = self._read(path)
            except CorruptionError as error:
                log.error("checkpoint_skipped", path=str(path), reason=str(error))
                skipped[path] = str(error)
                continue
            # Those that are newer than what the run goes on from.
            self._damaged = set(skipped)
            return found
        # Beginning again from the model would throw the run away: a person has to decide that.
        if skipped:
            raise _all_damaged(self._directory, skipped)
        return None

    def _read(self, path: Path) -> Checkpoint:
        state = _verify(path)
        progress = Progress.from_json(state["progress"])
        snapshot = (path / _SNAPSHOT).read_bytes()
        self._check_fits(path, state["made_for"])
        log.info(
            "checkpoint_found",
            path=str(path),
            num_updates=progress.num_updates,
            version=progress.policy_version,
        )
        return Checkpoint(path, progress, snapshot)

    def write(
        self, progress: Progress, snapshot: bytes, write_shards: Callable[[Path], None]
    ) -> Path:
        """Make `progress` durable and remove what is too old; returns where it is.

        Args:
            write_shards: puts every rank's files into the directory that it is given.

        Raises:
            CapacityError: the disk is full, or cannot be written; nothing is left behind and
                earlier checkpoints stand.
        """
        final = self._directory / f"update-{progress.num_updates:08d}"
        partial = final.with_suffix(_PARTIAL)
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            write_shards(partial)
            self._complete(partial, progress, snapshot)
            self._put_in_place(partial, final)
            # Last: until here the earlier checkpoints are what a crash falls back to.
            self._remove_old(final)
        except BaseException as error:
            shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, OSError):
                raise _disk_error(final, error) from error
            raise
        return final

    def _complete(self, partial: Path, progress: Progress, snapshot: bytes) -> None:
        """Add what rank 0 alone writes; the manifest last, which seals the rest."""
        state = {"progress": progress.to_json(), "made_for": self._made_for()}
        _write_file(partial / _SNAPSHOT, snapshot)
        _write_file(partial / _STATE, _to_json(state))
        # The others' shards by name: on a shared disk, what other machines wrote is found later by
        # listing than by asking.
        num_ranks = self._config.training.num_ranks
        shards = [_name_shard(rank, num_ranks) for rank in range(1, num_ranks)]
        _write_file(partial / _MANIFEST, _describe_all(partial, shards))
        # The directory's entries, before the rename makes the checkpoint exist.
        _sync(partial)

    def _put_in_place(self, partial: Path, final: Path) -> None:
        """Give a whole checkpoint its name. What had that name goes only after that.

        It had to be damaged to be in the way: this life would have begun from it otherwise.
        """
        replaced = final.with_suffix(_REPLACED)
        if final.exists():
            # A rename can't replace a directory that isn't empty, so the old one steps aside.
            shutil.rmtree(replaced, ignore_errors=True)
            final.rename(replaced)
        partial.rename(final)
        _sync(self._directory)
        shutil.rmtree(replaced, ignore_errors=True)

    def close(self) -> None:
        """Let another learner have the directory."""
        os.close(self._lock)

    def _remove_old(self, newest: Path) -> None:
        """Keep the newest whole ones. Those found damaged don't count, and go once a newer one is
        there.
        """
        self._damaged.discard(newest)
        whole = [path for path in _list_newest_first(self._directory) if path not in self._damaged]
        too_old = whole[self._config.training.keep_checkpoints :]
        too_old += [path for path in self._damaged if path < newest]
        for path in too_old:
            shutil.rmtree(path)
            self._damaged.discard(path)

    def _made_for(self) -> dict[str, Any]:
        training = self._config.training
        return {
            "num_ranks": training.num_ranks,
            "zero_stage": training.zero_stage,
            "dtype": self._config.model.dtype,
            "model": compute_model_identity(self._config.model.path).fingerprint,
        }

    def _check_fits(self, path: Path, made_for: dict[str, Any]) -> None:
        different = {
            name: (made_for.get(name), now)
            for name, now in self._made_for().items()
            if made_for.get(name) != now
        }
        if different:
            changes = ", ".join(
                f"{name} {was} (now {now})" for name, (was, now) in different.items()
            )
            raise ConfigurationError(
                f"Checkpoint {path} was made with {changes}. Continue with the same values, or "
                "start another run."
            )


def read_trained_groups(directory: Path) -> list[tuple[str, ...]]:
    """Group ids of each remembered update of the newest intact checkpoint, oldest first.

    For those who check a run from outside: it takes no lock, so it may be called beside a running
    learner.
    """
    for path in _list_newest_first(directory):
        try:
            return list(Progress.from_json(_verify(path)["progress"]).trained_groups)
        except CorruptionError as error:
            log.warning("checkpoint_skipped", path=str(path), reason=str(error))
    return []


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

    shard = optimizer | _read_random_state(device)
    path = directory / _shard_name(ranks)
    try:
        save_file(shard, path, metadata={"num_steps": str(num_steps)})
        _sync(path)
        if ranks.is_leader:
            save_file(weights, directory / _WEIGHTS, metadata={"format": "pt"})
            _sync(directory / _WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise _disk_error(path, error) from error


def _read_random_state(device: torch.device) -> dict[str, Tensor]:
    """With it a run that resumes draws what it would have drawn."""
    state = {"random.cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["random.cuda"] = torch.cuda.get_rng_state(device)
    return state


def read_rank_shard(
    directory: Path, ranks: Ranks, device: torch.device
) -> tuple[dict[str, Tensor], int]:
    """This rank's optimizer tensors and step count; the random state is put in place."""
    from safetensors import safe_open

    with safe_open(directory / _shard_name(ranks), framework="pt") as file:
        names = file.keys()
        tensors = {name: file.get_tensor(name) for name in names}
        num_steps = int(file.metadata()["num_steps"])
    torch.set_rng_state(tensors.pop("random.cpu"))
    if (cuda_state := tensors.pop("random.cuda", None)) is not None and device.type == "cuda":
        torch.cuda.set_rng_state(cuda_state, device)
    return tensors, num_steps


def _shard_name(ranks: Ranks) -> str:
    return _name_shard(ranks.rank, ranks.world_size)


def _name_shard(rank: int, num_ranks: int) -> str:
    return f"optimizer-{rank:05d}-of-{num_ranks:05d}.safetensors"


def _open_directory(directory: Path) -> int:
    """Make the directory; returns a handle of the file in it that its holder locks."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _sync(directory.parent)
        return os.open(directory / ".lock", os.O_CREAT | os.O_RDWR, 0o644)
    except OSError as error:
        raise ConfigurationError(
            f"Cannot use checkpoint directory {directory}: {error.strerror}. Make it writable or "
            "set SDAR_CHECKPOINTS."
        ) from error


def _lock_directory(directory: Path) -> int:
    """A handle that holds the directory until it is closed, or this process ends."""
    handle = _open_directory(directory)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise ConflictError(
            f"Another learner holds checkpoint directory {directory}. Stop it first, or give this "
            "run a directory of its own."
        ) from error
    except OSError as error:
        # Some shared disks have no locks. The role at the bus still lets one learner only read,
        # book and begin a checkpoint.
        log.warning("checkpoints_not_locked", directory=str(directory), error=str(error))
    return handle


def _list_newest_first(directory: Path) -> list[Path]:
    return sorted(directory.glob("update-" + "[0-9]" * 8), reverse=True)


def _verify(path: Path) -> dict[str, Any]:
    """The state of a checkpoint that holds exactly the files its manifest names, each as it says.

    Raises:
        CorruptionError: one byte, file or name is not as it was written.
    """
    try:
        files = _read_manifest(path)
        for name, expected in files.items():
            if (found := _describe(path / name)) != expected:
                raise CorruptionError(f"{name} is {found}, its manifest says {expected}.")
        state: dict[str, Any] = json.loads((path / _STATE).read_bytes())
        return {"progress": state["progress"], "made_for": dict(state["made_for"])}
    # What reading bytes that anything may have happened to can raise.
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptionError(f"unreadable: {error!r}") from error


def _read_manifest(path: Path) -> dict[str, Any]:
    """What each file is to be, of exactly the files that are there."""
    written = (path / _MANIFEST).read_bytes()
    files: dict[str, Any] = json.loads(written)["files"]
    if written != _seal(files):
        raise CorruptionError(f"{_MANIFEST} does not have the sha256 that it states of itself.")
    names = sorted(entry.name for entry in path.iterdir() if entry.name != _MANIFEST)
    if names != sorted(files) or not {_STATE, _SNAPSHOT, _WEIGHTS} <= files.keys():
        raise CorruptionError(f"It holds the files {names}, its manifest names {sorted(files)}.")
    return files


def _describe_all(directory: Path, shards: Sequence[str] = ()) -> bytes:
    names = {path.name for path in directory.iterdir()} | set(shards)
    return _seal({name: _describe(directory / name) for name in names})


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {
            "size_bytes": path.stat().st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }


def _seal(files: dict[str, Any]) -> bytes:
    """The bytes of a manifest. There is one spelling, so that every changed byte is noticed."""
    return _to_json({"files": files, "sha256": hashlib.sha256(_to_json(files)).hexdigest()})


def _to_json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True).encode()


def _write_file(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _disk_error(path: Path, error: Exception) -> CapacityError:
    return CapacityError(
        f"Cannot write {path}: {error}. Nothing was half-written and earlier checkpoints stand; "
        "the learner tries again until "
        "there is room. Free space on that disk."
    )


def _all_damaged(directory: Path, skipped: dict[Path, str]) -> CorruptionError:
    reasons = "; ".join(f"{path.name}: {reason}" for path, reason in skipped.items())
    return CorruptionError(
        f"All checkpoints in {directory} are damaged ({reasons}). Put an intact copy back, or "
        "delete them (rm -r "
        f"{directory}/update-*) to let the policy begin again from the model."
    )
