"""Owns who may come in: bearer tokens and their roles, certificates, a rate for each client, and what a bind beyond loopback
demands. `rpc` and `http` build servers and channels by it; it speaks neither. It never shows a token, in no error, log or repr.
"""

from __future__ import annotations

import contextvars
import enum
import functools
import hashlib
import hmac
import ipaddress
import re
import ssl
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, Literal, TypeVar

import structlog

from sdar.contracts.errors import CapacityError, ConfigurationError, ForbiddenError, SdarError, UnauthenticatedError
from sdar.runtime.settings import MAX_CALLS_PER_S, Settings

T = TypeVar("T")

MIN_TOKEN_CHARACTERS = 32
MAX_TOKEN_CHARACTERS = 512
_BURST_S = 2.0
"""A client may send so many seconds' worth of calls at once."""
_MAX_CLIENTS = 10_000
_TOKEN = re.compile(rf"[A-Za-z0-9._~+/=-]{{{MIN_TOKEN_CHARACTERS},{MAX_TOKEN_CHARACTERS}}}")
_TARGET_SCHEME = re.compile(r"^(dns|ipv4|ipv6):(//[^/]*/)?")
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_SCHEME = re.compile(r"[A-Za-z0-9+.-]+://")
_CLIENT_NAME_DIGITS = 12

CLIENT: contextvars.ContextVar[str] = contextvars.ContextVar("client", default="")
"""Who makes the call that is being answered: the name of its token, or its address where no token is asked for."""

log = structlog.get_logger()


class Role(enum.IntEnum):
    """What a token allows; the higher includes the lower."""

    READ = 1
    OPERATE = 2


# ---- files that may change


class Watched(Generic[T]):
    """What files say, read again whenever one changes. A change that cannot be used is logged and what was stays.

    Args:
        parse: makes the value of the files; raises ConfigurationError.
    """

    def __init__(self, paths: Sequence[Path], parse: Callable[[], T]) -> None:
        self._paths, self._parse = paths, parse
        self._stamp = self._find_stamp()  # before the reading: a change in its middle is seen next time
        self._value = parse()

    def get(self) -> T:
        stamp = self._find_stamp()
        if stamp != self._stamp:
            self._stamp = stamp
            try:
                self._value = self._parse()
            except ConfigurationError as error:
                log.error("changed_files_refused", error=error.message)
        return self._value

    def _find_stamp(self) -> tuple[tuple[int, int, int], ...]:
        try:
            stats = [path.stat() for path in self._paths]
        except OSError:
            return ()
        return tuple((stat.st_mtime_ns, stat.st_ino, stat.st_size) for stat in stats)


def _read_file(path: Path, setting: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigurationError(f"{setting} names {path}, which cannot be read: {error.strerror}. Correct it.") from error


# ---- tokens


@dataclass(frozen=True)
class Token:
    """One accepted token."""

    role: Role
    secret: str = field(repr=False)

    @functools.cached_property
    def digest(self) -> bytes:
        return hashlib.sha256(self.secret.encode()).digest()

    @functools.cached_property
    def client(self) -> str:
        """A name for its bearer that tells nothing of the token."""
        return f"token-{self.digest.hex()[:_CLIENT_NAME_DIGITS]}"


def parse_tokens(text: str, source: str) -> tuple[Token, ...]:
    """The tokens of a file: one `read:TOKEN` or `operate:TOKEN` a line, blank lines and lines that begin with # left out.

    Raises:
        ConfigurationError: a line that is none; its number is told, never its text.
    """
    tokens: list[Token] = []
    for number, line in enumerate(text.splitlines(), start=1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        role, _, secret = line.partition(":")
        if role not in ("read", "operate"):
            raise ConfigurationError(f"{source} line {number} names no role. Write read:TOKEN or operate:TOKEN.")
        token = Token(Role[role.upper()], check_token(secret.strip(), f"{source} line {number}"))
        if find_token(tokens, token.secret):
            raise ConfigurationError(f"{source} line {number} repeats the token of an earlier line. Give each role its own.")
        tokens.append(token)
    if not tokens:
        raise ConfigurationError(f'{source} holds no token. Write one: echo "operate:$(sdar token)" > FILE')
    return tuple(tokens)


def check_token(secret: str, source: str) -> str:
    """The token itself. Raises ConfigurationError for one that is too short or holds a character headers cannot."""
    if not _TOKEN.fullmatch(secret):
        raise ConfigurationError(
            f"{source}: a token of {len(secret)} characters, expected {MIN_TOKEN_CHARACTERS} to {MAX_TOKEN_CHARACTERS} of "
            "letters, digits or ._~+/=-. `sdar token` prints a good one."
        )
    return secret


def find_token(
    tokens: Sequence[Token], presented: str, compare: Callable[[bytes, bytes], bool] = hmac.compare_digest
) -> Token | None:
    """The accepted token that was presented, in a time that tells nothing: every one is compared, as digests of one length."""
    digest, found = hashlib.sha256(presented.encode(errors="replace")).digest(), None
    for token in tokens:
        if compare(token.digest, digest):
            found = token
    return found


# ---- certificates


@dataclass(frozen=True, slots=True)
class Certificates:
    """PEM texts: this process's own certificate chain and key, and the authority its peers are verified against."""

    chain: bytes | None
    key: bytes | None = field(repr=False)
    authority: bytes | None


class Tls:
    """The certificate files of a process, checked when read. One that speaks TLS does so with every peer.

    Args:
        client_auth: of whom this process's servers demand a certificate: nobody, callers of gRPC, or HTTP's too.

    Raises:
        ConfigurationError: files that cannot be read or do not belong together.
    """

    def __init__(
        self, chain: Path | None, key: Path | None, authority: Path | None, client_auth: Literal["none", "grpc", "all"] = "none"
    ) -> None:
        self._chain, self._key, self._authority, self.client_auth = chain, key, authority, client_auth
        if (chain is None) != (key is None):
            raise ConfigurationError("SDAR_TLS_CERT and SDAR_TLS_KEY belong together. Set both or neither.")
        if client_auth != "none" and (chain is None or authority is None):
            raise ConfigurationError(
                f"SDAR_TLS_CLIENT_AUTH={client_auth} needs SDAR_TLS_CERT, SDAR_TLS_KEY and SDAR_TLS_CA, which clients are "
                "verified against. Set them, or leave it out."
            )
        self.files = Watched([path for path in (chain, key, authority) if path is not None], self._read)

    @property
    def has_certificate(self) -> bool:
        """Without one of its own a process speaks TLS as a client only."""
        return self._chain is not None

    def build_server_context(self) -> ssl.SSLContext:
        """For HTTP servers. Each handshake sees the files as they are then."""
        current, context = self.files.get(), self._build_server_context()

        def refresh(connection: ssl.SSLObject, name: str | None, _: ssl.SSLContext) -> None:
            nonlocal current, context
            if self.files.get() is not current:
                current, context = self.files.get(), self._build_server_context()
            connection.context = context

        first = context
        first.sni_callback = refresh
        return first

    def build_client_context(self) -> ssl.SSLContext:
        """For HTTP clients; without an authority of our own, peers are verified against the system's."""
        context = ssl.create_default_context(cafile=None if self._authority is None else str(self._authority))
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        self._load_own(context)
        return context

    def _build_server_context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if self.client_auth == "all":
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_verify_locations(self._authority)
        self._load_own(context)
        return context

    def _load_own(self, context: ssl.SSLContext) -> None:
        if self._chain is not None:
            # Without a password of ours OpenSSL would ask a terminal for an encrypted key's.
            context.load_cert_chain(self._chain, self._key, password="")

    def _read(self) -> Certificates:
        def read(path: Path | None, setting: str) -> bytes | None:
            return None if path is None else _read_file(path, setting)

        read_files = Certificates(
            read(self._chain, "SDAR_TLS_CERT"), read(self._key, "SDAR_TLS_KEY"), read(self._authority, "SDAR_TLS_CA")
        )
        try:
            self.build_client_context()
        except (ssl.SSLError, OSError, ValueError) as error:
            names = ", ".join(str(path) for path in (self._chain, self._key, self._authority) if path is not None)
            raise ConfigurationError(
                f"The certificates in {names} cannot be used ({error}). Give PEM files: a certificate, the unencrypted key it "
                "was made with, and the certificate of an authority."
            ) from error
        return read_files


# ---- all of it


@dataclass(frozen=True)
class Security:
    """What a process's servers ask of callers and what its clients show. The default asks nothing, and only on loopback."""

    tls: Tls | None = None
    tokens: Watched[tuple[Token, ...]] | None = None
    own_token: str = field(default="", repr=False)
    is_insecure: bool = False
    max_calls_per_s: float = MAX_CALLS_PER_S
    _warned_of: set[str] = field(default_factory=set, init=False, repr=False, compare=False)

    @classmethod
    def from_settings(cls, settings: Settings) -> Security:
        """Raises ConfigurationError: a file that cannot be read, a bad token, certificates that do not fit."""
        tls = tokens = None
        if settings.tls_cert or settings.tls_key or settings.tls_ca or settings.tls_client_auth != "none":
            tls = Tls(settings.tls_cert, settings.tls_key, settings.tls_ca, settings.tls_client_auth)
        if (path := settings.tokens_file) is not None:
            tokens = Watched([path], lambda: _read_tokens(path))
        own = settings.token.get_secret_value().strip()
        return cls(tls, tokens, check_token(own, "SDAR_TOKEN") if own else "", settings.insecure, settings.max_calls_per_s)

    @property
    def is_serving_tls(self) -> bool:
        return self.tls is not None and self.tls.has_certificate

    def token_to_present(self) -> str:
        """What this process shows as a client: its own, or the first operate token it would accept itself, or none."""
        if self.own_token or self.tokens is None:
            return self.own_token
        return next((token.secret for token in self.tokens.get() if token.role is Role.OPERATE), "")

    def check_bind(self, host: str) -> None:
        """Refuse to listen where strangers reach an open server; warn of what else is open.

        Raises:
            ConfigurationError: beyond loopback without tokens.
        """
        if is_loopback(host):
            return
        if self.tokens is None and not self.is_insecure:
            raise ConfigurationError(
                f"Listening on {host} would let anyone in. Give the accepted tokens in a file "
                '(echo "operate:$(sdar token)" > FILE) and set SDAR_TOKENS_FILE to it; SDAR_INSECURE=true serves without.',
                host=host,
            )
        if self.tokens is None:
            log.warning("open_to_anyone", host=host, why="SDAR_INSECURE is set and SDAR_TOKENS_FILE is not")
        elif not self.is_serving_tls:
            log.warning("tokens_travel_in_plaintext", host=host, fix="set SDAR_TLS_CERT and SDAR_TLS_KEY, or encrypt by a mesh")

    def check_target(self, target: str) -> None:
        """Warn, once, before a token goes in plaintext to another machine."""
        is_known = target in self._warned_of
        if self.tls is None and not is_known and self.token_to_present() and not is_loopback_target(target):
            self._warned_of.add(target)
            log.warning("tokens_travel_in_plaintext", peer=target, fix="set SDAR_TLS_CA, or encrypt by a mesh")


OPEN = Security()


def _read_tokens(path: Path) -> tuple[Token, ...]:
    return parse_tokens(_read_file(path, "SDAR_TOKENS_FILE").decode("utf-8-sig", errors="replace"), str(path))


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it. Names beside localhost are not looked up: what they mean can change."""
    if host.startswith(("unix:", "unix-abstract:")) or host.lower() == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def is_loopback_target(target: str) -> bool:
    """The same of what a channel is opened to: `host:port`, `dns:///host:port`, `ipv4:host:port,host:port`, `unix:path`."""
    if target.startswith("unix"):
        return is_loopback(target)
    addresses = _TARGET_SCHEME.sub("", target).split(",")
    return all(is_loopback(address.rpartition(":")[0] or address) for address in addresses)


# ---- one server's door


class RateLimit:
    """Calls each client may make in a second, after a burst. A client is any name; those who rest are forgotten."""

    def __init__(self, calls_per_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._interval_s, self._clock = 1 / calls_per_s, clock
        self._paid_until: dict[str, float] = {}

    def take(self, client: str) -> float:
        """0 if the call is within the rate, otherwise the seconds after which it would be."""
        now = self._clock()
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
            UnauthenticatedError: no token, or a wrong one. ForbiddenError: a token of too low a role.
            CapacityError: too many calls of this client.
        """
        bearer, refusal = self.judge(needed, authorizations)
        self.count(bearer or address)
        if refusal:
            raise refusal
        return bearer or address

    def judge(self, needed: Role | None, authorizations: Sequence[str]) -> tuple[str, SdarError | None]:
        """Whose token a call shows, "" for none of ours, and why the call may not come in, None if it may."""
        if self._tokens is None:
            return "", None
        token = self._find(self._tokens.get(), authorizations)
        bearer = "" if token is None else token.client
        if needed is None:
            return bearer, None
        if token is None:
            told = "has one that is not accepted" if authorizations else "has none"
            return bearer, UnauthenticatedError(
                f"This server asks for a token and the call {told}. Send `authorization: Bearer TOKEN`; commands and "
                "services of sdar take it from SDAR_TOKEN."
            )
        if token.role < needed:
            return bearer, ForbiddenError(
                f"The token's role is {token.role.name.lower()}, this call needs {needed.name.lower()}. Use another token."
            )
        return bearer, None

    def count(self, client: str) -> None:
        """Count a call of a client, let in or not. Raises CapacityError for one too many."""
        if wait_s := self._rate.take(client):
            raise CapacityError(
                f"Too many calls. Wait {wait_s:.2f} s, or have SDAR_MAX_CALLS_PER_S of the server raised.",
                retry_after_s=f"{wait_s:.3f}",
            )

    @staticmethod
    def _find(tokens: Sequence[Token], authorizations: Sequence[str]) -> Token | None:
        # Two headers: whoever stands between might have looked at the other one.
        scheme, _, presented = authorizations[0].partition(" ") if len(authorizations) == 1 else ("", "", "")
        return find_token(tokens, presented.strip()) if scheme.lower() == "bearer" else None


def hide_credentials(url: str) -> str:
    """A URL fit to be shown: without user, password and what follows a question mark."""
    scheme = match[0] if (match := _SCHEME.match(url)) else ""
    place, _, query = url[len(scheme) :].partition("?")
    if "@" in query:
        return f"{scheme}***"  # of a password with a question mark or a query with an at sign: nobody can tell
    return f"{scheme}***@{place.rpartition('@')[2]}" if "@" in place else scheme + place


def escape_controls(text: str, *, keep: str = "") -> str:
    """Text safe to show on a terminal or a log line: no control, direction or line-separating characters save those kept."""
    return _CONTROL.sub(lambda match: match[0] if match[0] in keep else ascii(match[0])[1:-1], text)
