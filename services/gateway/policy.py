"""Which policy is the newest, as the manifests on the stream of policy updates say."""

from __future__ import annotations

import structlog

from sdar.bus.protocol import BEFORE_FIRST, Bus
from sdar.contracts import codec
from sdar.contracts.errors import SdarError
from sdar.contracts.streams import Stream

log = structlog.get_logger()

_MAX_MANIFESTS = 2000


class NewestPolicy:
    """The newest published policy.

    Attributes:
        version: -1 before the first one.
        num_updates: optimizer updates in it. After a crash that lost updates the versions go on and
            this number falls back.
    """

    def __init__(self, bus: Bus) -> None:
        self.version = -1
        self.num_updates = 0
        self._bus = bus
        self._cursor = BEFORE_FIRST

    async def follow(self) -> None:
        """Take in what was published since the last call."""
        for entry in await self._bus.tail(Stream.POLICY_UPDATES, self._cursor, _MAX_MANIFESTS):
            self._cursor = entry.entry_id
            try:
                manifest = codec.decode_weights_manifest(entry.payload)
            except SdarError as error:
                log.error("manifest_unreadable", entry_id=entry.entry_id, error=str(error))
                continue
            if manifest.policy_version >= self.version:
                self.version = manifest.policy_version
                self.num_updates = manifest.num_updates
