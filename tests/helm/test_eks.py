"""helm/values-eks.yaml: the run it makes is examples/alfworld.yaml, whatever the chart's own values say."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import yaml

from sdar.config import load_config

ROOT = Path(__file__).resolve().parents[2]
ACCOUNT = {
    "image": {"registry": "123456789012.dkr.ecr.us-east-1.amazonaws.com/sdar"},
    "storage": {"weightsUrl": "s3://sdar-weights/weights"},
    "learner": {"serviceAccount": {"annotations": {"eks.amazonaws.com/role-arn": "arn:aws:iam::123456789012:role/writer"}}},
}
"""The second file, as infra/terraform writes it."""


def render(directory: Path, *kinds: str) -> list[dict[str, Any]]:
    """The release's objects of these kinds."""
    account = directory / "account.yaml"
    account.write_text(yaml.safe_dump(ACCOUNT), encoding="utf-8")
    files = ["-f", str(ROOT / "helm" / "values-eks.yaml"), "-f", str(account)]
    done = subprocess.run(
        ["helm", "template", "alfworld", str(ROOT / "helm"), "-n", "sdar", *files], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return [manifest for manifest in yaml.safe_load_all(done.stdout) if manifest and manifest["kind"] in kinds]


def test_the_run_is_the_papers(tmp_path: Path) -> None:
    [config] = [m for m in render(tmp_path, "ConfigMap") if "run.yaml" in m["data"]]
    rendered = tmp_path / "run.yaml"
    rendered.write_text(config["data"]["run.yaml"], encoding="utf-8")
    assert load_config(rendered) == load_config(ROOT / "examples" / "alfworld.yaml")


def test_weights_are_in_the_bucket_and_only_the_learner_has_a_volume(tmp_path: Path) -> None:
    workloads = render(tmp_path, "Deployment", "StatefulSet")
    pods = {workload["metadata"]["name"]: workload["spec"]["template"]["spec"] for workload in workloads}
    claims = {name for name, pod in pods.items() for volume in pod["volumes"] if "persistentVolumeClaim" in volume}
    assert claims == {"alfworld-sdar-learner"}
    for role in ("rollout", "teacher", "learner"):
        environment = {each["name"]: each.get("value") for each in pods[f"alfworld-sdar-{role}"]["containers"][0]["env"]}
        assert environment["SDAR_WEIGHTS_URL"] == "s3://sdar-weights/weights"
        assert "HF_HUB_OFFLINE" not in environment, "the model comes from the hub"


def test_service_accounts_have_the_names_that_iam_trusts(tmp_path: Path) -> None:
    metadata = [account["metadata"] for account in render(tmp_path, "ServiceAccount")]
    accounts = {each["name"]: each.get("annotations", {}) for each in metadata}
    assert accounts["alfworld-sdar-learner"]["eks.amazonaws.com/role-arn"].endswith("role/writer")
    assert {"alfworld-sdar-rollout", "alfworld-sdar-teacher"} <= accounts.keys()
