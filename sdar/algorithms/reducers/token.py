"""The token reducer: every token keeps its own gap."""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

from sdar.algorithms.batching import MicroBatch
from sdar.algorithms.reducers import REDUCERS


@REDUCERS.register("token")
def token(
    teacher_gap: Float[Tensor, " N"], is_scored: Bool[Tensor, " N"], micro_batch: MicroBatch
) -> Float[Tensor, " N"]:
    """The gap as it is."""
    return teacher_gap
