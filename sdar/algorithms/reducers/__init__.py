"""Reducers: over which tokens the teacher's gap is brought together before anything reads it.

One module a reducer, named in a method's row.
All tokens of a turn are in one micro-batch; turns of an episode may be in several, so a reducer
looks at no more than a turn.
"""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Bool, Float
from torch import Tensor

from sdar.algorithms.batching import MicroBatch
from sdar.contracts.registry import Registry

Reducer = Callable[[Float[Tensor, " N"], Bool[Tensor, " N"], MicroBatch], Float[Tensor, " N"]]
"""(gap, is_scored, micro_batch) -> the gap that each token is given, 0 where it is not scored."""

REDUCERS: Registry[Reducer] = Registry("gap reducer", __name__)
