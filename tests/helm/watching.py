"""What the tests of dashboards and alerts have in common: which series exist, and what is wrong
with a query's use of them.
"""

from __future__ import annotations

import functools
import subprocess
import tempfile
from pathlib import Path

import yaml

from sdar.cli.metrics_page import list_services
from tests.helm.promql import read

ALERTS = Path(__file__).resolve().parents[2] / "helm" / "alerts" / "sdar.yaml"
_OF_TARGETS = {"run", "role", "instance", "job"}
"""Labels that Prometheus adds when it scrapes."""
_NO_LABELS: dict[str, tuple[str, ...]] = {}


@functools.cache
def known_series() -> dict[str, dict[str, tuple[str, ...]]]:
    """Every series that is exported: its labels, and the values that a query may ask for by name.

    A query for a wrong value gives no error and no data.
    """
    series = {"up": _NO_LABELS}
    for service in list_services():
        for measurement in service.measurements:
            for name, labels in measurement.series.items():
                series[name] = {label.name: label.values for label in labels}
    return series


def find_faults(expression: str) -> list[str]:
    """What in an expression names something that no service exports."""
    reading, known = read(expression), known_series()
    faults = [] if reading.selectors else ["it reads no series"]
    labels = set(_OF_TARGETS)
    for name, matchers in reading.selectors:
        if name not in known:
            faults.append(f"no service has {name}")
            continue
        labels |= known[name].keys()
        for label, (sign, value) in matchers.items():
            if label in known[name]:
                wanted = {value} if sign in ("=", "!=") else set(value.split("|"))
                unknown = sorted(wanted - set(known[name][label]))
                faults += [f"{name} has no {label} {part!r}" for part in unknown]
            elif label not in _OF_TARGETS:
                faults.append(f"{name} has no label {label}")
    missing = sorted(reading.groupings - labels)
    return faults + [f"none of its series has the label {label}" for label in missing]


def check_by_promtool(expressions: list[str]) -> str:
    """promtool's verdict on expressions; empty if it takes them all."""
    rules = [{"record": f"query:{place}", "expr": text} for place, text in enumerate(expressions)]
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]}, file)
        file.flush()
        done = subprocess.run(
            ["promtool", "check", "rules", file.name], capture_output=True, text=True, check=False
        )
    return "" if done.returncode == 0 else done.stdout + done.stderr
