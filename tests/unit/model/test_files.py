"""A model directory is checked before a start; readers of the tokenizer need no weights."""

import shutil
from pathlib import Path

import pytest

from sdar.contracts.errors import ConfigurationError
from sdar.model.files import check_model_files

MODEL = Path(__file__).parents[3] / "examples" / "models" / "household-tiny"


@pytest.fixture
def without_weights(tmp_path):
    return Path(
        shutil.copytree(MODEL, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    )


def test_a_complete_directory_is_accepted():
    check_model_files(MODEL)


def test_missing_weights_are_refused_except_for_who_reads_the_tokenizer_only(without_weights):
    check_model_files(without_weights, with_weights=False)
    with pytest.raises(ConfigurationError, match=r"no \*\.safetensors"):
        check_model_files(without_weights)


def test_weights_that_are_cut_short_are_refused(without_weights):
    weights = next(MODEL.glob("*.safetensors")).read_bytes()
    (without_weights / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ConfigurationError, match=r"model\.safetensors is no complete"):
        check_model_files(without_weights)


def test_a_missing_tokenizer_is_refused_also_without_weights(without_weights):
    (without_weights / "tokenizer.json").unlink()
    with pytest.raises(ConfigurationError, match=r"tokenizer\.json"):
        check_model_files(without_weights, with_weights=False)
