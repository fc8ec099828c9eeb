"""infra/terraform under the real AWS provider: style, validity, own tests, fit to values-eks.yaml.

`terraform test` plans with the provider and applies with a mock of it; no account, no credentials.
The provider comes from the registry, or from a mirror of yours. Run by `make test-terraform`;
without terraform or the provider it fails and says so.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
MODULE = ROOT / "infra" / "terraform"
KARPENTER_TYPES = "@kubernetes-models/karpenter@2.0.0"
"""npm package of Karpenter's types of September 2026; it knows placementGroupSelector."""
GPU = "nvidia.com/gpu"


def terraform(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run it, whatever comes of it."""
    return subprocess.run(
        ["terraform", *arguments],
        cwd=directory,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.fixture(scope="session")
def module(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the module with its provider, so that nothing is written to the repository."""
    if shutil.which("terraform") is None:
        pytest.fail(
            "terraform is not on PATH. Install version 1.11 or later: "
            "https://developer.hashicorp.com/terraform/install."
        )
    copy = tmp_path_factory.mktemp("terraform") / "module"
    shutil.copytree(
        MODULE, copy, ignore=shutil.ignore_patterns(".terraform*", "*.tfstate*", "*.tfvars")
    )
    initialised = terraform(copy, "init", "-backend=false", "-input=false", "-no-color")
    if initialised.returncode != 0:
        pytest.fail(
            f"terraform cannot get the AWS provider: {initialised.stderr.strip()}\nLet it reach "
            "registry.terraform.io, or name "
            "a mirror: TF_CLI_ARGS_init=-plugin-dir=DIRECTORY make test-terraform."
        )
    return copy


@pytest.fixture(scope="session")
def tested(module: Path) -> list[dict[str, Any]]:
    """What `terraform test` reported, a message a line."""
    done = terraform(module, "test", "-json", "-verbose")
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="session")
def applied(tested: list[dict[str, Any]]) -> Mapping[str, Mapping[str, Any]]:
    """Outputs of the mocked applies by the name of their run."""
    states = {
        m["@testrun"]: m["test_state"]["outputs"] for m in tested if m["type"] == "test_state"
    }
    values = {}
    for run, outputs in states.items():
        values[run] = {name: output["value"] for name, output in outputs.items()}
    return values


@pytest.fixture(scope="session")
def outputs(applied: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any]:
    """Those with default variables."""
    return applied["defaults"]


def read_manifests(outputs: Mapping[str, Any]) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(outputs["cluster_manifests"]))


@pytest.fixture(scope="session")
def manifests(outputs: Mapping[str, Any]) -> list[dict[str, Any]]:
    return read_manifests(outputs)


@pytest.fixture(scope="session")
def values() -> dict[str, Any]:
    """helm/values-eks.yaml."""
    return dict(yaml.safe_load((ROOT / "helm" / "values-eks.yaml").read_text(encoding="utf-8")))


@pytest.fixture(scope="session")
def pools(manifests: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Node pools by the label that pods select them by."""
    found = [manifest["spec"] for manifest in manifests if manifest["kind"] == "NodePool"]
    return {pool["template"]["metadata"]["labels"]["sdar.dev/pool"]: pool for pool in found}


def test_is_formatted(module: Path) -> None:
    done = terraform(module, "fmt", "-check", "-recursive", "-diff")
    assert done.returncode == 0, (
        f"Run terraform fmt -recursive infra/terraform.\n{done.stdout}{done.stderr}"
    )


def test_is_valid_without_warnings(module: Path) -> None:
    assert json.loads(terraform(module, "validate", "-json").stdout)["diagnostics"] == []


def test_every_claim_of_its_own_tests_holds(tested: list[dict[str, Any]]) -> None:
    problems = [
        m["@message"]
        for m in tested
        if m["type"] == "diagnostic" and m["diagnostic"]["severity"] == "error"
    ]
    assert not problems, "\n".join(problems)
    declared = sum(
        len(runs)
        for m in tested
        if m["type"] == "test_abstract"
        for runs in m["test_abstract"].values()
    )
    [summary] = [m["test_summary"] for m in tested if m["type"] == "test_summary"]
    assert summary == {
        "status": "pass",
        "passed": declared,
        "failed": 0,
        "errored": 0,
        "skipped": 0,
    }
    assert declared >= 16


@pytest.mark.parametrize("run", ["defaults", "several_nodes"])
def test_manifests_fit_the_schemas_of_kubernetes_and_karpenter(
    run: str, applied: Mapping[str, Mapping[str, Any]], tmp_path: Path
) -> None:
    manifests = read_manifests(applied[run])
    karpenters = [
        manifest for manifest in manifests if manifest["kind"] in ("EC2NodeClass", "NodePool")
    ]
    for manifest in manifests:
        if manifest not in karpenters:
            kubernetes_validate.validate(manifest, "1.29", strict=True)

    # Next to its packages, where node looks for them.
    script = Path(shutil.copy(Path(__file__).with_name("karpenter.mjs"), tmp_path))
    run_tool(tmp_path, "npm", "install", "--silent", "--no-audit", "--no-fund", KARPENTER_TYPES)
    assert run_tool(tmp_path, "node", str(script), given=json.dumps(karpenters)) == ""
    pool = next(manifest for manifest in karpenters if manifest["kind"] == "NodePool")
    pool["spec"]["disruption"]["consolidateAfter"] = "soon"
    assert "consolidateAfter" in run_tool(tmp_path, "node", str(script), given=json.dumps([pool]))


def run_tool(directory: Path, *command: str, given: str = "") -> str:
    """The tool's output; a tool that is not there or fails, fails the test with what it said."""
    if shutil.which(command[0]) is None:
        pytest.fail(f"{command[0]} is not on PATH. Install Node.js 20 or later.")
    done = subprocess.run(
        command,
        cwd=directory,
        input=given,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
    return done.stdout


def test_each_role_finds_a_pool_that_lets_it_in(
    values: dict[str, Any], pools: dict[str, dict[str, Any]]
) -> None:
    for role in ("gateway", "redis", "envs", "rollout", "teacher", "learner"):
        pool = pools[values[role]["nodeSelector"]["sdar.dev/pool"]]
        for taint in pool["template"]["spec"]["taints"]:
            assert any(
                is_tolerated(taint, toleration)
                for toleration in values[role].get("tolerations", [])
            ), (role, taint)


def is_tolerated(taint: dict[str, str], toleration: dict[str, str]) -> bool:
    has_value = toleration["operator"] == "Exists" or toleration["value"] == taint["value"]
    return has_value and (toleration["key"], toleration["effect"]) == (
        taint["key"],
        taint["effect"],
    )


def test_the_bounds_of_autoscaling_fit_the_limits_of_the_pools(
    values: dict[str, Any], pools: dict[str, dict[str, Any]]
) -> None:
    gpus = {
        role: values[role]["gpus"] * values[role]["replicas"]["max"]
        for role in ("rollout", "teacher")
    }
    assert sum(gpus.values()) <= pools["rollout"]["limits"][GPU]
    assert values["learner"]["gpus"] <= pools["learner"]["limits"][GPU]
    cpus = float(values["envs"]["resources"]["requests"]["cpu"]) * values["envs"]["replicas"]["max"]
    assert cpus <= pools["environments"]["limits"]["cpu"]


def test_volumes_are_of_a_class_that_the_cluster_gets(
    values: dict[str, Any], manifests: list[dict[str, Any]]
) -> None:
    classes = {
        manifest["metadata"]["name"] for manifest in manifests if manifest["kind"] == "StorageClass"
    }
    assert {
        values["storage"]["storageClass"],
        values["redis"]["storage"]["storageClass"],
    } <= classes


def test_a_rollout_has_ended_before_its_spot_node_is_taken(values: dict[str, Any]) -> None:
    defaults = yaml.safe_load((ROOT / "helm" / "values.yaml").read_text(encoding="utf-8"))
    for role in ("rollout", "teacher", "envs"):
        assert (defaults[role] | values[role])["terminationGracePeriodSeconds"] < 120, role


def test_the_two_values_files_name_nothing_twice(
    values: dict[str, Any], outputs: Mapping[str, Any]
) -> None:
    def paths(node: Any, prefix: str = "") -> set[str]:
        if not isinstance(node, dict):
            return {prefix}
        return set().union(*(paths(child, f"{prefix}/{key}") for key, child in node.items()))

    assert not paths(values) & paths(yaml.safe_load(outputs["helm_values"]))


def test_the_walkthrough_names_outputs_and_variables_that_exist(outputs: Mapping[str, Any]) -> None:
    page = (ROOT / "docs" / "eks.md").read_text(encoding="utf-8")
    named = set(re.findall(r"output -raw (\w+)", page))
    assert named
    assert named <= outputs.keys()
    declared = set(
        re.findall(
            r'^variable "(\w+)"',
            (MODULE / "variables.tf").read_text(encoding="utf-8"),
            re.MULTILINE,
        )
    )
    blocks = "".join(re.findall(r"```hcl\n(.*?)```", page, re.DOTALL)) + "".join(
        re.findall(r"-var (\w+=)", page)
    )
    assert set(re.findall(r"^(\w+) *=", blocks, re.MULTILINE)) <= declared
