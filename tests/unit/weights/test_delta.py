"""Differences between two versions of a tensor, down to the bits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sdar.contracts.errors import CorruptionError
from sdar.weights import delta as weight_delta
from sdar.weights.delta import Delta, apply_delta, encode_delta, has_deltas

DTYPES = (torch.bfloat16, torch.float16, torch.int16, torch.uint16)


def from_bits(bits: list[int], dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.tensor(bits, dtype=torch.int32).to(torch.int16).view(dtype)


def assert_same_bits(got: Tensor, want: Tensor) -> None:
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    assert torch.equal(got.view(torch.int16), want.view(torch.int16))


def change(base: Tensor, places: list[int]) -> Tensor:
    tensor = base.clone()
    tensor.view(torch.int16).reshape(-1)[places] ^= 1
    return tensor


def test_a_delta_is_gaps_and_new_values() -> None:
    delta = encode_delta(
        from_bits(list(range(10, 26))), from_bits([10, 99, 98, 13, 14, 97, *range(16, 26)])
    )
    assert delta is not None
    assert (delta.gaps.tolist(), delta.gaps.dtype) == ([1, 0, 2], torch.uint8)
    assert delta.values.view(torch.int16).tolist() == [99, 98, 97]


def test_values_that_are_equal_as_numbers_and_differ_as_bits_are_kept_apart() -> None:
    """NaN with two payloads, 0.0 and -0.0, an infinity."""
    base = from_bits([0x7FC0, 0x0000, 0x7F80, 0x7FC0, *[0] * 30])
    tensor = from_bits([0x7FC1, 0x8000, 0x7F80, 0x7FC0, *[0] * 30])
    delta = encode_delta(base, tensor)
    assert delta is not None
    assert delta.values.numel() == 2
    assert_same_bits(apply_delta(base, delta), tensor)


@pytest.mark.parametrize("dtype", DTYPES)
@given(st.data())
def test_every_delta_gives_back_its_tensor(dtype: torch.dtype, data: st.DataObject) -> None:
    bits = st.integers(-(2**15), 2**15 - 1)
    before = data.draw(st.lists(bits, min_size=1, max_size=40))
    after = [data.draw(bits) if data.draw(st.integers(0, 4)) == 0 else old for old in before]
    base, tensor = from_bits(before, dtype), from_bits(after, dtype)
    delta = encode_delta(base, tensor)
    if delta is None:
        num_changed = sum(old != new for old, new in zip(before, after, strict=True))
        assert 3 * num_changed > len(before), (
            "two bytes for the value and one for the gap, against half of two bytes each"
        )
    else:
        assert delta.size_bytes <= tensor.nbytes // 2
        assert_same_bits(apply_delta(base, delta), tensor)
    assert base.view(torch.int16).tolist() == before, "the base stays as it is"


@pytest.mark.parametrize(
    "places",
    [[], [0], [254], [255], [256], [509, 510, 511], [65_534], [65_535], [65_536], [0, 199_999]],
)
def test_gaps_of_any_length_can_be_written(places: list[int]) -> None:
    base = torch.zeros(200_000, dtype=torch.bfloat16)
    tensor = change(base, places)
    delta = encode_delta(base, tensor)
    assert delta is not None
    assert_same_bits(apply_delta(base, delta), tensor)


def test_the_shorter_of_the_two_widths_is_taken() -> None:
    base = torch.zeros(100_000, dtype=torch.bfloat16)
    dense, sparse = (
        encode_delta(base, change(base, list(range(0, 100_000, step)))) for step in (20, 5000)
    )
    assert dense is not None
    assert sparse is not None
    assert (dense.gaps.dtype, dense.size_bytes) == (torch.uint8, 5000 * 3)
    assert (sparse.gaps.dtype, sparse.size_bytes) == (torch.uint16, 20 * 4)


def test_a_tensor_larger_than_a_block_comes_back() -> None:
    """Changes on both sides of a block's border, and a gap longer than a block."""
    block = weight_delta._BLOCK
    base = torch.zeros(3 * block + 5, dtype=torch.bfloat16)
    tensor = change(base, [block - 1, block, 3 * block + 4])
    delta = encode_delta(base, tensor)
    assert delta is not None
    assert_same_bits(apply_delta(base, delta), tensor)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (), (4, 25)])
def test_shapes_are_kept(shape: tuple[int, ...]) -> None:
    base = torch.zeros(shape, dtype=torch.bfloat16)
    delta = encode_delta(base, base.clone())
    assert delta is not None
    assert apply_delta(base, delta).shape == shape
    assert delta.size_bytes == 0


def test_a_change_of_more_than_a_third_is_no_delta() -> None:
    base = torch.zeros(300, dtype=torch.bfloat16)
    assert encode_delta(base, change(base, list(range(100)))) is not None
    assert encode_delta(base, change(base, list(range(101)))) is None


def test_only_types_of_16_bits_have_deltas() -> None:
    others = (
        torch.float32,
        torch.float64,
        torch.int64,
        torch.uint8,
        torch.bool,
        torch.float8_e4m3fn,
    )
    assert all(has_deltas(torch.zeros(1).to(dtype)) for dtype in DTYPES)
    assert not any(has_deltas(torch.zeros(1).to(dtype)) for dtype in others)


@pytest.mark.parametrize(
    ("gaps", "values"),
    [
        (torch.tensor([8], dtype=torch.uint8), torch.ones(1, dtype=torch.bfloat16)),
        (torch.tensor([255, 0], dtype=torch.uint8), torch.ones(1, dtype=torch.bfloat16)),
        (torch.tensor([3, 4], dtype=torch.uint8), torch.ones(2, dtype=torch.bfloat16)),
        (torch.tensor([0, 0], dtype=torch.uint8), torch.ones(1, dtype=torch.bfloat16)),
        (torch.tensor([0], dtype=torch.uint8), torch.ones(2, dtype=torch.bfloat16)),
        (torch.tensor([0], dtype=torch.int64), torch.ones(1, dtype=torch.bfloat16)),
        (torch.tensor([0], dtype=torch.uint8), torch.ones(1, dtype=torch.float16)),
        (torch.zeros((), dtype=torch.uint8), torch.ones(2, dtype=torch.bfloat16)),
    ],
    ids=[
        "past the end",
        "passes the end",
        "second past the end",
        "too few",
        "too many",
        "no gaps",
        "other values",
        "scalar",
    ],
)
def test_a_delta_that_does_not_fit_its_base_is_corrupt(gaps: Tensor, values: Tensor) -> None:
    with pytest.raises(CorruptionError, match="A delta of"):
        apply_delta(torch.zeros(8, dtype=torch.bfloat16), Delta(gaps, values))


def test_a_delta_on_a_type_without_deltas_is_corrupt() -> None:
    with pytest.raises(CorruptionError, match=r"none of torch\.float32"):
        apply_delta(torch.zeros(8), Delta(torch.zeros(1, dtype=torch.uint8), torch.zeros(1)))
