"""helm/values-eks.yaml: the run it makes is examples/alfworld.yaml, and what is the account's own
finds its place.
"""

from __future__ import annotations

from pathlib import Path

from sdar.config import load_config
from tests.helm.chart import ROOT, Object, of_kind, render

ROLE = "arn:aws:iam::123456789012:role/sdar-weights-writer"
ACCOUNT = (
    "image.registry=123456789012.dkr.ecr.us-east-1.amazonaws.com/sdar",
    "storage.weightsUrl=s3://sdar-weights/weights",
    rf"learner.serviceAccount.annotations.eks\.amazonaws\.com/role-arn={ROLE}",
)
"""What infra/terraform writes into the second file."""


def release(*kinds: str) -> list[Object]:
    return of_kind(render("eks", *ACCOUNT, release="alfworld"), *kinds)


def test_the_run_is_the_papers(tmp_path: Path) -> None:
    [config] = [each for each in release("ConfigMap") if "run.yaml" in each["data"]]
    rendered = tmp_path / "run.yaml"
    rendered.write_text(config["data"]["run.yaml"], encoding="utf-8")
    assert load_config(rendered) == load_config(ROOT / "examples" / "alfworld.yaml")


def test_weights_are_in_the_bucket_and_only_the_learner_has_a_volume() -> None:
    workloads = release("Deployment", "StatefulSet")
    pods = {
        workload["metadata"]["name"]: workload["spec"]["template"]["spec"] for workload in workloads
    }
    claims = {
        name
        for name, pod in pods.items()
        for volume in pod["volumes"]
        if "persistentVolumeClaim" in volume
    }
    assert claims == {"alfworld-sdar-learner"}
    for role in ("rollout", "teacher", "learner"):
        environment = {
            each["name"]: each.get("value")
            for each in pods[f"alfworld-sdar-{role}"]["containers"][0]["env"]
        }
        assert environment["SDAR_WEIGHTS_URL"] == "s3://sdar-weights/weights"
        assert "HF_HUB_OFFLINE" not in environment, "the model comes from the hub"


def test_service_accounts_have_the_names_that_iam_trusts() -> None:
    accounts = {
        each["metadata"]["name"]: each["metadata"].get("annotations", {})
        for each in release("ServiceAccount")
    }
    assert accounts["alfworld-sdar-learner"] == {"eks.amazonaws.com/role-arn": ROLE}
    assert {"alfworld-sdar-rollout", "alfworld-sdar-teacher"} <= accounts.keys()
