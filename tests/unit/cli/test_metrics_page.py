from __future__ import annotations

import re

import pytest
from prometheus_client import CollectorRegistry

from sdar.algorithms.measurements import TOKEN_MEASUREMENTS
from sdar.cli.metrics_page import PAGE, list_services, render_page
from sdar.contracts.roles import ROLES
from sdar.process.gpu_time import GPU_SECONDS, GpuTime
from sdar.process.measurements import Declarations, Meters
from sdar.process.telemetry import build_registry
from services.gateway.metrics import GATEWAY, GatewayMetrics
from services.gateway.scaling.metrics import SCALING, ScalingMetrics
from services.learner.metrics import LEARNER, LearnerMetrics
from services.rollout.metrics import ROLLOUT, RolloutMetrics
from services.teacher.metrics import TEACHER, TeacherMetrics


def test_the_metrics_page_is_written_from_the_current_services():
    assert PAGE.read_text(encoding="utf-8") == render_page(), (
        "docs/metrics.md is out of date: run `make docs`"
    )


def test_every_mean_of_a_loss_is_shown_and_reported_by_the_learner():
    for measurement in TOKEN_MEASUREMENTS:
        shown = LEARNER.reported[measurement.name]
        assert shown in LEARNER.measurements
        assert (shown.name, shown.help) == (f"sdar_learner_{measurement.name}", measurement.help)


@pytest.mark.parametrize(
    ("make", "declarations"),
    [
        (GatewayMetrics, GATEWAY),
        (ScalingMetrics, SCALING),
        (RolloutMetrics, ROLLOUT),
        (TeacherMetrics, TEACHER),
        (LearnerMetrics, LEARNER),
    ],
)
def test_a_service_exposes_what_it_declares_and_nothing_else(
    make: type[Meters], declarations: Declarations
):
    registry = CollectorRegistry()
    make(registry)
    shown = {(family.name, family.type) for family in registry.collect()}
    declared = declarations.measurements
    assert shown == {(found.name.removesuffix("_total"), found.kind) for found in declared}


def test_what_is_collected_otherwise_is_on_the_page_as_it_is_exposed():
    registry = build_registry()
    registry.register(GpuTime(0))
    listed = {*list_services()[0].measurements, GPU_SECONDS}
    shown = {(f.name, f.type, f.documentation) for f in registry.collect()}
    assert shown == {(m.name.removesuffix("_total"), m.kind, m.help) for m in listed}


def test_every_metric_has_a_unit_a_meaning_and_a_name_of_the_project():
    services = list_services()
    # Besides: what all do, and the retriever.
    assert len(services) == len(ROLES) + 2
    for service in services:
        for measurement in service.measurements:
            assert re.fullmatch(r"(sdar|process)_[a-z0-9_]+", measurement.name)
        for declared in (*service.measurements, *service.figures):
            assert declared.unit
            assert len(declared.help) > 10
            assert declared.help.endswith(".")


def test_no_two_services_mean_different_things_by_one_name():
    first = {}
    for service in list_services():
        for measurement in service.measurements:
            assert first.setdefault(measurement.name, measurement) == measurement


def test_series_are_named_as_prometheus_sees_them():
    series = {}
    for service in list_services():
        for measurement in service.measurements:
            for name, labels in measurement.series.items():
                series[name] = tuple(label.name for label in labels)
    assert series["sdar_learner_seconds_bucket"] == ("part", "le")
    assert series["sdar_rollout_episodes_total"] == ("purpose", "task_type")
    assert series["sdar_updates"] == ()
    assert "sdar_learner_seconds" not in series
