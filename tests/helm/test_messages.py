"""What `helm install` says to values that cannot work: a sentence that names the key."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from sdar.config import RunConfig
from sdar.contracts import rules
from sdar.contracts.rules import RULES
from tests.helm.chart import CHART, ROOT, helm, refuse


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("run.training.max_stalenes=1", ["at '/run/training'", "'max_stalenes' not allowed"]),
        ("rollouts.gpus=1", ["'rollouts' not allowed"]),
        ("rollout.replica=1", ["at '/rollout'", "'replica' not allowed"]),
        ("run.training.max_staleness=-1", ["at '/run/training/max_staleness'", "got -1, want 0"]),
        ("run.method.name=ppo", ["at '/run/method/name'", "must be one of"]),
        ("run.model.path=", ["run.model.path is empty"]),
        ("run.model.path=null", ["at '/run/model/path'"]),
        ("run.environment.name=null", ["at '/run/environment/name'"]),
        ("run.environment.name=webshop", ["run.model.path is empty"]),
        ("rollout.gpus=-1", ["at '/rollout/gpus'", "got -1, want 0"]),
        ("rollout.gpus=3", ["rollout.gpus is 3", "run.rollout.tensor_parallel_size 1"]),
        (
            "run.rollout.tensor_parallel_size=2",
            ["run.rollout.tensor_parallel_size is 2", "rollout.gpus is 0", "Set rollout.gpus to 2"],
        ),
        (
            "learner.gpus=2",
            ["learner.gpus is 2", "run.training.num_ranks 1", "Set learner.gpus to 1"],
        ),
        (
            "learner.replicas=2,run.training.num_ranks=3",
            ["learner.replicas 2 does not divide run.training.num_ranks 3"],
        ),
        (
            "learner.replicas=2,run.training.num_ranks=2",
            ["learner.replicas is 2", "storage.accessModes has no ReadWriteMany"],
        ),
        ("envs.replicas.min=3", ["envs.replicas.min 3 is above envs.replicas.max 1"]),
        ("envs.replicas.min=0", ["at '/envs/replicas/min'", "got 0, want 1"]),
        ("autoscaling.mode=keda", ["autoscaling.mode is keda", "keda.sh/v1alpha1"]),
        (
            "autoscaling.mode=none,autoscaling.dryRun=true",
            ["autoscaling.dryRun", "autoscaling.mode is none"],
        ),
        ("storage.weightsUrl=gs://bucket", ["at '/storage/weightsUrl'", "gs://bucket"]),
        ("redis.enabled=false", ["redis.enabled is false", "redis.url"]),
        (
            "redis.url=redis://elsewhere:6379",
            ["redis.url names a Redis, and redis.enabled starts another"],
        ),
        ("ingress.enabled=true", ["ingress.host is empty"]),
        ("run.name=Mine", ["at '/run/name'", "Mine"]),
        ("fullnameOverride=2024-run", ["at '/fullnameOverride'", "2024-run"]),
        ("image.tag=0.1.0@sha256:00", ["at '/image/tag'", "0.1.0@sha256:00"]),
        ("image.pullSecrets[0].nam=mine", ["at '/image/pullSecrets/0'", "'nam' not allowed"]),
        (
            "storage.accessModes[0]=ReadWriteOncePod",
            ["storage.accessModes has ReadWriteOncePod", "storage.weightsUrl"],
        ),
    ],
)
def test_a_value_that_cannot_work_is_refused_by_its_name(setting, said):
    message = refuse("--set", setting)

    for words in said:
        assert words in message


BROKEN: tuple[dict[str, dict[str, Any]], ...] = (
    {"rollout": {"max_concurrent_episodes": 4}},
    {"rollout": {"max_response_tokens": 512}},
    {"training": {"num_minibatches": 20}},
    {"teacher": {"retrieval": "ucb"}, "method": {"name": "skill_grpo"}},
    {"teacher": {"scorer": "vllm"}, "rollout": {"temperature": 0.5}},
    {"teacher": {"tensor_parallel_size": 2}},
)
"""What the demo must be changed by to break each of RULES, in their order."""


def change_demo(changes: dict[str, dict[str, Any]]) -> dict[str, Any]:
    demo = yaml.safe_load((ROOT / "examples/household.yaml").read_text())
    for section, keys in changes.items():
        demo[section] |= keys
    return demo


@pytest.mark.parametrize(("rule", "changes"), zip(RULES, BROKEN, strict=True))
def test_a_rule_between_sections_is_refused_in_the_words_of_run_config(rule, changes, tmp_path):
    with pytest.raises(ValueError) as refusal:
        RunConfig.model_validate(change_demo(changes))
    sentence = str(refusal.value.errors()[0]["ctx"]["error"])  # type: ignore[attr-defined]
    (tmp_path / "values.yaml").write_text(yaml.safe_dump({"run": changes}))

    message = refuse("--values", str(tmp_path / "values.yaml"))

    for key in (rule.key, rule.other):
        assert key in sentence
        assert f"run.{key}" in message
    assert sentence in message.replace("run.", "")


def test_values_at_the_edge_of_every_rule_are_taken_by_both(tmp_path):
    changes = {
        "rollout": {"max_concurrent_episodes": 8, "max_response_tokens": 511, "temperature": 1},
        "training": {"num_minibatches": 16},
        "teacher": {"retrieval": "ucb", "scorer": "vllm", "tensor_parallel_size": 2},
    }
    values = {"run": changes, "teacher": {"gpus": 2}}
    (tmp_path / "values.yaml").write_text(yaml.safe_dump(values))

    assert RunConfig.model_validate(change_demo(changes))
    assert helm("lint", str(CHART), "--values", str(tmp_path / "values.yaml")).returncode == 0


@pytest.mark.parametrize("changes", BROKEN)
def test_a_rule_between_sections_stands_nowhere_but_in_its_row(changes, monkeypatch):
    monkeypatch.setattr(rules, "RULES", ())

    assert RunConfig.model_validate(change_demo(changes))


def test_run_config_checks_several_keys_at_once_in_no_other_place():
    sections = [field.annotation for field in RunConfig.model_fields.values()]
    models = [RunConfig, *(each for each in sections if hasattr(each, "model_fields"))]
    validators = [name for each in models for name in each.__pydantic_decorators__.model_validators]

    assert validators == ["_check_across_sections"]


def test_several_mistakes_are_told_at_once():
    message = refuse("--set", "rollout.gpus=3,learner.gpus=2,run.model.path=")

    assert all(
        words in message
        for words in ("rollout.gpus is 3", "learner.gpus is 2", "run.model.path is empty")
    )


def test_what_names_a_run_is_one_pattern_in_the_product_and_the_chart() -> None:
    """The template judges the release's name as well, which no schema sees."""
    pattern = RunConfig.model_json_schema()["properties"]["name"]["pattern"]
    validation = (CHART / "templates" / "_validate.tpl").read_text()
    assert f'regexMatch "{pattern}" $run.name' in validation
