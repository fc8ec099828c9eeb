"""Loads policy versions into a teacher: within its lag bound of the newest, sooner if cheap.

A version that cannot be read is passed over (`sdar.weights.follower`): the newest one that can be
read and is due is taken. Where there is none, the caller has to wait for the next.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import structlog

from sdar.bus.protocol import Bus
from sdar.contracts.errors import StaleError, WeightsUnavailableError
from sdar.contracts.types import WeightsManifest
from sdar.weights.follower import PolicyFollower
from sdar.weights.pins import PinnedVersions
from services.teacher.metrics import (
    DISPROOFS,
    REFUSED_POLICIES,
    WEIGHT_LOAD_SECONDS,
    TeacherMetrics,
)
from services.teacher.scorer import Scorer

log = structlog.get_logger()

EAGER_LOADING_SHARE = 0.2
"""A version that is not due yet is loaded when the last load took less than this share of the time
that has passed since.
"""


class ScoringPolicy:
    """Keeps a scorer within `max_lag` versions of the newest published policy.

    Not safe for concurrent calls.

    Args:
        max_lag: most versions behind the newest that a score may be made with.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        bus: Bus,
        scorer: Scorer,
        pins: PinnedVersions,
        metrics: TeacherMetrics,
        max_lag: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.pins = pins
        self.last_load_s = 0.0
        self._scorer = scorer
        self._metrics = metrics
        self._max_lag = max_lag
        self._clock = clock
        self._published = PolicyFollower(
            bus,
            max_known=max_lag + 1,
            on_refused=lambda: metrics.count(REFUSED_POLICIES),
        )
        self._tried_at = -float("inf")

    @property
    def newest_version(self) -> int:
        """Newest published version seen; the base is version 0."""
        return max(self._scorer.teacher_version, self._published.newest_version)

    @property
    def lag(self) -> int:
        """Versions between the newest published and the one that scores."""
        return self.newest_version - self._scorer.teacher_version

    async def catch_up(self, min_version: int = 0) -> None:
        """Bring the scorer to at least `min_version`, and to `max_lag` behind the newest policy.

        Within those bounds the newest version is taken as well while loading is cheap beside the
        rest of the work.

        Raises:
            StaleError: `min_version` has not been published yet.
            WeightsUnavailableError: no version that is due can be read.
        """
        await self._published.read()
        if self.newest_version < min_version:
            raise self._build_stale_error(min_version)
        least = max(min_version, self.newest_version - self._max_lag)
        if self._scorer.teacher_version < least:
            await self._load(least)
        elif self.lag and self._is_loading_cheap():
            await self._load_eagerly()

    def _build_stale_error(self, min_version: int) -> StaleError:
        return StaleError(
            f"The teacher knows policy versions up to {self.newest_version}, version "
            f"{min_version} is asked for. Repeat when it is published, or ask for an older one.",
            newest_version=self.newest_version,
            min_version=min_version,
        )

    def _is_loading_cheap(self) -> bool:
        return self.last_load_s < EAGER_LOADING_SHARE * (self._clock() - self._tried_at)

    async def _load_eagerly(self) -> None:
        """Load the newest version. One that cannot be read is no trouble yet: none is due."""
        try:
            await self._load(self.newest_version)
        except WeightsUnavailableError as error:
            log.warning(
                "policy_not_loaded",
                policy_version=self.newest_version,
                lag=self.lag,
                error=str(error),
            )

    async def _load(self, least: int) -> None:
        """Load the newest version that can be read, of at least `least`.

        Raises:
            WeightsUnavailableError: there is none.
        """
        # What could not be read before may be readable now: a store may only have been away.
        self._published.forgive()
        reasons: list[str] = []
        while (version := self._published.find_usable(least)) is not None:
            is_loaded = await self._published.load(version, self._install)
            self._metrics.set(DISPROOFS, self._published.num_disproofs)
            if is_loaded:
                return
            reasons.append(str(self._published.get_refusal(version)))
            # Loading takes long: a version that was published meanwhile is newer still.
            await self._published.read()
            # What was published meanwhile may put the next candidate past the bound.
            least = max(least, self.newest_version - self._max_lag)
        raise WeightsUnavailableError(
            f"No policy version from {least} to {self.newest_version} can be read: {reasons[0]}"
        )

    async def _install(self, manifest: WeightsManifest) -> None:
        started_at = self._clock()
        try:
            async with self.pins.loading(manifest.policy_version):
                await self._scorer.update_weights(manifest)
        finally:
            # A load that failed counts too: otherwise each batch would try it again.
            self._tried_at = self._clock()
            self.last_load_s = self._tried_at - started_at
        self._metrics.observe(WEIGHT_LOAD_SECONDS, self.last_load_s)
