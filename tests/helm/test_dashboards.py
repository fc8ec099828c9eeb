"""Dashboards: what Grafana needs of them, and queries that name only what exists. Whether each
shows something is asked of a real Prometheus by `python -m tools.check_dashboards`."""

import json
import re

import pytest

from tests.helm.promql import read
from tests.helm.watching import check_by_promtool, find_faults
from tools.check_dashboards import DASHBOARDS, list_queries
from tools.make_dashboards import ALL, render

QUERIES = list(list_queries())
FILLED = [query.fill("household", window="1m", seconds=1800) for query in QUERIES]
FILES = {path.stem: json.loads(path.read_text()) for path in DASHBOARDS.glob("*.json")}
PANELS = [
    (name, panel)
    for name, found in FILES.items()
    for panel in found["panels"]
    if panel["type"] != "row"
]


def test_the_files_are_written_from_the_current_panels():
    written = {f"sdar-{path.stem}": path.read_text() for path in DASHBOARDS.glob("*.json")}
    assert written == {dashboard.uid: render(dashboard) for dashboard in ALL}, (
        "helm/dashboards is out of date: run `make docs`"
    )


@pytest.mark.parametrize(
    "place", range(len(QUERIES)), ids=[f"{q.dashboard}/{q.panel}/{q.legend}" for q in QUERIES]
)
def test_a_query_reads_only_series_and_labels_that_a_service_exports(place):
    assert find_faults(FILLED[place]) == []


def test_prometheus_takes_every_query():
    assert check_by_promtool(FILLED) == ""


def test_every_query_is_about_the_run_that_is_chosen():
    for query in QUERIES:
        assert {
            matchers.get("run")
            for _, matchers in read(query.fill("$run", window="1m", seconds=9)).selectors
        } == {("=", "$run")}


def test_legends_name_labels_that_the_query_keeps():
    for query, text in zip(QUERIES, FILLED, strict=True):
        assert set(re.findall(r"{{(\w+)}}", query.legend)) <= read(text).groupings, query


def test_no_datasource_is_written_into_a_dashboard():
    named = [
        target["datasource"]["uid"] for _, panel in PANELS for target in [panel, *panel["targets"]]
    ]
    assert set(named) == {"${datasource}"}
    for found in FILES.values():
        variables = found["templating"]["list"]
        assert variables[0]["type"] == "datasource"
        assert {v["datasource"]["uid"] for v in variables[1:]} == {"${datasource}"}
        assert "$run" not in variables[1]["query"]["query"]


def test_dashboards_and_panels_can_be_told_apart():
    assert len({found["uid"] for found in FILES.values()}) == len(FILES) == 3
    for found in FILES.values():
        ids = [panel["id"] for panel in found["panels"]]
        assert len(set(ids)) == len(ids)
        used = {(name, v["name"]) for name in [found["uid"]] for v in found["templating"]["list"]}
        text = json.dumps(found["panels"])
        assert [
            name for _, name in used if f"${name}" not in text and f"${{{name}}}" not in text
        ] == []


@pytest.mark.parametrize(
    ("dashboard", "panel"), PANELS, ids=[f"{name}/{panel['title']}" for name, panel in PANELS]
)
def test_a_panel_has_a_title_a_unit_a_description_and_queries(dashboard, panel):
    assert panel["title"]
    assert panel["description"].endswith((".", "`."))
    assert panel["fieldConfig"]["defaults"]["unit"] in ("none", "percentunit", "s", "bytes")
    assert panel["targets"]
    assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])


@pytest.mark.parametrize("name", FILES)
def test_panels_do_not_lie_over_each_other_or_beyond_the_edge(name):
    taken = set()
    for panel in FILES[name]["panels"]:
        place = panel["gridPos"]
        cells = {
            (place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])
        }
        assert not cells & taken
        assert place["x"] + place["w"] <= 24
        taken |= cells


def test_a_query_with_a_wrong_name_label_or_value_is_found():
    assert find_faults('sum(rate(sdar_nonsense_total{run="x"}[1m]))') == [
        "no service has sdar_nonsense_total"
    ]
    assert find_faults('sdar_updates{run="x", phase="y"}') == ["sdar_updates has no label phase"]
    assert find_faults('sdar_run_phase{run="x", phase="asleep"}') == [
        "sdar_run_phase has no phase 'asleep'"
    ]
    assert find_faults('sdar_run_phase{run="x", phase=~"running|asleep"}') == [
        "sdar_run_phase has no phase 'asleep'"
    ]
    assert find_faults('sum by (stream) (sdar_updates{run="x"})') == [
        "none of its series has the label stream"
    ]
    assert find_faults('rate(sdar_learner_seconds{run="x"}[1m])') == [
        "no service has sdar_learner_seconds"
    ]
