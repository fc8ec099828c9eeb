"""What loss terms, gates and advantage shapings read: one value per sampled token.

Axes: N sampled tokens of a micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Bool, Float, Int
from torch import Tensor

from sdar.algorithms.corrections import OffPolicyWeights


@dataclass(frozen=True, slots=True, eq=False)
class TokenInputs:
    """Gradients: `policy_logprobs`, `entropy` and `off_policy.ratio` only. Log-probs and entropy in
    nats.
    """

    policy_logprobs: Float[Tensor, " N"]
    entropy: Float[Tensor, " N"]
    behavior_logprobs: Float[Tensor, " N"]
    advantages: Float[Tensor, " N"]
    ref_logprobs: Float[Tensor, " N"] | None
    teacher_gap: Float[Tensor, " N"]
    """Reduced as the method's row says; 0 where `is_scored` is false."""
    is_scored: Bool[Tensor, " N"]
    """Tokens with a finite teacher log-prob; nowhere true for methods without a teacher."""
    turn_index: Int[Tensor, " N"]
    off_policy: OffPolicyWeights
    distillation_weight: Float[Tensor, " N"]
    """Off-policy weight of a distillation term: 1 where the configuration asks for none."""
    teacher_weight: float
    """The schedule's factor at this update, in [0, 1]."""
