"""What the tests of dashboards and alerts have in common: which series exist, and what is wrong
with a query's use of them.
"""

from __future__ import annotations

import functools
import subprocess
import tempfile
from pathlib import Path

import yaml

from sdar.cli.metrics_page import list_metrics
from sdar.contracts.types import GroupOutcome, Purpose
from services.gateway.alarms import JUDGES
from services.gateway.state import RunPhase
from tests.helm.promql import read

ALERTS = Path(__file__).resolve().parents[2] / "helm" / "alerts" / "sdar.yaml"
_OF_TARGETS = {"run", "role", "instance", "job"}
"""Labels that Prometheus adds when it scrapes."""
_VALUES = {
    ("sdar_alarm", "name"): set(JUDGES),
    ("sdar_run_phase", "phase"): {phase.value for phase in RunPhase},
    ("sdar_rollout_episodes_total", "purpose"): {purpose.value for purpose in Purpose},
    ("sdar_rollout_successes_total", "purpose"): {purpose.value for purpose in Purpose},
    ("sdar_learner_groups_total", "outcome"): {outcome.value for outcome in GroupOutcome},
    ("sdar_ledger_groups", "state"): {
        *(outcome.value for outcome in GroupOutcome),
        "running",
        "buffered",
    },
    ("sdar_evaluation_successes", "sampling"): {"sampled", "greedy"},
    ("sdar_evaluation_episodes", "sampling"): {"sampled", "greedy"},
    ("sdar_learner_seconds_bucket", "part"): {"wait", "step", "publish", "checkpoint"},
    ("sdar_error_answers_total", "reason"): {"INTERNAL"},
}
"""Values of labels that queries may ask for, for a wrong one gives no error and no data."""


@functools.cache
def known_series() -> dict[str, set[str]]:
    series = {
        name: set(labels) for metric in list_metrics() for name, labels in metric.series.items()
    }
    return series | {"up": set()}


def find_faults(expression: str) -> list[str]:
    """What in an expression names something that no service exports."""
    reading, known, faults = read(expression), known_series(), []
    if not reading.selectors:
        faults.append("it reads no series")
    labels = set(_OF_TARGETS)
    for name, matchers in reading.selectors:
        if name not in known:
            faults.append(f"no service has {name}")
            continue
        labels |= known[name]
        faults += [
            f"{name} has no label {label}" for label in matchers.keys() - known[name] - _OF_TARGETS
        ]
        for label, (sign, value) in matchers.items():
            if label in known[name]:
                wanted = {value} if sign in ("=", "!=") else set(value.split("|"))
                faults += [
                    f"{name} has no {label} {part!r}"
                    for part in wanted - _VALUES.get((name, label), set())
                ]
    return faults + [
        f"none of its series has the label {label}" for label in sorted(reading.groupings - labels)
    ]


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
