from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sdar.cli.live import LineView, LiveView, compute_figures
from sdar.cli.metrics_log import MetricsLog
from sdar.config import EnvironmentConfig, ModelConfig, RunConfig


@pytest.fixture
def status() -> dict[str, Any]:
    evaluation = {"is_complete": True, "is_greedy": False, "success": 0.2, "interval": [0.15, 0.26]}
    lag = {"num_undelivered": 3, "num_pending": 4, "oldest_age_s": 0.5}
    return {
        "phase": "running",
        "num_updates": 7,
        "target_updates": 100,
        "max_staleness": 2,
        "evaluations": [evaluation],
        "stream_lags": {"tasks": lag},
        "ledger": {"issued": 9, "stale": 0},
        "ledger_gap": 0,
        "alarms": [],
    }


@pytest.fixture
def metrics(tmp_path: Path) -> MetricsLog:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    values = {
        "success_mean": 0.5,
        "trained_success_mean": 0.25,
        "reward_mean": 0.4,
        "tokens_per_s": 1234.5,
        "staleness_mean": 1.5,
        "staleness_max": 2.0,
    }
    for number in range(1, 8):
        record = {
            "entry_id": f"{number}-0",
            "service": "learner",
            "at_s": 2.0 * number,
            "values": values,
        }
        log.extend([record])
    return log


def test_the_figures_say_where_the_run_stands(status: dict[str, Any], metrics: MetricsLog) -> None:
    figures = compute_figures(status, metrics, wall_s=75.0)
    assert figures["update"] == "7 of 100"
    assert figures["time left"] == "3 min 06 s"  # 93 updates at 2 s each
    assert figures["success (held out)"] == "0.20 [0.15, 0.26]"
    assert figures["staleness"] == "mean 1.50, max 2 of at most 2"
    assert figures["queues"] == "tasks 7"
    assert figures["gate"] == "mean -, gap -"  # a method without a teacher measures none
    assert figures["wall clock"] == "1 min 15 s"


def test_an_alarm_is_shown_without_what_a_terminal_would_obey(
    status: dict[str, Any], metrics: MetricsLog
) -> None:
    status["alarms"] = [{"name": "dead_letters", "message": "3 entries \x1b[2J", "since_s": 1.0}]
    assert (
        compute_figures(status, metrics, wall_s=75.0)["alarms"]
        == r"dead_letters: 3 entries \x1b[2J"
    )


def test_a_plain_view_tells_alarms_when_they_change(
    status: dict[str, Any], metrics: MetricsLog, capsys: pytest.CaptureFixture[str]
) -> None:
    view = LineView(
        RunConfig(
            name="a",
            model=ModelConfig(path=Path("m")),
            environment=EnvironmentConfig(name="household"),
        )
    )
    alarm = {"name": "no_progress", "message": "Nothing was played.", "since_s": 1.0}
    for alarms in ([], [alarm], [alarm], []):
        view.show(status | {"alarms": alarms}, metrics, wall_s=75.0)
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("alarms")]
    assert told == ["alarms: no_progress: Nothing was played.", "alarms: none any more"]


def test_every_figure_stands_on_a_line_of_its_own(
    status: dict[str, Any], metrics: MetricsLog
) -> None:
    console = Console(file=io.StringIO(), width=120, force_terminal=False)
    config = RunConfig(
        name="a", model=ModelConfig(path=Path("m")), environment=EnvironmentConfig(name="household")
    )
    view = LiveView(config, console)
    view.show(status, metrics, wall_s=75.0)
    view.close()
    assert isinstance(console.file, io.StringIO)
    lines = [line.split("  ")[0] for line in console.file.getvalue().splitlines()]
    for name in compute_figures(status, metrics, wall_s=75.0):
        assert name in lines
