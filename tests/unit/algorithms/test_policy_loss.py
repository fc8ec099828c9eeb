import pytest
import torch

from sdar.algorithms.terms.policy import DUAL_CLIP, compute_policy_loss

from .builders import central_difference


def loss_of(ratio, advantages, weight=None):
    weight = torch.ones_like(ratio) if weight is None else weight
    return compute_policy_loss(ratio, advantages, weight, clip_low=0.2, clip_high=0.3)


def test_the_dual_clip_is_the_papers():
    assert DUAL_CLIP == 3.0


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope", "clipped", "dual"),
    [
        (1.0, 2.0, -2.0, -2.0, False, False),
        (1.2, 2.0, -2.4, -2.0, False, False),  # inside [0.8, 1.3]
        (1.5, 2.0, -2.6, 0.0, True, False),  # good and already likelier: no more
        (0.5, 2.0, -1.0, -2.0, False, False),  # good but less likely: full pull back
        (0.5, -2.0, 1.6, 0.0, True, False),  # bad and already rarer: no more
        (1.5, -2.0, 3.0, 2.0, False, False),  # bad but likelier: full push down
        (2.9, -2.0, 5.8, 2.0, False, False),
        (4.0, -2.0, 6.0, 0.0, False, True),  # dual clip at 3
        (4.0, 0.0, 0.0, 0.0, False, False),
    ],
)
def test_each_side_of_the_clip(ratio, advantage, loss, slope, clipped, dual):
    x = torch.tensor([ratio], requires_grad=True)
    result = loss_of(x, torch.tensor([advantage]))
    result.loss.sum().backward()
    assert result.loss.item() == pytest.approx(loss)
    assert x.grad.item() == pytest.approx(slope)
    assert (result.is_clipped.item(), result.is_dual_clipped.item()) == (clipped, dual)


def test_gradient_matches_finite_differences_and_carries_the_weight():
    torch.manual_seed(0)
    ratio = (torch.rand(40, dtype=torch.float64) * 4).requires_grad_()
    advantages, weight = torch.randn(40, dtype=torch.float64), torch.rand(40, dtype=torch.float64)
    loss_of(ratio, advantages, weight).loss.sum().backward()
    numeric = central_difference(
        lambda r: loss_of(r, advantages, weight).loss.sum(), ratio.detach()
    )
    torch.testing.assert_close(ratio.grad, numeric, atol=1e-6, rtol=1e-6)
