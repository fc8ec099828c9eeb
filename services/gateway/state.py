"""The gateway's durable memory: one small JSON record, saved in the transaction of each decision.

The account of groups isn't in it: the bus keeps that (`sdar.bus.ledger`). Here is what the
account's journal adds to it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from enum import Enum, StrEnum, auto

from sdar.config import RunConfig
from sdar.contracts.errors import CorruptionError
from sdar.contracts.types import GroupOutcome, LedgerEvent

from .evaluation import Evaluation

STATE_NAME = "gateway"
KEPT_REASONS = 100
"""Newest failures remembered. The record is written with every decision, so it stays small; the log
has them all.
"""


class RunPhase(StrEnum):
    """Where the run is.

    STARTING waits for the first policy and the environment; STOPPING issues no more groups and
    evaluates once more; FAILED gave up, since group after group failed.
    """

    STARTING = "starting"
    RUNNING = "running"
    PAUSED = "paused"
    STOPPING = "stopping"
    FINISHED = "finished"
    FAILED = "failed"


UNDER_WAY = (RunPhase.RUNNING, RunPhase.PAUSED, RunPhase.STOPPING)
"""The phases in which policies are evaluated and the run may end."""


class Standing(Enum):
    """What this process knows of where the run stands. Not saved: each process finds it out.

    Attributes:
        UNREAD: Redis was not read yet.
        BLANK: Redis knew nothing of this run and still does: a first start, or a lost disk. Nothing
            is written until the learner publishes a policy, since it may put a snapshot back first.
        KNOWN: the state in hand is the run's.
    """

    UNREAD = auto()
    BLANK = auto()
    KNOWN = auto()


@dataclass(frozen=True)
class Sleep:
    """The run's workloads are held at zero replicas, since the Unix time `since_s`.

    Attributes:
        configuration: digest of the run configuration that fell asleep; a stuck run is tried again
            under another one.
    """

    reason: str
    since_s: float
    configuration: str = ""


@dataclass
class FailureRow:
    """Task groups that failed in a row: since the last one that shows that the run gets on.

    Attributes:
        reasons: the newest reason by `FailureStage`.
    """

    num_failed: int = 0
    reasons: dict[str, str] = field(default_factory=dict)

    def add(self, event: LedgerEvent) -> None:
        """Take in that a group failed."""
        self.num_failed += 1
        self.reasons[event.stage] = event.reason

    def clear(self) -> None:
        self.num_failed = 0
        self.reasons.clear()


@dataclass
class GatewayState:
    """Everything a restarted gateway must know.

    Attributes:
        paused_at_s: when a pause was asked for that outlives the gateway; 0 if none is in force.
        next_group_number: always the number of groups the account has seen issued: both change in
            one transaction.
        failure_reasons: of the newest failed and cancelled groups, by id.
        failed_training: training groups that failed since one was trained or skipped, or an update
            was made. That a group was generated says nothing: the teacher and the learner may
            refuse it yet.
        failed_evaluation: episodes of evaluations that failed since one was played.
        unaccounted: what the check at the end of the run found: numbers of groups without exactly
            one outcome.
        finished_target: updates that were wanted when the run finished.
        sleep: none while the run is awake.
        sizes: replicas by workload before the last sleep.
        restoration: the bus's state `RESTORATION`, as of which the tasks that were lost with the
            streams have been sent again.
    """

    phase: RunPhase = RunPhase.STARTING
    is_stop_asked: bool = False
    paused_at_s: float = 0.0
    next_group_number: int = 0
    evaluations: list[Evaluation] = field(default_factory=list)
    environments: dict[str, str] = field(default_factory=dict)
    failure_reasons: dict[str, str] = field(default_factory=dict)
    failed_training: FailureRow = field(default_factory=FailureRow)
    failed_evaluation: FailureRow = field(default_factory=FailureRow)
    unaccounted: list[int] = field(default_factory=list)
    started_at_s: float = 0.0
    finished_at_s: float = 0.0
    finished_target: int = 0
    sleep: Sleep | None = None
    sizes: dict[str, int] = field(default_factory=dict)
    restoration: str = ""

    def apply(self, event: LedgerEvent) -> None:
        """Take in one entry of the account's journal about a training group."""
        if event.outcome in (GroupOutcome.TRAINED, GroupOutcome.SKIPPED):
            self.failed_training.clear()
        if event.outcome is GroupOutcome.FAILED:
            self.failed_training.add(event)
        if event.outcome in (GroupOutcome.FAILED, GroupOutcome.CANCELLED):
            stage = f"{event.stage}: " if event.stage else ""
            self.failure_reasons[event.group_id] = stage + event.reason
            # A dict keeps the order of insertion, so the first is the oldest.
            while len(self.failure_reasons) > KEPT_REASONS:
                self.failure_reasons.pop(next(iter(self.failure_reasons)))

    def to_bytes(self) -> bytes:
        return json.dumps(dataclasses.asdict(self), separators=(",", ":")).encode()

    @classmethod
    def from_bytes(cls, payload: bytes) -> GatewayState:
        """Raises CorruptionError if the record can't be read."""
        try:
            raw = json.loads(payload)
            # What is no plain value is built first; all else are the fields by their names.
            evaluations = [Evaluation(**evaluation) for evaluation in raw.pop("evaluations")]
            phase = RunPhase(raw.pop("phase"))
            sleep = raw.pop("sleep", None)
            failed_training = FailureRow(**raw.pop("failed_training", {}))
            failed_evaluation = FailureRow(**raw.pop("failed_evaluation", {}))
            # As sdar 0.1 counted them; a gateway that starts counts from 0 anyway.
            raw.pop("num_failed_in_a_row", None)
            return cls(
                phase=phase,
                evaluations=evaluations,
                sleep=sleep and Sleep(**sleep),
                failed_training=failed_training,
                failed_evaluation=failed_evaluation,
                **raw,
            )
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise CorruptionError(
                f"The gateway's saved state can't be read ({error}). It was written by another "
                "version of sdar; start the run under a new name."
            ) from error


def compute_digest(config: RunConfig) -> str:
    """Differs between configurations that differ."""
    return hashlib.sha256(config.model_dump_json().encode()).hexdigest()[:16]
