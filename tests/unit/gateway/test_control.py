"""The run's phases on plain states: what may be asked for when, and what a restart begins with."""

from __future__ import annotations

import pytest

from sdar.contracts.errors import RefusedError
from sdar.contracts.types import MetricRecord
from sdar.in_process.memory_bus import MemoryBus
from services.gateway.commit import Committer
from services.gateway.control import RunControl
from services.gateway.state import FailureRow, GatewayState, RunPhase, Sleep, compute_digest

from .fakes import Clock, build_config


def build_control(
    state: GatewayState, *, is_scaled: bool = True, num_updates: int = 2
) -> RunControl:
    config = build_config(num_updates=num_updates)
    committer = Committer(MemoryBus(config.stream_consumers))
    committer.draft.state = state
    return RunControl(config, committer, Clock(), is_scaled=is_scaled)


def sleep_of_this_configuration() -> Sleep:
    return Sleep("idle", 0.0, compute_digest(build_config(num_updates=2)))


@pytest.mark.parametrize("ask", ["pause", "resume", "stop"])
@pytest.mark.parametrize(
    ("phase", "allowed"),
    [
        (RunPhase.STARTING, set()),
        (RunPhase.RUNNING, {"pause", "resume", "stop"}),
        (RunPhase.PAUSED, {"pause", "resume", "stop"}),
        (RunPhase.STOPPING, {"stop"}),
        (RunPhase.FAILED, {"resume"}),
        (RunPhase.FINISHED, set()),
    ],
)
def test_each_phase_allows_what_can_be_done_in_it_and_refuses_the_rest_unchanged(
    phase: RunPhase, allowed: set[str], ask: str
) -> None:
    state = GatewayState(phase=phase)
    control = build_control(state)
    if ask in allowed:
        getattr(control, ask)()
        return
    with pytest.raises(RefusedError, match=phase.value):
        getattr(control, ask)()
    assert state == GatewayState(phase=phase)


@pytest.mark.parametrize(
    ("state", "want"),
    [
        (GatewayState(), RunPhase.RUNNING),
        (GatewayState(paused_at_s=1.0), RunPhase.PAUSED),
        (GatewayState(is_stop_asked=True), RunPhase.STOPPING),
        (GatewayState(paused_at_s=1.0, is_stop_asked=True), RunPhase.STOPPING),
    ],
)
def test_a_start_leads_to_what_was_asked_for_last(state: GatewayState, want: RunPhase) -> None:
    build_control(state).start()
    assert state.phase is want


@pytest.mark.parametrize(
    ("before", "want"),
    [
        (GatewayState(phase=RunPhase.RUNNING), RunPhase.STARTING),
        (GatewayState(phase=RunPhase.FAILED), RunPhase.STARTING),
        (
            GatewayState(phase=RunPhase.FAILED, sleep=sleep_of_this_configuration()),
            RunPhase.FAILED,
        ),
        (GatewayState(phase=RunPhase.FAILED, sleep=Sleep("idle", 0.0, "x")), RunPhase.STARTING),
        (GatewayState(phase=RunPhase.FINISHED, finished_target=2), RunPhase.FINISHED),
        (GatewayState(phase=RunPhase.FINISHED, finished_target=1), RunPhase.STARTING),
    ],
)
def test_a_restart_begins_anew_unless_the_run_is_finished_or_sleeps_as_failed_unchanged(
    before: GatewayState, want: RunPhase
) -> None:
    build_control(before).begin()
    assert before.phase is want


def test_a_run_that_sleeps_paused_sleeps_on_under_another_configuration() -> None:
    state = GatewayState(
        phase=RunPhase.PAUSED, paused_at_s=1.0, sleep=Sleep("paused", 0.0, "another")
    )
    control = build_control(state)
    control.begin()
    assert state.sleep is not None
    assert control.woken_at_s == 0.0


def test_a_run_that_nothing_scales_any_more_is_awake() -> None:
    state = GatewayState(phase=RunPhase.PAUSED, paused_at_s=1.0, sleep=Sleep("paused", 0.0))
    build_control(state, is_scaled=False).begin()
    assert state.sleep is None
    assert state.paused_at_s == 1.0


def test_a_run_gives_up_after_enough_failures_in_a_row_and_no_earlier() -> None:
    state = GatewayState(
        phase=RunPhase.RUNNING, failed_training=FailureRow(7, {"environment": "broken"})
    )
    control = build_control(state)
    control.give_up_if_hopeless(num_updates=0, num_waiting=0)
    assert state.phase is RunPhase.RUNNING
    state.failed_training.num_failed = 8
    control.give_up_if_hopeless(num_updates=0, num_waiting=0)
    assert state.phase is RunPhase.FAILED
    assert control.detail.startswith("8 groups failed in a row")


def say_skipped(num_steps: float, at_s: float) -> MetricRecord:
    return MetricRecord("test", "learner", "l", 3, at_s, {"num_skipped_steps_in_a_row": num_steps})


def test_a_run_gives_up_after_three_skipped_steps_in_a_row_and_a_resumed_one_is_tried_again() -> (
    None
):
    state = GatewayState(phase=RunPhase.RUNNING)
    control = build_control(state)
    began_s = control._clock()
    for harmless in (
        None,
        say_skipped(2.0, began_s + 1),
        say_skipped(3.0, began_s - 1),  # of before this process began
        MetricRecord("test", "learner", "l", 3, began_s + 1, {"loss": 0.0}),
    ):
        control.give_up_if_not_finite(harmless)
        assert state.phase is RunPhase.RUNNING
    told = say_skipped(3.0, began_s + 1)
    control.give_up_if_not_finite(told)
    assert state.phase is RunPhase.FAILED
    assert "skipped 3 optimizer steps in a row" in control.detail
    assert "training.learning_rate" in control.detail
