"""Owns which policy version the engine serves: the version an evaluation is pinned to while one
runs, else the newest.

Tokens are stamped by the engine, so training episodes in flight simply go on across any switch. A
version that cannot be read (torn, corrupt, of another base, being deleted, or its store is away) is
refused: the previous one goes on serving, the newest that can be read is taken, and the refused one
is tried again after a while.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

import structlog

from sdar.bus.protocol import BEFORE_FIRST, Bus
from sdar.contracts import codec
from sdar.contracts.errors import (
    BusUnavailableError,
    EngineFailedError,
    SdarError,
    WeightsUnavailableError,
)
from sdar.contracts.streams import Stream
from sdar.contracts.types import WeightsManifest
from sdar.weights.pins import PinnedVersions
from services.rollout.engine import Engine
from services.rollout.metrics import REFUSED_POLICIES, RolloutMetrics

log = structlog.get_logger()

_PAGE = 1000
_MAX_KNOWN = 100
"""Newest published versions kept in mind, more than the learner keeps in the store; and the first,
which it always keeps.
"""


@dataclass(frozen=True, slots=True)
class _Refusal:
    """Why a version could not be read, and from when on it may be tried again."""

    error: SdarError
    until_s: float


class PolicyFollower:
    """Follows `policy_updates` and switches the engine.

    Args:
        block_s: how long one look at the stream waits, hence how long stopping takes.
        retry_delays_s: pauses between attempts to load a version that the store does not have.
        refusal_s: how long a version that could not be read is left alone.
    """

    def __init__(
        self,
        bus: Bus,
        engine: Engine,
        pins: PinnedVersions,
        metrics: RolloutMetrics,
        block_s: float = 0.5,
        retry_delays_s: Sequence[float] = (0.2, 1.0, 3.0),
        refusal_s: float = 10.0,
    ) -> None:
        self._bus, self._engine, self._pins, self._metrics = bus, engine, pins, metrics
        self._block_s, self._retry_delays_s, self._refusal_s = block_s, retry_delays_s, refusal_s
        self._cursor = BEFORE_FIRST
        self._manifests: dict[int, WeightsManifest] = {}
        self._newest = engine.policy_version
        self._refusals: dict[int, _Refusal] = {}
        self._is_switching = False
        self._waiting: Counter[int] = Counter()
        self._serving: Counter[int] = Counter()
        self._changed = asyncio.Condition()

    @property
    def newest_version(self) -> int:
        """Newest published version seen; the base is version 0."""
        return self._newest

    async def catch_up(self) -> None:
        """Read what has been published so far and serve what is due. Called once before the first
        task.

        Raises:
            EngineFailedError, UnavailableError: from the engine.
        """
        await self._read(block_s=0.0)
        is_loaded = asyncio.Event()
        keeping = asyncio.create_task(
            self._pins.keep(is_loaded), name="policy_pins"
        )  # loading may take minutes
        try:
            await self._switch()
        finally:
            is_loaded.set()
            await keeping

    async def run(self, stopping: asyncio.Event) -> None:
        """Follow until stopped. Fails when the engine does."""
        beside = [
            asyncio.create_task(self._keep_switching(), name="policy_switching"),
            asyncio.create_task(self._pins.keep(stopping), name="policy_pins"),
        ]
        try:
            while not stopping.is_set() and not any(task.done() for task in beside):
                await self._read(self._block_s)
                async with self._changed:
                    self._changed.notify_all()  # a refusal may have lapsed
        finally:
            for task in beside:
                task.cancel()
            await asyncio.wait(beside)
        for task in beside:
            if not task.cancelled() and (error := task.exception()):
                raise error

    @contextlib.asynccontextmanager
    async def pinned(self, policy_version: int) -> AsyncIterator[None]:
        """Hold the engine at a version. Waits while others hold another; of those that wait, the
        oldest version is next.

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

        The gateway admits a group for a version, counting on tokens that are no older: played
        before the engine has switched, or while an evaluation holds it back, the group would be
        staler than its admission allows. One of a version that cannot be read is played all the
        same; the learner judges its tokens.
        """
        async with self._changed:
            await self._changed.wait_for(
                lambda: (
                    self._engine.policy_version >= policy_version
                    or self._is_refused(policy_version)
                )
            )

    async def _enter(self, version: int) -> None:
        async with self._changed:
            if not self._waiting[version]:
                # What could not be loaded then may be loadable now.
                self._refusals.pop(version, None)
            self._waiting[version] += 1
            self._changed.notify_all()
            try:
                await self._changed.wait_for(
                    lambda: self._is_served(version) or self._is_refused(version)
                )
                if not self._is_served(version):
                    raise self._refusals[version].error
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
        waiting = [version for version in self._waiting if not self._is_refused(version)]
        return min(waiting, default=self._find_newest_usable())

    def _find_newest_usable(self) -> int:
        usable = (version for version in self._manifests if not self._is_refused(version))
        return max(usable, default=self._engine.policy_version)

    def _is_refused(self, version: int) -> bool:
        refusal = self._refusals.get(version)
        return refusal is not None and time.monotonic() < refusal.until_s

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
        if len(self._manifests) > _MAX_KNOWN:
            del self._manifests[min(version for version in self._manifests if version)]

    async def _keep_switching(self) -> None:
        while True:
            async with self._changed:
                await self._changed.wait_for(self._is_due)
            await self._switch()

    def _is_due(self) -> bool:
        target = self._target()
        is_known = target in self._manifests or target < self._newest
        return target != self._engine.policy_version and not self._is_refused(target) and is_known

    async def _switch(self) -> None:
        """Bring the engine to the version due; one that cannot be read is refused and the previous
        goes on serving.
        """
        if not self._is_due():
            return
        target = self._target()
        self._is_switching = True
        try:
            await self._load(target)
        except SdarError as error:
            if (
                isinstance(error, (BusUnavailableError, EngineFailedError))
                or not self._engine.is_alive
            ):
                raise
            log.error(
                "policy_refused",
                policy_version=target,
                serving=self._engine.policy_version,
                error=str(error),
            )
            self._metrics.count(REFUSED_POLICIES)
            lasting = {
                version: refusal
                for version, refusal in self._refusals.items()
                if self._is_refused(version)
            }
            self._refusals = lasting | {target: _Refusal(error, time.monotonic() + self._refusal_s)}
        finally:
            self._is_switching = False
        async with self._changed:
            self._changed.notify_all()

    async def _load(self, version: int) -> None:
        if version not in self._manifests:
            raise WeightsUnavailableError(
                f"Policy version {version} is not in the stream of updates any more; the newest is "
                f"{self._newest}. "
                "Evaluate sooner after a version is published.",
                policy_version=version,
            )
        for delay_s in (*self._retry_delays_s, None):
            try:
                async with self._pins.loading(version):
                    await self._engine.update_weights(self._manifests[version])
                break
            except WeightsUnavailableError as error:
                # Collected as garbage, or the store is away for a moment: only the second is worth
                # waiting for.
                if delay_s is None or self._target() != version:
                    raise
                log.warning(
                    "policy_unavailable",
                    policy_version=version,
                    error=str(error),
                    retry_in_s=delay_s,
                )
                await asyncio.sleep(delay_s)
        log.info("policy_loaded", policy_version=version, newest_version=self._newest)
