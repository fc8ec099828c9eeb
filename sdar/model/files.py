"""Checks a model directory before anything is started on it, without loading weights or torch."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from sdar.contracts.errors import ConfigurationError

_HINT = (
    "Point model.path at a complete Hugging Face model directory, or make a tiny one with "
    "`sdar model create`."
)


def check_model_files(model_path: Path, *, with_weights: bool = True) -> None:
    """Read the headers of a model directory's files.

    That is cheap, and finds a file that is missing, cut short or no model at all.

    Args:
        with_weights: false does not check weights, for services that read only the tokenizer.

    Raises:
        ConfigurationError: names the file.
    """
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        _check_json(model_path / name)
    if not with_weights:
        return
    shards = sorted(model_path.glob("*.safetensors"))
    if not shards:
        raise ConfigurationError(f"{model_path} holds no *.safetensors weights. {_HINT}")
    for shard in shards:
        _check_shard(shard)


def _check_json(file: Path) -> None:
    try:
        json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"Cannot read {file}: {error.strerror}. {_HINT}") from error
    except ValueError as error:
        raise ConfigurationError(f"{file} is not valid JSON: {error}. {_HINT}") from error


def _check_shard(file: Path) -> None:
    try:
        # Opening reads the header and compares the file's length with it.
        with safe_open(file, "np"):
            pass
    except (SafetensorError, OSError) as error:
        raise ConfigurationError(
            f"{file} is no complete safetensors file: {error}. {_HINT}"
        ) from error


def read_tensor_names(model_path: Path) -> set[str]:
    """Names of the tensors in a model directory's weights, from their headers."""
    names: set[str] = set()
    for shard in sorted(model_path.glob("*.safetensors")):
        with safe_open(shard, "np") as file:
            names.update(file.keys())
    return names
