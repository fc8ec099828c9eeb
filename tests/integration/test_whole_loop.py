"""Every service's main loop in one process, on the in-memory bus, with the shipped model.

Nothing is faked but what the test is about: an environment is given by its class name, like any
user's.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from sdar.cli.report import build_summary, select_updates
from sdar.config import RunConfig, load_config
from sdar.contracts.errors import ConfigurationError, EnvironmentFailedError, UnavailableError
from sdar.environments.base import StepResult
from sdar.in_process.run import play_run
from services.envs.household import HouseholdEnvironment

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "household.yaml"
NUM_UPDATES = 3
NUM_GROUPS = 4
NUM_TASKS = 8


class FragileEnvironment(HouseholdEnvironment):
    """Every sixty-first step breaks."""

    name = "fragile"
    steps = itertools.count(1)

    def step(self, text: str) -> StepResult:
        if next(self.steps) % 61 == 0:
            raise RuntimeError("the oven is on fire")
        return super().step(text)


class BrokenEnvironment(HouseholdEnvironment):
    """Nothing works."""

    def step(self, text: str) -> StepResult:
        raise EnvironmentFailedError("there is no house")


def small_run(**overrides: object) -> RunConfig:
    small = {
        "training.num_updates": NUM_UPDATES,
        "training.groups_per_update": NUM_GROUPS,
        "training.group_size": 4,
        "training.checkpoint_every": 2,
        "rollout.max_concurrent_episodes": 16,
        "evaluation.num_tasks": NUM_TASKS,
        "teacher.skills": str(ROOT / "skills" / "household"),
    }
    return load_config(
        EXAMPLE, small | {key.replace("__", "."): value for key, value in overrides.items()}
    )


async def test_a_run_trains_evaluates_before_and_after_and_its_ledger_adds_up(
    tmp_path: Path,
) -> None:
    config = small_run()
    seen: list[int] = []
    outcome = await play_run(config, tmp_path, seen.append)

    status = outcome.status
    found = (status["phase"], status["num_updates"], status["policy_version"])
    assert found == ("finished", NUM_UPDATES, NUM_UPDATES)
    assert status["ledger"]["trained"] == NUM_UPDATES * NUM_GROUPS
    assert (status["ledger_gap"], status["dead_letters"]) == (0, 0)
    ledger = status["ledger"]
    assert ledger["issued"] == sum(
        ledger[outcome] for outcome in ("trained", "skipped", "stale", "failed", "cancelled")
    )
    evaluations = [
        (e["num_updates"], e["is_greedy"], e["num_episodes"], e["policy_version"])
        for e in status["evaluations"]
    ]
    assert sorted(evaluations) == [
        (n, greedy, NUM_TASKS, n) for n in (0, NUM_UPDATES) for greedy in (False, True)
    ]
    assert seen == sorted(seen)

    summary = build_summary(config, status, outcome.records, wall_s=1.0)
    assert summary["staleness_max"] <= config.training.max_staleness
    assert summary["num_updates"] == NUM_UPDATES


async def test_every_update_reports_its_gate_and_the_hint_reaches_the_teacher(
    tmp_path: Path,
) -> None:
    outcome = await play_run(small_run(), tmp_path)
    updates = select_updates(outcome.records)
    assert [record["policy_version"] for record in updates] == [1, 2, 3]
    for record in updates:
        values = record["values"]
        assert 0 < values["gate_mean"] < 1
        assert values["teacher_gap_abs"] > 0.05
        assert values["specific_skill_share"] == 1
        # The sampler and the learner are two implementations of one model.
        assert values.get("engine_mismatch_abs", 0) < 1e-4


@pytest.mark.parametrize("retrieval", ["embedding", "ucb"])
async def test_skills_found_by_meaning_or_utility_reach_the_teacher_in_a_whole_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, retrieval: str
) -> None:
    monkeypatch.setenv("SDAR_CACHE", str(tmp_path / "cache"))
    outcome = await play_run(
        small_run(teacher__retrieval=retrieval, teacher__num_skills=1), tmp_path
    )
    assert outcome.status["ledger"]["trained"] == NUM_UPDATES * NUM_GROUPS
    assert [
        record["values"]["specific_skill_share"] for record in select_updates(outcome.records)
    ] == [1] * NUM_UPDATES


async def test_in_step_nothing_is_ever_stale(tmp_path: Path) -> None:
    outcome = await play_run(small_run(training__max_staleness=0), tmp_path)
    assert outcome.status["ledger"]["stale"] == 0
    assert [record["values"]["staleness_max"] for record in select_updates(outcome.records)] == [
        0
    ] * NUM_UPDATES


@pytest.mark.parametrize("method", ["grpo", "skill_grpo"])
async def test_a_method_without_a_teacher_trains_on_trajectories_themselves(
    tmp_path: Path, method: str
) -> None:
    outcome = await play_run(small_run(method__name=method), tmp_path)
    assert outcome.status["ledger"]["trained"] == NUM_UPDATES * NUM_GROUPS
    assert "scored" not in outcome.status["stream_lags"]
    assert all("gate_mean" not in record["values"] for record in select_updates(outcome.records))


async def test_a_student_that_sees_the_skills_succeeds_at_once(tmp_path: Path) -> None:
    outcome = await play_run(small_run(method__name="skill_grpo"), tmp_path)
    assert outcome.status["evaluations"][0]["success"] > 0.8


async def test_episodes_whose_environment_breaks_are_played_again(tmp_path: Path) -> None:
    outcome = await play_run(
        small_run(environment__name=f"{__name__}:FragileEnvironment"), tmp_path
    )
    ledger = outcome.status["ledger"]
    assert (ledger["trained"], outcome.status["ledger_gap"]) == (NUM_UPDATES * NUM_GROUPS, 0)


async def test_an_environment_that_never_works_ends_the_run_with_its_reason(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="there is no house"):
        await play_run(small_run(environment__name=f"{__name__}:BrokenEnvironment"), tmp_path)


async def test_several_ranks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="num_ranks"):
        await play_run(small_run(training__num_ranks=2), tmp_path)
