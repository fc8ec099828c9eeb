"""A container's question to itself whether it lives: `python -m sdar.process.probe [--ready]`.

For HEALTHCHECK and exec probes. It ends with 0 for yes and 1 for no, and prints what was answered.
It starts nothing and changes nothing.
"""

from __future__ import annotations

import http.client
import ssl
import sys
from collections.abc import Sequence

from sdar.contracts.errors import SdarError
from sdar.process.settings import Settings, load_settings

_TIMEOUT_S = 4.0
"""Below the 5 s that the images' HEALTHCHECK allows."""


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if list(arguments) not in ([], ["--ready"]):
        print(f"error: got {' '.join(arguments)}, expected nothing or --ready.", file=sys.stderr)
        return 2
    try:
        status, text = ask("/readyz" if arguments else "/healthz", load_settings())
    except (SdarError, OSError, http.client.HTTPException) as error:
        print(f"no answer: {error}")
        return 1
    print(f"{status} {text}")
    return 0 if status == http.client.OK else 1


def ask(path: str, settings: Settings) -> tuple[int, str]:
    """Status and first line of what this container's service answers: on its probe port, or as the
    gateway on its HTTP port.

    Raises:
        OSError: nothing listens on either, or it is silent.
    """
    probes = http.client.HTTPConnection("127.0.0.1", settings.probe_port, timeout=_TIMEOUT_S)
    try:
        return _get(probes, path)
    except ConnectionRefusedError:
        # Only the gateway has no probe port: it answers where its page is.
        return _get(_open_gateway(settings), path)


def _open_gateway(settings: Settings) -> http.client.HTTPConnection:
    if settings.tls_cert is None or settings.tls_key is None:
        return http.client.HTTPConnection("127.0.0.1", settings.http_port, timeout=_TIMEOUT_S)
    # Its own server, over loopback, is asked for a number: a certificate for other names is no
    # reason to call it dead.
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.load_cert_chain(settings.tls_cert, settings.tls_key)
    return http.client.HTTPSConnection(
        "127.0.0.1", settings.http_port, timeout=_TIMEOUT_S, context=context
    )


def _get(connection: http.client.HTTPConnection, path: str) -> tuple[int, str]:
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        text = response.read(1000).decode(errors="replace")
        return response.status, text.partition("\n")[0]
    finally:
        connection.close()


if __name__ == "__main__":
    sys.exit(main())
