"""Corrections for tokens that an older policy, or another engine, sampled.

One module a correction, named as in `method.off_policy`.

Three policies score the same token: behavior (sampled it), proximal (the weights when the update
began) and current (has the gradient). With one optimizer step per batch proximal and current are
the same numbers, and no proximal forward is needed.

Axes: N sampled tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Bool, Float
from torch import Tensor

from sdar.contracts.errors import ContractError
from sdar.contracts.registry import Registry

LOG_RATIO_BOUND = 20.0
"""Clamp of log ratios before any exponential: wide enough never to matter, narrow enough never to
overflow.
"""


class PolicyScores(NamedTuple):
    """Log-probs of the same tokens under three policies; `current` without gradient."""

    current: Float[Tensor, " N"]
    behavior: Float[Tensor, " N"]
    proximal: Float[Tensor, " N"]


class Weighing(NamedTuple):
    """What a correction decides. None of it has a gradient."""

    anchor: Float[Tensor, " N"]
    """Log-probs of the policy that the clipped ratio is relative to."""
    policy_weight: Float[Tensor, " N"]
    distillation_weight: Float[Tensor, " N"]
    is_bounded: Bool[Tensor, " N"]


class OffPolicyWeights(NamedTuple):
    """What the loss terms need of a correction. Only `ratio` has a gradient."""

    ratio: Float[Tensor, " N"]
    policy_weight: Float[Tensor, " N"]
    distillation_weight: Float[Tensor, " N"]
    """Of the current against the behavior policy: the whole correction, since a distillation term
    has no ratio that would carry a part of it.
    """
    is_bounded: Bool[Tensor, " N"]
    """Tokens whose distillation weight was cut at its cap or masked to zero."""


Correction = Callable[[PolicyScores, float], Weighing]
"""(scores, cap) -> anchor and weights, finite and not negative."""

CORRECTIONS: Registry[Correction] = Registry("off-policy correction", __name__)


def compute_off_policy_weights(
    correction: str,
    policy_logprobs: Float[Tensor, " N"],
    behavior_logprobs: Float[Tensor, " N"],
    proximal_logprobs: Float[Tensor, " N"] | None,
    *,
    cap: float,
) -> OffPolicyWeights:
    """Ratio and weights of every token under the correction of that name.

    Args:
        proximal_logprobs: None if this is the first optimizer step on the batch: the current policy
            is the proximal one.
        cap: upper bound of the weight, or upper edge of the icepop mask.

    Raises:
        ConfigurationError: no correction has that name.
        ContractError: tensors of different lengths, which would broadcast into nonsense.
    """
    # Detached: of all that is computed here only the ratio may send a gradient to the policy.
    current = policy_logprobs.detach()
    proximal = current if proximal_logprobs is None else proximal_logprobs.detach()
    if not policy_logprobs.shape == behavior_logprobs.shape == proximal.shape:
        raise ContractError(
            f"Log-probs of {tuple(policy_logprobs.shape)} policy, {tuple(behavior_logprobs.shape)} "
            f"behavior and {tuple(proximal.shape)} proximal tokens. All three score the same "
            "sampled tokens."
        )
    weighing = CORRECTIONS[correction](PolicyScores(current, behavior_logprobs, proximal), cap)
    return OffPolicyWeights(
        compute_ratio(policy_logprobs, weighing.anchor),
        weighing.policy_weight,
        weighing.distillation_weight,
        weighing.is_bounded,
    )


def compute_ratio(
    logprobs: Float[Tensor, " N"], anchor: Float[Tensor, " N"]
) -> Float[Tensor, " N"]:
    """exp(logprobs - anchor), never infinite."""
    return (logprobs - anchor).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()


def cap_weights(anchor: Float[Tensor, " N"], scores: PolicyScores, cap: float) -> Weighing:
    """Weights against the behavior policy, cut at `cap`: truncated importance sampling."""
    to_current = compute_ratio(scores.current, scores.behavior)
    to_anchor = compute_ratio(anchor, scores.behavior)
    return Weighing(anchor, to_anchor.clamp(max=cap), to_current.clamp(max=cap), to_current > cap)
