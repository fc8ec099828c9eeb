"""The learner's data-parallel ranks: how they meet, how rank 0 leads them, how numbers are summed.

Rank 0 leads: it broadcasts a command, then all ranks carry it out together. A command is JSON plus
raw byte frames; nothing is ever pickled. A rank that dies breaks the next collective of the others,
so the learner stops as a whole; rank 0 makes one every few seconds, for a rank that vanished and
one that is asked to leave must be noticed while there is nothing to train, too.
"""

from __future__ import annotations

import datetime
import itertools
import json
import logging
import socket
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore, TCPStore

from sdar.contracts.errors import CapacityError, ConfigurationError, ConflictError
from sdar.process.settings import apply_environment

# Ranks hear from one another all the time, but for the longest step, publication or checkpoint of a
# large model.
_SILENCE_TIMEOUT = datetime.timedelta(minutes=30)
_MEETING_TIMEOUT = datetime.timedelta(minutes=10)


class Ranks:
    """This process's place among the ranks. Made by `join_ranks` or `stand_alone`."""

    def __init__(self, device: torch.device) -> None:
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self.device = device
        # Commands travel over gloo even where gradients use NCCL: waiting there takes no GPU and
        # may last.
        self._control = (
            dist.new_group(backend="gloo", timeout=_SILENCE_TIMEOUT)
            if self.world_size > 1
            else None
        )

    @property
    def is_leader(self) -> bool:
        return self.rank == 0

    def broadcast_command(
        self, command: dict[str, Any] | None, frames: Sequence[bytes] = ()
    ) -> tuple[dict[str, Any], list[bytes]]:
        """Rank 0 passes a command and its byte frames; every rank, rank 0 too, gets them back."""
        if self.world_size == 1:
            return command or {}, list(frames)
        parts = [json.dumps(command).encode(), *frames]
        sizes = self._broadcast_sizes([len(part) for part in parts])
        joined = np.empty(sum(sizes), np.uint8)
        if self.is_leader:
            joined = np.frombuffer(bytearray(b"".join(parts)), np.uint8)
        dist.broadcast(torch.from_numpy(joined), src=0, group=self._control)
        ends = itertools.accumulate(sizes)
        cut = zip(ends, sizes, strict=True)
        received = [joined[end - size : end].tobytes() for end, size in cut]
        return json.loads(received[0]), received[1:]

    def _broadcast_sizes(self, own: list[int]) -> list[int]:
        """Rank 0's sizes. Their number goes first: a receiver needs a tensor of the right shape."""
        count = torch.tensor([len(own)])
        dist.broadcast(count, src=0, group=self._control)
        sizes = torch.tensor(own) if self.is_leader else torch.empty(int(count), dtype=torch.int64)
        dist.broadcast(sizes, src=0, group=self._control)
        received: list[int] = sizes.tolist()
        return received

    def send_checkpoint(self, path: Path | None) -> None:
        """Rank 0: send the others the checkpoint to begin from."""
        self.broadcast_command({"checkpoint": None if path is None else str(path)})

    def receive_checkpoint(self) -> Path | None:
        """Other ranks: which checkpoint rank 0 found, if any."""
        path = self.broadcast_command(None)[0]["checkpoint"]
        return None if path is None else Path(path)

    def sum(self, values: Tensor) -> Tensor:
        """Elementwise sum of a CPU tensor over all ranks."""
        if self.world_size > 1:
            dist.all_reduce(values, group=self._control)
        return values

    def count_leaving(self, is_leaving: bool) -> int:
        """How many ranks are asked to leave; every rank says whether it is one."""
        return int(self.sum(torch.tensor([int(is_leaving)])))

    def raise_together(self, error: CapacityError | None, what: str) -> None:
        """Raise on every rank if a disk refused `what` on any.

        A rank raises its own error, or else that another one failed: so all stay in step.
        """
        num_failed = int(self.sum(torch.tensor([0 if error is None else 1])))
        if error is not None:
            raise error
        if num_failed:
            raise CapacityError(
                f"{what} failed on {num_failed} of {self.world_size} ranks. The log of those ranks "
                "says why."
            )


def stand_alone(device: str | None = None) -> Ranks:
    """The only rank, without ports or environment variables; may be called again in the same
    process.
    """
    return _join(0, 1, device, {"store": HashStore()})


def join_ranks(
    rank: int,
    world_size: int,
    store_address: tuple[str, int] | None = None,
    *,
    local_rank: int | None = None,
) -> Ranks:
    """One of several ranks; each takes the GPU of its number on its machine, if there are GPUs.

    Args:
        store_address: where rank 0 waits for the others, all on this machine; None where torchrun
            says it through the environment.
        local_rank: its number among the ranks of its machine; `rank` if not given.

    Raises:
        ConfigurationError: more ranks than GPUs.
    """
    local_rank = rank if local_rank is None else local_rank
    num_gpus = torch.cuda.device_count()
    num_local = local_rank + 1 if store_address is None else world_size
    if num_gpus and num_local > num_gpus:
        raise ConfigurationError(
            f"At least {num_local} of training.num_ranks {world_size} are on this machine, which "
            f"has {num_gpus} GPUs. "
            "Use at most one rank per GPU (torchrun --nproc-per-node)."
        )
    meeting: dict[str, Any] = {"init_method": "env://"}
    if store_address is not None:
        meeting = {"store": _open_store(rank, world_size, store_address)}
    return _join(rank, world_size, f"cuda:{local_rank}" if num_gpus else "cpu", meeting)


def _open_store(rank: int, world_size: int, address: tuple[str, int]) -> TCPStore:
    """Where the ranks of this machine meet, reachable from nowhere else.

    Left to themselves, torch's store listens on every address and gloo where the host's name leads;
    none asks who calls.
    """
    host, port = address
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    apply_environment({"GLOO_SOCKET_IFNAME": loopback, "NCCL_SOCKET_IFNAME": loopback})
    # The store takes the listener over, so it must not be closed with the socket object.
    listener = socket.create_server((host, port)).detach() if rank == 0 else None
    return TCPStore(host, port, world_size, rank == 0, _MEETING_TIMEOUT, master_listen_fd=listener)


def _join(rank: int, world_size: int, device_name: str | None, meeting: dict[str, Any]) -> Ranks:
    device = torch.device(device_name or ("cuda:0" if torch.cuda.is_available() else "cpu"))
    _import_deepspeed(rank, device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, rank=rank, world_size=world_size, **meeting)
    if dist.get_world_size() != world_size:
        raise ConflictError(
            f"This process already is one of {dist.get_world_size()} ranks, so it can't join "
            f"{world_size}."
        )
    _adopt_process_group(device)
    return Ranks(device)


def _import_deepspeed(rank: int, device: torch.device) -> None:
    """Import it with what it reads at import in place: its accelerator and its rank; keep its log
    to errors.
    """
    apply_environment({"DS_ACCELERATOR": device.type, "LOCAL_RANK": str(rank)})
    with warnings.catch_warnings():
        # Its import warns about its own deprecated calls.
        warnings.simplefilter("ignore")
        import deepspeed
    deepspeed.utils.logger.setLevel(logging.ERROR)


def _adopt_process_group(device: torch.device) -> None:
    """Make DeepSpeed use the process group that exists instead of looking for MPI."""
    import deepspeed.comm

    if device.type == "cpu":
        # It would first compile a shared-memory op, for most of a minute, that only its inference
        # engine uses.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not deepspeed.comm.is_initialized():
        deepspeed.comm.init_distributed(
            dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False
        )
