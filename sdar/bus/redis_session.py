"""One run on one Redis: its keys and consumers, the roles this process holds, and its scripts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from redis.commands.core import AsyncScript

from sdar.bus.protocol import (
    BusLimits,
    Consumers,
    Wiring,
    build_emptied_error,
    build_role_error,
)
from sdar.bus.redis_connection import RedisConnection
from sdar.contracts.streams import ConsumerGroup, RunKeys

Argument = str | bytes | int | float

PAYLOAD = b"p"
"""The field of an entry that holds its payload."""


class RedisSession:
    """What the parts of a `RedisBus` share.

    Attributes:
        tenures: the roles that this process holds, each with the number of its claim.
    """

    def __init__(
        self, connection: RedisConnection, run_id: str, consumers: Consumers, limits: BusLimits
    ) -> None:
        self.connection = connection
        self.client = connection.client
        self.run = connection.run
        self.send = connection.send
        self.run_id = run_id
        self.keys = RunKeys(run_id)
        self.wiring = Wiring(consumers)
        self.limits = limits
        self.tenures: dict[ConsumerGroup, int] = {}
        self._scripts: dict[str, AsyncScript] = {}

    def add_roles(self, request: Request) -> None:
        """The roles that a script has to check, as `redis_scripts` reads them."""
        request.add_list(
            (request.index(self.keys.tenure(role)), role, tenure)
            for role, tenure in self.tenures.items()
        )

    async def run_in_role(self, script: str, request: Request) -> list[Any]:
        """The reply of a script that checks the roles: a status and more.

        Raises:
            SupersededError, CorruptionError: another process has a role, or the server was emptied.
        """
        return check_roles(await self.run_script(script, request))

    async def run_script(self, script: str, request: Request) -> Any:
        """The reply of a script, which is repeated until Redis runs it."""
        return await self.run(lambda: self.call_script(script, request))

    async def call_script(self, script: str, request: Request) -> Any:
        """The reply of a script at the first try."""
        # A registered script is sent by its digest; whole only to a server that does not know it,
        # such as one that was restarted.
        if script not in self._scripts:
            self._scripts[script] = self.client.register_script(script)
        return await self._scripts[script](request.keys, request.arguments)


class Request:
    """Keys and arguments of one script, in the order in which its `take` reads them.

    A list is written as its length, and then its items' arguments.
    """

    def __init__(self, keys: Sequence[str]) -> None:
        self.keys = list(keys)
        self.arguments: list[Argument] = []
        self._indices: dict[str, int] = {}

    def index(self, key: str) -> int:
        """The key's index in Lua's KEYS; it is added if it is not there."""
        if key not in self._indices:
            self.keys.append(key)
            # After the append: Lua counts from 1.
            self._indices[key] = len(self.keys)
        return self._indices[key]

    def add(self, *arguments: Argument) -> None:
        self.arguments += arguments

    def add_list(self, items: Iterable[Iterable[Argument]]) -> None:
        # The length is filled in afterwards: `items` may be a generator.
        at = len(self.arguments)
        num_items = 0
        self.arguments.append(0)
        for item in items:
            self.arguments += item
            num_items += 1
        self.arguments[at] = num_items


def check_roles(reply: list[Any]) -> list[Any]:
    """The reply of a script that checks roles; raises what it says when a role is lost.

    Raises:
        SupersededError, CorruptionError: see `RedisSession.run_in_role`.
    """
    if reply[0] == b"superseded":
        raise build_role_error(ConsumerGroup(reply[1].decode()))
    if reply[0] == b"emptied":
        raise build_emptied_error(ConsumerGroup(reply[1].decode()))
    return reply


def pairs(flat: Sequence[bytes]) -> Iterable[tuple[bytes, bytes]]:
    """Fields and values of a hash as a script returns it."""
    return zip(flat[::2], flat[1::2], strict=True)


def decode(value: bytes | str) -> str:
    """Text of the server; redis-py decodes some replies itself."""
    return value.decode() if isinstance(value, bytes) else value
