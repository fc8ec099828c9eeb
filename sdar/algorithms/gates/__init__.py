"""Gates: how far each token's distillation is let through.

One module a gate, named as in `method.gate`.
A gate is a function of a token's inputs and the sharpness beta; most are sigmoid(beta * score). At
sharpness 0 such a gate is 0.5: not "no gate", but half of it, with the teacher out of the gradient.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from sdar.algorithms.inputs import TokenInputs
from sdar.contracts.registry import Registry

Gate = Callable[[TokenInputs, float], Float[Tensor, " N"]]
"""(inputs, sharpness) -> values in [0, 1], finite for every finite gap and entropy."""

GATES: Registry[Gate] = Registry("gate", __name__)


def compute_gate(name: str, inputs: TokenInputs, sharpness: float) -> Float[Tensor, " N"]:
    """The gate of every token, without gradient. Raises ConfigurationError for an unknown name."""
    gate = GATES[name]
    # A gate with a gradient could be opened by the policy to please the loss.
    with torch.no_grad():
        return gate(inputs, sharpness)
