"""On-policy self-distillation (OPSD) proper: the gradient of the reverse KL to the teacher."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from sdar.algorithms.inputs import TokenInputs
from sdar.algorithms.terms import TERMS, Metrics
from sdar.contracts.methods import LossSettings

GAP_BOUND = 10.0
"""Clamp of the teacher gap, in nats, where it acts as an advantage."""


def compute_reverse_kl_distillation(
    policy_logprobs: Float[Tensor, " N"], teacher_gap: Float[Tensor, " N"]
) -> Float[Tensor, " N"]:
    """l = -sg(clip(D, +-GAP_BOUND)) S.

    The gap acts as an advantage: a token that the teacher finds less likely is lowered, which the
    gated term never does.
    """
    # As REINFORCE with the gap in the place of the advantage: -D grad log pi.
    return -teacher_gap.clamp(-GAP_BOUND, GAP_BOUND) * policy_logprobs


@TERMS.register("opsd")
def opsd(inputs: TokenInputs, settings: LossSettings) -> tuple[Float[Tensor, " N"], Metrics]:
    """The reverse-KL term times the off-policy weight."""
    loss = compute_reverse_kl_distillation(inputs.policy_logprobs, inputs.teacher_gap)
    return inputs.distillation_weight * loss, {}
