"""Switches the engine to the policy version that is due, and holds it for evaluations.

Due is the version that a running evaluation is pinned to; without one, the newest that can be read.
Tokens are stamped by the engine, so training episodes in flight simply go on across any switch. A
version that was refused (`sdar.weights.follower`) is tried again after a while.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Sequence

import structlog

from sdar.bus.protocol import Bus
from sdar.contracts.errors import WeightsUnavailableError
from sdar.contracts.types import WeightsManifest
from sdar.weights.follower import PolicyFollower
from sdar.weights.pins import PinnedVersions
from services.rollout.engine import Engine
from services.rollout.metrics import REFUSED_POLICIES, RolloutMetrics

log = structlog.get_logger()

_MAX_KNOWN = 100
"""Newest published versions kept in mind, more than the learner keeps in the store."""


class ServedPolicy:
    """Follows what is published and switches the engine.

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
        self._engine = engine
        self._pins = pins
        self._block_s = block_s
        self._retry_delays_s = retry_delays_s
        self._published = PolicyFollower(
            bus,
            max_known=_MAX_KNOWN,
            refusal_s=refusal_s,
            on_refused=lambda: metrics.count(REFUSED_POLICIES),
        )
        self._served_version: int | None = None
        self._is_switching = False
        self._waiting: Counter[int] = Counter()
        self._serving: Counter[int] = Counter()

    @property
    def newest_version(self) -> int:
        """Newest published version seen; the base is version 0."""
        return self._published.newest_version

    @property
    def num_disproofs(self) -> int:
        """See `PolicyFollower`."""
        return self._published.num_disproofs

    async def catch_up(self) -> None:
        """Read what has been published so far and serve what is due.

        To be called once, before the first task.

        Raises:
            EngineFailedError, UnavailableError: from the engine.
        """
        await self._published.read()
        is_loaded = asyncio.Event()
        # Loading may take minutes, longer than a declaration of what is in use holds.
        keeping = asyncio.create_task(self._pins.keep(is_loaded), name="policy_pins")
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
                await self._published.read(self._block_s)
                # A refusal may have lapsed: time alone wakes nobody.
                self._published.notify()
        finally:
            for task in beside:
                task.cancel()
            await asyncio.wait(beside)
        # Both run for ever: one that has ended by itself has failed.
        for task in beside:
            if not task.cancelled() and (error := task.exception()):
                raise error

    @contextlib.asynccontextmanager
    async def pinned(self, policy_version: int) -> AsyncIterator[None]:
        """Hold the engine at a version.

        Waits while others hold another; of those that wait, the oldest version is next.

        Raises:
            WeightsUnavailableError, CorruptionError: that version cannot be loaded.
        """
        await self._enter(policy_version)
        try:
            yield
        finally:
            self._serving -= Counter({policy_version: 1})
            self._published.notify()

    async def reached(self, policy_version: int) -> None:
        """Wait until the engine serves this version or a newer one.

        The gateway admits a group for a version, counting on tokens that are no older: played
        before the engine has switched, or while an evaluation holds it back, the group would be
        staler than its admission allows. One of a version that cannot be read is played all the
        same; the learner judges its tokens.
        """
        await self._published.wait_until(
            lambda: (
                self._engine.policy_version >= policy_version
                or self._published.is_refused(policy_version)
            )
        )

    async def _enter(self, version: int) -> None:
        if not self._waiting[version]:
            # What could not be loaded then may be loadable now.
            self._published.forgive(version)
        self._waiting[version] += 1
        self._published.notify()
        try:
            await self._published.wait_until(
                lambda: self._is_served(version) or self._published.is_refused(version)
            )
            if not self._is_served(version):
                raise self._published.get_refusal(version)
            self._serving[version] += 1
        finally:
            self._waiting -= Counter({version: 1})
            self._published.notify()

    def _is_served(self, version: int) -> bool:
        # Not while it switches: the engine's number changes before the load is known to be done.
        return not self._is_switching and self._engine.policy_version == version == self._target()

    def _target(self) -> int:
        """The version due now. A version once entered stays until all who hold it have left."""
        if self._serving:
            return next(iter(self._serving))
        waiting = [v for v in self._waiting if not self._published.is_refused(v)]
        return min(waiting, default=self._find_newest())

    def _find_newest(self) -> int:
        newest = self._published.find_usable()
        return self._engine.policy_version if newest is None else newest

    async def _keep_switching(self) -> None:
        while True:
            await self._published.wait_until(self._is_due)
            await self._switch()

    def _is_due(self) -> bool:
        """Whether the engine has to switch to a version that was published and may be tried."""
        target = self._target()
        # Older than the newest but not at hand: it has left the follower's memory. Trying to load
        # it says so to whoever waits for it.
        is_published = target in self._published or target < self.newest_version
        # None at first: the base, which the engine starts with, has to be proven, too.
        is_other = target != self._served_version
        return is_other and is_published and not self._published.is_refused(target)

    async def _switch(self) -> None:
        """Bring the engine to the version that is due.

        One that cannot be read is refused, and the version before goes on serving.
        """
        if not self._is_due():
            return
        version = self._target()
        self._is_switching = True
        try:
            is_loaded = await self._published.load(version, self._install)
        finally:
            self._is_switching = False
        if is_loaded:
            self._served_version = version
            log.info("policy_loaded", policy_version=version, newest_version=self.newest_version)
        self._published.notify()

    async def _install(self, manifest: WeightsManifest) -> None:
        """Load a version. A store may be away for a moment, which is worth waiting for; a version
        that was collected as garbage looks the same.
        """
        version = manifest.policy_version
        for delay_s in self._retry_delays_s:
            try:
                return await self._load(manifest)
            except WeightsUnavailableError as error:
                # Something else is due by now: no use waiting for this one.
                if self._target() != version:
                    raise
                log.warning(
                    "policy_unavailable",
                    policy_version=version,
                    error=str(error),
                    retry_in_s=delay_s,
                )
                await asyncio.sleep(delay_s)
        # The last attempt: what it raises is the version's refusal.
        await self._load(manifest)

    async def _load(self, manifest: WeightsManifest) -> None:
        async with self._pins.loading(manifest.policy_version):
            await self._engine.update_weights(manifest)
