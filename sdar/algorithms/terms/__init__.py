"""Loss terms: the summands of a method's loss.

One module a term, with its facts in `sdar.contracts.methods.TERM_FACTS`.
A term never normalises: `loss` sums it over its tokens, weighs it and divides by the batch's count.
"""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

from sdar.algorithms.inputs import TokenInputs
from sdar.contracts.methods import LossSettings
from sdar.contracts.registry import Registry

Metrics = dict[str, Tensor]

Term = Callable[[TokenInputs, LossSettings], tuple[Float[Tensor, " N"], Metrics]]
"""(inputs, settings) -> the loss of every token, finite everywhere, and measurements [N] by
name.
"""

TERMS: Registry[Term] = Registry("loss term", __name__)
