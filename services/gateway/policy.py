"""Which policy is the newest, and how many updates it has seen."""

from __future__ import annotations

from sdar.bus.protocol import Bus
from sdar.weights.follower import PolicyFollower


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
        self._follower = PolicyFollower(bus)

    async def follow(self) -> None:
        """Take in what was published since the last call."""
        await self._follower.read()
        # None before the first one, and then both stay as they are.
        manifest = self._follower.newest
        if manifest is not None:
            self.version = manifest.policy_version
            self.num_updates = manifest.num_updates
