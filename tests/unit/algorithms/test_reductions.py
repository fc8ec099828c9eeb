import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sdar.algorithms.reductions import fill_masked, masked_mean, masked_sum


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_values_under_the_mask_reach_neither_value_nor_gradient(poison):
    x = torch.tensor([1.0, poison, 3.0], requires_grad=True)
    mean = masked_mean(x, torch.tensor([True, False, True]))
    mean.backward()
    assert mean.item() == 2.0
    assert x.grad.tolist() == [0.5, 0.0, 0.5]


def test_nowhere_true_mask_gives_zero_value_and_zero_gradient():
    x = torch.tensor([math.nan, 2.0], requires_grad=True)
    mean = masked_mean(x, torch.zeros(2, dtype=torch.bool))
    mean.backward()
    assert mean.item() == 0.0
    assert x.grad.tolist() == [0.0, 0.0]


def test_given_denominator_replaces_the_count():
    assert (
        masked_mean(torch.tensor([1.0, 3.0]), torch.tensor([True, True]), denominator=8).item()
        == 0.5
    )


def test_global_token_mean_differs_from_mean_of_row_means():
    rows = [torch.tensor([1.0, 1.0, 1.0, 1.0]), torch.tensor([3.0])]
    ours = sum(
        masked_mean(row, torch.ones_like(row, dtype=torch.bool), denominator=5).item()
        for row in rows
    )
    mean_of_means = (
        sum(masked_mean(row, torch.ones_like(row, dtype=torch.bool)).item() for row in rows) / 2
    )
    assert (ours, mean_of_means) == (pytest.approx(1.4), 2.0)


def test_filling_before_a_formula_keeps_its_gradient_finite():
    x, teacher, mask = (
        torch.zeros(2, requires_grad=True),
        torch.tensor([1.0, math.nan]),
        torch.tensor([True, False]),
    )
    (x * fill_masked(teacher, mask, torch.zeros(2))).sum().backward()
    assert x.grad.tolist() == [1.0, 0.0]


@given(st.lists(st.tuples(st.floats(-1e3, 1e3, width=32), st.booleans()), min_size=1, max_size=30))
def test_sum_equals_the_plain_loop(entries):
    values, mask = (
        torch.tensor([v for v, _ in entries], dtype=torch.float64),
        torch.tensor([m for _, m in entries]),
    )
    assert masked_sum(values, mask).item() == pytest.approx(
        sum(v for v, m in entries if m), abs=1e-9
    )
