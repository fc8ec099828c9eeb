"""The shaping of RLSD: the teacher shifts credit between tokens, as a factor on the advantage."""

from __future__ import annotations

import math

from jaxtyping import Float
from torch import Tensor

from sdar.algorithms.inputs import TokenInputs
from sdar.algorithms.shaping import SHAPINGS
from sdar.contracts.methods import LossSettings


@SHAPINGS.register("rlsd")
def rlsd(inputs: TokenInputs, settings: LossSettings) -> Float[Tensor, " N"]:
    """A [(1 - m) + m clip(exp(sign(A) D), 1 - clip, 1 + clip)], m the mixing at this update.

    Keeps every token's sign, and everything where A = 0.
    """
    mixing = settings.rlsd.mixing * inputs.teacher_weight
    clip = settings.rlsd.clip
    # Clipping the exponent instead of the exponential is the same and cannot overflow.
    exponent = (inputs.advantages.sign() * inputs.teacher_gap).clamp(
        math.log(1 - clip), math.log(1 + clip)
    )
    return inputs.advantages * ((1 - mixing) + mixing * exponent.exp())
