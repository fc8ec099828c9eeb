"""`sdar status` for a person: the whole account on a terminal of 80 columns, and nothing told that
is not known.
"""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from sdar.cli.status import render_status

LEDGER = {
    "issued": 4540,
    "running": 90,
    "generated": 4450,
    "trained": 3200,
    "skipped": 11,
    "stale": 12,
    "failed": 13,
}
STATUS: dict[str, Any] = {
    "run_id": "household",
    "method": "sdar",
    "phase": "running",
    "detail": "",
    "num_updates": 250,
    "target_updates": 1000,
    "policy_version": 251,
    "instances": {"rollout": 12, "teacher": 3},
    "bus": {"state": "ok", "used_bytes": 5 << 20, "max_bytes": 1 << 30},
    "ledger": LEDGER | {"cancelled": 14, "buffered": 1200},
    "ledger_gap": 0,
    "ledger_gap_ids": [],
    "stream_lags": {
        "trajectories": {"num_undelivered": 2.0, "num_pending": 3.0, "oldest_age_s": 1.25}
    },
    "evaluations": [],
    "figures": {},
    "alarms": [],
    "dead_letters": 0,
    "failures": {},
}


def render(status: dict[str, Any], scaling: dict[str, Any] | None = None) -> list[str]:
    console = Console(width=80, file=io.StringIO(), highlight=False)
    console.print(render_status(status, scaling))
    return [line.rstrip() for line in console.file.getvalue().splitlines() if line.strip()]


def describe_evaluation(**changes: Any) -> dict[str, Any]:
    evaluation = {
        "num_updates": 1000,
        "policy_version": 1003,
        "is_greedy": False,
        "success": 0.5,
        "interval": [0.412, 0.588],
    }
    return evaluation | {"num_episodes": 120, "num_tasks": 240, "num_failed": 7} | changes


def test_success_and_the_sampler_s_figures_are_told_each_with_what_it_is_over() -> None:
    figures = {
        "success_mean": 0.95,
        "num_episodes": 12_800.0,
        "trained_success_mean": 0.85,
        "num_trajectories": 1024.0,
        "engine_mismatch_abs": 2.1e-5,
        "probe_mismatch": 0.13,
        "policy_behavior_gap_abs": 0.012,
        "num_skipped_steps_in_a_row": 2.0,
    }
    lines = render(STATUS | {"figures": figures})
    assert lines[3:6] == [
        "success in training 0.950 of 12800 played, 0.850 of 1024 trained",
        "sampler to learner, nats: 2.1e-05 newest weights, 1.3e-01 probe, 1.2e-02 all",
        "optimizer steps skipped in a row: 2",
    ]
    stale = {name: figures[name] for name in ("policy_behavior_gap_abs",)}
    assert render(STATUS | {"figures": stale})[3] == "sampler to learner, nats: 1.2e-02 all"


def test_no_line_of_a_status_is_broken_on_eighty_columns() -> None:
    lines = render(STATUS | {"evaluations": [describe_evaluation()]})
    assert lines == [
        "household: sdar, running",
        "update 250 of 1000, policy version 251",
        "heard from lately: 12 rollout, 3 teacher; Redis ok, 5 of 1024 MiB",
        "issued 4540 = running 90 + generated 4450",
        "generated 4450 = trained 3200 + skipped 11 + stale 12",
        "               + failed 13 + cancelled 14 + buffered 1200",
        "  stream         waiting   in hand   oldest",
        " " + "─" * 43,
        "  trajectories   2         3         1.2 s",
        "  updates   policy   sampling   success   95% interval     episodes     failed",
        " " + "─" * 78,
        "  1000      v1003    sampled    0.500     0.412 to 0.588   120 of 240   7",
    ]


def test_an_evaluation_without_an_episode_claims_no_success() -> None:
    line = render(
        STATUS
        | {"evaluations": [describe_evaluation(num_episodes=0, success=0.0, interval=[0.0, 1.0])]}
    )[-1]
    assert line.split() == ["1000", "v1003", "sampled", "-", "-", "0", "of", "240", "7"]


def test_a_run_that_sleeps_says_why_and_how_it_is_woken() -> None:
    lines = render(
        STATUS
        | {"sleep": {"reason": "Paused for 30 minutes; `sdar resume` wakes it.", "since_s": 0.0}}
    )
    assert "Paused for 30 minutes; `sdar resume` wakes it." in " ".join(lines)
    assert lines[1].startswith("asleep since 19")


def test_sizes_are_shown_where_something_scales_them() -> None:
    workload = {"kind": "Deployment", "name": "sdar-rollout", "min": 1, "max": 4, "since_s": 0.0}
    rollout = workload | {"current": 2, "wanted": 3, "reason": "the learner waited 60% of its time"}
    envs = workload | {"current": None, "wanted": None, "reason": "not looked at yet"}
    scaling = {
        "mode": "gateway",
        "dry_run": True,
        "problem": "no right to scale",
        "workloads": {"rollout": rollout, "envs": envs},
    }
    lines = render(STATUS, scaling)
    assert "no right to scale" in lines
    assert any(line.startswith("dry run") for line in lines)
    assert any(line.split()[:3] == ["rollout", "2", "3"] and "1 to 4" in line for line in lines)
    assert any(line.split()[:3] == ["envs", "-", "-"] for line in lines)
    assert render(STATUS, scaling | {"mode": "off"}) == render(STATUS)
