"""The shipped run configurations load, and the paper's hold the paper's numbers."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdar.config import RunConfig, load_config

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
PAPER_MODELS = ("Qwen/Qwen2.5-3B-Instruct", "Qwen/Qwen2.5-7B-Instruct", "Qwen/Qwen3-1.7B")

# arXiv:2605.15155, appendix: one row per key, one column per environment.
PAPER = {
    "alfworld": {
        "training.groups_per_update": 16,
        "environment.max_turns": 50,
        "training.num_minibatches": 16,
        "rollout.history_turns": 2,
        "model.max_sequence_tokens": 2048 + 512,
        "environment.invalid_action_penalty": 0.1,
        "method.kl_coefficient": 0.01,
        "evaluation.temperature": 0.4,
    },
    "webshop": {
        "training.groups_per_update": 16,
        "environment.max_turns": 15,
        "training.num_minibatches": 16,
        "rollout.history_turns": 2,
        "model.max_sequence_tokens": 4096 + 512,
        "environment.invalid_action_penalty": 0.1,
        "method.kl_coefficient": 0.01,
        "evaluation.temperature": 0.4,
    },
    "search": {
        "training.groups_per_update": 128,
        "environment.max_turns": 4,
        "training.num_minibatches": 12,
        "rollout.history_turns": 4,
        "model.max_sequence_tokens": 4096 + 512,
        "environment.invalid_action_penalty": 0.01,
        "method.kl_coefficient": 0.001,
    },
}
PAPER_EVERYWHERE = {
    "method.name": "sdar",
    "method.gate": "gap",
    "method.gate_sharpness": 5.0,
    "method.distillation_weight": 0.01,
    "method.clip_low": 0.2,
    "method.clip_high": 0.2,
    "method.advantage_level": "turn",
    "training.group_size": 8,
    "training.learning_rate": 1e-6,
    "training.warmup_updates": 0,
    "training.weight_decay": 0.01,
    "training.max_gradient_norm": 1.0,
    "method.entropy_coefficient": 0.001,
    "rollout.max_response_tokens": 512,
    "rollout.temperature": 1.0,
}


ROWS_A_STEP = {"alfworld": 256, "webshop": 64, "search": 256}
"""Turn rows of a mini-batch in the paper's scripts."""
TURNS = {"alfworld": (10, 50), "webshop": (5, 15), "search": (2, 4)}
"""Turns of an episode, from a policy that solves its tasks to one that doesn't."""


def read(config: RunConfig, dotted: str) -> object:
    section, key = dotted.split(".")
    return getattr(getattr(config, section), key)


def configurations() -> list[Path]:
    return [path for path in sorted(EXAMPLES.glob("*.yaml")) if "comparison" not in path.name]


@pytest.mark.parametrize("path", configurations(), ids=lambda path: path.stem)
def test_every_example_loads_and_is_named_after_its_file(path: Path) -> None:
    assert load_config(path).name == path.stem


@pytest.mark.parametrize("model", PAPER_MODELS)
@pytest.mark.parametrize("environment", PAPER)
def test_the_full_sizes_hold_the_paper_s_numbers_with_each_of_its_models(
    environment: str, model: str
) -> None:
    config = load_config(EXAMPLES / f"{environment}.yaml", {"model.path": model})
    wanted = PAPER_EVERYWHERE | PAPER[environment]
    assert {key: read(config, key) for key in wanted} == wanted
    assert (config.environment.name, str(config.model.path)) == (environment, model)


@pytest.mark.parametrize(
    "path",
    [p for p in configurations() if "tiny" in p.stem or p.stem == "household"],
    ids=lambda p: p.stem,
)
def test_everything_a_tiny_example_names_is_shipped(path: Path) -> None:
    config = load_config(path)
    assert (Path(config.model.path) / "model.safetensors").is_file()
    for value in config.environment.options.values():
        assert not str(value).startswith("/") or Path(str(value)).exists()


def test_every_benchmark_comes_in_two_sizes() -> None:
    names = {path.stem for path in configurations()}
    assert {size for environment in PAPER for size in (environment, f"{environment}-tiny")} <= names


@pytest.mark.parametrize("environment", PAPER)
def test_a_batch_is_trained_in_as_many_steps_as_the_paper_s_mini_batches_make(
    environment: str,
) -> None:
    training = load_config(EXAMPLES / f"{environment}.yaml").training
    num_episodes = training.groups_per_update * training.group_size
    fewest, most = (
        num_episodes * num_turns / ROWS_A_STEP[environment] for num_turns in TURNS[environment]
    )
    assert fewest <= training.num_minibatches <= most
