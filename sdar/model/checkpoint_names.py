"""A model's tensors under the names and shapes of its checkpoint, and back.

transformers renames, stacks and splits tensors when it loads some architectures: the experts of a
Mixtral layer become one tensor. What is published has the checkpoint's names, for those are what
every other reader knows, vLLM first. Elements move and none changes, so a round trip is exact.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

Shapes = dict[str, tuple[int, ...]]

Rename = Callable[[str], tuple[str, str | None]]
"""A name to that of the other side, and the converter's pattern that it matched."""


def model_tensors(model: Any) -> dict[str, torch.Tensor]:
    """What `save_pretrained` would write, still under the model's own names.

    A head that is tied to the embedding appears once, as the embedding.
    """
    left_out = {*model.all_tied_weights_keys, *(model._keys_to_ignore_on_save or ())}
    return {
        name: value
        for name, value in model.state_dict().items()
        if isinstance(value, torch.Tensor) and name not in left_out
    }


def to_checkpoint(model: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Own names to the checkpoint's. Empties `tensors`, so that no tensor is held twice.

    Where nothing is converted, as in dense models, no tensor is copied.
    """
    # Each of them undone, the last one first.
    transforms = [each.reverse_transform() for each in reversed(_conversions(model))]
    return dict(_convert(model, tensors, transforms, _saved_name(transforms)))


def to_model(model: Any, tensors: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Undo `to_checkpoint`, one tensor of the model at a time. Empties `tensors`."""
    transforms = copy.deepcopy(_conversions(model))
    return _convert(model, tensors, transforms, _loaded_name(model, transforms))


def checkpoint_shapes(model: Any) -> Shapes:
    """Names and shapes of the tensors that make a policy version. Computes on no weight."""
    own = {
        name: torch.empty_like(value, device="meta") for name, value in model_tensors(model).items()
    }
    return {name: tuple(value.shape) for name, value in to_checkpoint(model, own).items()}


def note_checkpoint_names(model: Any, names: Iterable[str]) -> None:
    """Give a model without weights the conversions that loading a checkpoint would have noted.

    Which ones apply depends on the names in the files: a checkpoint may already be in the form of
    the model.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import dot_natural_key

    transforms = get_model_conversion_mapping(model)
    rename = _loaded_name(model, transforms)
    for name in sorted(names, key=dot_natural_key):
        rename(name)
    model._weight_conversions = [each for each in transforms if each.was_used()]


def _conversions(model: Any) -> list[Any]:
    """Those that loading used; of a model made from its configuration, those of its kind."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange

    noted: list[Any] | None = getattr(model, "_weight_conversions", None)
    if noted is not None:
        return noted
    every = get_model_conversion_mapping(model, add_legacy=False)
    # A prefix is there or not by the files alone.
    return [each for each in every if not isinstance(each, PrefixChange)]


def _saved_name(transforms: list[Any]) -> Rename:
    from transformers.core_model_loading import rename_source_key

    renamings, converters = _split(transforms)
    return lambda name: rename_source_key(name, renamings, converters, reverse=True)


def _loaded_name(model: Any, transforms: list[Any]) -> Rename:
    from transformers.core_model_loading import rename_source_key

    own, prefix = model.state_dict(), model.base_model_prefix

    def rename(name: str) -> tuple[str, str | None]:
        renamed, pattern = rename_source_key(name, *_split(transforms), prefix, own)
        # A name that only looks like an old one stays as it is.
        if renamed not in own and name in own:
            return rename_source_key(name, [], [], prefix, own)
        return renamed, pattern

    return rename


def _split(transforms: list[Any]) -> tuple[list[Any], list[Any]]:
    """Those that only rename, and those that change shapes as well."""
    from transformers.core_model_loading import WeightConverter

    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    return [each for each in transforms if each not in converters], converters


def _convert(
    model: Any,
    tensors: dict[str, torch.Tensor],
    transforms: list[Any],
    rename: Rename,
) -> Iterator[tuple[str, torch.Tensor]]:
    """As transformers does it in loading and in saving, one group of tensors at a time."""
    from transformers.core_model_loading import dot_natural_key

    by_pattern: dict[str, Any] = {}
    for converter in _split(transforms)[1]:
        by_pattern |= dict.fromkeys(converter.source_patterns, converter)
    groups: dict[str, Any] = {}
    # In the order of the numbers in their names: experts are stacked as they come.
    for name in sorted(tensors, key=dot_natural_key) if transforms else list(tensors):
        renamed, pattern = rename(name)
        if pattern is None:
            yield renamed, tensors.pop(name)
            continue
        group = groups.setdefault(renamed, copy.deepcopy(by_pattern[pattern]))
        group.add_tensor(renamed, name, pattern, tensors.pop(name))
    for renamed in list(groups):
        converted = groups.pop(renamed).convert(renamed, model=model, config=model.config)
        for name, value in converted.items():
            yield name, value[0] if isinstance(value, list) else value
