from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from sdar.bus.protocol import BusMemory, StreamLag
from sdar.contracts.streams import Stream
from services.gateway.alarms import (
    JUDGES,
    LEARNER_LEAST_SILENCE_S,
    LEAST_MISREAD_EPISODES,
    LENGTH_DRIFT,
    NO_PROGRESS_S,
    SILENCE_S,
    TEACHER_LAG_S,
    AlarmBoard,
    BusCondition,
    BusState,
    Situation,
    find_invalid_actions,
)
from services.gateway.history import Misread
from services.gateway.state import RunPhase

NOW = 10_000.0
NOTHING, SOME = StreamLag(0, 0, 0.0), StreamLag(3, 2, 1.0)
WAITING = {Stream.TASKS: SOME, Stream.TRAJECTORIES: SOME, Stream.SCORED: SOME}
FINE = Situation(
    now_s=NOW,
    phase=RunPhase.RUNNING,
    bus=BusCondition(BusState.OK, 0.0),
    memory=BusMemory(used_bytes=10, max_bytes=100),
    lags=WAITING,
    heard_at_s={"rollout": NOW - 5, "teacher": NOW - 5, "learner": NOW - 60},
    learner_busy_s=20.0,
    learner_input=Stream.SCORED,
    num_dead_letters=0,
    ledger_gap=0,
    length_drift=0.1,
    progress_at_s=NOW - 5,
)
LONG_AGO = {"rollout": 0.0, "teacher": 0.0, "learner": 0.0}


def names(**changes: Any) -> set[str]:
    situation = dataclasses.replace(FINE, **changes)
    return {name for name, judge in JUDGES.items() if judge(situation)}


def test_a_run_that_goes_well_has_no_alarm() -> None:
    assert names() == set()


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("redis_unreachable", {"bus": BusCondition(BusState.UNREACHABLE, NOW - 3, "no route")}),
        ("redis_full", {"bus": BusCondition(BusState.FULL, NOW - 3, "OOM")}),
        ("redis_memory", {"memory": BusMemory(used_bytes=81, max_bytes=100)}),
        ("rollout_silent", {"heard_at_s": FINE.heard_at_s | {"rollout": NOW - SILENCE_S - 1}}),
        ("teacher_silent", {"heard_at_s": FINE.heard_at_s | {"teacher": NOW - SILENCE_S - 1}}),
        (
            "teacher_lagging",
            {"lags": WAITING | {Stream.TRAJECTORIES: StreamLag(0, 1, TEACHER_LAG_S + 1)}},
        ),
        (
            "learner_silent",
            {"heard_at_s": FINE.heard_at_s | {"learner": NOW - LEARNER_LEAST_SILENCE_S - 1}},
        ),
        ("dead_letters", {"num_dead_letters": 1}),
        ("ledger_gap", {"ledger_gap": 1}),
        ("length_drift", {"length_drift": LENGTH_DRIFT + 0.01}),
        ("invalid_actions", {"misread": Misread(LEAST_MISREAD_EPISODES, "hm")}),
        ("engine_mismatch", {"figures": {"engine_mismatch_abs": 0.011}}),
        ("steps_skipped", {"figures": {"num_skipped_steps_in_a_row": 1.0}}),
        ("no_progress", {"progress_at_s": NOW - NO_PROGRESS_S - 1}),
        ("scaling", {"scaling_problem": "the API server is away"}),
    ],
)
def test_each_trouble_raises_its_own_alarm_and_no_other(name: str, changes: dict[str, Any]) -> None:
    assert names(**changes) == {name}


@pytest.mark.parametrize(
    ("dtype", "figures", "is_wrong"),
    [
        # Measured on sound engines, and on faulty ones.
        ("float32", {"engine_mismatch_abs": 3.1e-5, "probe_mismatch": 2.5e-5}, False),
        ("bfloat16", {"engine_mismatch_abs": 0.13, "probe_mismatch": 0.13}, False),
        ("float32", {"engine_mismatch_abs": 0.13}, True),
        ("bfloat16", {"engine_mismatch_abs": 1.4}, True),
        # At staleness 2 no token is of the weights that are trained: still there are two figures.
        ("float32", {"policy_behavior_gap_abs": 0.4, "probe_mismatch": 2.5e-5}, False),
        ("float32", {"policy_behavior_gap_abs": 0.4, "probe_mismatch": 0.13}, True),
        ("bfloat16", {"policy_behavior_gap_abs": 1.4}, True),
        ("float32", {"probe_mismatch": math.nan}, True),
    ],
)
def test_a_sampler_that_samples_from_another_policy_is_found_at_any_staleness(
    dtype: str, figures: dict[str, float], is_wrong: bool
) -> None:
    assert names(dtype=dtype, figures=figures) == ({"engine_mismatch"} if is_wrong else set())


def test_every_alarm_has_a_test() -> None:
    test: Any = test_each_trouble_raises_its_own_alarm_and_no_other
    marks = test.pytestmark
    assert {name for name, _ in marks[0].args[1]} == JUDGES.keys()


def test_a_service_with_nothing_to_do_may_be_silent() -> None:
    assert names(heard_at_s=LONG_AGO, lags=dict.fromkeys(WAITING, NOTHING)) == set()


def test_what_the_learner_holds_until_its_checkpoint_is_no_alarm() -> None:
    assert (
        names(
            heard_at_s=FINE.heard_at_s | {"learner": 0.0},
            lags={Stream.SCORED: StreamLag(0, 50, 900.0)},
        )
        == set()
    )


def test_a_slow_learner_is_given_the_time_its_updates_take() -> None:
    heard = FINE.heard_at_s | {"learner": NOW - 900}
    assert names(heard_at_s=heard, learner_busy_s=400.0) == set()
    assert names(heard_at_s=heard, learner_busy_s=200.0) == {"learner_silent"}


def test_nobody_is_called_silent_for_what_an_absent_redis_could_not_carry() -> None:
    away = BusCondition(BusState.UNREACHABLE, NOW - 500, "away")
    assert names(heard_at_s=LONG_AGO, bus=away) == {"redis_unreachable"}
    assert names(heard_at_s=LONG_AGO, bus=BusCondition(BusState.OK, NOW - 5)) == set()


@pytest.mark.parametrize("phase", [RunPhase.FINISHED, RunPhase.FAILED])
def test_a_run_that_is_over_waits_for_nobody(phase: RunPhase) -> None:
    old = dict.fromkeys(WAITING, StreamLag(1, 1, NOW))
    assert names(phase=phase, heard_at_s=LONG_AGO, lags=old, progress_at_s=0.0) == set()


def test_a_pause_is_no_lack_of_progress_and_a_start_that_waits_is() -> None:
    assert names(phase=RunPhase.PAUSED, progress_at_s=0.0) == set()
    assert names(phase=RunPhase.STARTING, progress_at_s=0.0) == {"no_progress"}


def test_nobody_is_missed_while_a_run_sleeps_nor_while_its_workers_come_up_again() -> None:
    old = dict.fromkeys(WAITING, StreamLag(1, 1, NOW))
    assert names(is_asleep=True, heard_at_s=LONG_AGO, lags=old, progress_at_s=0.0) == set()
    waking = {"heard_at_s": dict.fromkeys(LONG_AGO, NOW + 300), "lags": old, "progress_at_s": NOW}
    assert names(expected_at_s=NOW + 300, **waking) == set()
    assert names(expected_at_s=NOW - 1, **waking) == {"teacher_lagging"}


def test_a_method_without_a_teacher_misses_none() -> None:
    old = {Stream.TRAJECTORIES: StreamLag(1, 1, NOW)}
    assert (
        names(
            heard_at_s=FINE.heard_at_s | {"teacher": 0.0},
            lags=old,
            learner_input=Stream.TRAJECTORIES,
        )
        == set()
    )


def test_a_redis_without_a_bound_of_its_own_is_never_nearly_full() -> None:
    assert names(memory=BusMemory(used_bytes=2**40, max_bytes=0)) == set()


def test_an_alarm_stays_up_since_it_was_raised_and_comes_down_when_its_trouble_ends() -> None:
    board = AlarmBoard()
    board.update(dataclasses.replace(FINE, num_dead_letters=1))
    board.update(dataclasses.replace(FINE, num_dead_letters=2, now_s=NOW + 6))
    assert [(alarm.name, alarm.since_s) for alarm in board.alarms] == [("dead_letters", NOW)]
    assert "2 entries" in board.alarms[0].message
    board.update(FINE)
    assert board.alarms == []


def test_invalid_actions_are_shown_with_a_response_and_what_is_expected() -> None:
    misread = Misread(16, "I\x1b[2J think " + "x" * 1000)
    text = find_invalid_actions(
        dataclasses.replace(FINE, misread=misread, action_format="One whole number.")
    )
    assert "newest 16 episodes" in text
    assert "'I\\x1b[2J think xxx" in text
    assert "The environment expects: One whole number." in text
    assert len(text) < 700
    assert not find_invalid_actions(dataclasses.replace(FINE, misread=Misread(15, "hm")))
