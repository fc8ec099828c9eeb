"""Owns what keeps the policy near where it began: the k3 estimate of the KL to a frozen reference,
and the entropy bonus.

Axes: N sampled tokens.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def compute_k3_kl(
    policy_logprobs: Float[Tensor, " N"],
    ref_logprobs: Float[Tensor, " N"],
    *,
    log_ratio_bound: float,
    bound: float,
) -> Float[Tensor, " N"]:
    """k3 = exp(x) - x - 1 with x = ref - policy: a KL estimate that is never negative (Schulman,
    2020), at most `bound`.

    x is clamped *before* the exponential: an overflow clamped after it gives a gradient of 0 * inf
    = NaN. A clamped token has no gradient.
    """
    log_ratio = (ref_logprobs - policy_logprobs).clamp(-log_ratio_bound, log_ratio_bound)
    return (log_ratio.exp() - log_ratio - 1).clamp(max=bound)


def compute_entropy_loss(entropy: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """The negative entropy: minimising it keeps the policy exploring."""
    return -entropy
