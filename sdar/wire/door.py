"""Decides over each call to a server: who makes it, with which role, and how many a second."""

from __future__ import annotations

import contextvars
import time
from collections.abc import Callable, Sequence

from sdar.contracts.errors import CapacityError, ForbiddenError, SdarError, UnauthenticatedError
from sdar.wire.security import Security
from sdar.wire.tokens import Role, Token, find_token

_BURST_S = 2.0
"""A client may send so many seconds' worth of calls at once."""
_MAX_CLIENTS = 10_000

CLIENT: contextvars.ContextVar[str] = contextvars.ContextVar("client", default="")
"""Who makes the call that is being answered: the name of its token, or its address where no token
is asked for.
"""


class RateLimit:
    """Bounds the calls that each client may make in a second, after a burst.

    A client is any name. One that makes no calls is forgotten.
    """

    def __init__(self, calls_per_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._interval_s = 1 / calls_per_s
        self._clock = clock
        self._paid_until: dict[str, float] = {}

    def take(self, client: str) -> float:
        """0 if the call is within the rate, otherwise the seconds after which it would be."""
        now = self._clock()
        # Each call pays for one interval. Who has paid for more than a burst ahead has to wait, and
        # a call that has to wait is not counted.
        paid_until = max(self._paid_until.get(client, now), now) + self._interval_s
        wait_s = paid_until - now - max(_BURST_S, self._interval_s)
        if wait_s > 0:
            return wait_s
        self._paid_until[client] = paid_until
        if len(self._paid_until) > _MAX_CLIENTS:
            self._forget(now)
        return 0.0

    @property
    def num_clients(self) -> int:
        return len(self._paid_until)

    def _forget(self, now: float) -> None:
        # Who has paid for nothing ahead is known no better than a stranger.
        busy = {client: until for client, until in self._paid_until.items() if until > now}
        # The half that has called least: an attacker of many addresses must not fill the memory.
        kept = sorted(busy.items(), key=lambda item: item[1])[-_MAX_CLIENTS // 2 :]
        self._paid_until = dict(kept)


class Door:
    """Decides over each call of one server."""

    def __init__(self, security: Security, clock: Callable[[], float] = time.monotonic) -> None:
        self._tokens = security.tokens
        self._rate = RateLimit(security.max_calls_per_s, clock)

    def admit(self, needed: Role | None, authorizations: Sequence[str], address: str) -> str:
        """Let a call in.

        Args:
            needed: what it takes; None for what is open to all.
            authorizations: values of its authorization header.
            address: where it comes from, without the port.

        Returns:
            A name for the client.

        Raises:
            UnauthenticatedError: no token, or a wrong one.
            ForbiddenError: a token of too low a role.
            CapacityError: too many calls of this client.
        """
        bearer, refusal = self.judge(needed, authorizations)
        # Counted before it is refused: guessing tokens is bounded, too.
        self.count(bearer or address)
        if refusal:
            raise refusal
        return bearer or address

    def judge(
        self, needed: Role | None, authorizations: Sequence[str]
    ) -> tuple[str, SdarError | None]:
        """Whose token a call shows, and the reason why it may not come in.

        The first is "" without a token of ours, the second None for a call that may.
        """
        if self._tokens is None:
            return "", None
        token = self._find(self._tokens.get(), authorizations)
        bearer = "" if token is None else token.client
        if needed is None:
            return bearer, None
        if token is None:
            return bearer, _build_missing_error(is_shown=bool(authorizations))
        if token.role < needed:
            return bearer, ForbiddenError(
                f"The token's role is {token.role.name.lower()}, this call needs "
                f"{needed.name.lower()}. Use another token."
            )
        return bearer, None

    def count(self, client: str) -> None:
        """Count a call of a client, let in or not. Raises CapacityError for one too many."""
        if wait_s := self._rate.take(client):
            raise CapacityError(
                f"Too many calls. Wait {wait_s:.2f} s, or have SDAR_MAX_CALLS_PER_S of the server "
                "raised.",
                retry_after_s=f"{wait_s:.3f}",
            )

    @staticmethod
    def _find(tokens: Sequence[Token], authorizations: Sequence[str]) -> Token | None:
        # Of two headers a proxy in between might have checked the other one.
        if len(authorizations) != 1:
            return None
        scheme, _, presented = authorizations[0].partition(" ")
        return find_token(tokens, presented.strip()) if scheme.lower() == "bearer" else None


def _build_missing_error(*, is_shown: bool) -> UnauthenticatedError:
    found = "has one that is not accepted" if is_shown else "has none"
    return UnauthenticatedError(
        f"This server asks for a token and the call {found}. Send `authorization: Bearer "
        "TOKEN`; commands and services of sdar take it from SDAR_TOKEN."
    )
