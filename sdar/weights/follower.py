"""Which policy versions were published, which is newest, and which of them cannot be used.

A version that cannot be read (torn, corrupt, on a wrong base, being deleted, or its store is away)
or that an engine computes otherwise than the learner is refused: what was served before goes on
serving, and the newest version that is not refused is the next to try. When a version is due is the
caller's: an engine follows the newest one, a teacher stays within its lag, the gateway only counts.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import structlog

from sdar.bus.protocol import BEFORE_FIRST, Bus, Entry
from sdar.contracts import codec
from sdar.contracts.errors import (
    CorruptionError,
    InvalidInputError,
    MismatchError,
    RefusedError,
    SdarError,
    WeightsUnavailableError,
)
from sdar.contracts.streams import Stream
from sdar.contracts.types import WeightsManifest

log = structlog.get_logger()

_PAGE = 1000
_UNREADABLE = (CorruptionError, WeightsUnavailableError, InvalidInputError, RefusedError)
"""What a version raises that cannot be loaded; the weights in use are untouched by it. Anything
else is a fault of the engine or the bus, and says nothing of the version.
"""


@dataclass(frozen=True, slots=True)
class _Refusal:
    """Why a version could not be read, and from when on it may be tried again."""

    error: SdarError
    until_s: float


class PolicyFollower:
    """Follows `policy_updates`.

    Args:
        max_known: newest manifests kept in mind, beside that of version 0, which the learner always
            keeps in the store.
        refusal_s: how long a version that could not be read is left alone, unless `forgive` comes
            first.
        on_refused: called at each refusal, to count it.

    Attributes:
        num_disproofs: times that a version was found to compute something else than in the learner,
            since the last one that was right. They have to do with the engine, so another version
            does not help.
    """

    def __init__(
        self,
        bus: Bus,
        *,
        max_known: int = 1,
        refusal_s: float = math.inf,
        on_refused: Callable[[], None] = lambda: None,
    ) -> None:
        self.num_disproofs = 0
        self._bus = bus
        self._max_known = max_known
        self._refusal_s = refusal_s
        self._on_refused = on_refused
        self._cursor = BEFORE_FIRST
        self._manifests: dict[int, WeightsManifest] = {}
        self._refusals: dict[int, _Refusal] = {}
        self._loaded_version = 0
        self._disproven_version = 0
        self._changed = asyncio.Event()

    @property
    def newest(self) -> WeightsManifest | None:
        """The newest manifest that was published, None before the first."""
        return self._manifests[max(self._manifests)] if self._manifests else None

    @property
    def newest_version(self) -> int:
        """The newest version that was published; before the first it is the base, 0."""
        return max(self._manifests, default=0)

    def __contains__(self, version: int) -> bool:
        """Whether a version's manifest is at hand."""
        return version in self._manifests

    async def read(self, block_s: float = 0.0) -> None:
        """Take in all that was published since; waits up to `block_s` for the first."""
        num_read = _PAGE
        while num_read == _PAGE:
            page = await self._bus.tail(Stream.POLICY_UPDATES, self._cursor, _PAGE, block_s)
            num_read = len(page)
            # Only the first page is waited for: after a full one, the next may well be empty.
            block_s = 0.0
            if page:
                self._remember(page)
                self._cursor = page[-1].entry_id
                self.notify()

    def find_usable(self, least: int = 0) -> int | None:
        """The newest known version of at least `least` that is not refused, None without any."""
        usable = [v for v in self._manifests if v >= least and not self.is_refused(v)]
        return max(usable, default=None)

    async def load(
        self, version: int, install: Callable[[WeightsManifest], Awaitable[None]]
    ) -> bool:
        """Have a version installed; False if it cannot be read, which is logged and counted.

        Args:
            install: brings the weights into memory, or raises and leaves those that were there.

        Raises:
            UnavailableError, EngineFailedError: from `install`, when it is not the version's fault.
        """
        try:
            await install(self._find(version))
        except _UNREADABLE as error:
            self._refuse(version, error)
            return False
        self._loaded_version = version
        if version >= self._disproven_version:
            self.num_disproofs = 0
        return True

    def is_refused(self, version: int) -> bool:
        """Whether a version could not be read, and is to be left alone for now."""
        refusal = self._refusals.get(version)
        return refusal is not None and time.monotonic() < refusal.until_s

    def get_refusal(self, version: int) -> SdarError:
        """Why a version was last refused. Raises KeyError if it never was."""
        return self._refusals[version].error

    def forgive(self, version: int | None = None) -> None:
        """Let a version, or every one, be tried again: it may be readable now."""
        if version is None:
            self._refusals.clear()
        else:
            self._refusals.pop(version, None)

    async def wait_until(self, is_so: Callable[[], bool]) -> None:
        """Wait for what depends on versions and refusals; `is_so` is asked at every `notify`.

        Nothing else runs between `is_so` being true and the return.
        """
        while not is_so():
            await self._changed.wait()

    def notify(self) -> None:
        """Wake who waits; also to be called when something else changes that `is_so` looks at."""
        # A new event each time: clearing the old one could put a waiter back to sleep that has not
        # run yet.
        self._changed.set()
        self._changed = asyncio.Event()

    def _find(self, version: int) -> WeightsManifest:
        if version not in self._manifests:
            raise WeightsUnavailableError(
                f"Policy version {version} is not in the stream of updates any more; the newest is "
                f"{self.newest_version}. Evaluate sooner after a version is published.",
                policy_version=version,
            )
        return self._manifests[version]

    def _refuse(self, version: int, error: SdarError) -> None:
        log.error(
            "policy_refused", policy_version=version, serving=self._loaded_version, error=str(error)
        )
        # Refusals that have lapsed go now, so that a long run does not gather them.
        lasting = {
            known: self._refusals[known] for known in self._refusals if self.is_refused(known)
        }
        self._refusals = lasting
        self._refusals[version] = _Refusal(error, time.monotonic() + self._refusal_s)
        if isinstance(error, MismatchError):
            self.num_disproofs += 1
            self._disproven_version = version
        self._on_refused()

    def _remember(self, page: Sequence[Entry]) -> None:
        """Decode no more than is kept: a manifest names every tensor, and the stream is long.

        The newest entries hold the newest versions, for a learner publishes them in order.
        """
        found: list[WeightsManifest] = []
        # From the end of the page, where the newest are. The stream's first entry is decoded all
        # the same: it is the base of the run, which an evaluation may ask for at any time.
        for index in reversed(range(len(page))):
            may_be_base = index == 0 and self._cursor == BEFORE_FIRST
            if len(found) < self._max_known or may_be_base:
                found += _decode(page[index])
        for manifest in reversed(found):
            self._manifests[manifest.policy_version] = manifest
        outdated = sorted(self._manifests)[: -self._max_known]
        for version in outdated:
            if version != 0:
                del self._manifests[version]


def _decode(entry: Entry) -> list[WeightsManifest]:
    try:
        return [codec.decode_weights_manifest(entry.payload)]
    except SdarError as error:
        # One unreadable entry must not keep a reader from the versions behind it.
        log.error("policy_update_unreadable", entry_id=entry.entry_id, error=str(error))
        return []
