"""The learner's other ranks on this machine, where nobody else starts them: their processes.

A follower reads the run's configuration from its standard input, which rank 0 holds open: when rank
0 is gone, by whatever death, the input ends and the follower exits, so none is ever orphaned.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from types import TracebackType
from typing import Any, Self

import structlog
import torch

from sdar.config import RunConfig
from sdar.contracts.errors import SdarError
from sdar.process.ports import find_free_port
from services.learner.ranks import Ranks, join_ranks
from services.learner.update import Trainer, build_trainer

log = structlog.get_logger()

_HOST = "127.0.0.1"
_WATCH_S = 0.5
_STOP_TIMEOUT_S = 20.0
"""For a follower to leave the command that it is in; after an error none is waited for."""


class FollowerProcesses:
    """Ranks 1 .. num_ranks - 1 as child processes. A context manager: leaving it ends them."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self.store_address = (_HOST, find_free_port(_HOST))
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        num_ranks = self._config.training.num_ranks
        for rank in range(1, num_ranks):
            command = [
                sys.executable,
                "-m",
                __name__,
                str(rank),
                str(num_ranks),
                str(self.store_address[1]),
            ]
            process = subprocess.Popen(command, stdin=subprocess.PIPE)
            self._processes.append(process)
            assert process.stdin is not None
            process.stdin.write(self._config.model_dump_json().encode() + b"\n")
            process.stdin.flush()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # All first, so that they end side by side.
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in self._processes:
            try:
                process.wait(_STOP_TIMEOUT_S if error is None else 0.5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    async def watch(self, stopping: asyncio.Event) -> None:
        """Return when `stopping` is set; end this process if a follower dies before.

        A collective that waits for a dead rank can't be interrupted, so there is no gentler way
        than leaving at once.
        """
        while not stopping.is_set():
            for rank, process in enumerate(self._processes, start=1):
                if process.poll() is not None:
                    log.error(
                        "rank_died",
                        rank=rank,
                        exit_code=process.returncode,
                        hint="its own log lines say why",
                    )
                    os._exit(1)
            await asyncio.sleep(_WATCH_S)


def build_follower(config: RunConfig, ranks: Ranks) -> Trainer:
    """The trainer of a rank other than 0, from rank 0's checkpoint; run its `follow`."""
    torch.set_num_threads(config.training.num_threads)
    return build_trainer(config, ranks, ranks.receive_checkpoint())


def _exit_when_input_ends(stream: Any) -> None:
    stream.read()
    # Not sys.exit: the main thread may wait in a collective that nothing interrupts.
    os._exit(1)


def _main() -> None:
    rank, num_ranks, port = map(int, sys.argv[1:])
    # A Ctrl-C goes to every process: rank 0 finishes its step first, needs this one for it, and
    # says when to stop.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    config = RunConfig.model_validate_json(sys.stdin.buffer.readline())
    threading.Thread(target=_exit_when_input_ends, args=(sys.stdin.buffer,), daemon=True).start()
    try:
        build_follower(config, join_ranks(rank, num_ranks, (_HOST, port))).follow()
    except SdarError as error:
        sys.exit(f"learner rank {rank}: {error}")


if __name__ == "__main__":
    _main()
