"""What the gateway measures of the run as a whole: each declared here once.

docs/metrics.md lists them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from prometheus_client import REGISTRY, CollectorRegistry

from sdar.bus.ledger import LedgerAccount
from sdar.bus.protocol import BusMemory, StreamLag
from sdar.config import TrainingConfig
from sdar.contracts.streams import Stream
from sdar.contracts.types import GroupOutcome, LedgerEvent
from sdar.process.measurements import (
    TURNS_BUCKETS,
    Counter,
    Declarations,
    Gauge,
    Histogram,
    Label,
    LabelBound,
    Meters,
)

from .alarms import JUDGES, Alarm, BusState
from .evaluation import Evaluation
from .state import RunPhase

_EVALUATED = (Label("sampling", ("sampled", "greedy")), Label("task_type"))
_STREAM = Label("stream", tuple(Stream))

GATEWAY = Declarations()

LEDGER_GROUPS = GATEWAY.declare(
    Gauge(
        "sdar_ledger_groups",
        "groups",
        "Training groups by state of their account.",
        (Label("state", (*GroupOutcome, "running", "buffered")),),
    )
)
LEDGER_GAP = GATEWAY.declare(
    Gauge(
        "sdar_ledger_gap",
        "groups",
        "Groups the ledger cannot explain; anything but 0 is a defect.",
    )
)
POLICY_VERSION = GATEWAY.declare(
    Gauge("sdar_policy_version", "version", "Newest published policy version.")
)
UPDATES = GATEWAY.declare(Gauge("sdar_updates", "updates", "Optimizer updates so far."))
TARGET_UPDATES = GATEWAY.declare(
    Gauge("sdar_target_updates", "updates", "Updates that the run is for.")
)
MAX_STALENESS = GATEWAY.declare(
    Gauge(
        "sdar_max_staleness_updates",
        "updates",
        "Bound of staleness (training.max_staleness).",
    )
)
PHASE = GATEWAY.declare(
    Gauge(
        "sdar_run_phase",
        "0 or 1",
        "1 for the phase that the run is in.",
        (Label("phase", tuple(RunPhase)),),
    )
)
EVALUATION_EPISODES = GATEWAY.declare(
    Gauge(
        "sdar_evaluation_episodes",
        "episodes",
        "Episodes of the newest complete evaluation, sampled or greedy.",
        _EVALUATED,
    )
)
EVALUATION_SUCCESSES = GATEWAY.declare(
    Gauge(
        "sdar_evaluation_successes",
        "episodes",
        "Those that solved their task.",
        _EVALUATED,
    )
)
UNREADABLE_EVENTS = GATEWAY.declare(
    Counter("sdar_unreadable_events_total", "events", "Events that could not be decoded.")
)
EPISODE_TURNS = GATEWAY.declare(
    Histogram(
        "sdar_episode_turns",
        "turns",
        "Turns of training episodes, by the outcome of their group.",
        (Label("outcome", tuple(GroupOutcome)),),
        buckets=TURNS_BUCKETS,
    )
)
LENGTH_DRIFT = GATEWAY.declare(
    Gauge(
        "sdar_episode_length_drift",
        "0 to 1",
        "Total variation distance of episode length, played to trained.",
    )
)
STREAM_ENTRIES = GATEWAY.declare(
    Gauge(
        "sdar_stream_entries",
        "entries",
        "Entries a stream's consumers have not finished.",
        (_STREAM, Label("state", ("undelivered", "pending"))),
    )
)
STREAM_AGE = GATEWAY.declare(
    Gauge(
        "sdar_stream_oldest_age_seconds",
        "seconds",
        "Age of the oldest of them.",
        (_STREAM,),
    )
)
DEAD_LETTERS = GATEWAY.declare(Gauge("sdar_dead_letters", "letters", "Entries set aside."))
REDIS_MEMORY = GATEWAY.declare(
    Gauge(
        "sdar_redis_memory_bytes",
        "bytes",
        "Redis' memory: used, and most.",
        (Label("kind", ("used", "most")),),
    )
)
BUS_STATE = GATEWAY.declare(
    Gauge(
        "sdar_bus_state",
        "0 or 1",
        "1 for the state that the bus is in.",
        (Label("state", tuple(BusState)),),
    )
)
ALARM = GATEWAY.declare(
    Gauge(
        "sdar_alarm",
        "0 or 1",
        "1 while an alarm is up.",
        (Label("name", tuple(JUDGES)),),
    )
)


class GatewayMetrics(Meters):
    """The gateway's meters, and how it reads what it sees into them.

    Args:
        registry: none makes one of its own.
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        super().__init__(GATEWAY, registry)
        self._bound = LabelBound()

    def observe_lengths(self, event: LedgerEvent) -> None:
        """Count the lengths of a GENERATED or TRAINED event; other events have none."""
        for turns in event.episode_turns:
            self.observe(EPISODE_TURNS, turns, outcome=event.outcome)

    def observe_run(
        self,
        ledger: LedgerAccount,
        evaluations: Sequence[Evaluation],
        *,
        ledger_gap: int,
        phase: RunPhase,
        policy_version: int,
        num_updates: int,
        training: TrainingConfig,
        length_drift: float,
    ) -> None:
        """The run as its scheduler sees it."""
        for state, number in ledger.counts().items():
            self.set(LEDGER_GROUPS, number, state=state)
        self.set(LEDGER_GAP, ledger_gap)
        self.set(POLICY_VERSION, policy_version)
        self.set(UPDATES, num_updates)
        self.set(TARGET_UPDATES, training.num_updates)
        self.set(MAX_STALENESS, training.max_staleness)
        for other in RunPhase:
            self.set(PHASE, other is phase, phase=other)
        self.set(LENGTH_DRIFT, length_drift)
        self._observe_evaluations(evaluations)

    def _observe_evaluations(self, evaluations: Sequence[Evaluation]) -> None:
        """The newest complete one of each sampling: of two in the list, the later one."""
        complete = [evaluation for evaluation in evaluations if evaluation.is_complete]
        newest = {evaluation.is_greedy: evaluation for evaluation in complete}
        for evaluation in newest.values():
            self._observe_evaluation(evaluation)

    def _observe_evaluation(self, evaluation: Evaluation) -> None:
        sampling = "greedy" if evaluation.is_greedy else "sampled"
        # Types beyond the bound are pooled, so that none is lost.
        counts = {"other": [0, 0]}
        for task_type, (solved, played) in evaluation.successes.items():
            kind = counts.setdefault(self._bound(task_type), [0, 0])
            kind[0] += solved
            kind[1] += played
        for task_type, (solved, played) in counts.items():
            if played:
                self.set(EVALUATION_SUCCESSES, solved, sampling=sampling, task_type=task_type)
                self.set(EVALUATION_EPISODES, played, sampling=sampling, task_type=task_type)

    def observe_bus(
        self,
        state: BusState,
        lags: Mapping[Stream, StreamLag],
        memory: BusMemory,
        num_dead_letters: int,
        alarms: Sequence[Alarm],
    ) -> None:
        """The bus as the watch sees it, and the alarms that are up."""
        for stream, lag in lags.items():
            self.set(STREAM_ENTRIES, lag.num_undelivered, stream=stream, state="undelivered")
            self.set(STREAM_ENTRIES, lag.num_pending, stream=stream, state="pending")
            self.set(STREAM_AGE, lag.oldest_age_s, stream=stream)
        self.set(REDIS_MEMORY, memory.used_bytes, kind="used")
        self.set(REDIS_MEMORY, memory.max_bytes, kind="most")
        self.set(DEAD_LETTERS, num_dead_letters)
        for other in BusState:
            self.set(BUS_STATE, other is state, state=other)
        self._observe_alarms(alarms)

    def _observe_alarms(self, alarms: Sequence[Alarm]) -> None:
        up = {alarm.name for alarm in alarms}
        for name in JUDGES:
            self.set(ALARM, name in up, name=name)


def build_metrics() -> GatewayMetrics:
    """The process's own metrics, on the default registry that /metrics serves."""
    return GatewayMetrics(REGISTRY)
