from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sdar.cli.live import format_summary
from sdar.cli.plots import count_sampled_tokens, count_tokens_by_staleness
from sdar.cli.report import build_summary, describe_change, write_report
from sdar.config import RunConfig, save_config
from sdar.contracts.errors import ConfigurationError, UnavailableError

HOSTILE = "<script>alert(1)</script>"


def make_config() -> RunConfig:
    return RunConfig.model_validate(
        {"name": "demo", "model": {"path": "tiny"}, "environment": {"name": HOSTILE}}
    )


def make_evaluation(
    num_updates: int, success: float, *, is_greedy: bool = False, is_complete: bool = True
) -> dict[str, Any]:
    return {
        "evaluation_id": f"e{num_updates}",
        "policy_version": num_updates,
        "num_updates": num_updates,
        "is_greedy": is_greedy,
        "is_complete": is_complete,
        "num_tasks": 10,
        "num_episodes": 10,
        "num_failed": 0,
        "success": success,
        "interval": [success - 0.1, success + 0.1],
        "by_task_type": {HOSTILE: [int(10 * success), 10]},
        "reward_components": {HOSTILE: success / 2},
    }


def make_status(*evaluations: dict[str, Any]) -> dict[str, Any]:
    ledger = {"issued": 4, "running": 0, "generated": 4, "trained": 4, "buffered": 0}
    account = {"ledger": ledger, "ledger_gap": 0, "ledger_gap_ids": []}
    return {"evaluations": list(evaluations), "num_updates": 2, **account, "dead_letters": 0}


def make_finished_status() -> dict[str, Any]:
    return make_status(
        make_evaluation(0, 0.2),
        make_evaluation(0, 0.1, is_greedy=True),
        make_evaluation(1, 0.5),
        make_evaluation(2, 0.8),
        make_evaluation(2, 0.9, is_greedy=True),
    )


def make_update(number: int, **values: float) -> dict[str, Any]:
    values = {
        "success_mean": 0.5,
        "num_tokens": 100.0,
        "teacher_gap_mean": -0.1,
        "gate_mean": 0.4,
        **values,
    }
    at_s = 100.0 + number
    return {
        "entry_id": f"{number}-0",
        "service": "learner",
        "policy_version": number,
        "at_s": at_s,
        "values": values,
    }


def make_rollout(instance: str, at_s: float, num_tokens: float) -> dict[str, Any]:
    values = {"num_tokens_generated": num_tokens}
    return {
        "service": "rollout",
        "instance": instance,
        "policy_version": 2,
        "at_s": at_s,
        "values": values,
    }


RECORDS = [
    make_update(
        1, staleness_mean=0.0, staleness_max=0, staleness_tokens_0=10, num_policy_versions=1
    ),
    make_update(
        2,
        staleness_mean=0.5,
        staleness_max=1,
        staleness_tokens_0=5,
        staleness_tokens_1=5,
        num_policy_versions=2,
    ),
    make_rollout("a", 103.0, 120),
]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    save_config(make_config(), tmp_path / "config.yaml")
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps(record) + "\n" for record in RECORDS)
    )
    return tmp_path


def test_before_is_the_first_evaluation_and_after_the_last() -> None:
    summary = build_summary(make_config(), make_finished_status(), RECORDS, 12.34)
    assert (summary["success_before"], summary["success_after"]) == (0.2, 0.8)
    assert (summary["greedy_success_before"], summary["greedy_success_after"]) == (0.1, 0.9)
    assert summary["success_after_interval"] == pytest.approx([0.7, 0.9])
    assert summary["by_task_type"]["after"] == {HOSTILE: [8, 10]}
    assert summary["reward_components"] == {"before": {HOSTILE: 0.1}, "after": {HOSTILE: 0.4}}


@pytest.mark.parametrize(
    ("interval", "said"),
    [
        ((0.1, 0.3), "rose, by 0.100 to 0.300"),
        ((-0.3, -0.1), "fell, by 0.100 to 0.300"),
        ((-0.1, 0.3), "no clear change (-0.100 to +0.300)"),
        ((0.0, 0.3), "no clear change (+0.000 to +0.300)"),
    ],
)
def test_a_change_is_claimed_only_where_its_interval_leaves_zero_out(
    interval: tuple[float, float], said: str
) -> None:
    assert describe_change(interval) == said


def test_the_change_s_interval_is_in_the_summary_for_both_ways_of_sampling() -> None:
    summary = build_summary(make_config(), make_finished_status(), RECORDS, 12.34)
    # 0.2 to 0.8 and 0.1 to 0.9, each rate with an interval of 0.1 to both sides.
    assert summary["success_change_interval"] == pytest.approx((0.6 - 0.02**0.5, 0.6 + 0.02**0.5))
    assert summary["greedy_success_change_interval"] == pytest.approx(
        (0.8 - 0.02**0.5, 0.8 + 0.02**0.5)
    )


def test_staleness_and_versions_are_the_worst_of_all_updates() -> None:
    summary = build_summary(make_config(), make_finished_status(), RECORDS, 12.34)
    assert (summary["staleness_max"], summary["staleness_mean"]) == (1, 0.25)
    assert (
        summary["num_policy_versions_in_flight_max"],
        summary["num_policy_versions_in_batch_max"],
    ) == (2, 2)
    assert summary["ledger"]["gap"] == 0


def test_a_run_without_a_complete_evaluation_has_no_summary() -> None:
    status = make_status(make_evaluation(0, 0.0, is_complete=False))
    with pytest.raises(UnavailableError, match="no complete sampled evaluation"):
        build_summary(make_config(), status, [], 1.0)


def test_the_end_of_a_run_is_told_from_its_summary() -> None:
    text = format_summary(
        build_summary(make_config(), make_finished_status(), RECORDS, 12.34), Path("report.html")
    )
    assert "0.200 [0.100, 0.300] -> 0.800 [0.700, 0.900]" in text


def test_tokens_are_counted_by_staleness_over_all_updates() -> None:
    assert count_tokens_by_staleness(RECORDS[:2]) == {0: 15.0, 1: 5.0}


def test_sampled_tokens_are_counted_for_each_worker_also_when_it_starts_again() -> None:
    records = [
        make_rollout("a", 1, 10),
        make_rollout("b", 2, 5),
        make_rollout("a", 3, 30),
        make_rollout("a", 4, 7),
    ]
    assert count_sampled_tokens(records) == [(1, 10), (2, 5), (3, 20), (4, 7)]


def test_a_report_shows_every_plot_and_escapes_every_text(run_dir: Path) -> None:
    summary = build_summary(make_config(), make_finished_status(), RECORDS, 12.34)
    (run_dir / "summary.json").write_text(json.dumps(summary))
    page = write_report(run_dir).read_text(encoding="utf-8")
    assert HOSTILE not in page
    assert "&lt;script&gt;" in page
    for name in ("success", "teacher", "staleness", "throughput"):
        for suffix in ("", "-dark"):
            assert f'"plots/{name}{suffix}.png"' in page
            assert (run_dir / "plots" / f"{name}{suffix}.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_that_is_not_finished_has_a_report_too(run_dir: Path) -> None:
    page = write_report(run_dir).read_text(encoding="utf-8")
    assert "Not finished yet" in page
    assert "plots/success.png" in page


def test_a_run_without_a_teacher_has_no_plot_of_it(run_dir: Path) -> None:
    records = [make_update(1, staleness_mean=0.0)]
    for record in records:
        del record["values"]["gate_mean"], record["values"]["teacher_gap_mean"]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert "plots/teacher" not in write_report(run_dir).read_text(encoding="utf-8")


def test_another_directory_has_no_report(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no run directory"):
        write_report(tmp_path)
