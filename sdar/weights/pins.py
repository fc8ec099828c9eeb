"""Which policy versions a reader of weights declares in use, so that none is deleted under it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Set

import structlog

from sdar.bus.protocol import Bus
from sdar.contracts.errors import WeightsUnavailableError
from sdar.process.lifecycle import wait_or_stop

log = structlog.get_logger()

PIN_TTL_S = 60.0
"""How long a declaration holds. One that lapses costs at most a reading that fails: what is loaded
stays in memory.
"""


class PinnedVersions:
    """The versions of one reader.

    Args:
        reader: unique name of it.
        ttl_s: how long a declaration holds; `keep` renews it four times as often.
    """

    def __init__(self, bus: Bus, reader: str, ttl_s: float = PIN_TTL_S) -> None:
        self._bus = bus
        self._reader = reader
        self._ttl_s = ttl_s
        self._versions: frozenset[int] = frozenset()
        self._turnstile = asyncio.Lock()

    @contextlib.asynccontextmanager
    async def loading(self, version: int) -> AsyncIterator[None]:
        """Hold a version beside the one in use while it is read; afterwards it is the one in use.

        Raises:
            WeightsUnavailableError: it is being deleted.
        """
        before = self._versions
        await self._begin(version)
        try:
            yield
        except BaseException:
            # Only the next renewal declares this: until then one version too many is held.
            self._versions = before
            raise
        await self._declare(frozenset({version}))

    async def _begin(self, version: int) -> None:
        """Declare a version before any of it is read: from then on it is not deleted."""
        if await self._declare(self._versions | {version}):
            return
        # The one in use may be retired, after a pause longer than its declaration held. It is in
        # memory; let it go.
        if not await self._declare(frozenset({version})):
            raise WeightsUnavailableError(
                f"Policy version {version} is being deleted from the weight store. Take a newer "
                "one.",
                policy_version=version,
            )

    async def keep(self, stopping: asyncio.Event) -> None:
        """Renew the declaration until stopped."""
        while not await wait_or_stop(stopping, self._ttl_s / 4):
            if self._versions and not await self._declare(self._versions):
                # Retired while this reader was silent for too long. It serves from memory, and
                # there is nothing left to hold.
                log.warning("versions_retired_in_use", policy_versions=sorted(self._versions))
                self._versions = frozenset()

    async def _declare(self, versions: Set[int]) -> bool:
        """In turn, so that a renewal under way never comes after what replaces it."""
        async with self._turnstile:
            is_held = await self._bus.pin_versions(self._reader, versions, self._ttl_s)
            if is_held:
                self._versions = frozenset(versions)
            return is_held
