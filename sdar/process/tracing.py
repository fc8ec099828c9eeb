"""Traces: spans of a group of trajectories from its task to the update it trains, sent by OTLP.

The trace of a group is known from its id alone, so every service adds to it without a word on the
wire: the trace's id and the id of its first span (`gateway.issue`) are hashes of run and group, an
episode's span's of run and trajectory. Which groups are traced is a matter of the trace's id too,
so that all services agree.

Off, nothing of opentelemetry is imported and each call returns `NOTHING`. Spans hold ids, versions
and counts, never a prompt or a text. A collector that is away costs the spans, and nothing else.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextvars import ContextVar
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import structlog

from sdar.contracts.errors import ConfigurationError
from sdar.process.settings import Settings

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import SpanContext

log = structlog.get_logger()

Value = str | int | float | bool | Sequence[int]

_STOP_TIMEOUT_S = 3.0
"""Longest wait at the end for a collector to take what is left."""


class Span:
    """A stretch of work that is traced. An instance of this class itself traces nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end()

    def set(self, **attributes: Value) -> None:
        """Add attributes that were not known when the span began."""

    def end(self) -> None:
        """End the span, where it is not used as a context manager."""


NOTHING = Span()

_active: _Tracer | None = None
_current: ContextVar[_RealSpan | None] = ContextVar("current_span", default=None)
# The (trace id, span id) that the next span must get. The SDK takes ids from a generator only.
_chosen_ids: ContextVar[tuple[int | None, int | None]] = ContextVar(
    "chosen_ids", default=(None, None)
)


@contextlib.contextmanager
def serve_traces(settings: Settings, service: str, run_id: str) -> Iterator[None]:
    """Trace what happens in the block, if an endpoint is set, and send what is left at its end.

    Raises:
        ConfigurationError: the endpoint is no URL.
    """
    global _active
    if not settings.trace_endpoint or not settings.trace_share:
        yield
        return
    _active = tracer = _Tracer(settings, service, run_id)
    try:
        yield
    finally:
        _active = None
        tracer.stop()


def open_group(group_id: str, **attributes: Value) -> Span:
    """The first span of a group's trace. It counts once it is ended."""
    if (tracer := _active) is None or not tracer.is_traced(group_id):
        return NOTHING
    return tracer.begin(
        "gateway.issue", None, {"group_id": group_id, **attributes}, tracer.root_of(group_id)
    )


def group_span(name: str, group_id: str, **attributes: Value) -> Span:
    """Work on a group: a span under its first one."""
    if (tracer := _active) is None or not tracer.is_traced(group_id):
        return NOTHING
    return tracer.begin(name, tracer.root_of(group_id), {"group_id": group_id, **attributes})


def span(name: str, *, trajectory_id: str = "", **attributes: Value) -> Span:
    """A part of the work that is being traced here; nothing where none is.

    Args:
        trajectory_id: the span is this episode's, under which `record` finds it.
    """
    if (tracer := _active) is None or (parent := _current.get()) is None:
        return NOTHING
    if not trajectory_id:
        return tracer.begin(name, parent.context, attributes)
    own = tracer.episode_of(parent.context.trace_id, trajectory_id)
    return tracer.begin(name, parent.context, {"trajectory_id": trajectory_id, **attributes}, own)


def record(
    name: str,
    group_id: str,
    began_s: float,
    *,
    trajectory_id: str = "",
    is_linked: bool = False,
    **attributes: Value,
) -> None:
    """Work that ends now and was done on many groups at once: a span of it in this group's trace.

    Args:
        began_s: Unix time; one that lies ahead (another machine's clock) counts as now.
        trajectory_id: the span goes under this episode's instead of the group's first.
        is_linked: it points to the span in which it is recorded.
    """
    if (tracer := _active) is None or not tracer.is_traced(group_id):
        return
    parent = tracer.root_of(group_id)
    own = {"group_id": group_id, **attributes}
    if trajectory_id:
        parent = tracer.episode_of(parent.trace_id, trajectory_id)
        own["trajectory_id"] = trajectory_id
    current = _current.get() if is_linked else None
    links = [] if current is None else [current.context]
    tracer.begin(name, parent, own, links=links, began_s=began_s).end()


def span_over(name: str, group_ids: Iterable[str], **attributes: Value) -> Span:
    """Work on many groups at once: the first span of a trace of its own.

    It points to the first span of each group that is traced.
    """
    if (tracer := _active) is None:
        return NOTHING
    links = [tracer.root_of(one) for one in group_ids if tracer.is_traced(one)]
    return tracer.begin(name, None, attributes, links=links) if links else NOTHING


class _RealSpan(Span):
    def __init__(self, otel_span: Any) -> None:
        self.context: SpanContext = otel_span.get_span_context()
        self._span = otel_span

    def __enter__(self) -> Self:
        self._token = _current.set(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        from opentelemetry.trace import Status, StatusCode

        _current.reset(self._token)
        if kind is not None:
            # The kind and no more: an error's words may quote an episode.
            self._span.set_status(Status(StatusCode.ERROR, kind.__name__))
        self.end()

    def set(self, **attributes: Value) -> None:
        self._span.set_attributes(_name(attributes))

    def end(self) -> None:
        self._span.end()


class _Tracer:
    """Begins spans of one run.

    What sends them is built at the first span, not here: it has threads, and by then an engine that
    forks its workers has done so.
    """

    def __init__(self, settings: Settings, service: str, run_id: str) -> None:
        import opentelemetry.sdk.trace as sdk
        from opentelemetry.exporter.otlp.proto.grpc import trace_exporter
        from opentelemetry.sdk.trace import export

        self._sdk = sdk
        self._export = export
        self._exporter = trace_exporter
        self._endpoint = _check_endpoint(settings.trace_endpoint)
        self._run_id = run_id
        # Of the 64 low bits of a trace's id, which are spread evenly.
        self._limit = int(settings.trace_share * 2**64)
        self._resource = {
            "service.name": f"sdar-{service}",
            "service.instance.id": settings.instance,
            "sdar.run_id": run_id,
        }
        self._lock = threading.Lock()
        self._provider: TracerProvider | None = None
        self._tracer: Any = None

    def is_traced(self, group_id: str) -> bool:
        return self.root_of(group_id).trace_id & (2**64 - 1) < self._limit

    def root_of(self, group_id: str) -> SpanContext:
        return self._context(self._hash("trace", group_id, 16), self._hash("root", group_id, 8))

    def episode_of(self, trace_id: int, trajectory_id: str) -> SpanContext:
        return self._context(trace_id, self._hash("episode", trajectory_id, 8))

    def begin(
        self,
        name: str,
        parent: SpanContext | None,
        attributes: dict[str, Value],
        own: SpanContext | None = None,
        *,
        links: Iterable[SpanContext] = (),
        began_s: float | None = None,
    ) -> _RealSpan:
        """Args: own: the ids it gets; without it they are drawn."""
        from opentelemetry.trace import Link

        token = _chosen_ids.set((None, None) if own is None else (own.trace_id, own.span_id))
        try:
            begun = self._get_tracer().start_span(
                name,
                context=_build_context(parent),
                attributes=_name(attributes),
                links=[Link(target) for target in links],
                # In nanoseconds. A clock that runs ahead must not begin a span after its end.
                start_time=None if began_s is None else int(min(began_s, time.time()) * 1e9),
            )
        finally:
            _chosen_ids.reset(token)
        return _RealSpan(begun)

    def stop(self) -> None:
        """Send what is left, for a bounded time."""
        if self._provider is None:
            return
        # In a thread: the SDK's own wait for a collector that is away is half a minute.
        sending = threading.Thread(target=self._provider.shutdown, name="traces-stop", daemon=True)
        sending.start()
        sending.join(_STOP_TIMEOUT_S)

    def _get_tracer(self) -> Any:
        # Spans begin in several threads, and one provider must send for all of them.
        with self._lock:
            if self._provider is None:
                self._provider = self._build_provider()
                self._tracer = self._provider.get_tracer("sdar")
            return self._tracer

    def _build_provider(self) -> TracerProvider:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace.sampling import ALWAYS_ON

        _warn_once(self._endpoint)
        # A provider of ours and not the process's, by which vLLM and Redis' client would trace too.
        provider = self._sdk.TracerProvider(
            sampler=ALWAYS_ON,
            resource=Resource.create(self._resource),
            id_generator=_build_id_generator(),
            shutdown_on_exit=False,
        )
        exporter = self._exporter.OTLPSpanExporter(endpoint=self._endpoint)
        provider.add_span_processor(self._export.BatchSpanProcessor(exporter))
        log.info("traces_sent", endpoint=self._endpoint)
        return provider

    def _hash(self, kind: str, name: str, num_bytes: int) -> int:
        digest = hashlib.sha256(f"{kind}:{self._run_id}:{name}".encode()).digest()
        return int.from_bytes(digest[:num_bytes])

    def _context(self, trace_id: int, span_id: int) -> SpanContext:
        from opentelemetry.trace import SpanContext, TraceFlags

        return SpanContext(
            trace_id, span_id, is_remote=True, trace_flags=TraceFlags(TraceFlags.SAMPLED)
        )


def _check_endpoint(endpoint: str) -> str:
    if not endpoint.startswith(("http://", "https://")):
        raise ConfigurationError(
            f"OTEL_EXPORTER_OTLP_ENDPOINT is {endpoint!r}, which is no URL. Write "
            "http://HOST:4317, or https:// with TLS."
        )
    return endpoint


def _build_context(parent: SpanContext | None) -> Context:
    """A context of our own: libraries that look into the common one must not find our spans."""
    from opentelemetry.context import Context
    from opentelemetry.trace import NonRecordingSpan, set_span_in_context

    if parent is None:
        return Context()
    return set_span_in_context(NonRecordingSpan(parent), Context())


def _name(attributes: dict[str, Value]) -> dict[str, Value]:
    return {f"sdar.{name}": value for name, value in attributes.items()}


def _build_id_generator() -> Any:
    from opentelemetry.sdk.trace.id_generator import RandomIdGenerator

    class Chosen(RandomIdGenerator):
        def generate_trace_id(self) -> int:
            return _chosen_ids.get()[0] or super().generate_trace_id()

        def generate_span_id(self) -> int:
            return _chosen_ids.get()[1] or super().generate_span_id()

    return Chosen()


def _warn_once(endpoint: str) -> None:
    """Log once that a collector is away; the exporter would log it every few seconds."""
    # The exporter's thread lacks the service and instance that our log lines carry.
    bound = log.bind(**structlog.contextvars.get_contextvars())

    class FirstWarning(logging.Handler):
        is_logged = False

        def emit(self, entry: logging.LogRecord) -> None:
            if not self.is_logged:
                self.is_logged = True
                hint = "the run goes on; spans are dropped while it is so, and this is said once"
                bound.warning(
                    "traces_not_sent", endpoint=endpoint, error=entry.getMessage(), hint=hint
                )

    # Not passed on, so the library's own lines reach no other handler.
    logger = logging.getLogger("opentelemetry")
    logger.handlers = [FirstWarning(logging.WARNING)]
    logger.propagate = False
