"""Owns the HTTP API: routes, their models and the map from errors to answers. Every decision is the
scheduler's.
"""

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
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from tokenizers import Tokenizer

from sdar.bus.ledger import format_group_id
from sdar.bus.protocol import BEFORE_FIRST, Bus, DeadLetter
from sdar.contracts.errors import InvalidInputError, SdarError, UnknownResourceError
from sdar.wire.http_server import answer_error, build_error_response, build_page_policy

from .describe import describe_letter, describe_trajectory, replace_non_finite
from .environments import ADDRESS_PATTERN, MAX_NAME_CHARACTERS
from .scaling.scaler import Scaler
from .scheduler import Scheduler
from .watch import Watch

_PAGE = Path(__file__).parent / "web" / "index.html"
_ENTRY_ID = r"^[0-9]{1,19}-[0-9]{1,19}$"
_SHOWN_FAILURES = 10

LetterId = Annotated[str, PathParameter(pattern=_ENTRY_ID)]


class Reply(BaseModel):
    """An answer of the API. Fields are documented where they are declared."""

    model_config = ConfigDict(use_attribute_docstrings=True)


class ErrorBody(Reply):
    reason: str
    """The kind of error, the same name as over gRPC."""
    message: str
    """What failed, where, and what to do."""
    fields: dict[str, str]


class ErrorReply(Reply):
    error: ErrorBody


def _errors(*statuses: HTTPStatus) -> dict[int | str, dict[str, Any]]:
    return {int(status): {"model": ErrorReply, "description": status.phrase} for status in statuses}


_ERRORS = _errors(
    *(
        HTTPStatus.BAD_REQUEST,
        HTTPStatus.UNAUTHORIZED,
        HTTPStatus.FORBIDDEN,
        HTTPStatus.REQUEST_TIMEOUT,
    ),
    *(
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        HTTPStatus.UNPROCESSABLE_ENTITY,
        HTTPStatus.TOO_MANY_REQUESTS,
    ),
    HTTPStatus.SERVICE_UNAVAILABLE,
)
"""What the door before every route answers, or a dependency that is away."""
_CONFLICT = _errors(HTTPStatus.CONFLICT)
_NOT_FOUND = _errors(HTTPStatus.NOT_FOUND)
_NOT_NOW: dict[int | str, dict[str, Any]] = {
    503: {"content": {"text/plain": {}}, "description": "Not so now; the text says why."}
}


class SleepReply(Reply):
    reason: str
    """Why the idle guard holds rollout, teacher and learner at zero replicas, and what wakes the
    run.
    """
    since_s: float
    """Unix time since when."""


class EvaluationReply(Reply):
    evaluation_id: str
    policy_version: int
    num_updates: int
    is_greedy: bool
    is_complete: bool
    num_tasks: int
    num_episodes: int
    num_failed: int
    """Episodes that could not be played; counted as no success."""
    success: float
    """Successes over episodes, pooled over all tasks."""
    interval: tuple[float, float]
    """95% Wilson interval of `success`."""
    reward_components: dict[str, float]
    """Mean over all episodes of each reward component's sum: a benchmark's own score among them."""
    by_task_type: dict[str, tuple[int, int]]
    """[successes, episodes] of each task type."""


class AlarmReply(Reply):
    name: str
    message: str
    since_s: float
    """Unix time since when it is up."""


class BusReply(Reply):
    state: str
    """ok, unreachable (Redis does not answer) or full (it answers and refuses writes). Unless ok,
    what else is told here is as it was last seen."""
    since_s: float
    """Unix time since when it is in that state."""
    message: str
    used_bytes: int
    max_bytes: int
    """0 where Redis has no bound of its own."""


class RunReply(Reply):
    run_id: str
    phase: str
    detail: str
    """What a starting run waits for, or why a failed one gave up; empty otherwise."""
    method: str
    policy_version: int
    """Newest published version, -1 before the first."""
    num_updates: int
    target_updates: int
    max_staleness: int
    ledger: dict[str, int]
    """Training groups by state of their account."""
    ledger_gap: int
    """Groups the ledger cannot explain; anything but 0 is a defect."""
    ledger_gap_ids: list[str]
    """Which they are, as far as the check at the end of the run names them."""
    failures: dict[str, str]
    """Why the newest groups failed or were cancelled, by id."""
    length_drift: float
    """How much the lengths of episodes that are trained differ from those played: total variation
    distance, 0 to 1.
    """
    alarms: list[AlarmReply]
    """What is wrong now."""
    bus: BusReply
    dead_letters: int
    stream_lags: dict[str, dict[str, float]]
    """Per stream: entries never delivered, delivered but unfinished, and the age of the oldest in
    seconds.
    """
    instances: dict[str, int]
    """Workers heard from in the last half minute, by service. The learner, which reports once an
    update, is not among them.
    """
    evaluations: list[EvaluationReply]
    sleep: SleepReply | None
    """While the run sleeps; null otherwise."""
    started_at_s: float
    finished_at_s: float


class WorkloadReply(Reply):
    kind: str
    name: str
    min: int
    max: int
    current: int
    """Replicas asked for now."""
    wanted: int
    """Replicas the gateway wants; in a dry run it does nothing about it."""
    reason: str
    """Why, and what keeps it from following its signal at once."""
    since_s: float
    """Unix time since when current and wanted are so."""


class ScalingChangeReply(Reply):
    at_s: float
    """Unix time."""
    workload: str
    before: int
    after: int
    reason: str


class ScalingReply(Reply):
    mode: str
    """off (nothing is scaled here), gateway, or keda (only the learner is the gateway's)."""
    dry_run: bool
    idle_after_s: float
    """Seconds after which an idle run is put to sleep, 0 for never."""
    sleep: SleepReply | None
    problem: str
    """What kept the newest look from its work; empty if nothing did."""
    workloads: dict[str, WorkloadReply]
    """By service, as of the newest look."""
    changes: list[ScalingChangeReply]
    """The newest ones this gateway made, newest first."""


class DeadLetterReply(Reply):
    letter_id: str
    stream: str
    group: str
    """The consumer group that gave it up."""
    entry_id: str
    num_deliveries: int
    reason: str
    at_s: float
    """Unix time when it was set aside."""
    age_s: float
    size_bytes: int


class FullDeadLetterReply(DeadLetterReply):
    payload: Any
    """The record it holds; null where it cannot be read."""
    payload_error: str
    """Why it cannot be read; empty otherwise."""
    payload_base64: str
    """Its bytes, where it cannot be read; empty otherwise."""


class RetryReply(Reply):
    letter_id: str
    group_id: str
    """The group that was issued for it."""


class EnvironmentRequest(Reply):
    model_config = ConfigDict(extra="forbid")
    name: str = Field(min_length=1, max_length=MAX_NAME_CHARACTERS)
    address: str = Field(
        pattern=ADDRESS_PATTERN, description="HOST:PORT of a running EnvironmentService."
    )


class EnvironmentReply(Reply):
    name: str
    address: str
    version: str
    splits: dict[str, int]
    instructions: str
    max_turns: int


class MetricReply(Reply):
    entry_id: str
    """Pass the last one back as `after` to go on from there."""
    service: str
    instance: str
    policy_version: int
    at_s: float
    values: dict[str, float | None]
    """null where a value is not finite."""


def build_app(
    scheduler: Scheduler,
    watch: Watch,
    bus: Bus,
    *,
    load_tokenizer: Callable[[], Tokenizer] | None = None,
    scaler: Scaler | None = None,
    registry: CollectorRegistry = REGISTRY,
) -> FastAPI:
    """The gateway's application. It answers at once while Redis is away: from what the watch saw
    last, or with 503.

    Args:
        bus: is asked for dead letters; its calls are given up after a moment.
        load_tokenizer: the first trajectory that is asked for waits for it; without it tokens are
            shown as numbers only.
        scaler: none where nothing is scaled.
    """
    app = FastAPI(
        title="sdar gateway", version="1", docs_url=None, redoc_url=None, responses=_ERRORS
    )
    app.add_exception_handler(SdarError, answer_error)
    app.add_exception_handler(RequestValidationError, _answer_invalid)
    app.add_exception_handler(HTTPException, _answer_http_error)
    _add_probes(app, scheduler, registry)
    _add_run(app, scheduler, watch)
    _add_scaling(app, scheduler, watch, scaler)
    _add_dead_letters(app, scheduler, watch, bus)
    _add_lookups(app, scheduler, load_tokenizer)

    text = _PAGE.read_text(encoding="utf-8")
    policy = build_page_policy(text)

    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(text, headers={"Content-Security-Policy": policy})

    return app


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
        return PlainTextResponse(
            f"{scheduler.health.detail}\n", 200 if scheduler.health.is_alive else 503
        )

    @app.get("/readyz", response_class=PlainTextResponse, responses=_NOT_NOW, tags=["probes"])
    async def readyz() -> Response:
        """200 once the run is running: the environment lists its tasks and a first policy is
        published.
        """
        health = scheduler.health
        is_ready = health.is_alive and health.is_ready and not health.blocked
        return PlainTextResponse(
            f"{health.blocked or scheduler.detail or health.detail}\n", 200 if is_ready else 503
        )

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

    @app.get("/v1/environments", tags=["environments"])
    async def list_environments() -> list[EnvironmentReply]:
        """The environments this run knows."""
        return [
            EnvironmentReply(**dataclasses.asdict(item)) for item in scheduler.environments.values()
        ]

    @app.post("/v1/environments", responses=_NOT_FOUND, tags=["environments"])
    async def register_environment(request: EnvironmentRequest) -> EnvironmentReply:
        """Add an environment by its address, or move one: later groups are played there."""
        return EnvironmentReply(
            **dataclasses.asdict(
                await scheduler.register_environment(request.name, request.address)
            )
        )


def _add_scaling(app: FastAPI, scheduler: Scheduler, watch: Watch, scaler: Scaler | None) -> None:
    @app.get("/v1/scaling", tags=["run"])
    async def get_scaling() -> ScalingReply:
        """How many replicas each workload has, how many it is to have, and why."""
        file = scaler.file if scaler else None
        return ScalingReply(
            mode=file.mode if file else "off",
            dry_run=file.dry_run if file else False,
            idle_after_s=file.idle_after_s if file else 0.0,
            sleep=_describe_sleep(scheduler),
            problem=watch.scaling_problem or (scaler.problem if scaler else ""),
            workloads={
                role: WorkloadReply(**dataclasses.asdict(it))
                for role, it in scaler.workloads.items()
            }
            if scaler
            else {},
            changes=[
                ScalingChangeReply(**dataclasses.asdict(one)) for one in reversed(scaler.changes)
            ]
            if scaler
            else [],
        )


def _describe_sleep(scheduler: Scheduler) -> SleepReply | None:
    sleep = scheduler.state.sleep
    return None if sleep is None else SleepReply(reason=sleep.reason, since_s=sleep.since_s)


def _add_dead_letters(app: FastAPI, scheduler: Scheduler, watch: Watch, bus: Bus) -> None:
    @app.get("/v1/dead-letters", tags=["dead letters"])
    async def list_dead_letters(
        before: Annotated[str | None, Query(pattern=_ENTRY_ID)] = None,
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    ) -> list[DeadLetterReply]:
        """Entries that were set aside, newest first. Pass the last one's id as `before` for older
        ones.
        """
        return [
            DeadLetterReply(**_summarize(letter))
            for letter in await watch.ask(bus.list_dead_letters(limit, before))
        ]

    @app.get("/v1/dead-letters/{letter_id}", responses=_NOT_FOUND, tags=["dead letters"])
    async def get_dead_letter(letter_id: LetterId) -> FullDeadLetterReply:
        """One of them, with its payload. 404 if it is not there."""
        letter = await watch.ask(bus.find_dead_letter(letter_id))
        if letter is None:
            raise UnknownResourceError(f"There is no dead letter {letter_id}.", letter_id=letter_id)
        return FullDeadLetterReply(**_summarize(letter), **describe_letter(letter))

    @app.post(
        "/v1/dead-letters/{letter_id}/retry",
        responses=_NOT_FOUND | _CONFLICT,
        tags=["dead letters"],
    )
    async def retry_dead_letter(letter_id: LetterId) -> RetryReply:
        """Do its work again and remove it, both or neither: a training task as a new group, an
        evaluation's as it was.

        404 if it is not there, so also the second time. 409 if its payload tells of no work, or the
        run issues nothing.
        """
        group_id = await watch.ask(scheduler.retry_dead_letter(letter_id))
        return RetryReply(letter_id=letter_id, group_id=group_id)


def _summarize(letter: DeadLetter) -> dict[str, Any]:
    names = ("letter_id", "stream", "group", "entry_id", "num_deliveries", "reason", "at_s")
    shown = {name: getattr(letter, name) for name in names}
    return shown | {"age_s": max(0.0, time.time() - letter.at_s), "size_bytes": len(letter.payload)}


def _add_lookups(
    app: FastAPI, scheduler: Scheduler, load_tokenizer: Callable[[], Tokenizer] | None
) -> None:
    @app.get("/v1/metrics", tags=["lookups"])
    async def get_metrics(
        after: Annotated[str, Query(pattern=_ENTRY_ID)] = BEFORE_FIRST,
        limit: Annotated[int, Query(ge=1, le=5000)] = 1000,
    ) -> list[MetricReply]:
        """History of every service's metrics, oldest first."""
        found = scheduler.history.metrics_after(after, limit)
        return [
            MetricReply(
                entry_id=entry.entry_id,
                service=entry.record.service,
                instance=entry.record.instance,
                policy_version=entry.record.policy_version,
                at_s=entry.record.at_s,
                values=replace_non_finite(entry.record.values),
            )
            for entry in found
        ]

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
        return describe_trajectory(
            found, None if load_tokenizer is None else await asyncio.to_thread(load_tokenizer)
        )


def describe_run(scheduler: Scheduler, watch: Watch) -> RunReply:
    """The run's status as the API gives it."""
    config, state = scheduler.config, scheduler.state
    newest_failures = list(state.failure_reasons.items())[-_SHOWN_FAILURES:]
    memory = watch.memory
    return RunReply(
        run_id=config.name,
        phase=str(state.phase),
        detail=scheduler.detail,
        method=config.method.name,
        policy_version=scheduler.policy.version,
        num_updates=scheduler.policy.num_updates,
        target_updates=config.training.num_updates,
        max_staleness=config.training.max_staleness,
        ledger=scheduler.ledger.counts(),
        ledger_gap=scheduler.ledger_gap,
        ledger_gap_ids=[format_group_id(number) for number in state.unaccounted],
        failures=dict(reversed(newest_failures)),
        length_drift=scheduler.lengths.compute_drift(),
        alarms=[AlarmReply(**dataclasses.asdict(alarm)) for alarm in watch.board.alarms],
        bus=BusReply(
            **dataclasses.asdict(watch.condition),
            used_bytes=memory.used_bytes,
            max_bytes=memory.max_bytes,
        ),
        dead_letters=watch.num_dead_letters,
        stream_lags={str(stream): dataclasses.asdict(lag) for stream, lag in watch.lags.items()},
        instances={
            name: scheduler.history.count_instances(name)
            for name in (("rollout", "teacher") if scheduler.config.needs_teacher else ("rollout",))
        },
        evaluations=[
            EvaluationReply.model_validate(evaluation.summary()) for evaluation in state.evaluations
        ],
        sleep=_describe_sleep(scheduler),
        started_at_s=state.started_at_s,
        finished_at_s=state.finished_at_s,
    )
