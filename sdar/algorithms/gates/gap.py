"""The gap gate of SDAR: open where the teacher finds the sampled token likelier."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from sdar.algorithms.gates import GATES
from sdar.algorithms.inputs import TokenInputs


@GATES.register("gap")
def gap(inputs: TokenInputs, sharpness: float) -> Float[Tensor, " N"]:
    """sigmoid(beta D), arXiv:2605.15155: attenuates what the teacher finds less likely."""
    return torch.sigmoid(sharpness * inputs.teacher_gap)
