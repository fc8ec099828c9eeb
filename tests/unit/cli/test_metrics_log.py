from __future__ import annotations

from pathlib import Path
from typing import Any

from sdar.cli.metrics_log import MetricsLog


def record(number: int, service: str = "learner") -> dict[str, Any]:
    return {"entry_id": f"{number}-0", "service": service, "values": {"loss": float(number)}}


def test_records_survive_a_resume_and_the_cursor_goes_on(tmp_path: Path) -> None:
    first = MetricsLog(tmp_path / "metrics.jsonl")
    first.extend([record(1), record(2)])
    second = MetricsLog(tmp_path / "metrics.jsonl")
    assert second.query()["after"] == "2-0"
    second.extend([record(3, "rollout")])
    assert [r["entry_id"] for r in MetricsLog(tmp_path / "metrics.jsonl").records()] == [
        "1-0",
        "2-0",
        "3-0",
    ]
    assert second.latest("learner") == {"loss": 2.0}


def test_a_line_that_a_crash_cut_short_is_dropped_and_fetched_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    MetricsLog(path).extend([record(1), record(2)])
    path.write_text(path.read_text()[:-10])
    log = MetricsLog(path)
    assert log.query()["after"] == "1-0"
    log.extend([record(2)])
    assert len(MetricsLog(path).records()) == 2
