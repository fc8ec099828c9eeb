"""Writes docs/metrics.md: what every service measures, from the declarations in the code.

Dashboards and alerts are checked against `list_services`: they may read no other metric.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.metrics_core import Metric

from sdar.contracts.roles import ROLES, Role, RoleSpec
from sdar.process.gpu_time import GPUS
from sdar.process.measurements import Counter, Declarations, Figure, Gauge, Measurement
from sdar.process.telemetry import EVERY_SERVICE

_ROOT = Path(__file__).resolve().parents[2]
_SERVICES = _ROOT / "services"
PAGE = _ROOT / "docs" / "metrics.md"

_HEADER = """# Metrics

Written by `make docs` from the services' code; change it there. Each service answers `/metrics` on
its probe port, the gateway on its HTTP port. Names and labels are stable. Prometheus adds `run` and
`role` to each series ([scraping](operations.md#prometheus-and-grafana)). A histogram has the series
`_bucket`, `_sum` and `_count`.

Services also report on the stream `metrics`: `GET /v1/metrics` lists the records, and a local run
keeps them in `metrics.jsonl`. *Key* is the name of a measurement in its service's records. The
value of a counter there is the total since the process began.
"""


_REMARKS: dict[str, str] = {
    Role.GATEWAY: "The run as a whole; the sections below are about single services.",
    Role.LEARNER: (
        "Of rank 0. A value that was not measured yet, or that the method has not, is NaN."
    ),
    Role.ENVS: "Of any environment server, `sdar env serve` included.",
}


@dataclass(frozen=True, slots=True)
class Service:
    """One part of the page: what a service measures, in the order of its declaration."""

    title: str
    text: str
    measurements: tuple[Measurement, ...]
    figures: tuple[Figure, ...] = ()


def list_services() -> list[Service]:
    """What each service measures; the first part is about what all of them measure."""
    # Here, so that others who import this module do not wait for it.
    from services.envs.search.batching import RETRIEVER

    of_process = (*_list_process_metrics(), *EVERY_SERVICE.measurements)
    return [
        Service("Every service", "", of_process),
        *map(_build_role, ROLES.values()),
        build_service("`retriever`", "Of `sdar retriever`, where Search-QA has one.", RETRIEVER),
    ]


def _build_role(row: RoleSpec) -> Service:
    """The part of the page about a service: what the modules `metrics` of its folder declare."""
    declared: list[Declarations] = []
    for path in sorted((_SERVICES / row.name).rglob("metrics.py")):
        # services/gateway/metrics.py is services.gateway.metrics.
        name = ".".join(path.relative_to(_SERVICES.parent).with_suffix("").parts)
        found = vars(importlib.import_module(name)).values()
        declared += [value for value in found if isinstance(value, Declarations)]
    if row.may_hold_gpus:
        declared.append(GPUS)
    return build_service(f"`{row.name}`", _REMARKS.get(row.name, ""), *declared)


def build_service(title: str, text: str, *declarations: Declarations) -> Service:
    """The part of the page about a service that measures what was declared."""
    measurements: list[Measurement] = []
    figures: list[Figure] = []
    for declared in declarations:
        measurements += declared.measurements
        # What is measured is reported as well; figures are in the records alone.
        reported = declared.reported.values()
        figures += [found for found in reported if isinstance(found, Figure)]
    return Service(title, text, tuple(measurements), tuple(figures))


def _list_process_metrics() -> list[Measurement]:
    """What Prometheus' client measures of every process: its words, our units."""
    families = ProcessCollector(registry=CollectorRegistry()).collect()
    return [_declare_process_metric(family) for family in families]


def _declare_process_metric(family: Metric) -> Measurement:
    # Prometheus has the unit at the end of the name.
    ending = family.name.rpartition("_")[2]
    unit = "files" if ending == "fds" else ending
    if family.type == "counter":
        return Counter(f"{family.name}_total", unit, family.documentation)
    return Gauge(family.name, unit, family.documentation)


def render_page() -> str:
    """The whole page as Markdown."""
    return "\n".join([_HEADER, *map(render_service, list_services())]) + "\n"


def render_service(service: Service) -> str:
    """One part of the page."""
    lines = [f"\n## {service.title}\n"]
    if service.text:
        lines.append(f"{service.text}\n")
    lines += ["| metric | type | unit | key | meaning |", "|---|---|---|---|---|"]
    lines += map(_render_measurement, service.measurements)
    if service.figures:
        lines += ["\nIn its records alone:\n", "| key | unit | meaning |", "|---|---|---|"]
        lines += map(_render_figure, service.figures)
    return "\n".join(lines)


def _render_measurement(measurement: Measurement) -> str:
    name = measurement.name
    if measurement.labels:
        name += "{" + ",".join(label.name for label in measurement.labels) + "}"
    key = measurement.key if isinstance(measurement, Counter | Gauge) else ""
    shown_key = f"`{key}`" if key else ""
    return _render_row(f"`{name}`", measurement.kind, measurement.unit, shown_key, measurement.help)


def _render_figure(figure: Figure) -> str:
    return _render_row(f"`{figure.key}`", figure.unit, figure.help)


def _render_row(*cells: str) -> str:
    # A bar would end the cell.
    escaped = [cell.replace("|", "\\|") for cell in cells]
    return f"| {' | '.join(escaped)} |"


if __name__ == "__main__":
    PAGE.write_text(render_page(), encoding="utf-8")
    print(f"Wrote {PAGE}")
