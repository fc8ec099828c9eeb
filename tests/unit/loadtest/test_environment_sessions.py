from __future__ import annotations

import asyncio
import functools
import os
import selectors

import pytest

from loadtest.environment_sessions import (
    OURS,
    PEER,
    Schedule,
    Timings,
    Trial,
    build_measurement,
    compute_percentile,
    find_largest,
    play,
    run_trial,
)
from sdar.contracts.errors import SdarError

QUICK = Schedule(period_s=0.1, num_warmups=1, num_rounds=3, limit_s=0.05)


def build_trial(num_sessions, latency_s=0.01, num_missed=0):
    return Trial(
        num_sessions,
        Timings([latency_s] * 20, [0.001] * 20, num_missed),
        2048.0,
        server_share=0.5,
        client_share=0.1,
    )


@pytest.mark.parametrize("capacity", [1, 5, 256, 700, 5000])
@pytest.mark.parametrize("first", [1, 256, 3000])
@pytest.mark.parametrize("factor", [2.0, 1.25])
def test_the_search_ends_just_below_what_is_not_held(capacity, first, factor):
    tried = []

    def try_out(num_sessions):
        tried.append(num_sessions)
        return build_trial(num_sessions, 0.01 if num_sessions <= capacity else 0.2)

    best = find_largest(try_out, 0.1, first, factor).num_sessions
    assert best <= capacity
    assert min(number for number in tried if number > capacity) <= max(best * 1.12, best + 1)
    assert len(tried) < 50
    assert len(set(tried)) == len(tried)


def test_a_server_that_holds_nothing_is_an_error():
    with pytest.raises(SdarError, match="not one session"):
        find_largest(lambda num_sessions: build_trial(num_sessions, 0.2), 0.1, 4, 2.0)


@pytest.mark.parametrize(
    ("latency_s", "num_missed", "verdict"),
    [
        (0.09, 0, "held"),
        (0.09, 1, "not held"),
        (0.15, 0, "void"),
        (0.17, 0, "not held"),
        (0.15, 1, "not held"),
    ],
)
def test_over_the_limit_by_no_more_than_late_clients_may_have_added_is_void(
    latency_s, num_missed, verdict
):
    """Clients are late by 30 ms: 150 ms may have been 90, and 170 is over the limit."""
    assert Trial(1, Timings([latency_s], [0.03], num_missed), 0.0, 0.0, 0.0).judge(0.1) == verdict


def test_a_percentile_is_a_value_that_was_measured():
    values = [float(value) for value in range(100, 0, -1)]
    assert compute_percentile(values, 0.95) == 95
    assert compute_percentile([3.0], 0.5) == 3.0
    assert compute_percentile([], 0.95) == float("inf")


class VirtualClock(selectors.SelectSelector):
    """Waits for nothing: time passes by what it is asked to wait."""

    now_s = 0.0

    def select(self, timeout=None):
        self.now_s += timeout or 0.0
        return super().select(0)


def play_virtually(build_steps):
    """`play` on a clock of its own. `build_steps` makes the sessions' steps from that clock."""
    clock = VirtualClock()
    loop = asyncio.SelectorEventLoop(clock)
    loop.time = lambda: clock.now_s
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        return runner.run(play(build_steps(clock), QUICK))


def test_every_session_steps_on_schedule_and_warming_up_is_left_out():
    sent = []

    async def step(clock):
        sent.append(clock.now_s)

    timings = play_virtually(lambda clock: [functools.partial(step, clock)] * 10)
    assert sent == pytest.approx([sent[0] + 0.01 * index for index in range(40)])
    assert (len(timings.latencies), len(timings.latenesses), timings.num_missed) == (30, 30, 0)
    assert timings.latencies == pytest.approx([0.0] * 30)


def test_waiting_for_a_slow_server_counts_from_when_the_step_was_due():
    """Steps of 0.12 s, one due every 0.1 s: the counted ones end 0.14, 0.16 and 0.18 s late."""
    timings = play_virtually(lambda clock: [lambda: asyncio.sleep(0.12)])
    assert timings.latencies == pytest.approx([0.14, 0.16, 0.18])
    assert timings.latenesses == []


def test_steps_that_come_too_late_to_be_sent_are_missed():
    """Steps of 0.4 s: sent at 0, 0.4 and 0.5, a period after the end; others are not."""
    timings = play_virtually(lambda clock: [lambda: asyncio.sleep(0.4)])
    assert (len(timings.latencies), timings.num_missed) == (1, 2)


def test_a_step_that_fails_is_missed_with_those_after_it():
    async def step():
        raise OSError

    assert play_virtually(lambda clock: [step]).num_missed == 4


def test_clients_that_are_late_themselves_are_found_out():
    """Due at 0, 25, 50 and 75 ms of each round; the first delays the others until 80 ms."""

    async def step(clock, busy_s):
        clock.now_s += busy_s

    timings = play_virtually(
        lambda clock: [functools.partial(step, clock, busy_s) for busy_s in (0.08, 0.0, 0.0, 0.0)]
    )
    assert sorted(timings.latenesses) == pytest.approx(
        [0.0] * 3 + [0.005] * 3 + [0.03] * 3 + [0.055] * 3
    )
    assert Trial(4, timings, 0.0, 0.0, 1.0).lateness_s == pytest.approx(0.055)


@pytest.mark.parametrize("server", [OURS, PEER], ids=lambda server: server.name)
def test_a_server_is_started_pinned_played_and_ended(server):
    lines, own = [], os.sched_getaffinity(0)
    schedule = Schedule(period_s=2.0, num_warmups=1, num_rounds=2)
    trial = run_trial(server, 4, schedule, min(own), lines.append)
    assert (trial.num_sessions, trial.timings.num_missed, len(trial.timings.latencies)) == (4, 0, 8)
    assert trial.client_share > 0
    assert os.sched_getaffinity(0) == own
    assert lines[-1].startswith(f"{server.name}, 4 sessions: p95 ")


def test_rows_compare_pairs_and_the_number_to_reach():
    measurement = build_measurement(
        [build_trial(600), build_trial(700)], [build_trial(1200), build_trial(700)], Schedule()
    )
    held, goal, memory = measurement.comparisons
    assert (held.ratios, held.is_met) == ([0.5, 1.0], None)
    assert (goal.ours, goal.theirs, goal.is_met) == (650, 512, True)
    assert memory.pairs == ((2.0, 2.0),) * 2
    (table,) = measurement.tables
    assert table.rows[0] == ("ours", "600", "10", "10", "50%", "10%", "1")
    assert len(table.rows) == 4
