"""How every process logs, and its server of probes and metrics (/healthz, /readyz, /metrics)."""

from __future__ import annotations

import contextlib
import io
import logging
import socket
import socketserver
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any, TextIO
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import structlog
from prometheus_client import REGISTRY, CollectorRegistry, ProcessCollector, make_wsgi_app

from sdar.contracts.errors import ConflictError
from sdar.process.measurements import Counter, Declarations, Label, Meters
from sdar.process.text import escape_controls

log = structlog.get_logger()

_SILENCE_TIMEOUT_S = 5.0
"""Longest silence of a client in the middle of its request."""

EVERY_SERVICE = Declarations()
"""What each process measures, whatever its service."""
ERROR_ANSWERS = EVERY_SERVICE.declare(
    Counter(
        "sdar_error_answers_total",
        "calls",
        "Calls answered with an error, by protocol (grpc, http) and kind of error.",
        # The other reasons are the classes of sdar/contracts/errors.py.
        (Label("protocol", ("grpc", "http")), Label("reason", ("INTERNAL", "UNIMPLEMENTED"))),
    )
)
PROCESS = Meters(EVERY_SERVICE, REGISTRY)
"""Of this process as a whole; every service's /metrics shows them."""
# There at 0, so that the first one is seen as an increase.
PROCESS.count(ERROR_ANSWERS, 0, protocol="grpc", reason="INTERNAL")


def configure_logging(service: str, instance: str, level: str, format: str) -> None:
    """Send structlog events to stderr, one line each, with service and instance on every line."""
    of_format: Any
    renderer: Any
    if format == "json":
        # JSON escapes control characters by itself; a traceback becomes one of its fields.
        of_format = structlog.processors.format_exc_info
        renderer = structlog.processors.JSONRenderer()
    else:
        of_format = structlog.processors.UnicodeDecoder()
        renderer = _TextRenderer()
    least = logging.getLevelNamesMapping()[level.upper()]
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.StackInfoRenderer(),
            of_format,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(least),
        # Not stdout, which belongs to what a command prints.
        logger_factory=structlog.PrintLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(service=service, instance=instance)


class _TextRenderer:
    """Writes an event as one line that no text from outside can break.

    Control characters are escaped, and a traceback's lines are indented under the event. Tracebacks
    are plain: structlog's default ones print local variables, and prompts don't belong in logs.
    """

    def __init__(self) -> None:
        self._console = structlog.dev.ConsoleRenderer(
            colors=False, exception_formatter=_write_traceback
        )

    def __call__(self, logger: Any, name: str, event: MutableMapping[str, Any]) -> str:
        for key, value in event.items():
            if isinstance(value, str):
                event[key] = escape_controls(value)
        # Once more over the whole: values of other types write themselves only here.
        return escape_controls(self._console(logger, name, event), keep="\n")


def render_event(event: Mapping[str, Any]) -> str:
    """The text of a line that was logged as JSON.

    Its service and instance are left out: whoever shows lines of several services adds them.
    """
    left_out = ("service", "instance", "exception")
    shown = {name: value for name, value in event.items() if name not in left_out}
    text = _TextRenderer()(None, "", shown)
    if trace := str(event.get("exception", "")):
        text += "\n" + textwrap.indent(escape_controls(trace, keep="\n"), "    ")
    return text


def _write_traceback(stream: TextIO, exception: Any) -> None:
    text = io.StringIO()
    structlog.dev.plain_traceback(text, exception)
    stream.write(textwrap.indent(text.getvalue(), "    ", lambda line: True))


@dataclass
class Health:
    """What the probes answer.

    A main loop calls `beat`; a loop that does not for `max_silence_s` is reported dead.
    """

    max_silence_s: float = 120.0
    is_ready: bool = False
    detail: str = "starting"
    blocked: str = ""
    """What a main loop waits for that is not its to mend (Redis away, or full); else empty."""
    _last_beat: float = field(default_factory=time.monotonic)

    def beat(self) -> None:
        self._last_beat = time.monotonic()

    def mark_ready(self, detail: str = "ready") -> None:
        self.is_ready = True
        self.detail = detail
        self.beat()

    def mark_unready(self, detail: str) -> None:
        self.is_ready = False
        self.detail = detail

    def report_blocked(self, reason: str) -> None:
        """Report what the main loop waits for: at every try, and with "" when the wait is over.

        A service that waits for another is not ready, and it is alive.
        """
        self.blocked = reason
        self.beat()

    @property
    def is_alive(self) -> bool:
        return time.monotonic() - self._last_beat < self.max_silence_s


class ProbeServer:
    """Answers probes and metrics from a thread of its own.

    A main loop that is busy therefore does not fail them; one that is silent for too long does.
    """

    def __init__(self, host: str, port: int, health: Health, registry: CollectorRegistry) -> None:
        self._server = _bind_probes(host, port, _probe_app(health, registry))
        self.port = self._server.server_port
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True
        )

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _bind_probes(host: str, port: int, app: Callable[..., Iterable[bytes]]) -> WSGIServer:
    kind = _WsgiServer6 if ":" in host else _WsgiServer
    try:
        return make_server(host, port, app, server_class=kind, handler_class=_QuietHandler)
    except OSError as error:
        raise ConflictError(
            f"Cannot serve probes on {host}:{port}: {error.strerror}. Free the port, or give "
            "another port or host (a service of a run takes them from SDAR_PROBE_PORT and "
            "SDAR_HOST).",
            port=port,
        ) from error


def build_registry() -> CollectorRegistry:
    """A registry with the metrics that every process has, for a service to add its own."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    PROCESS.show_in(registry)
    return registry


@contextlib.contextmanager
def serve_probes(
    host: str, port: int, health: Health, registry: CollectorRegistry | None = None
) -> Iterator[CollectorRegistry]:
    """Answer probes for the length of the block; yields the registry whose metrics they show.

    Without a registry a new one is made, with the process's own metrics.

    Raises:
        ConflictError: the port is taken.
    """
    if registry is None:
        registry = build_registry()
    server = ProbeServer(host, port, health, registry)
    server.start()
    log.info("probes_served", host=host, port=server.port, paths="/healthz /readyz /metrics")
    try:
        yield registry
    finally:
        server.stop()


class _WsgiServer(socketserver.ThreadingMixIn, WSGIServer):
    """A thread for each request: a client that connects and is silent must not delay a probe."""

    daemon_threads = True


class _WsgiServer6(_WsgiServer):
    address_family = socket.AF_INET6


class _QuietHandler(WSGIRequestHandler):
    timeout = _SILENCE_TIMEOUT_S

    def log_message(self, format: str, *args: Any) -> None:
        """A probe a second isn't worth a log line."""


def _probe_app(health: Health, registry: CollectorRegistry) -> Callable[..., Iterable[bytes]]:
    metrics_app: Any = make_wsgi_app(registry)

    def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if path == "/metrics":
            return metrics_app(environ, start_response)  # type: ignore[no-any-return]
        # A dead loop is not ready either, whatever it reported last.
        known = {
            "/healthz": health.is_alive,
            "/readyz": health.is_alive and health.is_ready and not health.blocked,
        }
        if path not in known:
            start_response("404 Not Found", [("Content-Type", "text/plain")])
            return [b"Known paths: /healthz /readyz /metrics\n"]
        start_response(
            "200 OK" if known[path] else "503 Service Unavailable", [("Content-Type", "text/plain")]
        )
        return [f"{health.blocked or health.detail}\n".encode()]

    return answer
