"""The term of Skill-SD: an importance-weighted k3 toward the teacher."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from sdar.algorithms.distillation import compute_live_gap
from sdar.algorithms.inputs import TokenInputs
from sdar.algorithms.terms import TERMS, Metrics
from sdar.contracts.methods import LossSettings

GAP_BOUND = 20.0
"""Bound on the exponent of k3, in nats."""
LOG_RATIO_BOUND = 10.0
"""Bound on the log of the importance ratio."""


def compute_skill_sd(
    policy_logprobs: Float[Tensor, " N"],
    teacher_gap: Float[Tensor, " N"],
    behavior_logprobs: Float[Tensor, " N"],
) -> Float[Tensor, " N"]:
    """rho k3, with its gradient through both.

    l = S - T
    k3 = exp(min(-l, GAP_BOUND)) - 1 + l
    rho = exp(min(S - S_old, LOG_RATIO_BOUND))
    """
    # -l, with the gradient that S gives it; the teacher has none.
    live_gap = compute_live_gap(policy_logprobs, teacher_gap)
    k3 = live_gap.clamp(max=GAP_BOUND).exp() - 1 - live_gap
    rho = (policy_logprobs - behavior_logprobs).clamp(max=LOG_RATIO_BOUND).exp()
    return rho * k3


@TERMS.register("skill_sd")
def skill_sd(inputs: TokenInputs, settings: LossSettings) -> tuple[Float[Tensor, " N"], Metrics]:
    """The published term. It has its own importance ratio, so no off-policy weight is on it."""
    loss = compute_skill_sd(inputs.policy_logprobs, inputs.teacher_gap, inputs.behavior_logprobs)
    return loss, {}
