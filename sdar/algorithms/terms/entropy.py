"""The entropy bonus: minimising the negative entropy keeps the policy exploring."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from sdar.algorithms.inputs import TokenInputs
from sdar.algorithms.terms import TERMS, Metrics
from sdar.contracts.methods import LossSettings


@TERMS.register("entropy")
def entropy(inputs: TokenInputs, settings: LossSettings) -> tuple[Float[Tensor, " N"], Metrics]:
    """-h, in nats."""
    return -inputs.entropy, {}
