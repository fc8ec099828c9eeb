"""Loads a causal language model, and puts the weights of a policy version into it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from sdar.contracts.errors import ConfigurationError, CorruptionError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_causal_lm(model_path: Path, dtype: str) -> Any:
    """Load a Hugging Face causal language model; remote code is never run.

    Returns:
        A `transformers` model with a `.model` body and an `.lm_head`, in evaluation mode, on the
            CPU.

    Raises:
        ConfigurationError: no model there, or a file in it cannot be read.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # a service's log is no terminal
    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(model_path),
            dtype=DTYPES[dtype],
            attn_implementation="sdpa",
            use_safetensors=True,
            trust_remote_code=False,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ConfigurationError(
            f"Cannot load a causal language model from model.path {model_path}: {error}. "
            "Point it at a complete Hugging Face model directory, or make a tiny one with `sdar "
            "model create`."
        ) from error
    if not hasattr(model, "model") or not hasattr(model, "lm_head"):
        raise ConfigurationError(
            f"{type(model).__name__} has no separate body and lm_head; use a decoder such as Qwen2 "
            "or Qwen3."
        )
    return model.eval()


def export_tensors(model: Any) -> dict[str, torch.Tensor]:
    """The tensors that make a policy version, by name; a head tied to the embedding appears once,
    as the embedding.
    """
    tensors = {
        name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)
    }
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    return tensors


def install_tensors(model: Any, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Copy a policy version into `model`, in place.

    Raises:
        CorruptionError: names or shapes differ from the model's; the model is unchanged.
    """
    own = export_tensors(model)
    new = dict(tensors)
    if own.keys() != new.keys():
        raise CorruptionError(
            "The published weights are not of this model: missing "
            f"{sorted(own.keys() - new.keys())[:3]}, "
            f"unexpected {sorted(new.keys() - own.keys())[:3]}. Publish from the same model.path."
        )
    for name, value in new.items():
        if own[name].shape != value.shape:
            raise CorruptionError(
                f"Tensor {name} has shape {tuple(value.shape)}, this model's has "
                f"{tuple(own[name].shape)}."
            )
    with torch.no_grad():
        for name, value in new.items():
            own[name].copy_(value)
