"""Per-token values become one number: masked sums over a denominator that is always named.

Never averages over micro-batches: means of means weigh tokens by how they happened to be packed
(rows [1, 1, 1, 1] and [3] give 2.0 instead of 1.4). A loss is therefore a masked sum over the
*whole batch's* token count, and micro-batches and ranks add up.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def masked_sum(x: Float[Tensor, "*axes"], mask: Bool[Tensor, "*axes"]) -> Float[Tensor, ""]:
    """Sum of `x` where `mask` is true; 0 if it is nowhere true.

    Selects rather than multiplies, so a NaN or infinity under the mask reaches neither the value
    nor the gradient of `x`. (An `x` that was *computed from* a NaN still passes it on to what it
    was computed from: clean inputs with `fill_masked` first.)
    """
    return torch.where(mask, x, torch.zeros_like(x)).sum()


def masked_mean(
    x: Float[Tensor, "*axes"], mask: Bool[Tensor, "*axes"], denominator: float | None = None
) -> Float[Tensor, ""]:
    """`masked_sum(x, mask)` divided by `denominator`; 0 if the mask is nowhere true.

    Args:
        denominator: what the sum is divided by. A loss passes the number of sampled tokens of the
            whole batch, over all micro-batches and ranks. None takes the number of true entries of
            this `mask`: for measurements only.
    """
    total = masked_sum(x, mask)
    if denominator is None:
        return total / mask.sum().clamp(min=1)
    return total / denominator


def fill_masked(
    x: Float[Tensor, "*axes"], mask: Bool[Tensor, "*axes"], fill: Float[Tensor, "*axes"]
) -> Float[Tensor, "*axes"]:
    """`x` where `mask` is true, elsewhere `fill`, so that what is computed from it stays finite
    outside the mask.
    """
    return torch.where(mask, x, fill)
