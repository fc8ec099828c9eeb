from __future__ import annotations

import asyncio
import os
import time

import pytest

from loadtest import environment_sessions
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
    return Trial(num_sessions, Timings([latency_s] * 20, [0.001] * 20, num_missed), 2048.0, server_share=0.5, client_share=0.1)


@pytest.mark.parametrize("capacity", [1, 5, 256, 700, 5000])
@pytest.mark.parametrize("first", [1, 256, 3000])
def test_the_search_ends_just_below_what_is_not_held(capacity, first):
    tried = []

    def try_out(num_sessions):
        tried.append(num_sessions)
        return build_trial(num_sessions, 0.01 if num_sessions <= capacity else 0.2)

    best = find_largest(try_out, 0.1, first).num_sessions
    assert best <= capacity
    assert min(number for number in tried if number > capacity) <= max(best * 1.12, best + 1)
    assert len(tried) < 20
    assert len(set(tried)) == len(tried)


def test_a_server_that_holds_nothing_is_an_error():
    with pytest.raises(SdarError, match="not one session"):
        find_largest(lambda num_sessions: build_trial(num_sessions, 0.2), 0.1, 4)


def test_a_missed_step_is_not_held():
    assert build_trial(1).is_held(0.1)
    assert not build_trial(1, num_missed=1).is_held(0.1)


def test_a_percentile_is_a_value_that_was_measured():
    values = [float(value) for value in range(100, 0, -1)]
    assert compute_percentile(values, 0.95) == 95
    assert compute_percentile([3.0], 0.5) == 3.0
    assert compute_percentile([], 0.95) == float("inf")


async def test_every_session_steps_on_schedule_and_warming_up_is_left_out():
    sent = []

    async def step():
        sent.append(asyncio.get_running_loop().time())

    timings = await play([step] * 10, QUICK)
    assert len(sent) == 40
    assert (len(timings.latencies), len(timings.latenesses), timings.num_missed) == (30, 30, 0)
    assert sent[-1] - sent[0] > 0.3
    assert compute_percentile(timings.latencies, 0.5) < QUICK.period_s


async def test_waiting_for_a_slow_server_counts_from_when_the_step_was_due():
    """Each step takes 0.12 s where one is due every 0.1 s: the counted ones end 0.14, 0.16 and 0.18 s after they were due."""
    timings = await play([lambda: asyncio.sleep(0.12)], QUICK)
    assert [latency > least for latency, least in zip(timings.latencies, (0.139, 0.159, 0.179), strict=True)] == [True] * 3
    assert timings.latenesses == []


async def test_a_step_that_fails_is_missed_with_those_after_it():
    async def step():
        raise OSError

    assert (await play([step], QUICK)).num_missed == 4


async def test_clients_that_are_late_themselves_are_found_out():
    async def step():
        time.sleep(0.05)  # noqa: ASYNC251 - what a client must not do: hold all others up

    timings = await play([step] * 4, QUICK)
    assert compute_percentile(timings.latenesses or timings.latencies, 0.95) > environment_sessions.MAX_LATENESS_S


@pytest.mark.parametrize("server", [OURS, PEER], ids=lambda server: server.name)
def test_a_server_is_started_pinned_played_and_ended(server):
    lines, own = [], os.sched_getaffinity(0)
    trial = run_trial(server, 4, QUICK, min(own), lines.append)
    assert (trial.num_sessions, trial.timings.num_missed, len(trial.timings.latencies)) == (4, 0, 12)
    assert trial.server_share > 0
    assert os.sched_getaffinity(0) == own
    assert lines[-1].startswith(f"{server.name}, 4 sessions: p95 ")


def test_rows_compare_pairs_and_the_number_to_reach():
    measurement = build_measurement([build_trial(600), build_trial(700)], [build_trial(1200), build_trial(700)], Schedule())
    held, goal, memory = measurement.comparisons
    assert (held.ratios, held.is_met) == ([0.5, 1.0], None)
    assert (goal.ours, goal.theirs, goal.is_met) == (650, 512, True)
    assert memory.pairs == ((2.0, 2.0),) * 2
    (table,) = measurement.tables
    assert table.rows[0] == ("ours", "600", "10", "10", "50%", "10%", "1")
    assert len(table.rows) == 4
