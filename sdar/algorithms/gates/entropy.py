"""The entropy gate: open where the policy is undecided, whatever the teacher says."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from sdar.algorithms.gates import GATES
from sdar.algorithms.inputs import TokenInputs


@GATES.register("entropy")
def entropy(inputs: TokenInputs, sharpness: float) -> Float[Tensor, " N"]:
    """sigmoid(beta h), arXiv:2605.15155: h is never negative, so it never falls under 0.5."""
    return torch.sigmoid(sharpness * inputs.entropy)
