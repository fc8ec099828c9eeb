import itertools
import math

import pytest
import torch

from sdar.algorithms.gates import GATES, compute_gate
from sdar.contracts.errors import ConfigurationError

from .builders import make_inputs

every_gate = pytest.mark.parametrize("name", GATES.names())
GAPS = (-1e4, -30.0, -1.0, 0.0, 1.0, 30.0, 1e4)
ENTROPIES = (0.0, 0.3, 2.0, 12.0)


def make_grid(**changes):
    gaps, entropies = zip(*itertools.product(GAPS, ENTROPIES), strict=True)
    return make_inputs(list(gaps), entropy=torch.tensor(entropies), **changes)


@every_gate
@pytest.mark.parametrize("sharpness", [0.0, 1.0, 5.0, 100.0])
def test_a_gate_is_finite_and_between_zero_and_one(name, sharpness):
    gate = compute_gate(name, make_grid(), sharpness)
    assert gate.shape == (len(GAPS) * len(ENTROPIES),)
    assert ((gate >= 0) & (gate <= 1)).all()  # false for NaN


@every_gate
def test_a_gate_sends_no_gradient(name):
    entropy = torch.ones(3, requires_grad=True)
    gap = torch.tensor([-1.0, 0.0, 1.0], requires_grad=True)
    assert not compute_gate(name, make_inputs(gap, entropy=entropy), 5.0).requires_grad


@every_gate
def test_an_unscored_token_has_a_finite_gate(name):
    """Its gap is 0: whatever the teacher gave, the masked sum leaves it out."""
    inputs = make_inputs([0.0], is_scored=torch.tensor([False]))
    assert torch.isfinite(compute_gate(name, inputs, 5.0)).all()


@every_gate
def test_an_empty_micro_batch_has_no_gates(name):
    assert compute_gate(name, make_inputs(torch.zeros(0)), 5.0).shape == (0,)


@every_gate
def test_a_token_s_gate_does_not_depend_on_the_others(name):
    grid = make_grid()
    alone = make_inputs(grid.teacher_gap[:1], entropy=grid.entropy[:1])
    assert compute_gate(name, alone, 5.0)[0] == compute_gate(name, grid, 5.0)[0]


def test_an_unknown_gate_is_refused_with_the_known_ones():
    with pytest.raises(ConfigurationError, match=r"'hard'\. Known: entropy, gap, soft_or"):
        compute_gate("hard", make_inputs([0.0]), 5.0)


def test_gap_gate_vector():
    gaps = torch.tensor([-1.0, -0.5, -0.2, 0.0, 0.2, 0.5, 1.0])
    want = [0.006693, 0.075858, 0.268941, 0.5, 0.731059, 0.924142, 0.993307]
    assert compute_gate("gap", make_inputs(gaps), 5.0).tolist() == pytest.approx(want, abs=1e-6)


def test_entropy_gate_never_falls_under_a_half():
    entropy = torch.tensor([0.0, 0.3, 2.0])
    want = [1 / (1 + math.exp(-5 * h)) for h in entropy.tolist()]
    inputs = make_inputs(torch.full((3,), -9.0), entropy=entropy)
    assert compute_gate("entropy", inputs, 5.0).tolist() == pytest.approx(want)


def test_soft_or_gate_is_the_published_one_with_its_opening_at_high_entropy():
    gap, entropy = torch.tensor([0.2, -1.0, -1.0]), torch.tensor([0.5, 0.0, 2.0])
    # 1 - .5 * .8 = .6;  1 - 1 * 2 = -1;  1 - (-1) * 2 = 3: wide open although the teacher disagrees
    want = [1 / (1 + math.exp(-5 * score)) for score in (0.6, -1.0, 3.0)]
    assert compute_gate(
        "soft_or", make_inputs(gap, entropy=entropy), 5.0
    ).tolist() == pytest.approx(want)
