"""Owns which policy version the engine serves: the version an evaluation is pinned to while one runs, else the newest.

Tokens are stamped by the engine, so training episodes in flight simply go on across any switch.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Sequence

import structlog

from sdar.contracts import codec
from sdar.contracts.errors import CorruptionError, SdarError, WeightsUnavailableError
from sdar.contracts.streams import Stream
from sdar.contracts.types import WeightsManifest
from sdar.runtime.bus import BEFORE_FIRST, Bus
from services.rollout.engine import Engine

log = structlog.get_logger()

_PAGE = 1000


class PolicyFollower:
    """Follows `policy_updates` and switches the engine.

    Args:
        block_s: how long one look at the stream waits, hence how long stopping takes.
        retry_delays_s: pauses between attempts to load a version that the store does not have.
    """

    def __init__(
        self, bus: Bus, engine: Engine, block_s: float = 0.5, retry_delays_s: Sequence[float] = (0.2, 1.0, 3.0)
    ) -> None:
        self._bus, self._engine = bus, engine
        self._block_s, self._retry_delays_s = block_s, retry_delays_s
        self._cursor = BEFORE_FIRST
        self._manifests: dict[int, WeightsManifest] = {}
        self._newest = engine.policy_version
        self._refused: dict[int, SdarError] = {}
        self._is_switching = False
        self._waiting: Counter[int] = Counter()
        self._serving: Counter[int] = Counter()
        self._changed = asyncio.Condition()

    @property
    def newest_version(self) -> int:
        """Newest published version seen; the base is version 0."""
        return self._newest

    async def catch_up(self) -> None:
        """Read what has been published so far and serve what is due. Called once before the first task.

        Raises:
            EngineFailedError, UnavailableError: from the engine.
        """
        await self._read(block_s=0.0)
        await self._switch()

    async def run(self, stopping: asyncio.Event) -> None:
        """Follow until stopped. Fails when the engine does."""
        switching = asyncio.create_task(self._keep_switching(), name="policy_switching")
        try:
            while not stopping.is_set() and not switching.done():
                await self._read(self._block_s)
        finally:
            switching.cancel()
            await asyncio.wait([switching])
        if not switching.cancelled() and (error := switching.exception()):
            raise error

    @contextlib.asynccontextmanager
    async def pinned(self, policy_version: int) -> AsyncIterator[None]:
        """Hold the engine at a version. Waits while others hold another; of those that wait, the oldest version is next.

        Raises:
            WeightsUnavailableError, CorruptionError: that version cannot be loaded.
        """
        await self._enter(policy_version)
        try:
            yield
        finally:
            async with self._changed:
                self._serving -= Counter({policy_version: 1})
                self._changed.notify_all()

    async def reached(self, policy_version: int) -> None:
        """Wait until the engine serves this version or a newer one.

        The gateway admits a group for a version, counting on tokens that are no older: played before the engine has switched,
        or while an evaluation holds it back, the group would be staler than its admission allows. One of a version that cannot
        be read is played all the same; the learner judges its tokens.
        """
        async with self._changed:
            await self._changed.wait_for(
                lambda: self._engine.policy_version >= policy_version or policy_version in self._refused
            )

    async def _enter(self, version: int) -> None:
        async with self._changed:
            if not self._waiting[version]:
                # What could not be loaded then may be loadable now.
                self._refused.pop(version, None)
            self._waiting[version] += 1
            self._changed.notify_all()
            try:
                await self._changed.wait_for(lambda: self._is_served(version) or version in self._refused)
                if not self._is_served(version):
                    raise self._refused[version]
                self._serving[version] += 1
            finally:
                self._waiting -= Counter({version: 1})
                self._changed.notify_all()

    def _is_served(self, version: int) -> bool:
        return not self._is_switching and self._engine.policy_version == version == self._target()

    def _target(self) -> int:
        """The version due now. A version once entered stays until all who hold it have left."""
        if self._serving:
            return next(iter(self._serving))
        waiting = [version for version in self._waiting if version not in self._refused]
        return min(waiting, default=self._newest)

    async def _read(self, block_s: float) -> None:
        while entries := await self._bus.tail(Stream.POLICY_UPDATES, self._cursor, _PAGE, block_s):
            async with self._changed:
                for entry in entries:
                    self._remember(entry.payload)
                self._cursor = entries[-1].entry_id
                self._changed.notify_all()
            block_s = 0.0

    def _remember(self, payload: bytes) -> None:
        try:
            manifest = codec.decode_weights_manifest(payload)
        except SdarError as error:
            log.error("policy_update_unreadable", error=str(error))
            return
        self._manifests[manifest.policy_version] = manifest
        self._newest = max(self._newest, manifest.policy_version)

    async def _keep_switching(self) -> None:
        while True:
            async with self._changed:
                await self._changed.wait_for(self._is_due)
            await self._switch()

    def _is_due(self) -> bool:
        target = self._target()
        is_known = target in self._manifests or target < self._newest
        return target != self._engine.policy_version and target not in self._refused and is_known

    async def _switch(self) -> None:
        """Bring the engine to the version due; one that cannot be read is refused and the previous goes on serving."""
        if not self._is_due():
            return
        target = self._target()
        self._is_switching = True
        try:
            await self._load(target)
        except (CorruptionError, WeightsUnavailableError) as error:
            log.error("policy_refused", policy_version=target, error=str(error))
            self._refused[target] = error
        finally:
            self._is_switching = False
        async with self._changed:
            self._changed.notify_all()

    async def _load(self, version: int) -> None:
        if version not in self._manifests:
            raise WeightsUnavailableError(
                f"Policy version {version} is not in the stream of updates any more; the newest is {self._newest}. "
                "Evaluate sooner after a version is published.",
                policy_version=version,
            )
        for delay_s in (*self._retry_delays_s, None):
            try:
                await self._engine.update_weights(self._manifests[version])
                break
            except WeightsUnavailableError as error:
                # Collected as garbage, or the store is away for a moment: only the second is worth waiting for.
                if delay_s is None or self._target() != version:
                    raise
                log.warning("policy_unavailable", policy_version=version, error=str(error), retry_in_s=delay_s)
                await asyncio.sleep(delay_s)
        log.info("policy_loaded", policy_version=version, newest_version=self._newest)
