"""Owns the HTTP API: routes, their models and the map from errors to answers. Every decision is the scheduler's."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, CollectorRegistry, generate_latest
from pydantic import BaseModel, ConfigDict, Field

from sdar.contracts.errors import SdarError
from sdar.contracts.types import ScoredTrajectory
from sdar.runtime.bus import BEFORE_FIRST, Bus
from sdar.runtime.chat import ChatTokenizer

from .scheduler import Scheduler

_PAGE = Path(__file__).parent / "web" / "index.html"


class Reply(BaseModel):
    """An answer of the API. Fields are documented where they are declared."""

    model_config = ConfigDict(use_attribute_docstrings=True)


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
    dead_letters: int
    stream_lags: dict[str, dict[str, float]]
    """Per stream: entries never delivered, delivered but unfinished, and the age of the oldest in seconds."""
    instances: dict[str, int]
    """Processes heard from in the last seconds, by service."""
    evaluations: list[EvaluationReply]
    started_at_s: float
    finished_at_s: float


class EnvironmentRequest(Reply):
    model_config = ConfigDict(extra="forbid")
    name: str = Field(min_length=1, max_length=128)
    address: str = Field(pattern=r"^[^\s:/]+:\d{1,5}$", description="HOST:PORT of a running EnvironmentService.")


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
    values: dict[str, float]


def build_app(
    scheduler: Scheduler, bus: Bus, *, tokenizer: ChatTokenizer | None = None, registry: CollectorRegistry = REGISTRY
) -> FastAPI:
    """The gateway's application.

    Args:
        tokenizer: renders a trajectory's tokens as text; without it tokens are shown as numbers only.
    """
    app = FastAPI(title="sdar gateway", version="1", docs_url="/docs", redoc_url=None)
    app.add_exception_handler(SdarError, _answer_error)
    _add_probes(app, scheduler, registry)
    _add_run(app, scheduler, bus)
    _add_lookups(app, scheduler, tokenizer)

    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(_PAGE.read_text(encoding="utf-8"))

    return app


async def _answer_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, SdarError)
    body = {"reason": error.reason, "message": error.message, "fields": error.fields}
    headers = {"Retry-After": "1"} if error.http_status in (429, 503) else {}
    return JSONResponse({"error": body}, status_code=int(error.http_status), headers=headers)


def _add_probes(app: FastAPI, scheduler: Scheduler, registry: CollectorRegistry) -> None:
    @app.get("/healthz", response_class=PlainTextResponse, tags=["probes"])
    async def healthz() -> Response:
        """200 while the main loop turns."""
        return PlainTextResponse(f"{scheduler.health.detail}\n", 200 if scheduler.health.is_alive else 503)

    @app.get("/readyz", response_class=PlainTextResponse, tags=["probes"])
    async def readyz() -> Response:
        """200 once the run is running: the environment lists its tasks and a first policy is published."""
        is_ready = scheduler.health.is_alive and scheduler.health.is_ready
        return PlainTextResponse(f"{scheduler.detail or scheduler.health.detail}\n", 200 if is_ready else 503)

    @app.get("/metrics", response_class=PlainTextResponse, tags=["probes"])
    async def metrics() -> Response:
        """Prometheus metrics of this process."""
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)


def _add_run(app: FastAPI, scheduler: Scheduler, bus: Bus) -> None:
    @app.get("/v1/run", tags=["run"])
    async def get_run() -> RunReply:
        """Where the run stands."""
        return await describe_run(scheduler, bus)

    @app.post("/v1/run/pause", tags=["run"])
    async def pause() -> RunReply:
        """Issue no more groups; what is in flight goes on. 409 unless running."""
        scheduler.pause()
        return await describe_run(scheduler, bus)

    @app.post("/v1/run/resume", tags=["run"])
    async def resume() -> RunReply:
        """Go on issuing groups. 409 unless paused."""
        scheduler.resume()
        return await describe_run(scheduler, bus)

    @app.post("/v1/run/stop", tags=["run"])
    async def stop() -> RunReply:
        """End early: no more groups, one last evaluation. 409 before the run has started."""
        scheduler.stop()
        return await describe_run(scheduler, bus)

    @app.get("/v1/environments", tags=["environments"])
    async def list_environments() -> list[EnvironmentReply]:
        """The environments this run knows."""
        return [EnvironmentReply(**dataclasses.asdict(item)) for item in scheduler.environments.values()]

    @app.post("/v1/environments", tags=["environments"])
    async def register_environment(request: EnvironmentRequest) -> EnvironmentReply:
        """Add an environment by its address, or move one: later groups are played there."""
        return EnvironmentReply(**dataclasses.asdict(await scheduler.register_environment(request.name, request.address)))


def _add_lookups(app: FastAPI, scheduler: Scheduler, tokenizer: ChatTokenizer | None) -> None:
    @app.get("/v1/metrics", tags=["lookups"])
    async def get_metrics(
        after: Annotated[str, Query(pattern=r"^\d{1,20}-\d{1,20}$")] = BEFORE_FIRST,
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
                values=entry.record.values,
            )
            for entry in found
        ]

    @app.get("/v1/trajectories", tags=["lookups"])
    async def list_trajectories(limit: Annotated[int, Query(ge=1, le=2000)] = 50) -> list[str]:
        """Ids of the newest training trajectories, newest first."""
        return scheduler.history.trajectory_ids(limit)

    @app.get("/v1/trajectories/{trajectory_id}", tags=["lookups"])
    async def get_trajectory(trajectory_id: str) -> dict[str, Any]:
        """One of the newest trajectories: task, turns, log-probs, versions and the teacher's score. 404 if it is not there."""
        return _describe_trajectory(scheduler.history.trajectory(trajectory_id), tokenizer)


async def describe_run(scheduler: Scheduler, bus: Bus) -> RunReply:
    """The run's status as the API gives it."""
    config, state = scheduler.config, scheduler.state
    lags = {}
    for stream, groups in config.stream_consumers.items():
        for group in groups:
            lag = await bus.stream_lag(stream, group)
            lags[str(stream)] = dataclasses.asdict(lag)
    return RunReply(
        run_id=config.name,
        phase=str(state.phase),
        detail=scheduler.detail,
        method=config.method.name,
        policy_version=scheduler.policy_version,
        num_updates=scheduler.num_updates,
        target_updates=config.training.num_updates,
        max_staleness=config.training.max_staleness,
        ledger=state.ledger.counts(),
        ledger_gap=state.ledger.find_gap(),
        dead_letters=await bus.count_dead_letters(),
        stream_lags=lags,
        instances={name: scheduler.history.count_instances(name) for name in ("rollout", "teacher", "learner")},
        evaluations=[EvaluationReply.model_validate(evaluation.summary()) for evaluation in state.evaluations],
        started_at_s=state.started_at_s,
        finished_at_s=state.finished_at_s,
    )


def _describe_trajectory(scored: ScoredTrajectory, tokenizer: ChatTokenizer | None) -> dict[str, Any]:
    """Plain JSON of a trajectory. Texts are data: whoever shows them escapes them."""
    trajectory, score = scored.trajectory, scored.score
    turns = []
    for turn in trajectory.turns:
        shown = {
            "turn_index": turn.turn_index,
            "messages": [dataclasses.asdict(message) for message in turn.messages],
            "response_text": turn.response_text,
            "action": turn.action,
            "is_action_valid": turn.is_action_valid,
            "reward": turn.reward,
            "reward_components": turn.reward_components,
            "stop_reason": str(turn.stop_reason),
            "num_prompt_tokens": len(turn.prompt_token_ids),
            "response_token_ids": turn.response_token_ids.tolist(),
            "behavior_logprobs": turn.behavior_logprobs.tolist(),
            "policy_versions": turn.policy_versions.tolist(),
        }
        if tokenizer is not None:
            shown["response_tokens"] = [tokenizer.tokenizer.decode([token]) for token in turn.response_token_ids.tolist()]
        if score is not None:
            shown["teacher_logprobs"] = score.turn_logprobs[turn.turn_index].tolist()
        turns.append(shown)
    described = {
        name: getattr(trajectory, name)
        for name in ("run_id", "group_id", "trajectory_id", "attempt", "episode_index", "is_success", "duration_s")
    }
    described |= {
        "task": dataclasses.asdict(trajectory.task),
        "environment": dataclasses.asdict(trajectory.environment),
        "model": dataclasses.asdict(trajectory.model),
        "sampling": dataclasses.asdict(trajectory.sampling),
        "end": str(trajectory.end),
        "episode_return": trajectory.episode_return,
        "turns": turns,
    }
    if score is not None:
        described["teacher"] = {
            "teacher_version": score.teacher_version,
            "skill_ids": score.skill_ids,
            "num_specific_skills": score.num_specific_skills,
            "skill_library_hash": score.skill_library_hash,
            "template_hash": score.template_hash,
            "retrieval": score.retrieval,
            "scorer": score.scorer,
        }
    return described
