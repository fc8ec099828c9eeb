"""Loads a causal language model, and puts the weights of a policy version into it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from sdar.contracts.errors import ConfigurationError, CorruptionError
from sdar.model.checkpoint_names import (
    Shapes,
    checkpoint_shapes,
    model_tensors,
    note_checkpoint_names,
    to_checkpoint,
    to_model,
)
from sdar.model.files import read_tensor_names

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_causal_lm(model_path: Path, dtype: str) -> Any:
    """Load a Hugging Face causal language model; remote code is never run.

    Returns:
        A `transformers` model, in evaluation mode, on the CPU.

    Raises:
        ConfigurationError: no model there, a file in it cannot be read, or its files do not make a
            whole model.
    """
    model, report = _read_model(model_path, dtype)
    _check_weights(model, model_path, report)
    _check_round_trip(model)
    return model.eval()


def compute_version_shapes(model_path: Path) -> Shapes:
    """Names and shapes of the tensors that make a policy version of the model in a directory.

    Read from its configuration and the headers of its files, without weights.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    # On the meta device tensors have shapes and no memory.
    with torch.device("meta"):
        config = AutoConfig.from_pretrained(str(model_path), trust_remote_code=False)
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    note_checkpoint_names(model, read_tensor_names(model_path))
    return checkpoint_shapes(model)


def _read_model(model_path: Path, dtype: str) -> tuple[Any, dict[str, Any]]:
    """The model, and transformers' report of what was missing."""
    # Here, since each takes a second and more to import.
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # a service's log is no terminal
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(model_path),
            output_loading_info=True,
            dtype=DTYPES[dtype],
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
    model, report = loaded
    return model, report


def _check_weights(model: Any, model_path: Path, report: dict[str, Any]) -> None:
    """Refuse what transformers fills up with random numbers, or leaves out, with a warning."""
    missing = sorted(report["missing_keys"])
    if missing:
        raise ConfigurationError(
            f"The *.safetensors files of model.path {model_path} lack {len(missing)} tensors of "
            f"{type(model).__name__}, first {missing[0]}. Point it at a complete model; an adapter "
            "has to be merged into its base model first."
        )
    tied = set(model.get_expanded_tied_weights_keys(all_submodels=True))
    apart = tied - set(model.all_tied_weights_keys)
    if apart:
        raise ConfigurationError(
            f"config.json of model.path {model_path} ties {min(apart)} to the embedding, but its "
            "files hold another tensor of that name. Set tie_word_embeddings to false, or remove "
            "the tensor."
        )


def _check_round_trip(model: Any) -> None:
    """Refuse a model that `export_tensors` and `install_tensors` would lose a tensor of."""
    own = {
        name: torch.empty_like(value, device="meta") for name, value in model_tensors(model).items()
    }
    shapes = {name: value.shape for name, value in own.items()}
    returned = {name: value.shape for name, value in to_model(model, to_checkpoint(model, own))}
    different = sorted(name for name, _ in returned.items() ^ shapes.items())
    if different:
        raise ConfigurationError(
            f"transformers does not write the tensors of {type(model).__name__} back as it read "
            f"them, first {different[0]}, so its updates cannot be published. Use another model."
        )


def export_tensors(model: Any) -> dict[str, torch.Tensor]:
    """The tensors that make a policy version, by the names of the checkpoint.

    Those that are stored as the model has them are its own, not copies.
    """
    return to_checkpoint(model, model_tensors(model))


def install_tensors(model: Any, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Copy a policy version into `model`, in place.

    Raises:
        CorruptionError: names or shapes differ from the model's; the model is unchanged.
    """
    new = dict(tensors)
    # All of it before the first copy: a model of two versions would be worse than an old one.
    _check_tensors(checkpoint_shapes(model), new)
    own = model_tensors(model)
    with torch.no_grad():
        for name, value in to_model(model, new):
            own[name].copy_(value)


def _check_tensors(own: Shapes, new: dict[str, torch.Tensor]) -> None:
    if own.keys() != new.keys():
        raise CorruptionError(
            "The published weights are not of this model: missing "
            f"{sorted(own.keys() - new.keys())[:3]}, "
            f"unexpected {sorted(new.keys() - own.keys())[:3]}. Publish from the same model.path."
        )
    for name, value in new.items():
        if own[name] != tuple(value.shape):
            raise CorruptionError(
                f"Tensor {name} has shape {tuple(value.shape)}, this model's has {own[name]}."
            )
