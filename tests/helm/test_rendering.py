"""What the chart renders: sound objects for every values file, the demo by default, nothing shared
between releases.
"""

from __future__ import annotations

import functools
import json
import re
import shutil
from typing import Any

import kubernetes_validate
import pytest
import yaml

from sdar.config import load_config
from sdar.contracts import roles
from services.gateway.scaling.file import ScalingFile
from tests.helm.chart import CHART, ROOT, VALUES_FILES, component, find, helm, of_kind, pods, render
from tools import chart_schema

KUBERNETES = ("1.29", kubernetes_validate.latest_version())
NOT_KUBERNETES_OWN = {"ScaledObject", "TriggerAuthentication", "ServiceMonitor", "PrometheusRule"}
every_values_file = pytest.mark.parametrize("values", VALUES_FILES)


@every_values_file
def test_helm_finds_nothing_to_complain_of(values):
    path = VALUES_FILES[values]
    done = helm(
        "lint",
        "--strict",
        str(CHART),
        *(["--values", str(path)] if path and "keda" not in path.read_text() else []),
    )

    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("version", KUBERNETES)
@every_values_file
def test_every_object_fits_the_schemas_of_kubernetes(values, version):
    things = [thing for thing in render(values) if thing["kind"] not in NOT_KUBERNETES_OWN]

    assert things
    for thing in things:
        check_schema(json.dumps(thing), version)


@functools.cache
def check_schema(thing: str, version: str) -> None:
    kubernetes_validate.validate(json.loads(thing), version, strict=True)


def test_kinds_that_kubernetes_does_not_have_are_rendered_only_where_they_are_served():
    assert not NOT_KUBERNETES_OWN & {thing["kind"] for thing in render(apis=())}
    assert {"ScaledObject", "TriggerAuthentication"} <= {thing["kind"] for thing in render("keda")}


def test_ports_name_their_protocol_which_server_side_apply_to_kubernetes_1_20_asks_for():
    for thing in of_kind(render("everything"), "Service"):
        assert all("protocol" in port for port in thing["spec"]["ports"])
    for _, pod in pods(render("everything")):
        assert all(
            "protocol" in port
            for container in pod["spec"]["containers"]
            for port in container.get("ports", [])
        )


def test_two_releases_in_a_namespace_share_no_name():
    names = [
        {(thing["kind"], thing["metadata"]["name"]) for thing in render(release=release)}
        for release in ("first", "second")
    ]

    assert len(names[0]) == len(names[1])
    assert not names[0] & names[1]


@pytest.mark.parametrize(
    ("release", "name"),
    [("sdar", "sdar-learner"), ("my-sdar", "my-sdar-learner"), ("a", "a-sdar-learner")],
)
def test_names_begin_with_the_release(release, name):
    assert find(render(release=release), "StatefulSet", name)


@pytest.mark.parametrize("release", ["r" * 53, "my." + "r" * 50, "r" * 43 + "-" + "r" * 9])
def test_the_longest_release_name_leaves_names_and_labels_that_kubernetes_takes(release):
    things = render(release=release)
    for thing in things:
        name = thing["metadata"]["name"]
        # Pods of a StatefulSet have the label controller-revision-hash: its name, a dash and ten
        # characters.
        assert len(name) <= {"StatefulSet": 52, "ConfigMap": 253}.get(thing["kind"], 63), name
        assert re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", name)
        assert all(len(value) <= 63 for value in thing["metadata"]["labels"].values())


def test_a_release_whose_name_no_service_could_have_is_refused():
    refused = helm("template", "2024-run", str(CHART))

    assert "2024-run begins with a digit" in refused.stderr
    assert (
        helm("template", "2024-run", str(CHART), "--set", "fullnameOverride=run-2024").returncode
        == 0
    )


def test_only_namespaced_kinds_are_rendered():
    kinds = {thing["kind"] for values in VALUES_FILES for thing in render(values)}

    assert not kinds & {
        "Namespace",
        "ClusterRole",
        "ClusterRoleBinding",
        "PriorityClass",
        "StorageClass",
        "PersistentVolume",
    }


def run_of(*settings: str) -> dict[str, Any]:
    things = render("defaults", *settings)
    return yaml.safe_load(find(things, "ConfigMap", "sdar-run")["data"]["run.yaml"])


def test_the_default_run_is_the_household_demo_word_for_word():
    demo = yaml.safe_load((ROOT / "examples/household.yaml").read_text())
    run = run_of()

    assert (run.pop("name"), demo.pop("name")) == ("sdar", "household")
    assert run["model"].pop("path").endswith("/examples/" + demo["model"].pop("path"))
    assert run == demo


def test_a_key_alone_replaces_the_demos():
    demo = run_of()

    demo["training"]["num_updates"] = 7
    assert run_of("run.training.num_updates=7") == demo


def test_a_run_that_names_its_environment_has_nothing_of_the_demo():
    own = {"model": {"path": "/models/mine"}, "environment": {"name": "webshop"}}

    assert run_of("run.model.path=/models/mine", "run.environment.name=webshop") == own | {
        "name": "sdar"
    }


@every_values_file
def test_services_read_the_run_that_the_values_hold(values, tmp_path):
    rendered = find(render(values, release="a.run"), "ConfigMap", "a-run-sdar-run")["data"][
        "run.yaml"
    ]
    (tmp_path / "run.yaml").write_text(rendered)

    config = load_config(tmp_path / "run.yaml")

    assert config.name == "a-run"


def test_large_and_small_numbers_reach_the_run_unrounded(tmp_path):
    settings = (
        "run.training.num_updates=10000000",
        "run.training.learning_rate=1e-7",
        "run.seed=123456789",
    )
    (tmp_path / "run.yaml").write_text(
        find(render("defaults", *settings), "ConfigMap", "sdar-run")["data"]["run.yaml"]
    )

    config = load_config(tmp_path / "run.yaml")

    assert (config.training.num_updates, config.training.learning_rate, config.seed) == (
        10_000_000,
        1e-7,
        123_456_789,
    )


@pytest.mark.parametrize(
    ("values", "absent"),
    [("grpo", {"teacher", "envs"}), ("skill_grpo", set()), ("defaults", set())],
)
def test_a_method_without_a_teacher_and_a_server_elsewhere_leave_no_trace(values, absent):
    roles = {role for role, _ in pods(render(values))}

    assert {"gateway", "rollout", "teacher", "envs", "learner", "redis", "check"} - roles == absent
    assert not absent & {
        thing["metadata"]["labels"].get("app.kubernetes.io/component") for thing in render(values)
    }


def test_the_gateway_owns_the_sizes_that_it_scales():
    def sized(values, *settings):
        workloads = of_kind(render(values, *settings), "Deployment", "StatefulSet")
        return {
            component(thing): thing["spec"]["replicas"]
            for thing in workloads
            if "replicas" in thing["spec"]
        }

    fixed = {"gateway": 1, "redis": 1}
    assert sized("defaults") == fixed
    assert sized("keda") == {"gateway": 1}
    assert sized("skill_grpo") == fixed | {
        "teacher": 1
    }  # no stream tells KEDA what it is asked for
    assert sized("existing") == {"gateway": 1, "rollout": 3, "teacher": 1, "envs": 1, "learner": 1}
    assert sized(
        "defaults", "autoscaling.dryRun=true", "rollout.replicas.max=4"
    ) == fixed | dict.fromkeys(("rollout", "teacher", "envs", "learner"), 1)


def test_the_scaling_file_names_workloads_that_exist():
    for values in ("defaults", "everything", "grpo", "keda"):
        things = render(values)
        scaling = yaml.safe_load(find(things, "ConfigMap", "sdar-scaling")["data"]["scaling.yaml"])
        for workload in scaling["workloads"].values():
            assert find(things, workload["kind"], workload["name"])
        assert (set(scaling["workloads"]) == {"learner"}) == (values == "keda")


def test_the_gateway_takes_every_scaling_file_that_the_schema_lets_through(tmp_path):
    limits = [
        chart_schema.build_schema()["properties"][key]["properties"]
        for key in ("autoscaling", "rollout")
    ]
    longest, most = (
        limits[0]["idleAfterSeconds"]["maximum"],
        limits[1]["replicas"]["properties"]["max"]["maximum"],
    )
    values = {"autoscaling": {"idleAfterSeconds": longest}, "rollout": {"replicas": {"max": most}}}
    (tmp_path / "values.yaml").write_text(yaml.safe_dump(values))
    done = helm("template", "sdar", str(CHART), "--values", str(tmp_path / "values.yaml"))
    text = find(list(yaml.safe_load_all(done.stdout)), "ConfigMap", "sdar-scaling")["data"][
        "scaling.yaml"
    ]

    scaling = ScalingFile.model_validate(yaml.safe_load(text))

    assert (scaling.idle_after_s, scaling.workloads["rollout"].max) == (longest, most)
    assert set(scaling.workloads) == {"rollout", "teacher", "envs", "learner"}


def test_the_generated_files_are_up_to_date(tmp_path, monkeypatch):
    for name in (
        "values.yaml",
        "values.schema.json",
        "README.md",
        "files/run-defaults.yaml",
        "files/methods.yaml",
        "files/rules.yaml",
        "files/household.yaml",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((CHART / name).read_bytes())
    monkeypatch.setattr(chart_schema, "CHART", tmp_path)

    chart_schema.write()

    for name in (
        "values.schema.json",
        "README.md",
        "files/run-defaults.yaml",
        "files/methods.yaml",
        "files/rules.yaml",
        "files/household.yaml",
    ):
        assert (tmp_path / name).read_text() == (CHART / name).read_text(), (
            f"{name} is old: run make docs"
        )


def test_the_schema_leaves_no_key_unchecked():
    kubernetes_own = {
        "nodeSelector",
        "affinity",
        "podAnnotations",
        "annotations",
        "requests",
        "limits",
        "labels",
        "valueFrom",
    }
    open_keys = {"options"}  # of an environment, which knows its own

    def visit(node, name):
        if node.get("type") == "object" and name not in kubernetes_own | open_keys:
            assert node.get("additionalProperties") is False or name == "items", name
        for key, child in node.get("properties", {}).items():
            visit(child, key)

    visit(chart_schema.build_schema(), "values")


def test_the_default_values_name_every_key_of_the_charts_own_part():
    def keys(node, path=""):
        for name, child in node.get("properties", {}).items():
            yield path + name
            if child.get("properties"):
                yield from keys(child, f"{path}{name}.")

    schema = chart_schema.build_schema()
    del schema["properties"]["run"]
    values = yaml.safe_load((CHART / "values.yaml").read_text())

    def stands(key):
        node = values
        for part in key.split("."):
            if part not in node:
                return False
            node = node[part]
        return True

    for key in keys(schema):
        # What a role shares with others stands once, in podDefaults.
        assert stands(key) or stands(f"podDefaults.{key.partition('.')[2]}"), key


def test_what_is_generated_differs_from_release_to_release():
    def secrets(release):
        return [
            thing.get("data") or thing.get("stringData")
            for thing in of_kind(render(release=release), "Secret")
        ]

    for first, second in zip(secrets("one"), secrets("two"), strict=True):
        for key in {"tokens", "redis-password"} & set(first):
            assert first[key] != second[key]


def test_the_notes_name_claims_and_secrets_that_exist():
    notes = helm("install", "sdar", str(CHART), "--dry-run=client").stdout.partition("NOTES:")[2]
    (redis,) = [thing for thing in of_kind(render(), "StatefulSet") if component(thing) == "redis"]

    assert find(render(), "PersistentVolumeClaim", "sdar-data")
    assert f"persistentvolumeclaim {'sdar-data'} " in notes
    assert f"data-{redis['metadata']['name']}-0" in notes
    assert f"secret {find(render(), 'Secret', 'sdar-auth')['metadata']['name']} " in notes


def test_uninstalling_leaves_the_claims_and_nothing_else():
    kept = [
        thing["metadata"]["name"]
        for thing in render()
        if thing["metadata"].get("annotations", {}).get("helm.sh/resource-policy") == "keep"
    ]
    hooks = [
        thing for thing in render() if "helm.sh/hook" in thing["metadata"].get("annotations", {})
    ]

    assert kept == ["sdar-data"]
    assert all(
        "hook-succeeded" in hook["metadata"]["annotations"]["helm.sh/hook-delete-policy"]
        for hook in hooks
    )


@pytest.mark.parametrize("presence", roles.Presence)
def test_a_role_has_pods_in_the_runs_that_its_row_says_without_an_edit_of_templates(
    presence, tmp_path
):
    chart = tmp_path / "chart"
    shutil.copytree(CHART, chart)
    rows = chart_schema.build_roles()
    rows["rollout"]["presence"] = str(presence)
    (chart / "files/roles.yaml").write_text(yaml.safe_dump(rows))
    runs = ({"method.name": "sdar"}, {"method.name": "skill_grpo"}, {"method.name": "grpo"})
    for changes in (*runs, {"environment.address": "envs.example.com:9090"}):
        told = [word for key, value in changes.items() for word in ("--set", f"run.{key}={value}")]
        done = helm("template", "sdar", str(chart), *told)
        assert done.returncode == 0, done.stderr
        there = {role for role, _ in pods(list(filter(None, yaml.safe_load_all(done.stdout))))}
        config = load_config(ROOT / "examples" / "household.yaml", changes)
        assert ("rollout" in there) == config.has(presence), changes
