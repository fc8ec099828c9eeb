"""The term of SDAR: distillation of the sampled tokens, each as far as its gate lets it through."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from sdar.algorithms.distillation import compute_gated_distillation
from sdar.algorithms.gates import compute_gate
from sdar.algorithms.inputs import TokenInputs
from sdar.algorithms.terms import TERMS, Metrics
from sdar.contracts.methods import LossSettings

_GATE_OPEN = 0.5
"""A gate above this counts as open in the metrics: the value it has at gap 0."""


@TERMS.register("sdar")
def sdar(inputs: TokenInputs, settings: LossSettings) -> tuple[Float[Tensor, " N"], Metrics]:
    """w g (T - S), w the off-policy weight (arXiv:2605.15155, which has no w)."""
    gate = compute_gate(settings.gate, inputs, settings.gate_sharpness)
    loss = compute_gated_distillation(inputs.policy_logprobs, inputs.teacher_gap, gate)
    metrics = {"gate_mean": gate, "gate_open_share": gate > _GATE_OPEN}
    return inputs.distillation_weight * loss, metrics
