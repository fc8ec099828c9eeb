"""The clipped policy-gradient loss, per token.

Axes: N sampled tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sdar.algorithms.inputs import TokenInputs
from sdar.algorithms.shaping import shape_advantages
from sdar.algorithms.terms import TERMS, Metrics
from sdar.contracts.methods import LossSettings

DUAL_CLIP = 3.0
"""Bound on the loss of a token with a negative advantage, as a multiple of it; as published."""


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
) -> PolicyLoss:
    """weight * max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)), bounded by -A * DUAL_CLIP where
    A < 0.

    PPO (arXiv:1707.06347, eq. 7) with dual clip (arXiv:1912.09729, eq. 5): without the bound, a
    token that became much more likely although it was bad would have a loss, and a gradient, of any
    size.

    Args:
        ratio: policy over proximal policy, with gradient.
        weight: off-policy weight of each token, without gradient.
    """
    # As losses: the larger one of a pair is the pessimistic one.
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    pessimistic = torch.maximum(plain, clipped)
    ceiling = -advantages * DUAL_CLIP
    # Only there is the loss positive and grows with the ratio without bound.
    is_dual_clipped = (advantages < 0) & (pessimistic > ceiling)
    loss = torch.where(is_dual_clipped, ceiling, pessimistic)
    return PolicyLoss(weight * loss, (clipped > plain) & (advantages != 0), is_dual_clipped)


@TERMS.register("policy")
def policy(inputs: TokenInputs, settings: LossSettings) -> tuple[Float[Tensor, " N"], Metrics]:
    """The policy loss on the advantages as the method shapes them."""
    result = compute_policy_loss(
        inputs.off_policy.ratio,
        shape_advantages(inputs, settings),
        inputs.off_policy.policy_weight,
        clip_low=settings.clip_low,
        clip_high=settings.clip_high,
    )
    return result.loss, {
        "clip_fraction": result.is_clipped,
        "dual_clip_fraction": result.is_dual_clipped,
    }
