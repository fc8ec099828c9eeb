"""The published "ungated" control: the gated term with every gate at 1."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from sdar.algorithms.distillation import compute_gated_distillation
from sdar.algorithms.inputs import TokenInputs
from sdar.algorithms.terms import TERMS, Metrics
from sdar.contracts.methods import LossSettings


@TERMS.register("constant_gate")
def constant_gate(
    inputs: TokenInputs, settings: LossSettings
) -> tuple[Float[Tensor, " N"], Metrics]:
    """w (T - S): its gradient -w does not depend on the teacher."""
    loss = compute_gated_distillation(inputs.policy_logprobs, inputs.teacher_gap, 1.0)
    return inputs.distillation_weight * loss, {}
