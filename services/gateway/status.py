"""Where the run stands, as the API gives it."""

from __future__ import annotations

import dataclasses
import math
from itertools import chain

from sdar.bus.ledger import format_group_id
from sdar.contracts.roles import WORKERS
from sdar.contracts.streams import ConsumerGroup

from .replies import AlarmReply, BusReply, EvaluationReply, RunReply, SleepReply
from .scheduler import Scheduler
from .state import Sleep
from .watch import Watch

_SHOWN_FAILURES = 10


def describe_run(scheduler: Scheduler, watch: Watch) -> RunReply:
    """The run's status, from what the scheduler holds and the watch saw last."""
    config = scheduler.config
    state = scheduler.state
    lags = {str(stream): dataclasses.asdict(lag) for stream, lag in watch.lags.items()}
    evaluations = [EvaluationReply.model_validate(one.summary()) for one in state.evaluations]
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
        ledger_gap_ids=list(map(format_group_id, state.unaccounted)),
        failures=_list_newest(state.failure_reasons),
        length_drift=scheduler.lengths.compute_drift(),
        figures=_list_finite(scheduler.history.collect_figures()),
        alarms=_describe_alarms(watch),
        bus=_describe_bus(watch),
        dead_letters=watch.num_dead_letters,
        stream_lags=lags,
        instances=_count_workers(scheduler),
        evaluations=evaluations,
        sleep=describe_sleep(state.sleep),
        started_at_s=state.started_at_s,
        finished_at_s=state.finished_at_s,
    )


def describe_sleep(sleep: Sleep | None) -> SleepReply | None:
    """Why and since when the run sleeps; None while it is awake."""
    return None if sleep is None else SleepReply(reason=sleep.reason, since_s=sleep.since_s)


def _describe_alarms(watch: Watch) -> list[AlarmReply]:
    return [AlarmReply(**dataclasses.asdict(alarm)) for alarm in watch.board.alarms]


def _list_finite(figures: dict[str, float]) -> dict[str, float]:
    """JSON knows no other numbers; what is none raises an alarm."""
    return {name: value for name, value in figures.items() if math.isfinite(value)}


def _list_newest(failure_reasons: dict[str, str]) -> dict[str, str]:
    newest = list(failure_reasons.items())[-_SHOWN_FAILURES:]
    return dict(reversed(newest))


def _describe_bus(watch: Watch) -> BusReply:
    condition = dataclasses.asdict(watch.condition)
    memory = watch.memory
    return BusReply(**condition, used_bytes=memory.used_bytes, max_bytes=memory.max_bytes)


def _count_workers(scheduler: Scheduler) -> dict[str, int]:
    """By role, the workers heard from lately; a role that takes nothing in this run is left out."""
    readers = set(chain.from_iterable(scheduler.config.stream_consumers.values()))
    here = (role for role in WORKERS if ConsumerGroup(role) in readers)
    return {role.value: scheduler.history.count_instances(role) for role in here}
