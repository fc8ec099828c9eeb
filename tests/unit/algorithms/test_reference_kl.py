import math

import pytest
import torch

from sdar.algorithms.reference_kl import compute_entropy_loss, compute_k3_kl


def k3(policy, ref):
    return compute_k3_kl(policy, ref, log_ratio_bound=20.0, bound=10.0)


def test_k3_by_hand():
    policy, ref = torch.tensor([-1.0, -2.0, -1.0]), torch.tensor([-1.0, -1.0, -3.0])
    want = [0.0, math.e - 2, math.exp(-2) + 1]  # x = 0, 1, -2 in exp(x) - x - 1
    assert k3(policy, ref).tolist() == pytest.approx(want, abs=1e-6)


def test_gradient_is_one_minus_the_ratio():
    policy = torch.tensor([-1.0, -2.0, -0.5], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([-1.0, -1.0, -3.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda p: k3(p, ref), policy)
    k3(policy, ref).sum().backward()
    torch.testing.assert_close(policy.grad, 1 - (ref - policy.detach()).exp())


@pytest.mark.parametrize(("policy", "ref"), [(-1000.0, -1.0), (-1.0, -1000.0), (-1.0, -math.inf)])
def test_far_apart_policies_give_the_bound_and_no_nan_gradient(policy, ref):
    x = torch.tensor([policy], requires_grad=True)
    value = k3(x, torch.tensor([ref]))
    value.sum().backward()
    assert value.item() == 10.0
    assert x.grad.item() == 0.0


def test_entropy_bonus_lowers_the_loss_of_uncertain_tokens():
    assert compute_entropy_loss(torch.tensor([0.0, 2.0])).tolist() == [0.0, -2.0]
