"""Shapings: what the teacher's gap does to the advantages, as a factor or as an addend.

One module a shaping, named in a method's row.
The other way to learn from the gap is a loss term of its own (`sdar.algorithms.terms`).
"""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

from sdar.algorithms.inputs import TokenInputs
from sdar.contracts.methods import LossSettings, get_method
from sdar.contracts.registry import Registry

Shaping = Callable[[TokenInputs, LossSettings], Float[Tensor, " N"]]
"""(inputs, settings) -> the advantages that the policy loss takes, without gradient."""

SHAPINGS: Registry[Shaping] = Registry("advantage shaping", __name__)


def shape_advantages(inputs: TokenInputs, settings: LossSettings) -> Float[Tensor, " N"]:
    """Advantages after the shaping that the method's row names, if it names one."""
    name = get_method(settings.name).shaping
    return inputs.advantages if name is None else SHAPINGS[name](inputs, settings)
