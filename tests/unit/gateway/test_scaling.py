"""What size each workload is to have, and when a run is idle: signals, hysteresis and the scaling
file.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdar.contracts.roles import Role
from services.gateway.alarms import LEARNER_SILENCE_FACTOR, NO_PROGRESS_S, BusState
from services.gateway.scaling.file import ScalingFileReader, Workload
from services.gateway.scaling.governor import LOOKS_DOWN, LOOKS_UP, MISSING_S, SETTLE_S, Governor
from services.gateway.scaling.scaler import LOOK_S
from services.gateway.scaling.signals import Advice, Load, Stillness, advise, find_idleness
from services.gateway.state import RunPhase

GOOD_FILE = """
mode: gateway
idle_after_s: 60
workloads:
  rollout: {kind: Deployment, name: sdar-rollout, min: 1, max: 4}
  learner: {kind: StatefulSet, name: sdar-learner, min: 1, max: 1}
"""


def build_load(*, wait: float = 0.1, idle: tuple[float, ...] = (0.0,), **changes: Any) -> Load:
    """A load in which the learner waits for a share of its time and each rollout worker is idle for
    one.
    """
    workers = {"rollout": {f"r{i}": [{"waiting_share": share}] for i, share in enumerate(idle)}}
    values = {
        "updates": [{"wait_share": wait}] * 3,
        "workers": workers,
        "num_admitted": 100,
    } | changes
    return Load(**values)


def build_teachers(*idle: float) -> dict[str, Any]:
    return {"teacher": {f"t{i}": [{"waiting_share": share}] for i, share in enumerate(idle)}}


def build_sessions(*, running: float, waiting: float, num_workers: int = 1) -> Load:
    record = {"running_episodes": running / num_workers, "waiting_sessions": waiting / num_workers}
    return Load(
        workers={"rollout": {f"r{i}": [record] for i in range(num_workers)}},
        sessions_per_replica=10,
    )


@pytest.mark.parametrize(
    ("wait", "replicas", "wanted"), [(0.5, 2, 4), (0.25, 3, 4), (0.9, 2, 4), (0.3, 1, 2)]
)
def test_rollout_grows_by_what_the_learner_lacks_and_at_most_doubles(
    wait: float, replicas: int, wanted: int
) -> None:
    assert advise(Role.ROLLOUT, build_load(wait=wait), replicas).replicas == wanted


def test_a_learner_that_waits_a_little_changes_nothing() -> None:
    assert advise(Role.ROLLOUT, build_load(wait=0.15, idle=(0.9, 0.9)), 2).replicas == 2


@pytest.mark.parametrize(
    ("narrow", "changes"),
    [
        ("teacher", {"num_lagging": 40}),
        ("sessions", {"workers": {"rollout": {"r": [{"waiting_sessions": 3.0}]}}}),
        ("max_staleness", {"idle": (0.5, 0.6)}),
    ],
)
def test_rollout_does_not_grow_where_something_else_is_narrow(
    narrow: str, changes: dict[str, Any]
) -> None:
    advice = advise(Role.ROLLOUT, build_load(wait=0.6, **changes), 2)
    assert advice.replicas == 2
    assert narrow in advice.reason


def test_rollout_shrinks_when_a_whole_worker_is_spare_and_the_learner_never_waits() -> None:
    assert advise(Role.ROLLOUT, build_load(wait=0.01, idle=(0.4, 0.4, 0.5)), 3).replicas == 2
    assert advise(Role.ROLLOUT, build_load(wait=0.01, idle=(0.3, 0.3, 0.5)), 3).replicas == 3
    assert advise(Role.ROLLOUT, build_load(wait=0.01, idle=(1.0,)), 1).replicas == 1


def test_one_update_held_up_by_an_evaluation_is_no_signal() -> None:
    waits = [{"wait_share": share} for share in (0.05, 0.95, 0.06)]
    assert advise(Role.ROLLOUT, build_load(updates=waits), 2).replicas == 2
    assert "1 updates" in advise(Role.ROLLOUT, build_load(updates=waits[1:2]), 2).reason


def test_the_teacher_grows_when_what_admission_allows_piles_up_before_it_or_gets_old() -> None:
    workers = build_teachers(0.0)
    assert (
        advise(Role.TEACHER, Load(workers=workers, num_lagging=30, num_admitted=100), 1).replicas
        == 2
    )
    assert (
        advise(
            "teacher", Load(workers=workers, num_lagging=2, num_admitted=100, lag_age_s=90.0), 1
        ).replicas
        == 2
    )
    assert (
        advise(
            "teacher", Load(workers=workers, num_lagging=20, num_admitted=100, lag_age_s=5.0), 1
        ).replicas
        == 1
    )
    idle = Load(workers=build_teachers(0.9), num_lagging=30, num_admitted=100)
    assert advise(Role.TEACHER, idle, 1).replicas == 1


def test_the_teacher_shrinks_when_nothing_waits_and_one_is_spare() -> None:
    assert (
        advise(
            "teacher", Load(workers=build_teachers(0.7, 0.7), num_lagging=1, num_admitted=100), 2
        ).replicas
        == 1
    )
    assert (
        advise(
            "teacher", Load(workers=build_teachers(0.5, 0.5), num_lagging=1, num_admitted=100), 2
        ).replicas
        == 2
    )
    assert (
        advise(Role.TEACHER, Load(num_lagging=90, num_admitted=100), 2).replicas == 2
    )  # nobody was heard: nothing is known


def test_environments_grow_to_hold_the_episodes_that_wait_and_shrink_with_some_to_spare() -> None:
    assert advise(Role.ENVS, build_sessions(running=35, waiting=25, num_workers=3), 1).replicas == 4
    assert (
        advise(Role.ENVS, build_sessions(running=8, waiting=2), 1).replicas == 2
    )  # others hold sessions too
    assert advise(Role.ENVS, build_sessions(running=8, waiting=0), 2).replicas == 1
    assert advise(Role.ENVS, build_sessions(running=9, waiting=0), 2).replicas == 2
    assert advise(Role.ENVS, build_sessions(running=10, waiting=0.1), 1).replicas == 1


def test_the_learner_has_no_signal() -> None:
    assert advise(Role.LEARNER, build_load(wait=0.9), 2).replicas == 2


# ---- hysteresis


def build_workload(least: int, most: int) -> Workload:
    return Workload(kind="Deployment", name="w", min=least, max=most)


def follow(
    governor: Governor,
    workload: Workload,
    replicas: int,
    advised: list[int],
    now_s: float = SETTLE_S,
) -> tuple[int, list[tuple[float, int]]]:
    """Look once for each advice and do what is decided; returns the last size, and each change with
    its time.
    """
    changes = []
    for wanted in advised:
        decision = governor.decide(now_s, workload, replicas, Advice(wanted, "because."))
        if decision.replicas != replicas:
            replicas = decision.replicas
            governor.note_change(now_s)
            changes.append((now_s, replicas))
        now_s += LOOK_S
    return replicas, changes


def test_several_looks_have_to_agree_in_a_row_and_more_of_them_on_the_way_down() -> None:
    workload = build_workload(1, 9)
    assert follow(Governor(0.0), workload, 2, [4] * (LOOKS_UP - 1) + [2, 4, 4])[1] == []
    assert follow(Governor(0.0), workload, 2, [4] * LOOKS_UP)[0] == 4
    assert follow(Governor(0.0), workload, 4, [3] * (LOOKS_DOWN - 1))[0] == 4
    assert follow(Governor(0.0), workload, 4, [1] * LOOKS_DOWN)[0] == 3  # one at a time


def test_a_change_settles_before_the_next_and_the_reason_says_so() -> None:
    governor, workload = Governor(0.0), build_workload(1, 9)
    _, changes = follow(governor, workload, 1, [9] * 20)
    assert changes[0][1] == 9
    governor.note_change(1000.0)
    assert (
        "settles for 50 s more" in governor.decide(1010.0, workload, 2, Advice(3, "more.")).reason
    )


@pytest.mark.parametrize(("replicas", "wanted"), [(0, 2), (1, 2), (5, 4)])
def test_a_size_outside_its_bounds_is_corrected_at_once(replicas: int, wanted: int) -> None:
    assert (
        Governor(0.0).decide(0.0, build_workload(2, 4), replicas, Advice(replicas, "")).replicas
        == wanted
    )


def test_a_fixed_size_follows_no_signal() -> None:
    governor = Governor(0.0)
    assert follow(governor, build_workload(2, 2), 2, [9] * 50)[1] == []
    assert follow(governor, build_workload(2, 2), 2, [0] * 50)[1] == []


def test_no_more_are_asked_for_while_some_are_missing_and_what_they_lacked_counts_for_nothing() -> (
    None
):
    governor, workload = Governor(0.0), build_workload(1, 9)
    for now_s in range(0, 500, 5):
        governor.note_missing(float(now_s), 1)
        assert governor.decide(float(now_s), workload, 2, Advice(4, "more.")).replicas == 2
        assert governor.steady_since_s == now_s
    for now_s in range(
        500, int(MISSING_S) + 200, 5
    ):  # a node that never comes: down is judged again
        governor.note_missing(float(now_s), 1)
        decision = governor.decide(float(now_s), workload, 2, Advice(1, "less."))
    assert decision.replicas == 1


bounds = st.tuples(st.integers(1, 6), st.integers(0, 6)).map(
    lambda pair: build_workload(pair[0], pair[0] + pair[1])
)


@given(bounds, st.integers(0, 20), st.lists(st.integers(-5, 30), min_size=1, max_size=120))
@settings(max_examples=60, deadline=None)
def test_whatever_is_advised_bounds_hold_and_changes_keep_their_distance(
    workload: Workload, replicas: int, advised: list[int]
) -> None:
    _, changes = follow(Governor(0.0), workload, replicas, advised)
    assert all(workload.min <= size <= workload.max for _, size in changes)
    by_signal = [
        change
        for change in changes
        if not (change is changes[0] and workload.clamp(replicas) != replicas)
    ]
    for (before_s, _), (after_s, _) in itertools.pairwise(by_signal):
        assert after_s - before_s >= SETTLE_S


@given(bounds, st.integers(1, 14), st.integers(0, 30))
@settings(max_examples=40, deadline=None)
def test_a_constant_advice_leads_one_way_and_then_nowhere(
    workload: Workload, replicas: int, wanted: int
) -> None:
    start = workload.clamp(replicas)
    size, changes = follow(Governor(0.0), workload, start, [wanted] * 200)
    sizes = [start, *(size for _, size in changes)]
    assert sizes in (sorted(sizes), sorted(sizes, reverse=True))
    assert size == workload.clamp(wanted)


@given(bounds, st.floats(0.2, 15.0), st.integers(1, 12))
@settings(max_examples=60, deadline=None)
def test_in_a_steady_run_the_workers_settle_at_what_the_learner_needs(
    workload: Workload, demand: float, replicas: int
) -> None:
    """`demand`: workers whose data the learner uses up. Its waiting and their idling follow from
    how many there are.
    """
    governor, replicas, now_s, sizes = Governor(0.0), workload.clamp(replicas), SETTLE_S, []
    for _ in range(250):
        wait, idle = max(0.0, 1 - replicas / demand), max(0.0, 1 - demand / replicas)
        advice = advise(Role.ROLLOUT, build_load(wait=wait, idle=(idle,) * replicas), replicas)
        decision = governor.decide(now_s, workload, replicas, advice)
        if decision.replicas != replicas:
            governor.note_change(now_s)
            replicas = decision.replicas
            sizes.append(replicas)
        now_s += LOOK_S
    ups = [after > before for before, after in itertools.pairwise(sizes)]
    assert len(set(ups)) <= 1  # never up and then down again, or the other way round
    assert replicas >= min(workload.max, math.floor(0.8 * demand))
    assert replicas <= max(workload.min, math.ceil(demand) + 1)


# ---- the idle guard

NOW = 100_000.0
MOVING = Stillness(
    now_s=NOW,
    phase=RunPhase.RUNNING,
    detail="",
    finished_at_s=0.0,
    paused_at_s=0.0,
    progress_at_s=NOW - 10,
    bus=BusState.OK,
    bus_since_s=0.0,
    learner_busy_s=20.0,
)


def is_idle(idle_after_s: float = 1800.0, **changes: Any) -> bool:
    return find_idleness(dataclasses.replace(MOVING, **changes), idle_after_s) != ""


def test_a_run_that_moves_is_not_idle_and_a_guard_that_is_off_never_finds_one() -> None:
    assert not is_idle()
    assert not is_idle(0.0, phase=RunPhase.FINISHED, finished_at_s=1.0, progress_at_s=0.0)


def test_a_finished_run_is_idle_some_time_after_its_end() -> None:
    assert is_idle(phase=RunPhase.FINISHED, finished_at_s=NOW - 1801)
    assert not is_idle(phase=RunPhase.FINISHED, finished_at_s=NOW - 1799)


def test_a_paused_run_is_idle_once_what_was_under_way_has_come_to_rest() -> None:
    assert is_idle(60.0, phase=RunPhase.PAUSED, paused_at_s=NOW - 61, progress_at_s=NOW - 61)
    assert not is_idle(60.0, phase=RunPhase.PAUSED, paused_at_s=NOW - 61, progress_at_s=NOW - 59)
    assert not is_idle(60.0, phase=RunPhase.PAUSED, paused_at_s=NOW - 59, progress_at_s=NOW - 500)


def test_a_failed_run_is_idle_and_says_why_it_gave_up() -> None:
    still = dataclasses.replace(
        MOVING, phase=RunPhase.FAILED, detail="8 groups failed", progress_at_s=NOW - 100
    )
    assert "8 groups failed" in find_idleness(still, 60.0)


@pytest.mark.parametrize("phase", [RunPhase.STARTING, RunPhase.RUNNING, RunPhase.STOPPING])
def test_a_run_without_progress_is_stuck_after_longer_than_anything_should_take(
    phase: RunPhase,
) -> None:
    assert is_idle(1.0, phase=phase, progress_at_s=NOW - NO_PROGRESS_S - 1)
    assert not is_idle(1.0, phase=phase, progress_at_s=NOW - NO_PROGRESS_S + 1)
    assert not is_idle(1800.0, phase=phase, progress_at_s=NOW - 1799)
    slow = {"learner_busy_s": 1000.0, "progress_at_s": NOW - LEARNER_SILENCE_FACTOR * 1000.0 + 1}
    assert not is_idle(1.0, phase=phase, **slow)


def test_time_without_redis_is_no_idleness() -> None:
    assert not is_idle(1.0, progress_at_s=0.0, bus=BusState.UNREACHABLE, bus_since_s=NOW - 5000)
    assert not is_idle(1.0, progress_at_s=0.0, bus_since_s=NOW - 100)


# ---- the file


def test_a_changed_file_is_taken_up_at_the_next_look(tmp_path: Path) -> None:
    path = tmp_path / "scaling.yaml"
    path.write_text(GOOD_FILE)
    reader = ScalingFileReader(path)
    assert not reader.refresh()
    assert reader.file
    assert reader.file.workloads["rollout"].max == 4
    path.write_text(GOOD_FILE.replace("max: 4", "max: 8"))
    assert not reader.refresh()
    assert (reader.file.workloads["rollout"].max, reader.problem) == (8, "")


@pytest.mark.parametrize(
    ("contents", "named"),
    [
        (GOOD_FILE.replace("min: 1, max: 4", "min: 5, max: 4"), "below its min 5"),
        (GOOD_FILE.replace("idle_after_s", "idle_after"), "idle_after"),
        (GOOD_FILE.replace("rollout:", "rollouts:"), "rollouts"),
        (GOOD_FILE.replace("kind: Deployment", "kind: DaemonSet"), "workloads.rollout.kind"),
        (GOOD_FILE.replace("max: 4", "max: four"), "workloads.rollout.max"),
        ("mode: [", "while parsing"),
        ("idle_after_s: 2026-13-45", "month must be in 1..12"),
        ("dry_run: !!bool perhaps", "perhaps"),
        ("- a list", "file"),
        ("", "file"),
    ],
)
def test_a_broken_file_is_reported_once_and_the_last_good_one_stays(
    tmp_path: Path, contents: str, named: str
) -> None:
    path = tmp_path / "scaling.yaml"
    path.write_text(GOOD_FILE)
    reader = ScalingFileReader(path)
    reader.refresh()
    path.write_text(contents)
    assert reader.refresh()
    assert named in reader.problem
    assert "last good one stays" in reader.problem
    assert reader.file
    assert reader.file.workloads["rollout"].max == 4
    assert not reader.refresh()
    path.write_text(GOOD_FILE)
    reader.refresh()
    assert reader.problem == ""


def test_a_file_that_is_not_there_scales_nothing_and_is_told_of(tmp_path: Path) -> None:
    reader = ScalingFileReader(tmp_path / "missing.yaml")
    assert reader.refresh()
    assert reader.file is None
    assert "Nothing is scaled" in reader.problem


def test_a_file_that_is_back_as_it_was_is_no_problem_any_more(tmp_path: Path) -> None:
    path = tmp_path / "scaling.yaml"
    path.write_text(GOOD_FILE)
    reader = ScalingFileReader(path)
    reader.refresh()
    path.unlink()
    assert reader.refresh()
    assert "cannot be read" in reader.problem
    path.write_text(GOOD_FILE)
    assert not reader.refresh()
    assert reader.problem == ""


def test_beside_keda_only_the_learner_is_the_gateways(tmp_path: Path) -> None:
    path = tmp_path / "scaling.yaml"
    path.write_text(GOOD_FILE.replace("mode: gateway", "mode: keda"))
    reader = ScalingFileReader(path)
    reader.refresh()
    assert reader.file
    assert list(reader.file.managed) == ["learner"]
