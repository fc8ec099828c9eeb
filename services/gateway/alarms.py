"""The alarms: what is wrong with a run, as early as it can be known. Pure; a person acts on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial

import structlog

from sdar.bus.protocol import BusMemory, StreamLag
from sdar.contracts.roles import ROLES, WORKERS, Role, RoleSpec
from sdar.contracts.streams import Stream

from .history import Misread
from .state import RunPhase

log = structlog.get_logger()

SILENCE_S = 60.0
"""Rollout workers and teachers report every few seconds; this many missed in a row are no hiccup.
"""
LEARNER_LEAST_SILENCE_S = 300.0
"""The learner reports once an update. The first one compiles kernels, so less would cry wolf."""
LEARNER_SILENCE_FACTOR = 3.0
"""An update that takes this many times the slowest of the newest ones isn't merely slow."""
TEACHER_LAG_S = 120.0
"""A trajectory is scored in seconds; one that has waited this long will soon be stale."""
MEMORY_SHARE = 0.8
"""Share of Redis' memory in use that leaves time to act before writes are refused."""
LENGTH_DRIFT = 0.25
"""A quarter of all episodes would have to be of other lengths for what is trained to look like what
is played.
"""
LEAST_MISREAD_EPISODES = 16
"""Episodes without one valid action, below which a model that is new to the task may just have
fumbled.
"""
MISMATCH_TOLERANCE = {"float32": 0.01, "bfloat16": 0.3}
"""Most nats by which a sampler's log-probs may differ from the learner's of the same weights, on
average, by the number format. Measured at most: 3e-5 in float32 and 0.13 in bfloat16, where an
engine that serves other weights, or scales its logits otherwise, is off by 1.4 to 14.
"""
MOST_POLICY_GAP = 1.0
"""Nats by which they may differ over all tokens; in older ones is what the policy has learnt since.
Beyond it a token is e times as likely as when it was sampled, or as unlikely: whether the engine is
wrong or the policy runs away, this is no data to train on. Measured in the demo (examples/
household.yaml) at staleness 2: at most 0.022 nats, and 12 to 89 under a learning rate of 1.
"""
NO_PROGRESS_S = 600.0
"""No group played or closed, no evaluation episode, no new policy: longer than the longest episode
should take.
"""

_SHOWN_CHARACTERS = 200
"""Of a response in an alarm."""

_ACTIVE = (RunPhase.RUNNING, RunPhase.PAUSED, RunPhase.STOPPING)


class BusState(StrEnum):
    """UNREACHABLE: Redis does not answer; FULL: it answers and refuses writes."""

    OK = "ok"
    UNREACHABLE = "unreachable"
    FULL = "full"


@dataclass(frozen=True, slots=True)
class BusCondition:
    """Where the bus stands since the Unix time `since_s`, and what it last said."""

    state: BusState
    since_s: float
    message: str = ""


@dataclass(frozen=True, slots=True)
class Alarm:
    """Something is wrong since the Unix time `since_s`."""

    name: str
    message: str
    since_s: float


@dataclass(frozen=True, slots=True)
class Situation:
    """What the alarms judge, as of one moment. Times are Unix times.

    Attributes:
        lags: of each consumed stream, as last known.
        heard_at_s: by service, when one of its processes last reported; for one never heard, from
            when on it is missed.
        learner_busy_s: the slowest of the learner's newest updates, without its waiting; 0 before
            the first.
        progress_at_s: when the account, the policy or an evaluation last moved.
        is_asleep: the idle guard holds the workers at zero: nobody can be missed.
        expected_at_s: until when workers of a run that was woken may take to come up.
        scaling_problem: why the scaler cannot do its work.
        misread: the newest episodes, if none of their actions was valid.
        action_format: how the environment wants an action to be written; empty if it does not say.
        figures: of the newest update and of the rollout workers, by their names in docs/metrics.md;
            what was not measured is absent.
        dtype: number format of the policy.
    """

    now_s: float
    phase: RunPhase
    bus: BusCondition
    memory: BusMemory
    lags: Mapping[Stream, StreamLag]
    heard_at_s: Mapping[str, float]
    learner_busy_s: float
    learner_input: Stream
    num_dead_letters: int
    ledger_gap: int
    length_drift: float
    progress_at_s: float
    is_asleep: bool = False
    expected_at_s: float = 0.0
    scaling_problem: str = ""
    misread: Misread | None = None
    action_format: str = ""
    figures: Mapping[str, float] = field(default_factory=dict)
    dtype: str = "float32"

    def is_waiting(self, stream: Stream) -> bool:
        lag = self.lags.get(stream)
        return lag is not None and lag.num_undelivered + lag.num_pending > 0

    def silence_s(self, service: str) -> float:
        """How long nothing was heard of a service over a bus that could have carried it."""
        # What nobody could have sent, or nobody was there to send, is no silence.
        if self.bus.state is not BusState.OK or self.phase not in _ACTIVE or self.is_asleep:
            return 0.0
        return self.now_s - max(self.heard_at_s.get(service, self.now_s), self.bus.since_s)


def find_redis_unreachable(situation: Situation) -> str:
    bus = situation.bus
    if bus.state is not BusState.UNREACHABLE:
        return ""
    return f"{bus.message} Everything waits for it, for {situation.now_s - bus.since_s:.0f} s now."


def find_redis_full(situation: Situation) -> str:
    bus = situation.bus
    if bus.state is not BusState.FULL:
        return ""
    full_s = situation.now_s - bus.since_s
    return f"{bus.message} Everything waits until it takes writes again, for {full_s:.0f} s now."


def find_redis_memory(situation: Situation) -> str:
    memory = situation.memory
    # 0: this Redis has no bound of its own.
    if not memory.max_bytes or memory.used_bytes <= MEMORY_SHARE * memory.max_bytes:
        return ""
    used_mib = memory.used_bytes / 2**20
    max_mib = memory.max_bytes / 2**20
    return (
        f"Redis holds {used_mib:.0f} of {max_mib:.0f} MiB; beyond that it refuses writes. Raise "
        "its maxmemory."
    )


def find_worker_silent(row: RoleSpec, situation: Situation) -> str:
    """The alarm `<role>_silent` of a role that any number of processes may hold."""
    # Silent and idle may be scaled down; silent with work at hand is dead or stuck.
    silence_s = situation.silence_s(row.name)
    if silence_s <= SILENCE_S:
        return ""
    # Without a teacher the learner reads what a teacher would: then nobody misses that role.
    own = (stream for stream in row.reads if stream is not situation.learner_input)
    waiting = [stream for stream in own if situation.is_waiting(stream)]
    if not waiting:
        return ""
    return (
        f"No {row.name} process was heard from for {silence_s:.0f} s while entries wait for it in "
        f"{', '.join(waiting)}. See its log."
    )


def find_teacher_lagging(situation: Situation) -> str:
    lag = situation.lags.get(Stream.TRAJECTORIES)
    has_teacher = situation.learner_input is not Stream.TRAJECTORIES
    if not has_teacher or situation.phase not in _ACTIVE or lag is None:
        return ""
    # One that was woken finds what has waited while it slept.
    is_excused = situation.is_asleep or situation.now_s < situation.expected_at_s
    if lag.oldest_age_s <= TEACHER_LAG_S or is_excused:
        return ""
    waiting = lag.num_undelivered + lag.num_pending
    return (
        f"{waiting} trajectories wait for the teacher, the oldest for {lag.oldest_age_s:.0f} s; "
        "they may go stale."
    )


def find_learner_silent(situation: Situation) -> str:
    silence_s = situation.silence_s(Role.LEARNER)
    lag = situation.lags.get(situation.learner_input)
    bound_s = max(LEARNER_LEAST_SILENCE_S, LEARNER_SILENCE_FACTOR * situation.learner_busy_s)
    # What it has read and holds until its next checkpoint is no sign of trouble; what it doesn't
    # read is.
    if silence_s <= bound_s or lag is None or not lag.num_undelivered:
        return ""
    return (
        f"No update for {silence_s:.0f} s while {lag.num_undelivered} episodes wait for the "
        "learner. See its log."
    )


def find_dead_letters(situation: Situation) -> str:
    if not situation.num_dead_letters:
        return ""
    return (
        f"{situation.num_dead_letters} entries were set aside. Look at them with `sdar dead-letter "
        "list`."
    )


def find_ledger_gap(situation: Situation) -> str:
    if not situation.ledger_gap:
        return ""
    return (
        f"The account of groups cannot explain {situation.ledger_gap} of them: a defect, or "
        "somebody wrote into Redis."
    )


def find_length_drift(situation: Situation) -> str:
    drift = situation.length_drift
    if drift <= LENGTH_DRIFT:
        return ""
    return (
        f"Episodes that are trained differ in length from those played by {drift:.2f} (total "
        "variation): long ones are dropped more often. Raise training.max_staleness or add rollout "
        "workers."
    )


def find_invalid_actions(situation: Situation) -> str:
    misread = situation.misread
    if misread is None or misread.num_episodes < LEAST_MISREAD_EPISODES:
        return ""
    return (
        f"No action was valid in the newest {misread.num_episodes} episodes, so nothing can be "
        f"learned. The newest response: {_shorten(misread.response)!r}. The environment expects: "
        f"{_shorten(situation.action_format) or 'it does not say; set its action_format'}. Let "
        "prompts say so (rollout.show_actions), leave room for whole responses "
        "(rollout.max_response_tokens), or take a model that follows it."
    )


def _shorten(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."


def find_engine_mismatch(situation: Situation) -> str:
    """Whether what is sampled is what is trained: by each figure there is.

    One of them, that over all tokens, is there at any staleness.
    """
    tolerance = MISMATCH_TOLERANCE[situation.dtype]
    judged = (
        ("engine_mismatch_abs", tolerance, "on tokens of the weights that are trained"),
        ("probe_mismatch", tolerance, "on the probe of the version that is sampled from"),
        ("policy_behavior_gap_abs", MOST_POLICY_GAP, "on all tokens of the newest update"),
    )
    for name, bound, where in judged:
        value = situation.figures.get(name, 0.0)
        # Negated, so that no number at all is an alarm, too.
        if not value <= bound:
            return (
                f"The sampler's log-probs differ from the learner's by {value:.2g} nats {where}; "
                f"in {situation.dtype} at most {bound:g} is right. Do not trust this run: see "
                "docs/models.md for what the engine computes otherwise."
            )
    return ""


def find_steps_skipped(situation: Situation) -> str:
    num_skipped = situation.figures.get("num_skipped_steps_in_a_row", 0.0)
    if num_skipped < 1:
        return ""
    return (
        f"The learner skipped its newest {num_skipped:.0f} optimizer steps: a loss or the gradient "
        "norm was no finite number. Lower training.learning_rate, or look at the groups that its "
        "log names."
    )


def find_no_progress(situation: Situation) -> str:
    idle_s = situation.now_s - situation.progress_at_s
    if (
        idle_s <= NO_PROGRESS_S
        or situation.is_asleep
        or situation.phase not in (RunPhase.STARTING, RunPhase.RUNNING, RunPhase.STOPPING)
    ):
        return ""
    return f"Nothing was played, trained or evaluated for {idle_s / 60:.0f} minutes."


def find_scaling(situation: Situation) -> str:
    return situation.scaling_problem


JUDGES: dict[str, Callable[[Situation], str]] = {
    "redis_unreachable": find_redis_unreachable,
    "redis_full": find_redis_full,
    "redis_memory": find_redis_memory,
    **{f"{role}_silent": partial(find_worker_silent, ROLES[role]) for role in WORKERS},
    "teacher_lagging": find_teacher_lagging,
    "learner_silent": find_learner_silent,
    "dead_letters": find_dead_letters,
    "ledger_gap": find_ledger_gap,
    "length_drift": find_length_drift,
    "invalid_actions": find_invalid_actions,
    "engine_mismatch": find_engine_mismatch,
    "steps_skipped": find_steps_skipped,
    "no_progress": find_no_progress,
    "scaling": find_scaling,
}
"""Every alarm by its name; each says what is wrong in a sentence, or returns an empty text."""


class AlarmBoard:
    """The alarms that are up, each since when; a change is logged."""

    def __init__(self) -> None:
        self.alarms: list[Alarm] = []

    def update(self, situation: Situation) -> None:
        """Judge the situation; an alarm that stays up keeps the time since when it is."""
        since_s = {alarm.name: alarm.since_s for alarm in self.alarms}
        self.alarms = []
        for name, judge in JUDGES.items():
            if text := judge(situation):
                self.alarms.append(Alarm(name, text, since_s.get(name, situation.now_s)))
        for alarm in self.alarms:
            if alarm.name not in since_s:
                log.warning("alarm_raised", name=alarm.name, message=alarm.message)
        for name in since_s.keys() - {alarm.name for alarm in self.alarms}:
            log.info("alarm_cleared", name=name)
