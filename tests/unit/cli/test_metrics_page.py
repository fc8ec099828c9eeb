from __future__ import annotations

import re

from sdar.cli.metrics_page import PAGE, list_metrics, render_page


def test_the_metrics_page_is_written_from_the_current_services():
    assert PAGE.read_text(encoding="utf-8") == render_page(), (
        "docs/metrics.md is out of date: run `make docs`"
    )


def test_every_metric_has_a_unit_a_meaning_and_a_name_of_the_project():
    metrics = list_metrics()
    assert len({metric.role for metric in metrics}) == 7
    for metric in metrics:
        assert re.fullmatch(r"(sdar|process)_[a-z0-9_]+", metric.name)
        assert metric.unit
        assert len(metric.meaning) > 10


def test_no_two_services_mean_different_things_by_one_name():
    told = {}
    for metric in list_metrics():
        assert told.setdefault(metric.name, (metric.kind, metric.labels, metric.meaning))[1:] == (
            metric.labels,
            metric.meaning,
        )


def test_series_are_named_as_prometheus_sees_them():
    series = {name: labels for metric in list_metrics() for name, labels in metric.series.items()}
    assert series["sdar_learner_seconds_bucket"] == ("part", "le")
    assert series["sdar_rollout_episodes_total"] == ("purpose", "task_type")
    assert series["sdar_updates"] == ()
    assert "sdar_learner_seconds" not in series
