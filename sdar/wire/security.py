"""What a process's servers ask of callers, and what its clients show: tokens and certificates.

It refuses a bind beyond loopback without tokens.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, field

import structlog

from sdar.contracts.errors import ConfigurationError
from sdar.process.settings import MAX_CALLS_PER_S, Settings
from sdar.wire.tls import Tls
from sdar.wire.tokens import Role, Token, check_token, read_tokens
from sdar.wire.watched import Watched

_TARGET_SCHEME = re.compile(r"^(dns|ipv4|ipv6):(//[^/]*/)?")

log = structlog.get_logger()


@dataclass(frozen=True)
class Security:
    """What a process's servers ask of callers and what its clients show.

    The default asks nothing, and serves on loopback only.
    """

    tls: Tls | None = None
    tokens: Watched[tuple[Token, ...]] | None = None
    own_token: str = field(default="", repr=False)
    is_insecure: bool = False
    max_calls_per_s: float = MAX_CALLS_PER_S
    _warned_of: set[str] = field(default_factory=set, init=False, repr=False, compare=False)

    @classmethod
    def from_settings(cls, settings: Settings) -> Security:
        """Read what the settings name.

        Raises:
            ConfigurationError: a file cannot be read, a token is bad or certificates do not fit.
        """
        tokens = None
        if (path := settings.tokens_file) is not None:
            tokens = Watched([path], lambda: read_tokens(path))
        own = settings.token.get_secret_value().strip()
        return cls(
            _read_tls(settings),
            tokens,
            check_token(own, "SDAR_TOKEN") if own else "",
            settings.insecure,
            settings.max_calls_per_s,
        )

    @property
    def is_serving_tls(self) -> bool:
        return self.tls is not None and self.tls.has_certificate

    def token_to_present(self) -> str:
        """What this process shows as a client: its own token, else one that it accepts itself.

        Empty where it has neither. Of the accepted ones it is the first that may operate.
        """
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
                '(echo "operate:$(sdar token)" > FILE) and set SDAR_TOKENS_FILE to it; '
                "SDAR_INSECURE=true serves without.",
                host=host,
            )
        if self.tokens is None:
            log.warning(
                "open_to_anyone", host=host, why="SDAR_INSECURE is set and SDAR_TOKENS_FILE is not"
            )
        elif not self.is_serving_tls:
            log.warning(
                "tokens_travel_in_plaintext",
                host=host,
                fix="set SDAR_TLS_CERT and SDAR_TLS_KEY, or encrypt by a mesh",
            )

    def check_target(self, target: str) -> None:
        """Warn, once, before a token goes in plaintext to another machine."""
        is_known = target in self._warned_of
        if (
            self.tls is None
            and not is_known
            and self.token_to_present()
            and not is_loopback_target(target)
        ):
            self._warned_of.add(target)
            log.warning(
                "tokens_travel_in_plaintext",
                peer=target,
                fix="set SDAR_TLS_CA, or encrypt by a mesh",
            )


def _read_tls(settings: Settings) -> Tls | None:
    """None where no setting speaks of TLS: then this process neither serves nor speaks it."""
    is_asking = settings.tls_client_auth != "none"
    if not (settings.tls_cert or settings.tls_key or settings.tls_ca or is_asking):
        return None
    return Tls(settings.tls_cert, settings.tls_key, settings.tls_ca, settings.tls_client_auth)


OPEN = Security()


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the host.

    Names beside localhost are not looked up, since what they mean can change.
    """
    if host.startswith(("unix:", "unix-abstract:")) or host.lower() == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    # ::ffff:127.0.0.1 is loopback, too, which Python says of the mapped address alone.
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def is_loopback_target(target: str) -> bool:
    """Whether a channel to this target stays on this machine.

    A target is `host:port`, `dns:///host:port`, `ipv4:host:port,host:port` or `unix:path`.
    """
    if target.startswith("unix"):
        return is_loopback(target)
    addresses = _TARGET_SCHEME.sub("", target).split(",")
    return all(is_loopback(address.rpartition(":")[0] or address) for address in addresses)
