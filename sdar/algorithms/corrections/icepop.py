"""IcePop: a token whose weight leaves a band is left out."""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

from sdar.algorithms.corrections import CORRECTIONS, PolicyScores, Weighing, compute_ratio

_LOW = 0.5
"""Lower edge of the band; the configured cap is its upper one."""


@CORRECTIONS.register("icepop")
def icepop(scores: PolicyScores, cap: float) -> Weighing:
    """Ratio current / proximal, weight proximal / behavior inside [0.5, cap], else 0."""
    # Each weight is masked by its own ratio: the two terms correct for different policies.
    policy_weight, _ = _mask_outside(compute_ratio(scores.proximal, scores.behavior), cap)
    distillation_weight, is_masked = _mask_outside(
        compute_ratio(scores.current, scores.behavior), cap
    )
    return Weighing(scores.proximal, policy_weight, distillation_weight, is_masked)


def _mask_outside(
    weight: Float[Tensor, " N"], high: float
) -> tuple[Float[Tensor, " N"], Bool[Tensor, " N"]]:
    is_outside = (weight < _LOW) | (weight > high)
    return weight.masked_fill(is_outside, 0.0), is_outside
