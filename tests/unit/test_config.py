from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from sdar.config import RunConfig, load_config, save_config
from sdar.contracts.errors import ConfigurationError
from sdar.contracts.streams import ConsumerGroup, Stream

MINIMAL = "name: a\nmodel: {path: m}\nenvironment: {name: household}\n"


def write(directory: Path, text: str) -> Path:
    path = directory / "run.yaml"
    path.write_text(text)
    return path


def test_a_minimal_configuration_loads_with_defaults(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, MINIMAL))
    assert config.method.name == "sdar"
    assert config.training.group_size == 8


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (
            MINIMAL + "method: {gate_sharpnes: 2}\n",
            ["method.gate_sharpnes", "Did you mean gate_sharpness?"],
        ),
        (MINIMAL + "xyz: 1\n", ["unknown key xyz", "Known keys here: name, seed, model"]),
        (
            MINIMAL + "learning_rate: 1\n",
            ["unknown key learning_rate", "Did you mean training.learning_rate?"],
        ),
        (
            MINIMAL + "method: {name: rlsd, rlsd_mixing: 0.5, rlsd_decay_updates: 9}\n",
            [
                "unknown key method.rlsd_mixing. Did you mean rlsd.mixing?",
                "unknown key method.rlsd_decay_updates. Did you mean rlsd.decay_updates?",
            ],
        ),
        (
            MINIMAL + "method: {rlsd: {mixin: 0.5}}\n",
            ["method.rlsd.mixin", "Did you mean mixing?"],
        ),
        (
            MINIMAL + "method: {clip_low: 1.0}\n",
            ["method.clip_low", "1.0", "less than 1"],
        ),
        (
            MINIMAL + "method: {gate: hard}\n",
            ["method.gate", "'hard'", "'entropy', 'gap' or 'soft_or'"],
        ),
        (
            MINIMAL + "training: {max_staleness: -1}\n",
            ["training.max_staleness", "-1", "greater than or equal to 0"],
        ),
        (MINIMAL + "training: {num_updates: many}\n", ["training.num_updates", "'many'"]),
        (MINIMAL + "method: {name: ppo}\n", ["method.name", "'ppo'", "grpo"]),
        ("model: {path: m}\nenvironment: {name: x}\n", ["name is missing"]),
        (
            MINIMAL + "rollout: {max_concurrent_episodes: 4}\n",
            ["max_concurrent_episodes 4", "group_size 8"],
        ),
        (
            MINIMAL + "method: {name: skill_grpo}\nteacher: {retrieval: ucb}\n",
            ["teacher.retrieval ucb", "method.name skill_grpo", "Use another"],
        ),
        (
            MINIMAL + "training: {num_minibatches: 99}\n",
            ["num_minibatches 99", "groups_per_update 16"],
        ),
        ("- a list\n", ["list", "mapping"]),
        ("name: [unclosed\n", ["not valid YAML"]),
        ("name: Not/Allowed\nmodel: {path: m}\nenvironment: {name: x}\n", ["name", "Not/Allowed"]),
    ],
)
def test_a_bad_configuration_is_refused_with_the_key_and_what_fits(
    tmp_path: Path, text: str, named: list[str]
) -> None:
    with pytest.raises(ConfigurationError) as caught:
        load_config(write(tmp_path, text))
    for part in named:
        assert part in caught.value.message


def test_a_missing_file_is_named() -> None:
    with pytest.raises(ConfigurationError, match=r"nowhere\.yaml"):
        load_config(Path("nowhere.yaml"))


def test_overrides_reach_nested_keys_and_are_validated(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL)
    assert load_config(path, {"training.num_updates": 3}).training.num_updates == 3
    with pytest.raises(ConfigurationError, match="num_updates"):
        load_config(path, {"training.num_updates": 0})
    with pytest.raises(ConfigurationError, match="name is a value"):
        load_config(path, {"name.deeper": 0})


def test_paths_are_relative_to_the_file_not_to_the_process(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    config = load_config(
        write(tmp_path, MINIMAL + "teacher: {skills: library, embedding_model: ../minilm}\n")
    )
    assert config.model.path == tmp_path / "m"
    assert config.teacher.skills == tmp_path / "library"
    assert config.teacher.embedding_model == tmp_path.parent / "minilm"


def test_a_saved_configuration_loads_as_the_same_run(tmp_path: Path) -> None:
    config = load_config(
        write(tmp_path, MINIMAL + "method: {name: rlsd}\ntraining: {adam_betas: [0.8, 0.9]}\n")
    )
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config


@pytest.mark.parametrize(
    ("method", "has_teacher"),
    [("grpo", False), ("skill_grpo", False), ("sdar", True), ("rlsd", True)],
)
def test_the_method_wires_the_streams(tmp_path: Path, method: str, has_teacher: bool) -> None:
    consumers = load_config(write(tmp_path, MINIMAL), {"method.name": method}).stream_consumers
    reads_itself = consumers[Stream.TRAJECTORIES] == (ConsumerGroup.LEARNER,)
    assert reads_itself is not has_teacher
    assert (Stream.SCORED in consumers) is has_teacher


def test_groups_of_a_section_are_read_and_overridden_like_sections(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL + "method: {name: rlsd, rlsd: {mixing: 0.25}}\n")
    config = load_config(path, {"method.rlsd.clip": 0.1})
    assert (config.method.rlsd.mixing, config.method.rlsd.clip) == (0.25, 0.1)
    assert config.method.rlsd.decay_updates == 100


def list_fields(section: type[BaseModel]) -> Iterator[tuple[str, FieldInfo]]:
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from list_fields(field.annotation)
        else:
            yield name, field


def test_every_field_has_bounds_or_a_closed_type() -> None:
    for name, field in list_fields(RunConfig):
        if field.annotation in (int, float):
            assert field.metadata, f"{name} is an unbounded number"


@pytest.mark.parametrize("section", ["rollout", "evaluation"])
def test_a_temperature_that_vllm_would_raise_is_refused_with_the_least_one(
    section: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigurationError, match=rf"{section}.temperature.*0\.005.*0\.01"):
        load_config(write(tmp_path, MINIMAL + f"{section}: {{temperature: 0.005}}\n"))
    config = load_config(write(tmp_path, MINIMAL + f"{section}: {{temperature: 0.01}}\n"))
    assert config.evaluation_sampling(is_greedy=True).temperature == 0
