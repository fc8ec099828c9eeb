"""The routes of the HTTP API. What is decided is the scheduler's, looks at Redis the watch's."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request
from fastapi import Path as PathParameter
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, CollectorRegistry, generate_latest
from starlette.exceptions import HTTPException
from tokenizers import Tokenizer

from sdar.bus.protocol import BEFORE_FIRST, Bus, DeadLetter
from sdar.contracts.errors import InvalidInputError, SdarError, UnknownResourceError
from sdar.wire.http_server import answer_error, build_error_response, build_page_policy

from .describe import describe_letter, describe_trajectory, replace_non_finite
from .history import MetricEntry
from .replies import (
    DeadLetterReply,
    EnvironmentReply,
    EnvironmentRequest,
    ErrorReply,
    FullDeadLetterReply,
    MetricReply,
    RetryReply,
    RunReply,
    ScalingChangeReply,
    ScalingReply,
    WorkloadReply,
)
from .scaling.scaler import Scaler
from .scheduler import Scheduler
from .status import describe_run, describe_sleep
from .watch import Watch

_PAGE = Path(__file__).parent / "web" / "index.html"
# As Redis writes them: milliseconds and a number, neither over 64 bits.
_ENTRY_ID = r"^[0-9]{1,19}-[0-9]{1,19}$"

LetterId = Annotated[str, PathParameter(pattern=_ENTRY_ID)]


def _errors(*statuses: HTTPStatus) -> dict[int | str, dict[str, Any]]:
    return {int(status): {"model": ErrorReply, "description": status.phrase} for status in statuses}


_ERRORS = _errors(
    HTTPStatus.BAD_REQUEST,
    HTTPStatus.UNAUTHORIZED,
    HTTPStatus.FORBIDDEN,
    HTTPStatus.REQUEST_TIMEOUT,
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    HTTPStatus.UNPROCESSABLE_ENTITY,
    HTTPStatus.TOO_MANY_REQUESTS,
    HTTPStatus.SERVICE_UNAVAILABLE,
)
"""What the door before every route answers, or a dependency that is away."""
_CONFLICT = _errors(HTTPStatus.CONFLICT)
_NOT_FOUND = _errors(HTTPStatus.NOT_FOUND)
_NOT_NOW: dict[int | str, dict[str, Any]] = {
    503: {"content": {"text/plain": {}}, "description": "Not so now; the text says why."}
}


def build_app(
    scheduler: Scheduler,
    watch: Watch,
    bus: Bus,
    *,
    load_tokenizer: Callable[[], Tokenizer] | None = None,
    scaler: Scaler | None = None,
    registry: CollectorRegistry = REGISTRY,
) -> FastAPI:
    """The gateway's application.

    While Redis is away it answers at once: from what the watch saw last, or with 503.

    Args:
        bus: is asked for dead letters; its calls are given up after a moment.
        load_tokenizer: the first trajectory that is asked for waits for it; without it tokens are
            shown as numbers only.
        scaler: none where nothing is scaled.
    """
    app = _build_empty_app()
    _add_probes(app, scheduler, registry)
    _add_run(app, scheduler, watch)
    _add_controls(app, scheduler, watch)
    _add_environments(app, scheduler)
    _add_scaling(app, scheduler, watch, scaler)
    _add_dead_letters(app, scheduler, watch, bus)
    _add_metrics(app, scheduler)
    _add_trajectories(app, scheduler, load_tokenizer)
    _add_page(app)
    return app


def _build_empty_app() -> FastAPI:
    """Without routes; whatever is raised in one is answered in one form."""
    # FastAPI's own pages of the API load scripts from elsewhere; /openapi.json says as much.
    app = FastAPI(
        title="sdar gateway", version="1", docs_url=None, redoc_url=None, responses=_ERRORS
    )
    app.add_exception_handler(SdarError, answer_error)
    app.add_exception_handler(RequestValidationError, _answer_invalid)
    app.add_exception_handler(HTTPException, _answer_http_error)
    return app


def _add_page(app: FastAPI) -> None:
    text = _PAGE.read_text(encoding="utf-8")
    policy = build_page_policy(text)

    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(text, headers={"Content-Security-Policy": policy})


async def _answer_invalid(_: Request, error: Exception) -> Response:
    """Says where and what, never what was sent: that may be anything, also no text."""
    assert isinstance(error, RequestValidationError)
    faults = [f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()]
    return build_error_response(InvalidInputError("; ".join(faults) + ". See /openapi.json."))


async def _answer_http_error(_: Request, error: Exception) -> Response:
    """No such route or method, or a body that is no JSON: in the form of all errors."""
    assert isinstance(error, HTTPException)
    response = build_error_response(
        InvalidInputError(f"{error.detail}. See /openapi.json."), error.status_code
    )
    response.headers.update(error.headers or {})
    return response


def _add_probes(app: FastAPI, scheduler: Scheduler, registry: CollectorRegistry) -> None:
    @app.get("/healthz", response_class=PlainTextResponse, responses=_NOT_NOW, tags=["probes"])
    async def healthz() -> Response:
        """200 while the main loop turns."""
        health = scheduler.health
        return PlainTextResponse(f"{health.detail}\n", 200 if health.is_alive else 503)

    @app.get("/readyz", response_class=PlainTextResponse, responses=_NOT_NOW, tags=["probes"])
    async def readyz() -> Response:
        """200 once the run is running: the environment lists its tasks and a first policy is
        published.
        """
        health = scheduler.health
        is_ready = health.is_alive and health.is_ready and not health.blocked
        reason = health.blocked or scheduler.detail or health.detail
        return PlainTextResponse(f"{reason}\n", 200 if is_ready else 503)

    _add_prometheus(app, registry)


def _add_prometheus(app: FastAPI, registry: CollectorRegistry) -> None:
    @app.get("/metrics", response_class=PlainTextResponse, tags=["probes"])
    async def metrics() -> Response:
        """Prometheus metrics of this process."""
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)


def _add_run(app: FastAPI, scheduler: Scheduler, watch: Watch) -> None:
    @app.get("/v1/run", tags=["run"])
    async def get_run() -> RunReply:
        """Where the run stands."""
        return describe_run(scheduler, watch)

    @app.get("/v1/run/configuration", tags=["run"])
    async def get_configuration() -> dict[str, Any]:
        """What the run is, every key with its value: what a report of it is made from."""
        return scheduler.config.model_dump(mode="json")


def _add_controls(app: FastAPI, scheduler: Scheduler, watch: Watch) -> None:
    @app.post("/v1/run/pause", responses=_CONFLICT, tags=["run"])
    async def pause(until_restart: bool = False) -> RunReply:
        """Issue no more groups; what is in flight goes on. 409 unless running.

        It holds until somebody resumes the run; with `until_restart`, as a drain asks for it, at
        most until this gateway ends.
        """
        scheduler.control.pause(until_restart=until_restart)
        return describe_run(scheduler, watch)

    @app.post("/v1/run/resume", responses=_CONFLICT, tags=["run"])
    async def resume() -> RunReply:
        """Go on issuing groups, also after giving up, and wake a run that sleeps. 409 where nothing
        can go on.
        """
        scheduler.control.resume()
        return describe_run(scheduler, watch)

    @app.post("/v1/run/stop", responses=_CONFLICT, tags=["run"])
    async def stop() -> RunReply:
        """End early: no more groups, one last evaluation. 409 before the run has started."""
        scheduler.control.stop()
        return describe_run(scheduler, watch)


def _add_environments(app: FastAPI, scheduler: Scheduler) -> None:
    @app.get("/v1/environments", tags=["environments"])
    async def list_environments() -> list[EnvironmentReply]:
        """The environments this run knows."""
        return [
            EnvironmentReply(**dataclasses.asdict(item)) for item in scheduler.environments.values()
        ]

    @app.post("/v1/environments", responses=_NOT_FOUND, tags=["environments"])
    async def register_environment(request: EnvironmentRequest) -> EnvironmentReply:
        """Add an environment by its address, or move one: later groups are played there."""
        found = await scheduler.register_environment(request.name, request.address)
        return EnvironmentReply(**dataclasses.asdict(found))


def _add_scaling(app: FastAPI, scheduler: Scheduler, watch: Watch, scaler: Scaler | None) -> None:
    @app.get("/v1/scaling", tags=["run"])
    async def get_scaling() -> ScalingReply:
        """How many replicas each workload has, how many it is to have, and why."""
        reply = ScalingReply(
            mode="off",
            dry_run=False,
            idle_after_s=0.0,
            sleep=describe_sleep(scheduler.state.sleep),
            problem=watch.scaling_problem,
            workloads={},
            changes=[],
        )
        return reply if scaler is None else _describe_scaling(reply, scaler)


def _describe_scaling(reply: ScalingReply, scaler: Scaler) -> ScalingReply:
    """The same with what the scaler has seen and done."""
    file = scaler.file
    if file is not None:
        reply.mode = file.mode
        reply.dry_run = file.dry_run
        reply.idle_after_s = file.idle_after_s
    reply.problem = reply.problem or scaler.problem
    for role, workload in scaler.workloads.items():
        reply.workloads[role] = WorkloadReply(**dataclasses.asdict(workload))
    for change in reversed(scaler.changes):
        reply.changes.append(ScalingChangeReply(**dataclasses.asdict(change)))
    return reply


def _add_dead_letters(app: FastAPI, scheduler: Scheduler, watch: Watch, bus: Bus) -> None:
    @app.get("/v1/dead-letters", tags=["dead letters"])
    async def list_dead_letters(
        before: Annotated[str | None, Query(pattern=_ENTRY_ID)] = None,
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    ) -> list[DeadLetterReply]:
        """Entries that were set aside, newest first. Pass the last one's id as `before` for older
        ones.
        """
        letters = await watch.ask(bus.list_dead_letters(limit, before))
        return [DeadLetterReply(**_summarize(letter)) for letter in letters]

    @app.get("/v1/dead-letters/{letter_id}", responses=_NOT_FOUND, tags=["dead letters"])
    async def get_dead_letter(letter_id: LetterId) -> FullDeadLetterReply:
        """One of them, with its payload. 404 if it is not there."""
        letter = await watch.ask(bus.find_dead_letter(letter_id))
        if letter is None:
            raise UnknownResourceError(f"There is no dead letter {letter_id}.", letter_id=letter_id)
        return FullDeadLetterReply(**_summarize(letter), **describe_letter(letter))

    _add_retry(app, scheduler, watch)


def _add_retry(app: FastAPI, scheduler: Scheduler, watch: Watch) -> None:
    @app.post(
        "/v1/dead-letters/{letter_id}/retry",
        responses=_NOT_FOUND | _CONFLICT,
        tags=["dead letters"],
    )
    async def retry_dead_letter(letter_id: LetterId) -> RetryReply:
        """Do its work again and remove it, both or neither: a training task as a new group, an
        evaluation's as it was.

        404 if it is not there, so also the second time. 409 if its payload is no work, or the run
        issues nothing.
        """
        group_id = await watch.ask(scheduler.retry_dead_letter(letter_id))
        return RetryReply(letter_id=letter_id, group_id=group_id)


def _summarize(letter: DeadLetter) -> dict[str, Any]:
    names = ("letter_id", "stream", "group", "entry_id", "num_deliveries", "reason", "at_s")
    shown = {name: getattr(letter, name) for name in names}
    return shown | {"age_s": max(0.0, time.time() - letter.at_s), "size_bytes": len(letter.payload)}


def _add_metrics(app: FastAPI, scheduler: Scheduler) -> None:
    @app.get("/v1/metrics", tags=["lookups"])
    async def get_metrics(
        after: Annotated[str, Query(pattern=_ENTRY_ID)] = BEFORE_FIRST,
        limit: Annotated[int, Query(ge=1, le=5000)] = 1000,
    ) -> list[MetricReply]:
        """History of every service's metrics, oldest first."""
        return [_describe_metrics(entry) for entry in scheduler.history.metrics_after(after, limit)]


def _describe_metrics(entry: MetricEntry) -> MetricReply:
    record = entry.record
    return MetricReply(
        entry_id=entry.entry_id,
        service=record.service,
        instance=record.instance,
        policy_version=record.policy_version,
        at_s=record.at_s,
        values=replace_non_finite(record.values),
    )


def _add_trajectories(
    app: FastAPI, scheduler: Scheduler, load_tokenizer: Callable[[], Tokenizer] | None
) -> None:
    @app.get("/v1/trajectories", tags=["lookups"])
    async def list_trajectories(limit: Annotated[int, Query(ge=1, le=2000)] = 50) -> list[str]:
        """Ids of the newest training trajectories, newest first."""
        return scheduler.history.trajectory_ids(limit)

    @app.get("/v1/trajectories/{trajectory_id}", responses=_NOT_FOUND, tags=["lookups"])
    async def get_trajectory(trajectory_id: str) -> dict[str, Any]:
        """One of the newest trajectories: task, turns, log-probs, versions and the teacher's score.
        404 if it is not there.
        """
        found = scheduler.history.trajectory(trajectory_id)
        # In a thread: the first call reads the tokenizer's file, megabytes of it.
        tokenizer = None if load_tokenizer is None else await asyncio.to_thread(load_tokenizer)
        return describe_trajectory(found, tokenizer)
