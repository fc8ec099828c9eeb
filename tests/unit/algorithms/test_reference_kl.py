import math

import pytest
import torch

from sdar.algorithms.terms import TERMS
from sdar.algorithms.terms.kl import compute_k3_kl
from sdar.config import MethodConfig

from .builders import make_inputs


def test_k3_by_hand():
    policy, ref = torch.tensor([-1.0, -2.0, -1.0]), torch.tensor([-1.0, -1.0, -3.0])
    want = [0.0, math.e - 2, math.exp(-2) + 1]  # x = 0, 1, -2 in exp(x) - x - 1
    assert compute_k3_kl(policy, ref).tolist() == pytest.approx(want, abs=1e-6)


def test_gradient_is_one_minus_the_ratio():
    policy = torch.tensor([-1.0, -2.0, -0.5], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([-1.0, -1.0, -3.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda p: compute_k3_kl(p, ref), policy)
    compute_k3_kl(policy, ref).sum().backward()
    torch.testing.assert_close(policy.grad, 1 - (ref - policy.detach()).exp())


@pytest.mark.parametrize(("policy", "ref"), [(-1000.0, -1.0), (-1.0, -1000.0), (-1.0, -math.inf)])
def test_far_apart_policies_give_the_bound_and_no_nan_gradient(policy, ref):
    x = torch.tensor([policy], requires_grad=True)
    value = compute_k3_kl(x, torch.tensor([ref]))
    value.sum().backward()
    assert value.item() == 10.0
    assert x.grad.item() == 0.0


def test_entropy_bonus_lowers_the_loss_of_uncertain_tokens():
    inputs = make_inputs(teacher_gap=[0.0, 0.0], entropy=torch.tensor([0.0, 2.0]))
    values, _ = TERMS["entropy"](inputs, MethodConfig())
    assert values.tolist() == [0.0, -2.0]
