"""Owns the correction for tokens that an older policy, or another engine, sampled.

Three policies score the same token: behavior (sampled it), proximal (the weights when the update
began) and current (has the gradient). With one optimizer step per batch proximal and current are
the same numbers, and no proximal forward is needed.

| correction   | ratio that PPO clips      | weight of the token                                             |
|--------------|---------------------------|-----------------------------------------------------------------|
| none         | 1, gradient of log pi     | 1: plain policy gradient, as if every token were fresh          |
| truncated_is | 1, gradient of log pi     | min(current / behavior, cap)                                    |
| decoupled    | current / proximal        | min(proximal / behavior, cap) (AReaL, arXiv:2505.24298, eq. 5)  |
| icepop       | current / proximal        | proximal / behavior inside [low, high], else 0                  |

Axes: N sampled tokens.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sdar.contracts.errors import ContractError

Correction = Literal["none", "truncated_is", "decoupled", "icepop"]


class OffPolicyWeights(NamedTuple):
    """What the loss terms need of a correction. Only `ratio` has a gradient."""

    ratio: Float[Tensor, " N"]
    policy_weight: Float[Tensor, " N"]
    distillation_weight: Float[Tensor, " N"]
    """Correction of current against behavior policy: a distillation term has no ratio of its own to
    carry any part of it.
    """
    is_bounded: Bool[Tensor, " N"]
    """Tokens whose distillation weight was cut at its cap or masked to zero."""


def compute_off_policy_weights(
    correction: Correction,
    policy_logprobs: Float[Tensor, " N"],
    behavior_logprobs: Float[Tensor, " N"],
    proximal_logprobs: Float[Tensor, " N"] | None,
    *,
    cap: float,
    icepop_low: float,
    log_ratio_bound: float,
) -> OffPolicyWeights:
    """Ratio and weights of every token under `correction`; see the module's table.

    Args:
        proximal_logprobs: None if this is the first optimizer step on the batch: the current policy
            is the proximal one.
        cap: upper bound of the weight, or upper edge of the icepop mask.
        log_ratio_bound: log ratios are clamped to +- this before the exponential, so that none
            overflows.

    Raises:
        ContractError: tensors of different lengths, which would broadcast into nonsense.
    """
    current = policy_logprobs.detach()
    proximal = current if proximal_logprobs is None else proximal_logprobs.detach()
    if not policy_logprobs.shape == behavior_logprobs.shape == proximal.shape:
        raise ContractError(
            f"Log-probs of {tuple(policy_logprobs.shape)} policy, {tuple(behavior_logprobs.shape)} "
            "behavior and "
            f"{tuple(proximal.shape)} proximal tokens. All three score the same sampled tokens."
        )
    anchor = proximal if correction in ("decoupled", "icepop") else current
    ratio = (policy_logprobs - anchor).clamp(-log_ratio_bound, log_ratio_bound).exp()
    ones, never = torch.ones_like(current), torch.zeros_like(current, dtype=torch.bool)
    if correction == "none":
        return OffPolicyWeights(ratio, ones, ones, never)

    to_current = (current - behavior_logprobs).clamp(-log_ratio_bound, log_ratio_bound).exp()
    to_anchor = (anchor - behavior_logprobs).clamp(-log_ratio_bound, log_ratio_bound).exp()
    if correction == "icepop":
        distillation_weight, is_bounded = _mask_outside(to_current, icepop_low, cap)
        return OffPolicyWeights(
            ratio, _mask_outside(to_anchor, icepop_low, cap)[0], distillation_weight, is_bounded
        )
    return OffPolicyWeights(
        ratio, to_anchor.clamp(max=cap), to_current.clamp(max=cap), to_current > cap
    )


def _mask_outside(
    weight: Float[Tensor, " N"], low: float, high: float
) -> tuple[Float[Tensor, " N"], Bool[Tensor, " N"]]:
    is_outside = (weight < low) | (weight > high)
    return weight.masked_fill(is_outside, 0.0), is_outside
