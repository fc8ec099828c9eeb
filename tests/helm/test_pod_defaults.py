"""`podDefaults`: what it says reaches every pod, and a role's own section has its way over it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.helm.chart import CHART, Object, component, find, helm, of_kind, pods, render
from tools import chart_schema

SERVICES = ("gateway", "rollout", "teacher", "envs", "learner")
WITH_IDENTITY = (*SERVICES, "redis")
ALL = (*WITH_IDENTITY, "check")
KEYS_WITHOUT = {
    "redis": ("env", "startupSeconds"),
    "check": ("env", "startupSeconds", "podAnnotations", "serviceAccount"),
}
"""Keys of `podDefaults` that a role does not have."""
OWN_SPREAD = ("gateway", "learner", "redis", "check")
"""Roles of one pod, or of ranks that belong together: their own section spreads over nothing."""


def pod_of(role: str, values: str = "pod_defaults") -> Object:
    return dict(pods(render(values)))[role]


def variables_of(role: str) -> dict[str, str]:
    (container,) = pod_of(role)["spec"]["containers"]
    return {each["name"]: each.get("value") for each in container["env"]}


def annotations_of(role: str) -> dict[str, str]:
    account = find(render("pod_defaults"), "ServiceAccount", f"sdar-{role}")
    return account["metadata"]["annotations"]


def spread_of(role: str) -> list[str]:
    constraints = pod_of(role)["spec"].get("topologySpreadConstraints", [])
    return [constraint["topologyKey"] for constraint in constraints]


@pytest.mark.parametrize("role", sorted({*ALL} - {"rollout"}))
def test_a_default_places_every_pod(role: str) -> None:
    spec = pod_of(role)["spec"]

    assert spec["nodeSelector"] == {"kubernetes.io/arch": "amd64", "team": "learning"}
    assert spec["tolerations"] == [{"key": "dedicated", "operator": "Exists"}]
    assert "nodeAffinity" in spec["affinity"]
    assert spec["priorityClassName"] == "training"
    assert spread_of(role) == ([] if role in OWN_SPREAD else ["topology.kubernetes.io/zone"])


@pytest.mark.parametrize("role", sorted({*WITH_IDENTITY} - {"rollout"}))
def test_a_default_annotates_every_pod_and_account(role: str) -> None:
    assert pod_of(role)["metadata"]["annotations"]["sidecar.istio.io/inject"] == "false"
    assert annotations_of(role) == {"team": "learning"}


@pytest.mark.parametrize("role", sorted({*SERVICES} - {"rollout"}))
def test_a_default_variable_reaches_every_service(role: str) -> None:
    assert variables_of(role)["AWS_REGION"] == "eu-central-1"


def test_a_default_start_is_that_of_the_roles_that_name_none() -> None:
    allowed = {
        role: probe["periodSeconds"] * probe["failureThreshold"]
        for role in SERVICES
        for probe in [pod_of(role)["spec"]["containers"][0]["startupProbe"]]
    }

    assert allowed == {"gateway": 300, "rollout": 60, "teacher": 900, "envs": 600, "learner": 900}


def test_maps_of_a_role_are_merged_with_the_defaults() -> None:
    pod = pod_of("rollout")
    annotations = pod["metadata"]["annotations"]

    assert pod["spec"]["nodeSelector"] == {
        "kubernetes.io/arch": "amd64",
        "team": "inference",
        "pool": "gpu",
    }
    # With the chart's own, which keeps what shares a volume on one node.
    assert pod["spec"]["affinity"].keys() == {"nodeAffinity", "podAntiAffinity", "podAffinity"}
    assert annotations.keys() == {"checksum/config", "sidecar.istio.io/inject", "team"}
    assert annotations_of("rollout") == {"team": "learning", "role": "reader"}


def test_lists_texts_and_numbers_of_a_role_replace_the_defaults_and_so_do_empty_ones() -> None:
    spec = pod_of("rollout")["spec"]

    assert spread_of("rollout") == ["kubernetes.io/hostname", "topology.kubernetes.io/zone"]
    assert variables_of("rollout")["AWS_PROFILE"] == "reader"
    assert "AWS_REGION" not in variables_of("rollout")
    assert "tolerations" not in spec
    assert "priorityClassName" not in spec


def test_a_default_changes_only_pods_and_accounts() -> None:
    plain = {(thing["kind"], thing["metadata"]["name"]): thing for thing in render()}
    changed = {
        (thing["kind"], component(thing))
        for thing in render("pod_defaults")
        if thing["kind"] != "Secret" and thing != plain[thing["kind"], thing["metadata"]["name"]]
    }

    accounts = of_kind(render(), "ServiceAccount")
    assert {role for kind, role in changed if kind == "ServiceAccount"} == {*WITH_IDENTITY}
    assert len(accounts) == len(WITH_IDENTITY)
    assert {role for kind, role in changed if kind != "ServiceAccount"} == {*ALL}
    assert {kind for kind, _ in changed} == {"Deployment", "StatefulSet", "Pod", "ServiceAccount"}


@pytest.mark.parametrize("role", ALL)
def test_the_schema_describes_a_default_at_each_role_that_may_name_its_own(role: str) -> None:
    sections = chart_schema.build_schema()["properties"]
    defaults = sections["podDefaults"]["properties"]
    own = sections[role]["properties"]
    shared = defaults.keys() & own.keys()

    assert {key: own[key] for key in shared} == {key: defaults[key] for key in shared}
    assert all("description" in own[key] for key in shared - {"serviceAccount"})
    missing = defaults.keys() - shared
    expected = {"redis": {"env", "startupSeconds"}}
    expected["check"] = expected["redis"] | {"podAnnotations", "serviceAccount"}
    assert missing == expected.get(role, set())


def test_values_of_a_chart_without_defaults_make_the_same_pods(tmp_path: Path) -> None:
    """What `helm upgrade --reuse-values` gives a release of an older chart: every key of a pod
    stands at its role, and `podDefaults` nowhere.
    """
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    defaults = values["podDefaults"]
    older = {role: defaults | values[role] for role in ALL}
    for role, unknown in KEYS_WITHOUT.items():
        for key in unknown:
            del older[role][key]
    file = tmp_path / "values.yaml"
    file.write_text(yaml.safe_dump(older | {"podDefaults": None}))

    done = helm("template", "sdar", str(CHART), "--namespace", "runs", "--values", str(file))

    assert done.returncode == 0, done.stderr
    made = [thing for thing in yaml.safe_load_all(done.stdout) if thing]
    assert dict(pods(made)) == dict(pods(render(apis=())))
