"""Checks a model directory before anything is started on it, without loading weights or torch."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from sdar.contracts.errors import ConfigurationError


def check_model_files(model_path: Path, *, with_weights: bool = True) -> None:
    """Read the headers of a model directory's files: cheap, and finds what is missing, cut short or
    no model at all.

    Args:
        with_weights: false does not check weights, for services that read only the tokenizer.

    Raises:
        ConfigurationError: names the file.
    """
    hint = (
        "Point model.path at a complete Hugging Face model directory, or make a tiny one with "
        "`sdar model create`."
    )
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        try:
            json.loads((model_path / name).read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigurationError(
                f"Cannot read {model_path / name}: {error.strerror}. {hint}"
            ) from error
        except ValueError as error:
            raise ConfigurationError(
                f"{model_path / name} is not valid JSON: {error}. {hint}"
            ) from error
    if not with_weights:
        return
    shards = sorted(model_path.glob("*.safetensors"))
    if not shards:
        raise ConfigurationError(f"{model_path} holds no *.safetensors weights. {hint}")
    for shard in shards:
        try:
            with safe_open(shard, "np"):
                pass
        except (SafetensorError, OSError) as error:
            raise ConfigurationError(
                f"{shard} is no complete safetensors file: {error}. {hint}"
            ) from error
