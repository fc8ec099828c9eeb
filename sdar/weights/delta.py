"""The difference between two versions of one tensor: which elements changed, and to what.

Elements are compared and stored as bits, so that NaN, -0.0 and every other value come back exactly.
Only types of 16 bits are worth it: at a reinforcement learner's step sizes most weights round to
the same bfloat16 as before, while in float32 nearly all move. Pure functions; nothing here reads or
writes files.

    base    10 11 12 13 14 15        gaps    1 0 2      elements passed over before each change
    tensor  10 99 98 13 14 97        values  99 98 97   what is there now
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sdar.contracts.errors import CorruptionError

_Width = type[np.uint8 | np.uint16]

_BLOCK = 1 << 22
"""Elements looked at together: bounds the memory that positions take, however large the tensor."""


@dataclass(frozen=True, slots=True)
class Delta:
    """The changed elements of a tensor.

    Attributes:
        gaps: uint8 or uint16, in a row. The largest value of its type passes over that many
            elements and names none, so that a gap of any length can be written.
        values: the tensor's type, in a row, one a change.
    """

    gaps: Tensor
    values: Tensor

    @property
    def size_bytes(self) -> int:
        return self.gaps.nbytes + self.values.nbytes


def has_deltas(tensor: Tensor) -> bool:
    """Whether a tensor's type is one whose changes are stored."""
    return tensor.element_size() == torch.int16.itemsize


def encode_delta(base: Tensor, tensor: Tensor) -> Delta | None:
    """What turns `base` into `tensor`, None where that is more than half of `tensor`.

    Both are on the CPU, contiguous, of one type with 16 bits and of one shape.
    """
    before = _bits(base)
    after = _bits(tensor)
    most_bytes = tensor.nbytes // 2
    # A change takes its value and at least one byte of gap: most refusals need no encoding.
    if np.count_nonzero(before != after) * (after.itemsize + 1) > most_bytes:
        return None
    # Neither width is always the shorter one: 8 bits need passes where changes are far apart, and
    # 16 bits waste one byte a change where they are near. Both are written, the shorter is kept.
    codes: dict[_Width, list[npt.NDArray[Any]]] = {np.uint8: [], np.uint16: []}
    values = [after[:0]]
    for gaps, changed in _iter_changes(before, after):
        for width, written in codes.items():
            written.append(_encode_gaps(gaps, width))
        values.append(after[changed])
    delta = Delta(
        _join_shortest(codes), torch.from_numpy(np.concatenate(values)).view(tensor.dtype)
    )
    return delta if delta.size_bytes <= most_bytes else None


def _iter_changes(
    before: npt.NDArray[np.int16], after: npt.NDArray[np.int16]
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """By block: the gap before each change, and the change's position in the whole tensor."""
    # A gap may span blocks, so it is counted from the last change of the blocks before. The first
    # change is counted from one before the tensor's beginning: its gap is its position.
    last = -1
    for start in range(0, len(after), _BLOCK):
        block = slice(start, start + _BLOCK)
        changed = np.flatnonzero(before[block] != after[block]) + start
        yield np.diff(changed, prepend=last) - 1, changed
        last = changed[-1] if len(changed) else last


def _join_shortest(codes: Mapping[_Width, Sequence[npt.NDArray[Any]]]) -> Tensor:
    """The gaps in the width that takes fewest bytes; of two as short, the first."""
    joined: list[npt.NDArray[Any]] = []
    for width, written in codes.items():
        # The empty array stands for a tensor without elements, which has no block.
        joined.append(np.concatenate([np.empty(0, width), *written], dtype=width))
    return torch.from_numpy(min(joined, key=_size))


def apply_delta(base: Tensor, delta: Delta) -> Tensor:
    """Undo `encode_delta`; `base` stays as it is.

    Raises:
        CorruptionError: the delta is not of such a tensor.
    """
    _check_types(base, delta)
    tensor = base.clone(memory_format=torch.contiguous_format)
    values = _bits(delta.values)
    codes = delta.gaps.reshape(-1).numpy()
    if not _write_changes(_bits(tensor), values, codes):
        raise CorruptionError(
            f"A delta of {len(values)} values and {len(codes)} gaps does not fit {tensor.numel()} "
            "elements."
        )
    return tensor


def _check_types(base: Tensor, delta: Delta) -> None:
    if (
        delta.gaps.dtype not in (torch.uint8, torch.uint16)
        or delta.values.dtype != base.dtype
        or not has_deltas(base)
    ):
        raise CorruptionError(
            f"A delta of {delta.gaps.dtype} gaps and {delta.values.dtype} values is none of "
            f"{base.dtype}."
        )


def _write_changes(
    bits: npt.NDArray[np.int16], values: npt.NDArray[np.int16], codes: npt.NDArray[Any]
) -> bool:
    """Write `values` over the elements that `codes` name; False if the three do not fit together.

    Every block is compared with the bounds before it is written: the delta may be damaged.
    """
    num_changed = 0
    last = -1
    for start in range(0, len(codes), _BLOCK):
        block = codes[start : start + _BLOCK]
        is_change = block != np.iinfo(codes.dtype).max
        # A change stands one element behind those that its gap passes over; a pass has no element
        # of its own. The running sum is therefore the position that each code leads to.
        reached = np.cumsum(block + is_change.astype(np.int64)) + last
        changed = reached[is_change]
        last = int(reached[-1])
        if last >= len(bits) or num_changed + len(changed) > len(values):
            return False
        bits[changed] = values[num_changed : num_changed + len(changed)]
        num_changed += len(changed)
    return num_changed == len(values)


def _encode_gaps(gaps: npt.NDArray[np.int64], width: _Width) -> npt.NDArray[Any]:
    # The largest value of the type is no gap: it passes over as many elements and names none.
    limit = np.iinfo(width).max
    num_passes = gaps // limit
    # Each change's own code comes after those that only pass over.
    last = np.cumsum(num_passes + 1) - 1
    codes = np.full(last[-1] + 1 if len(last) else 0, limit, dtype=width)
    codes[last] = gaps % limit
    return codes


def _size(array: npt.NDArray[Any]) -> int:
    return array.nbytes


def _bits(tensor: Tensor) -> npt.NDArray[np.int16]:
    """The elements' bit patterns in a row; shares memory with `tensor`."""
    return tensor.reshape(-1).view(torch.int16).numpy()
