"""The retriever as a service: Search-R1's POST /retrieve over HTTP, probes and metrics."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any

import structlog
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, generate_latest
from pydantic import BaseModel, Field, StringConstraints, ValidationError

from sdar.contracts.errors import InvalidInputError, SdarError, UnavailableError
from sdar.process.lifecycle import wait_or_stop
from sdar.process.telemetry import Health
from sdar.wire.http_server import HttpServer, answer_error, bind_http, build_http_server
from sdar.wire.security import OPEN, Security
from services.envs.search.batching import Batcher
from services.envs.search.passages import Hit, Retriever

DEFAULT_TOPK = 3
MAX_TOPK = 100
MAX_QUERIES = 2048
MAX_QUERY_CHARACTERS = 4000
MAX_BODY_BYTES = 32 << 20
_MAX_SHOWN_PROBLEMS = 3
KEEP_ALIVE_S = 30
"""Longer than clients keep an idle connection: none sends on one that is just being closed."""

log = structlog.get_logger()

Query = Annotated[str, StringConstraints(max_length=MAX_QUERY_CHARACTERS)]


class RetrieveRequest(BaseModel):
    """Exactly one of `query` and `queries`. Fields beside these are ignored, as Search-R1 does."""

    query: Query | None = None
    queries: Annotated[list[Query], Field(min_length=1, max_length=MAX_QUERIES)] | None = None
    topk: Annotated[int, Field(ge=1, le=MAX_TOPK)] | None = None
    return_scores: bool = False


@dataclass
class RetrieverState:
    """What the routes ask: `batcher` is None until the retriever is loaded."""

    health: Health = field(default_factory=Health)
    batcher: Batcher | None = None


def build_app(state: RetrieverState) -> FastAPI:
    """The service's application."""
    app = FastAPI(
        title="sdar retriever", version="1", docs_url=None, redoc_url=None, openapi_url=None
    )
    app.add_exception_handler(SdarError, answer_error)

    @app.post("/retrieve")
    async def retrieve(request: Request) -> Response:
        """{"result": [[{"document": {"id", "contents"}, "score"}]]}, or without return_scores the
        documents alone.
        """
        asked = parse_request(await request.body())
        if state.batcher is None:
            raise UnavailableError(
                f"The retriever is {state.health.detail}. Retry once GET /readyz answers 200."
            )
        queries = [asked.query] if asked.query is not None else asked.queries or []
        found = await state.batcher.retrieve(queries, asked.topk or DEFAULT_TOPK)
        to_json = functools.partial(_hit_to_json, has_score=asked.return_scores)
        result = [list(map(to_json, hits)) for hits in found]
        return JSONResponse({"result": result})

    _add_probes(app, state)
    return app


def _add_probes(app: FastAPI, state: RetrieverState) -> None:
    def answer(is_good: bool) -> Response:
        return PlainTextResponse(f"{state.health.detail}\n", 200 if is_good else 503)

    @app.get("/healthz")
    async def healthz() -> Response:
        """200 while the process turns."""
        return answer(state.health.is_alive)

    @app.get("/readyz")
    async def readyz() -> Response:
        """200 once queries are answered."""
        return answer(state.health.is_alive and state.health.is_ready)

    @app.get("/metrics")
    async def metrics() -> Response:
        """Prometheus metrics of this process."""
        return Response(generate_latest(REGISTRY), media_type=CONTENT_TYPE_LATEST)


def parse_request(body: bytes) -> RetrieveRequest:
    """Raises InvalidInputError: not what /retrieve takes."""
    try:
        asked = RetrieveRequest.model_validate_json(body)
    except ValidationError as error:
        problems = []
        for problem in error.errors()[:_MAX_SHOWN_PROBLEMS]:
            place = ".".join(map(str, problem["loc"])) or "body"
            problems.append(f"{place}: {problem['msg']}")
        raise InvalidInputError(
            f"/retrieve cannot read the request. {'; '.join(problems)}."
        ) from error
    if (asked.query is None) == (asked.queries is None):
        raise InvalidInputError(
            "/retrieve takes either query, one text, or queries, a list of texts. Send one of them."
        )
    return asked


async def serve_retriever(
    stopping: asyncio.Event,
    *,
    open_retriever: Callable[[], Retriever],
    host: str,
    port: int,
    security: Security = OPEN,
    on_ready: Callable[[int], None] = lambda port: None,
) -> None:
    """Answer probes at once, and queries once the retriever is loaded, until `stopping` is set.

    Requests in flight are then answered.

    Args:
        open_retriever: loads the retriever, in a thread.
        port: 0 takes a free one; `on_ready` is called with it once queries are answered.

    Raises:
        ConflictError: the port is taken.
        ConfigurationError: no token guards a port beyond loopback.
        Other errors: whatever `open_retriever` raises.
    """
    state = RetrieverState()
    listener = bind_http(host, port)
    bound_port = listener.getsockname()[1]
    server = _build_server(state, host, security)

    serving = asyncio.create_task(server.serve(sockets=[listener]))
    state.health.detail = "loading"
    log.info("retriever_loading", host=host, port=bound_port)
    try:
        retriever = await _load(open_retriever, stopping, state.health)
        if retriever is None:
            return
        async with Batcher(retriever) as state.batcher:
            state.health.mark_ready()
            log.info("retriever_ready", host=host, port=bound_port)
            on_ready(bound_port)
            while not await wait_or_stop(stopping, 1.0) and not serving.done():
                state.health.beat()
            # Before the batcher ends: requests in flight still need it.
            await _stop(server, serving, state.health)
    finally:
        await _stop(server, serving, state.health)


def _build_server(state: RetrieverState, host: str, security: Security) -> HttpServer:
    return build_http_server(
        build_app(state),
        host,
        security,
        max_body_bytes=MAX_BODY_BYTES,
        # A search changes nothing, so a token that may only read is enough.
        read_posts=("/retrieve",),
        timeout_keep_alive=KEEP_ALIVE_S,
    )


async def _stop(server: HttpServer, serving: asyncio.Task[None], health: Health) -> None:
    health.mark_unready("draining")
    server.should_exit = True
    await serving


async def _load(
    open_retriever: Callable[[], Retriever], stopping: asyncio.Event, health: Health
) -> Retriever | None:
    """The retriever, None if the service was stopped first."""
    loaded = _start_loading(open_retriever)
    stop = asyncio.create_task(stopping.wait())
    try:
        while not loaded.done() and not stop.done():
            await asyncio.wait((loaded, stop), timeout=1.0, return_when=asyncio.FIRST_COMPLETED)
            health.beat()
        return loaded.result() if loaded.done() else None
    finally:
        stop.cancel()


def _start_loading(open_retriever: Callable[[], Retriever]) -> asyncio.Future[Retriever]:
    """Load in a daemon's thread: the end of the process need not wait for a large index."""
    loop = asyncio.get_running_loop()
    loaded: asyncio.Future[Retriever] = loop.create_future()

    def load() -> None:
        outcome: Retriever | BaseException
        try:
            outcome = open_retriever()
        # The boundary of a thread: raised by whoever waits for it.
        except BaseException as error:  # noqa: BLE001
            outcome = error
        # Raised where the loop is closed, because the service was stopped meanwhile.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(_settle, loaded, outcome)

    threading.Thread(target=load, name="retriever-loading", daemon=True).start()
    return loaded


def _settle(loaded: asyncio.Future[Retriever], outcome: Retriever | BaseException) -> None:
    # Given up meanwhile.
    if loaded.done():
        return
    if isinstance(outcome, BaseException):
        loaded.set_exception(outcome)
    else:
        loaded.set_result(outcome)


def _hit_to_json(hit: Hit, has_score: bool) -> dict[str, Any]:
    document = {"id": hit.passage.passage_id, "contents": hit.passage.contents}
    if not has_score:
        return document
    return {"document": document, "score": hit.score}
