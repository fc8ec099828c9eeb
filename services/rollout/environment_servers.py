"""Finds the servers behind an environment's address, and ranks them for the next session.

A name may stand for many servers, as a headless Service of Kubernetes does for its pods. Each gets
a channel of its own, for a session lives in one server; gRPC's own balancing knows calls, not
sessions. Never looks into a call.
"""

from __future__ import annotations

import asyncio
import ipaddress
import random
import re
import socket
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import grpc
import structlog

from sdar.contracts.errors import UnavailableError
from sdar.v1 import environment_pb2_grpc
from sdar.wire.rpc_client import connect
from sdar.wire.security import OPEN, Security

log = structlog.get_logger()

Resolve = Callable[[str, int], Awaitable[list[str]]]
"""(host, port) to the HOST:PORT of each server of that name. Raises OSError."""

_RESOLVE_EVERY_S = 5.0
_RESOLVE_AGAIN_S = 1.0
"""Soonest look-up after a server was found away: its pod may be gone, and another may be there."""
# A server that is away takes seconds to come back; a full one has room when any episode ends.
_AVOID_AWAY_S = 5.0
_AVOID_FULL_S = 0.5

_NAMED = re.compile(r"([A-Za-z0-9._-]+):([0-9]{1,5})", re.ASCII)


@dataclass(slots=True, eq=False)
class EnvironmentServer:
    """One server and its channel.

    Attributes:
        num_sessions: sessions of this client, those being opened included.
        is_listed: the name still leads there. If not, its sessions end there and no new ones begin.
        avoid_until: others are asked first until then (monotonic), for it was away or full.
    """

    target: str
    channel: grpc.aio.Channel
    stub: Any
    num_sessions: int = 0
    is_listed: bool = True
    avoid_until: float = 0.0


class EnvironmentServers:
    """The servers of one address.

    HOST:PORT with a name is looked up again and again; any other address is one target of gRPC's.

    Args:
        security: what servers are verified against and shown; certificates must name the host of
            `address`.
    """

    def __init__(
        self, address: str, security: Security = OPEN, resolve: Resolve | None = None
    ) -> None:
        self._address = address
        self._security = security
        self._resolve = resolve or resolve_host
        self._name = _parse_name(address)
        self._servers: dict[str, EnvironmentServer] = {}
        self._resolving: asyncio.Task[None] | None = None
        self._resolve_at = self._resolved_at = 0.0
        self._closing: set[asyncio.Task[None]] = set()
        if self._name is None:
            self._add(address)
        else:
            security.check_target(address)

    async def rank(self) -> list[EnvironmentServer]:
        """All servers, the one to ask first at the front.

        That is the one with the fewest sessions of this client; those away or full are at the end.

        Raises:
            UnavailableError: the name leads nowhere.
        """
        await self._look_up()
        servers = [server for server in self._servers.values() if server.is_listed]
        if not servers:
            raise UnavailableError(
                f"No server is known under {self._address}: the name has no address. Start the "
                "environment, or correct it."
            )
        # Of servers with as many sessions, workers would otherwise all take the first.
        random.shuffle(servers)
        now = time.monotonic()
        return sorted(servers, key=lambda server: (server.avoid_until > now, server.num_sessions))

    def take(self, server: EnvironmentServer) -> None:
        """Count a session that is going to be opened there; `release` it at its end."""
        server.num_sessions += 1

    def release(self, server: EnvironmentServer) -> None:
        """A session there has ended, or did not begin."""
        server.num_sessions -= 1
        self._drop_if_unused(server)

    def avoid(self, server: EnvironmentServer, *, is_away: bool) -> None:
        """Ask others first for a while: this one is away, or else full."""
        server.avoid_until = time.monotonic() + (_AVOID_AWAY_S if is_away else _AVOID_FULL_S)
        if is_away:
            self._resolve_at = min(self._resolve_at, self._resolved_at + _RESOLVE_AGAIN_S)

    async def close(self) -> None:
        if self._resolving is not None:
            self._resolving.cancel()
            await asyncio.gather(self._resolving, return_exceptions=True)
        await asyncio.gather(
            *self._closing, *(server.channel.close(None) for server in self._servers.values())
        )
        self._servers.clear()

    async def _look_up(self) -> None:
        """Keep the list of servers fresh; wait for it only where there is none yet."""
        if self._name is None:
            return
        if self._resolving is None and time.monotonic() >= self._resolve_at:
            self._resolving = asyncio.create_task(
                self._update(*self._name), name="resolve_environments"
            )
        # Shielded: others wait for the same look-up.
        if self._resolving is not None and not self._servers:
            await asyncio.shield(self._resolving)

    async def _update(self, host: str, port: int) -> None:
        try:
            targets = await self._resolve(host, port)
        except (OSError, UnicodeError) as error:
            # The servers known so far may well be there still: a name server that is away must not
            # end their sessions.
            log.warning("environments_not_resolved", address=self._address, error=str(error))
        else:
            self._set_targets(targets)
        finally:
            self._resolved_at = time.monotonic()
            self._resolve_at = self._resolved_at + _RESOLVE_EVERY_S
            self._resolving = None

    def _set_targets(self, targets: list[str]) -> None:
        known = {target for target, server in self._servers.items() if server.is_listed}
        for target in targets:
            if target not in self._servers:
                self._add(target)
        for target, server in list(self._servers.items()):
            # A name comes back under which a server was unlisted: then it is listed again.
            server.is_listed = target in targets
            self._drop_if_unused(server)
        if known != set(targets):
            log.info("environments_resolved", address=self._address, targets=sorted(targets))

    def _add(self, target: str) -> None:
        channel = connect(
            target, self._security, is_sticky=True, host="" if self._name is None else self._name[0]
        )
        self._servers[target] = EnvironmentServer(
            target, channel, environment_pb2_grpc.EnvironmentServiceStub(channel)
        )

    def _drop_if_unused(self, server: EnvironmentServer) -> None:
        if server.is_listed or server.num_sessions:
            return
        # It may have been dropped before, and its channel is closed once.
        if self._servers.pop(server.target, None) is None:
            return
        closing = asyncio.ensure_future(server.channel.close(None))
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)


async def resolve_host(host: str, port: int) -> list[str]:
    """All addresses of a host, as targets. Raises OSError."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    hosts = {str(address[0]) for *_, address in found}
    return sorted(f"[{one}]:{port}" if ":" in one else f"{one}:{port}" for one in hosts)


def _parse_name(address: str) -> tuple[str, int] | None:
    """Host and port of an address to be looked up here; None for what gRPC takes as it is."""
    # Schemes (`dns:///`, `unix:`) and bracketed IPv6 addresses do not match.
    match = _NAMED.fullmatch(address)
    if match is None:
        return None
    host, port = match[1], int(match[2])
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return host, port
    return None
