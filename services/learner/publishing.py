"""How a new policy reaches the others: its weights into the store, then its manifest to the bus."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence

from torch import Tensor

from sdar.bus.protocol import Bus
from sdar.config import RunConfig
from sdar.contracts import codec
from sdar.contracts.streams import Stream
from sdar.contracts.types import WeightsManifest
from sdar.model.chat import compute_model_identity
from sdar.weights.store import WeightStore
from services.learner.progress import Progress
from services.learner.torch_thread import TorchThread
from services.learner.update import ExportedPolicy

_KEPT_VERSIONS = 8
"""Published versions kept beyond the staleness bound: an evaluation pins one while newer ones
appear. Also how many updates pass between two collections of those that are no longer kept.
"""


class Publisher:
    """Publishes versions, and has old ones removed from the store."""

    def __init__(
        self, config: RunConfig, bus: Bus, weights: WeightStore, torch: TorchThread
    ) -> None:
        self._config = config
        self._bus = bus
        self._weights = weights
        self._torch = torch

    async def find_newest(self) -> tuple[int, int]:
        """The newest version that was announced and the newest in the store, -1 for none.

        A crash between storing and announcing leaves them apart.
        """
        entry = await self._bus.newest(Stream.POLICY_UPDATES)
        announced = -1
        if entry is not None:
            announced = codec.decode_weights_manifest(entry.payload).policy_version
        stored = await self._torch.run(self._weights.list_versions)
        return announced, max(stored, default=-1)

    async def publish(
        self,
        policy: ExportedPolicy,
        progress: Progress,
        durable_version: int,
        stopping: asyncio.Event,
    ) -> None:
        """Store the weights of `progress` under its version and announce it.

        `durable_version`, the newest checkpoint's, is never removed. Raises WeightsUnavailableError
        or CapacityError if the store still refuses when `stopping` is set.
        """
        # The store first: a version that is announced can be read.
        manifest = await self._torch.insist(stopping, self._write_weights, policy.tensors, progress)
        manifest = dataclasses.replace(manifest, probe=policy.probe)
        await self._bus.publish(Stream.POLICY_UPDATES, [codec.encode_weights_manifest(manifest)])
        if manifest.policy_version % _KEPT_VERSIONS == 0:
            loop = asyncio.get_running_loop()
            await self._torch.insist(stopping, self._collect_garbage, durable_version, loop)

    def _write_weights(self, tensors: dict[str, Tensor], progress: Progress) -> WeightsManifest:
        model = compute_model_identity(self._config.model.path)
        return self._weights.publish(
            progress.policy_version, tensors, model, num_updates=progress.num_updates
        )

    def _collect_garbage(self, durable_version: int, loop: asyncio.AbstractEventLoop) -> None:
        """Runs in the torch thread, where the store is used; the bus answers in the event loop."""

        def retire(versions: Sequence[int]) -> bool:
            return asyncio.run_coroutine_threadsafe(
                self._bus.retire_versions(versions), loop
            ).result()

        keep_newest = _KEPT_VERSIONS + self._config.training.max_staleness
        # 0 is where the run began, and the durable one where a crash falls back to.
        self._weights.collect_garbage(keep_newest, in_use=(0, durable_version), retire=retire)
