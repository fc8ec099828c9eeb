"""One process's connections to a Redis: outages waited out and reported; who else is connected.

- An unreachable Redis (away, loading its file, silent) is retried for `outage_tolerance_s`. One
  that answers and refuses writes (out of memory or disk, read-only) is waited for without bound.
  redis-py's own retries are off: it nests one around connecting within one around the command, and
  together they have no deadline.
- A process that is asked to stop waits `LEAVE_S` more for either. What it had not written by then
  is done again after the next start.
- Connections are named after run and process. A process without any at the server is dead, unless
  the server or the network was away: then the others may not be back yet. `fetch_witness` therefore
  returns since when this process has been in touch with a server that has been up.

It knows no stream and no key.
"""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import redis.asyncio as redis
import structlog
from redis import exceptions as redis_errors
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from sdar.contracts.errors import BusUnavailableError, ConfigurationError
from sdar.process.text import hide_credentials

log = structlog.get_logger()

_AWAY = (redis_errors.ConnectionError, redis_errors.TimeoutError, TimeoutError, OSError)
"""Errors of a server that is not there, or does not answer."""

Command = tuple[Any, ...]
OnBlocked = Callable[[str], None]

_CONNECT_TIMEOUT_S = 10.0
_REPLY_TIMEOUT_S = 20.0
"""Longest silence of a server that is there. It is well above the longest blocking read."""
# The first retry comes soon, for most interruptions are short; in a lasting one each process asks
# once a second.
_FIRST_RETRY_S = 0.05
_MAX_RETRY_S = 1.0
_LOG_EVERY_S = 30.0
LEAVE_S = 10.0
"""How long a process that is asked to stop goes on waiting in one call: a fraction of what its
supervisor gives it to end.
"""
_REFUSAL_HINTS = {
    "OOM": "is full ({words}). Raise its maxmemory.",
    "MISCONF": "cannot write to its disk ({words}). Give it room there.",
    "READONLY": "is a replica and takes no writes ({words}). Address the primary.",
    "NOREPLICAS": "misses its replicas ({words}). Bring them back.",
}
"""What Redis' write refusals mean, by the code they begin with."""
_REFUSAL = re.compile(rf"\b({'|'.join(_REFUSAL_HINTS)}) (.*)", re.DOTALL)
"""A refusal within an error: Redis before 7.0 puts much before one that a script meets."""


@dataclass(frozen=True, slots=True)
class Witness:
    """What this process can say of the others.

    Attributes:
        names: the names of all connections at the server, None where its ACL forbids to ask.
        settled_s: for how long the others have been able to be connected: no less than this.
    """

    names: frozenset[str] | None
    settled_s: float


def format_client_name(run_id: str, instance: str) -> str:
    """The name of an instance's connections; Redis takes visible ASCII without spaces."""
    return re.sub(r"[^!-~]", "_", f"sdar:{run_id}:{instance}")


class RedisConnection:
    """Runs operations on one Redis. Connects at the first.

    Args:
        url: redis://, rediss:// or unix:// address.
        client_name: what the connections are called at the server; "" leaves them without a name.
        outage_tolerance_s: see the module.
        on_blocked: called with a reason at every retry of any operation, and with "" when no
            operation is held up any more.
    """

    def __init__(
        self, url: str, client_name: str, outage_tolerance_s: float, on_blocked: OnBlocked | None
    ) -> None:
        self._url = url
        self._client_name = client_name
        self._outage_tolerance_s = outage_tolerance_s
        self._on_blocked = on_blocked or (lambda reason: None)
        self._blocked: dict[object, str] = {}
        self._next_log_at = 0.0
        self._in_touch_since: float | None = None
        self._leaves_at: float | None = None
        self.client = self._build_client()

    def _build_client(self) -> redis.Redis:
        try:
            return redis.Redis.from_url(
                self._url,
                # Replies as Redis 6 gives them; with protocol 3 redis-py returns other types.
                protocol=2,
                redis_connect_func=self._introduce,
                # redis-py would wait with asyncio.wait_for, which before Python 3.12 can swallow a
                # cancellation. See run.
                socket_timeout=None,
                socket_connect_timeout=_CONNECT_TIMEOUT_S,
                # A Unix socket's connection takes no such option.
                **({} if self._url.startswith("unix:") else {"socket_keepalive": True}),
                retry=Retry(NoBackoff(), 0),
            )
        except ValueError:
            # Without the reason's text: it may quote a password that was taken for a port.
            raise ConfigurationError(
                f"Redis address {self._place!r} is not usable. Use redis://host:port/0, special "
                "characters of a password as %XX."
            ) from None

    async def run(self, operation: Callable[[], Awaitable[Any]]) -> Any:
        """The result of `operation`, which is repeated until Redis does it.

        A reply may be lost after Redis has done it: each must be one that may be repeated.

        Raises:
            BusUnavailableError: unreachable for too long, or held up while this process is to end.
            ConfigurationError: credentials or rights are missing.
        """
        waiting = _Waiting(self._outage_tolerance_s)
        try:
            while True:
                try:
                    async with asyncio.timeout(_REPLY_TIMEOUT_S):
                        result = await operation()
                    self._in_touch_since = self._in_touch_since or time.monotonic()
                    return result
                except (redis_errors.RedisError, TimeoutError, OSError) as error:
                    reason = self._judge(error, waiting)
                    self._check_leaving(reason, waiting)
                self._report(waiting, reason)
                await asyncio.sleep(waiting.next_delay_s())
        finally:
            self._report(waiting, "")

    async def send(self, commands: Sequence[Command]) -> list[Any]:
        """Send all commands in one round trip; the replies in their order."""

        async def send_once() -> list[Any]:
            pipeline = self.client.pipeline(transaction=False)
            for command in commands:
                pipeline.execute_command(*command)
            replies: list[Any] = await pipeline.execute()
            return replies

        return await self.run(send_once) if commands else []

    async def fetch_witness(self) -> Witness:
        """Who is connected now, and what that is worth."""
        clients = await self.run(lambda: _unless_forbidden(self.client.client_list()))
        # After the list: if the server restarts in between, its age shows it.
        info = await self.run(lambda: _unless_forbidden(self.client.info("server")))
        in_touch_s = time.monotonic() - (self._in_touch_since or time.monotonic())
        # A server that restarts between two operations of this process breaks neither: only its age
        # shows that the others have had to come back.
        up_s = in_touch_s if info is None else float(info["uptime_in_seconds"])
        names = None if clients is None else frozenset(client["name"] for client in clients)
        return Witness(names, min(in_touch_s, up_s))

    async def check_eviction(self) -> None:
        """Raises ConfigurationError where the server would throw entries away to make room."""
        info = await self.run(lambda: _unless_forbidden(self.client.info("memory"))) or {}
        policy = info.get("maxmemory_policy", "noeviction")
        if info.get("maxmemory") and policy != "noeviction":
            raise ConfigurationError(
                f"Redis at {self._place} evicts keys when it is full (maxmemory-policy {policy}): "
                "a run would lose its groups without a word. Set it to noeviction."
            )

    async def hurry(self, stopping: asyncio.Event) -> None:
        """Returns when this process is asked to stop; from then on no call waits for long."""
        await stopping.wait()
        self._leaves_at = time.monotonic() + LEAVE_S

    async def close(self) -> None:
        await self.client.aclose()

    async def _introduce(self, connection: Any) -> None:
        await connection.on_connect()
        if self._client_name:
            await connection.send_command("CLIENT", "SETNAME", self._client_name)
            await _unless_forbidden(connection.read_response())

    def _judge(self, error: Exception, waiting: _Waiting) -> str:
        """Why the operation has to wait; raises where waiting is no help."""
        # Before outages: redis-py's error for wrong credentials is a ConnectionError too.
        self._check_rights(error)
        # No Redis talks like that: something else answers at its address, as a network does that is
        # still being set up.
        if isinstance(error, redis_errors.InvalidResponse):
            error = redis_errors.ConnectionError(f"what answers there is no Redis: {error}")
        if isinstance(error, _AWAY):
            return self._judge_outage(error, waiting)
        if refusal := describe_write_refusal(error):
            # It answers, so the time of the outage before does not count any more.
            waiting.end_outage()
            return f"Redis at {self._place} {refusal}"
        raise error

    def _check_rights(self, error: Exception) -> None:
        """Raises ConfigurationError for an error that only another URL or ACL can end."""
        if isinstance(error, redis_errors.AuthenticationError | redis_errors.AuthorizationError):
            raise ConfigurationError(
                f"Redis refuses the credentials of {self._place}: {error}. Fix its URL."
            ) from error
        if isinstance(error, redis_errors.NoPermissionError):
            raise ConfigurationError(
                f"Redis at {self._place} denies its user a command: {error}. Fix its ACL."
            ) from error

    def _judge_outage(self, error: Exception, waiting: _Waiting) -> str:
        self._in_touch_since = None
        # asyncio's own timeout says nothing.
        silence = f"no reply in {_REPLY_TIMEOUT_S:g} s"
        problem = f"{type(error).__name__}: {error}" if str(error) else silence
        if waiting.is_outage_over_tolerance():
            raise BusUnavailableError(
                f"Redis at {self._place} did not answer for {self._outage_tolerance_s:g} s "
                f"({problem}). Check that it runs and that SDAR_REDIS_URL names it; nothing "
                "acknowledged is lost.",
                address=self._place,
            ) from error
        return f"Redis at {self._place} does not answer ({problem})."

    def _check_leaving(self, reason: str, waiting: _Waiting) -> None:
        if self._leaves_at is None:
            return
        # A call that begins after the request to stop has the whole time as well: it may be the
        # commit of what was finished last.
        if time.monotonic() >= max(self._leaves_at, waiting.began_at + LEAVE_S):
            raise BusUnavailableError(
                f"{reason} Asked to stop meanwhile; what was not written is done again after the "
                "next start.",
                address=self._place,
            )

    def _report(self, waiting: _Waiting, reason: str) -> None:
        # Several operations may be held up at once; "" is reported when the last one is not.
        was_blocked = bool(self._blocked)
        if reason:
            self._blocked[waiting] = reason
        else:
            self._blocked.pop(waiting, None)
        if reason:
            self._on_blocked(reason)
            if time.monotonic() >= self._next_log_at:
                self._next_log_at = time.monotonic() + _LOG_EVERY_S
                log.warning("bus_blocked", reason=reason)
        elif was_blocked and not self._blocked:
            self._on_blocked("")
            self._next_log_at = 0.0
            log.info("bus_unblocked")

    @property
    def _place(self) -> str:
        """The address without credentials."""
        return hide_credentials(self._url)


class _Waiting:
    """One operation that is being repeated.

    It knows since when Redis has been away for the operation, and when the next try is due.
    """

    def __init__(self, outage_tolerance_s: float) -> None:
        self.began_at = time.monotonic()
        self._tolerance_s = outage_tolerance_s
        self._give_up_at: float | None = None
        self._delay_s = _FIRST_RETRY_S

    def is_outage_over_tolerance(self) -> bool:
        """Whether the next try would come too late."""
        if self._give_up_at is None:
            self._give_up_at = time.monotonic() + self._tolerance_s
        return time.monotonic() + self._delay_s > self._give_up_at

    def end_outage(self) -> None:
        self._give_up_at = None

    def next_delay_s(self) -> float:
        # By chance, so that the processes of a run do not all come back at the same moment.
        delay_s = self._delay_s * random.uniform(0.5, 1.0)
        self._delay_s = min(2 * self._delay_s, _MAX_RETRY_S)
        return delay_s


def describe_write_refusal(error: Exception) -> str:
    """Why Redis refuses to write for now; empty if the error says something else."""
    words = str(error)
    if isinstance(error, redis_errors.OutOfMemoryError):
        words = f"OOM {words}"  # redis-py takes the code off errors that have a class
    elif isinstance(error, redis_errors.ReadOnlyError):
        words = f"READONLY {words}"
    found = _REFUSAL.search(words) if isinstance(error, redis_errors.ResponseError) else None
    return _REFUSAL_HINTS[found[1]].format(words=found[2].strip().rstrip(".")) if found else ""


async def _unless_forbidden(reply: Awaitable[Any]) -> Any:
    """The reply, None where the server's ACL forbids the command.

    Managed Redis often forbids administrative ones.
    """
    try:
        return await reply
    except redis_errors.NoPermissionError:
        return None
