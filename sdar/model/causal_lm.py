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
    model = _read_model(model_path, dtype)
    # The losses apply the head to parts of a sequence, so they need it apart from the body.
    if not hasattr(model, "model") or not hasattr(model, "lm_head"):
        raise ConfigurationError(
            f"{type(model).__name__} has no separate body and lm_head; use a decoder such as Qwen2 "
            "or Qwen3."
        )
    return model.eval()


def _read_model(model_path: Path, dtype: str) -> Any:
    # Here, since each takes a second and more to import.
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # a service's log is no terminal
    try:
        return AutoModelForCausalLM.from_pretrained(
            str(model_path),
            dtype=DTYPES[dtype],
            attn_implementation="sdpa",
            use_safetensors=True,
            trust_remote_code=False,
        )
    # What transformers raises over a file that is missing, cut short or of another model.
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ConfigurationError(
            f"Cannot load a causal language model from model.path {model_path}: {error}. "
            "Point it at a complete Hugging Face model directory, or make a tiny one with `sdar "
            "model create`."
        ) from error


def export_tensors(model: Any) -> dict[str, torch.Tensor]:
    """The tensors that make a policy version, by name.

    A head that is tied to the embedding appears once, as the embedding.
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
    # All of it before the first copy: a model of two versions would be worse than an old one.
    _check_tensors(own, new)
    with torch.no_grad():
        for name, value in new.items():
            own[name].copy_(value)


def _check_tensors(own: dict[str, torch.Tensor], new: dict[str, torch.Tensor]) -> None:
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
