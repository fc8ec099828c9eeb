"""Alert rules: they name what exists, tell people what to do, and fire when promtool's tests say so
and not else.
"""

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from services.gateway.alarms import JUDGES
from tests.helm.promql import read
from tests.helm.watching import ALERTS, find_faults

CASES = Path(__file__).with_name("alerts_test.yaml")
ROOT = Path(__file__).resolve().parents[2]
RULES = [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]
NAMES = [rule["alert"] for rule in RULES]


def run_promtool(*arguments) -> str:
    """Its output if it found a fault."""
    done = subprocess.run(
        ["promtool", *map(str, arguments)], capture_output=True, text=True, check=False
    )
    return "" if done.returncode == 0 else done.stdout + done.stderr


@pytest.mark.parametrize("rule", RULES, ids=NAMES)
def test_an_alert_reads_only_series_and_labels_that_a_service_exports(rule):
    assert find_faults(rule["expr"]) == []


@pytest.mark.parametrize("rule", RULES, ids=NAMES)
def test_every_selector_can_be_narrowed_to_one_run(rule):
    assert {matchers.get("run") for _, matchers in read(rule["expr"]).selectors} == {("=~", ".+")}


@pytest.mark.parametrize("rule", RULES, ids=NAMES)
def test_an_alert_tells_how_bad_it_is_what_is_wrong_and_what_to_do(rule):
    assert rule["labels"].keys() == {"severity"}
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert rule["annotations"].keys() == {"summary", "description", "runbook"}
    assert "{{ $labels.run }}" in rule["annotations"]["summary"]
    page, _, anchor = rule["annotations"]["runbook"].partition("#")
    headings = re.findall(r"^#+ (.+)$", (ROOT / page).read_text(), re.MULTILINE)
    assert anchor in {
        re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-") for heading in headings
    }


def test_every_alarm_of_the_gateway_has_its_alert():
    expressions = " ".join(rule["expr"] for rule in RULES)
    patterns = re.findall(r'name=~?"([^"]+)"', expressions)
    assert [
        name for name in JUDGES if not any(re.fullmatch(pattern, name) for pattern in patterns)
    ] == []


def test_the_rules_are_valid_and_each_fires_on_its_case_and_not_on_its_neighbour():
    assert run_promtool("check", "rules", ALERTS) == ""
    assert run_promtool("test", "rules", CASES) == ""


def test_each_alert_has_a_case_in_which_it_fires():
    cases = CASES.read_text()
    assert len(set(NAMES)) == len(NAMES)
    assert [name for name in NAMES if f'alertname="{name}"' not in cases] == []


def test_the_cases_notice_an_alert_that_never_fires_and_one_that_always_does(tmp_path):
    (tmp_path / "cases.yaml").write_text(
        yaml.safe_dump(yaml.safe_load(CASES.read_text()) | {"rule_files": ["rules.yaml"]})
    )
    for broken in ("vector(1) > 2", 'label_replace(vector(1), "run", "near", "", "")'):
        rules = [
            rule | {"expr": broken} if rule["alert"] == "SdarIdleGpu" else rule for rule in RULES
        ]
        (tmp_path / "rules.yaml").write_text(
            yaml.safe_dump({"groups": [{"name": "one", "rules": rules}]})
        )
        assert "SdarIdleGpu" in run_promtool("test", "rules", tmp_path / "cases.yaml")
