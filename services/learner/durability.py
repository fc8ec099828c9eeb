"""What was trained and no checkpoint holds yet, and the checkpoint after which it is booked."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import structlog

from sdar.bus.protocol import Bus, Delivery
from sdar.config import RunConfig
from sdar.contracts.types import LedgerEvent
from services.learner.checkpoint import CheckpointStore
from services.learner.ingest import Group, book_refused, book_trained
from services.learner.progress import Progress
from services.learner.torch_thread import TorchThread
from services.learner.update import Trainer

log = structlog.get_logger()


class Durability:
    """Entries that wait to be acknowledged, and their groups to be booked.

    Attributes:
        num_updates: in the newest checkpoint.
        policy_version: of that checkpoint; its weights must stay in the store.
    """

    def __init__(
        self,
        config: RunConfig,
        bus: Bus,
        checkpoints: CheckpointStore,
        trainer: Trainer,
        torch: TorchThread,
        progress: Progress,
    ) -> None:
        self.num_updates = progress.num_updates
        self.policy_version = progress.policy_version
        self._config = config
        self._bus = bus
        self._checkpoints = checkpoints
        self._trainer = trainer
        self._torch = torch
        self._unacknowledged: list[Delivery] = []
        self._unbooked: list[LedgerEvent] = []

    @property
    def num_unacknowledged(self) -> int:
        return len(self._unacknowledged)

    def add(self, trained: Sequence[Group], refused: Sequence[Group], progress: Progress) -> None:
        """These were trained in the update that led to `progress`, and those left out of it."""
        version = progress.policy_version
        for group in (*trained, *refused):
            self._unacknowledged += group.deliveries
        self._unbooked += [book_trained(self._config, group, version) for group in trained]
        self._unbooked += [book_refused(self._config, group, version) for group in refused]

    async def write_checkpoint(self, progress: Progress, stopping: asyncio.Event) -> None:
        """Write a checkpoint, then acknowledge and book the groups whose updates it contains.

        Raises CapacityError if the disk is still full when `stopping` is set.
        """
        # A part of the checkpoint: what a bus that lost its disk is given back.
        snapshot = await self._bus.take_snapshot()
        path = await self._torch.insist(
            stopping, self._checkpoints.write, progress, snapshot, self._trainer.save
        )
        self.num_updates = progress.num_updates
        self.policy_version = progress.policy_version
        # After the checkpoint: a crash between the two brings the entries back, and their ids show
        # that they are done.
        await self._bus.commit({}, self._unacknowledged, transitions=self._unbooked)
        log.info("checkpoint_written", path=str(path), num_acknowledged=self.num_unacknowledged)
        self._unacknowledged = []
        self._unbooked = []
