"""What the HTTP API answers and takes: its models, each field documented where it is declared."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from .environments import ADDRESS_PATTERN, MAX_NAME_CHARACTERS


class Reply(BaseModel):
    """A record of the API. What stands below a field describes it in /openapi.json."""

    model_config = ConfigDict(use_attribute_docstrings=True)


class ErrorBody(Reply):
    reason: str
    """The kind of error, the same name as over gRPC."""
    message: str
    """What failed, where, and what to do."""
    fields: dict[str, str]


class ErrorReply(Reply):
    error: ErrorBody


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
    all other numbers of the bus are as they were last seen.
    """
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
    figures: dict[str, float]
    """Of the newest update: success in training (success_mean over num_episodes, all that were
    played; trained_success_mean over num_trajectories, those that were trained), how far the
    sampler is from the learner in nats (engine_mismatch_abs, policy_behavior_gap_abs, and
    probe_mismatch of the worst rollout worker), optimizer steps skipped in a row. docs/metrics.md
    explains each; what was not measured is absent.
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
    """Why, and what keeps it from what its signal asks for."""
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
