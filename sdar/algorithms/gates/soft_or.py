"""The soft-OR gate: open where the policy is undecided or the teacher agrees."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from sdar.algorithms.gates import GATES
from sdar.algorithms.inputs import TokenInputs


@GATES.register("soft_or")
def soft_or(inputs: TokenInputs, sharpness: float) -> Float[Tensor, " N"]:
    """sigmoid(beta [1 - (1 - h)(1 - D)]), as published in arXiv:2605.15155.

    h is in nats and may be over 1. There a negative D opens the gate instead of closing it.
    """
    score = 1 - (1 - inputs.entropy) * (1 - inputs.teacher_gap)
    return torch.sigmoid(sharpness * score)
