from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sdar.cli.compare import Comparison, Trial, format_table, load_comparison, plan_trials
from sdar.config import load_config, save_config
from sdar.contracts.errors import ConfigurationError, ConflictError

SPEC = """
name: test
base: run.yaml
set: {training.num_updates: 5}
seeds: [0, 1]
variants:
  - name: grpo
    set: {method.name: grpo}
  - name: sdar
"""
BASE = """
name: base
model: {path: tiny}
environment: {name: household}
"""


@pytest.fixture
def spec_path(tmp_path: Path) -> Path:
    (tmp_path / "run.yaml").write_text(BASE)
    path = tmp_path / "spec.yaml"
    path.write_text(SPEC)
    return path


def plan(spec_path: Path) -> tuple[Comparison, list[Trial]]:
    comparison = load_comparison(spec_path)
    return comparison, plan_trials(comparison, spec_path, spec_path.parent / "runs")


def finish(trial: Trial, num_successes: int) -> None:
    trial.summary = {
        "success_before": 0.25,
        "success_after": num_successes / 100,
        "greedy_success_after": 0.5,
        "by_task_type": {
            "before": {"clean": [25, 100]},
            "after": {"clean": [num_successes - 1, 50], "cook": [1, 50]},
        },
        "staleness_mean": 1.5,
        "staleness_max": 2,
        "num_updates": 5,
        "num_evaluation_episodes": 100,
    }


def test_every_variant_is_planned_under_every_seed_with_its_own_values(spec_path: Path) -> None:
    _, trials = plan(spec_path)
    assert [trial.name for trial in trials] == [
        "grpo-seed0",
        "grpo-seed1",
        "sdar-seed0",
        "sdar-seed1",
    ]
    assert [
        (t.config.method.name, t.config.seed, t.config.training.num_updates) for t in trials
    ] == [
        ("grpo", 0, 5),
        ("grpo", 1, 5),
        ("sdar", 0, 5),
        ("sdar", 1, 5),
    ]


def test_a_finished_run_is_not_run_again(spec_path: Path) -> None:
    _, trials = plan(spec_path)
    directory = trials[0].directory
    directory.mkdir(parents=True)
    save_config(trials[0].config, directory / "config.yaml")
    (directory / "summary.json").write_text(json.dumps({"success_after": 0.5}))
    assert [trial.summary is not None for trial in plan(spec_path)[1]] == [
        True,
        False,
        False,
        False,
    ]


def test_a_finished_run_of_another_configuration_is_refused(spec_path: Path) -> None:
    _, trials = plan(spec_path)
    directory = trials[0].directory
    directory.mkdir(parents=True)
    save_config(load_config(spec_path.parent / "run.yaml"), directory / "config.yaml")
    (directory / "summary.json").write_text("{}")
    with pytest.raises(ConflictError, match="another configuration"):
        plan(spec_path)


def test_counts_are_pooled_over_seeds_and_deviation_is_over_seeds(spec_path: Path) -> None:
    comparison, trials = plan(spec_path)
    for trial, num_successes in zip(trials, (40, 60, 80, 90), strict=True):
        finish(trial, num_successes)
    rows = format_table(comparison, trials).splitlines()
    # 100 of 200: Wilson interval 0.431 to 0.569; mean of 0.4 and 0.6 with ddof 1.
    assert (
        rows[2]
        == "| grpo | 0, 1 | 0.400, 0.600 | 0.500 [0.431, 0.569] | 0.500 ± 0.141 | 0.500 | 0.250 "
        "| 1.50, 2 | 5 |"
    )
    assert "0.850 ± 0.071" in rows[3]


def test_a_failed_run_is_named_with_its_reason_and_the_others_stand(spec_path: Path) -> None:
    comparison, trials = plan(spec_path)
    for trial in trials[1:]:
        finish(trial, 50)
    trials[0].failure = "no model\nthere"
    table = format_table(comparison, trials)
    assert "| grpo | 0, 1 | failed, 0.500 |" in table
    assert "Failed: grpo-seed0: no model there" in table


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (SPEC.replace("seeds: [0, 1]", "seeds: []"), "seeds"),
        (SPEC.replace("- name: sdar", "- name: grpo"), "different"),
        (SPEC.replace("set: {method", "sets: {method"), "sets"),
        ("[", "YAML"),
    ],
)
def test_an_experiment_that_is_not_valid_is_refused_with_what_is_wrong(
    spec_path: Path, text: str, named: str
) -> None:
    spec_path.write_text(text)
    with pytest.raises(ConfigurationError, match=named):
        load_comparison(spec_path)


def test_a_variant_that_is_no_valid_run_is_named(spec_path: Path) -> None:
    spec_path.write_text(SPEC.replace("method.name: grpo", "method.nam: grpo"))
    with pytest.raises(ConfigurationError, match=r"variant grpo.*method\.nam"):
        plan(spec_path)


def test_the_shipped_experiment_plans_every_run_of_the_documented_table() -> None:
    path = Path(__file__).parents[3] / "examples" / "household-comparison.yaml"
    comparison = load_comparison(path)
    trials = plan_trials(comparison, path, Path("nowhere"))
    assert comparison.seeds == [0, 1, 2]
    methods: dict[str, Any] = {trial.variant: trial.config.method.name for trial in trials}
    assert {"grpo", "grpo_opsd", "constant_gate", "sdar"} <= set(methods.values())
