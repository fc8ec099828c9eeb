"""Owns the clipped policy-gradient loss, per token. Never normalises: `methods` sums it over the
batch's token count.

Axes: N sampled tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor


class PolicyLoss(NamedTuple):
    """`loss` has the gradient; a clipped token, at either bound, has none."""

    loss: Float[Tensor, " N"]
    is_clipped: Bool[Tensor, " N"]
    is_dual_clipped: Bool[Tensor, " N"]


def compute_policy_loss(
    ratio: Float[Tensor, " N"],
    advantages: Float[Tensor, " N"],
    weight: Float[Tensor, " N"],
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
) -> PolicyLoss:
    """weight * max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)), bounded by -A * dual_clip where
    A < 0.

    PPO (arXiv:1707.06347, eq. 7) with dual clip (arXiv:1912.09729, eq. 5): without the bound, a
    token that became much more likely although it was bad would have a loss, and a gradient, of any
    size.

    Args:
        ratio: policy over proximal policy, with gradient.
        weight: off-policy weight of each token, without gradient.
    """
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    pessimistic = torch.maximum(plain, clipped)
    ceiling = -advantages * dual_clip
    is_dual_clipped = (advantages < 0) & (pessimistic > ceiling)
    loss = torch.where(is_dual_clipped, ceiling, pessimistic)
    return PolicyLoss(weight * loss, (clipped > plain) & (advantages != 0), is_dual_clipped)
