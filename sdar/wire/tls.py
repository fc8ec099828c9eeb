"""Reads and checks a process's certificates, and makes TLS contexts of them."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from sdar.contracts.errors import ConfigurationError
from sdar.wire.watched import Watched, read_file


@dataclass(frozen=True, slots=True)
class Certificates:
    """PEM texts: this process's own certificate chain and key, and the authority its peers are
    verified against.
    """

    chain: bytes | None
    key: bytes | None = field(repr=False)
    authority: bytes | None


class Tls:
    """The certificate files of a process, checked when they are read.

    A process that speaks TLS does so with every peer.

    Args:
        client_auth: whose certificate this process's servers demand: nobody's, that of callers
            over gRPC, or that of callers over HTTP, too.

    Raises:
        ConfigurationError: files that cannot be read or do not belong together.
    """

    def __init__(
        self,
        chain: Path | None,
        key: Path | None,
        authority: Path | None,
        client_auth: Literal["none", "grpc", "all"] = "none",
    ) -> None:
        self._chain = chain
        self._key = key
        self._authority = authority
        self.client_auth = client_auth
        self._check_complete()
        self._paths = [path for path in (chain, key, authority) if path is not None]
        self.files = Watched(self._paths, self._read)

    def _check_complete(self) -> None:
        if (self._chain is None) != (self._key is None):
            raise ConfigurationError(
                "SDAR_TLS_CERT and SDAR_TLS_KEY belong together. Set both or neither."
            )
        if self.client_auth != "none" and (self._chain is None or self._authority is None):
            raise ConfigurationError(
                f"SDAR_TLS_CLIENT_AUTH={self.client_auth} needs SDAR_TLS_CERT, SDAR_TLS_KEY and "
                "SDAR_TLS_CA, which clients are verified against. Set them, or leave it out."
            )

    @property
    def has_certificate(self) -> bool:
        """Without one of its own a process speaks TLS as a client only."""
        return self._chain is not None

    def build_server_context(self) -> ssl.SSLContext:
        """For HTTP servers. Each handshake sees the files as they are then."""
        current, context = self.files.get(), self._build_server_context()

        # Called at each handshake. A server keeps the context it began with, so that one is given
        # the files' present content by handing the connection another.
        def refresh(connection: ssl.SSLObject, name: str | None, _: ssl.SSLContext) -> None:
            nonlocal current, context
            if self.files.get() is not current:
                current, context = self.files.get(), self._build_server_context()
            connection.context = context

        first = context
        first.sni_callback = refresh
        return first

    def build_client_context(self) -> ssl.SSLContext:
        """For HTTP clients; without an authority of our own, peers are verified against the
        system's.
        """
        context = ssl.create_default_context(
            cafile=None if self._authority is None else str(self._authority)
        )
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
        read_files = Certificates(
            _read_setting(self._chain, "SDAR_TLS_CERT"),
            _read_setting(self._key, "SDAR_TLS_KEY"),
            _read_setting(self._authority, "SDAR_TLS_CA"),
        )
        # gRPC takes any bytes and fails at the first handshake; OpenSSL judges them now.
        try:
            self.build_client_context()
        except (ssl.SSLError, OSError, ValueError) as error:
            names = ", ".join(map(str, self._paths))
            raise ConfigurationError(
                f"The certificates in {names} cannot be used ({error}). Give PEM files: a "
                "certificate, the unencrypted key it was made with, and the certificate of an "
                "authority."
            ) from error
        return read_files


def _read_setting(path: Path | None, setting: str) -> bytes | None:
    return None if path is None else read_file(path, setting)
