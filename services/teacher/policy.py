"""Owns how a teacher keeps up with the policy: which version is newest, and when it is loaded. Never scores."""

from __future__ import annotations

import time
from collections.abc import Callable

import structlog

from sdar.contracts import codec
from sdar.contracts.errors import CorruptionError, StaleError, WeightsUnavailableError
from sdar.contracts.streams import Stream
from sdar.contracts.types import WeightsManifest
from sdar.runtime.bus import BEFORE_FIRST, Bus
from services.teacher.scorer import Scorer

log = structlog.get_logger()

_PAGE = 1000

EAGER_LOADING_SHARE = 0.2
"""A version that is not due yet is loaded when loading has taken less than this share of the time since the last one."""


class PolicyFollower:
    """Keeps a scorer within `max_lag` versions of the newest published policy; not safe for concurrent calls.

    Args:
        max_lag: most versions behind the newest that a score may be made with.
        clock: seconds, monotonic.
    """

    def __init__(self, bus: Bus, scorer: Scorer, max_lag: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._bus = bus
        self._scorer = scorer
        self._max_lag = max_lag
        self._clock = clock
        self._cursor = BEFORE_FIRST
        self._newest: WeightsManifest | None = None
        self._tried_at = -float("inf")
        self.last_load_s = 0.0

    @property
    def newest_version(self) -> int:
        """Newest published version seen; the base is version 0."""
        return max(self._newest.policy_version if self._newest else 0, self._scorer.teacher_version)

    @property
    def lag(self) -> int:
        """Versions between the newest published and the one that scores."""
        return self.newest_version - self._scorer.teacher_version

    async def catch_up(self, min_version: int = 0) -> None:
        """Return with a scorer of at least `min_version`, at most `max_lag` behind the newest policy.

        Within those bounds the newest version is taken as well while loading is cheap beside the rest of the work.

        Raises:
            StaleError: `min_version` has not been published yet.
            CorruptionError, WeightsUnavailableError: the version that is due cannot be read.
        """
        await self._follow()
        if self.newest_version < min_version:
            raise StaleError(
                f"The teacher knows policy versions up to {self.newest_version}, version {min_version} is asked for. "
                "Repeat when it is published, or ask for an older one.",
                newest_version=self.newest_version,
                min_version=min_version,
            )
        if self._scorer.teacher_version < max(min_version, self.newest_version - self._max_lag):
            await self._load()
        elif self.lag and self._is_loading_cheap():
            try:
                await self._load()
            except (CorruptionError, WeightsUnavailableError) as error:
                log.warning("policy_not_loaded", policy_version=self.newest_version, lag=self.lag, error=str(error))

    async def _follow(self) -> None:
        while entries := await self._bus.tail(Stream.POLICY_UPDATES, self._cursor, _PAGE):
            self._newest = codec.decode_weights_manifest(entries[-1].payload)
            self._cursor = entries[-1].entry_id

    def _is_loading_cheap(self) -> bool:
        return self.last_load_s < EAGER_LOADING_SHARE * (self._clock() - self._tried_at)

    async def _load(self) -> None:
        """Load the newest version; one that is gone again by then has a successor."""
        while (manifest := self._newest) is not None:
            started_at = self._clock()
            try:
                return await self._scorer.update_weights(manifest)
            except WeightsUnavailableError:
                await self._follow()
                if self._newest is manifest:
                    raise
            finally:
                self._tried_at = self._clock()
                self.last_load_s = self._tried_at - started_at
