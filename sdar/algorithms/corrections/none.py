"""No correction: plain policy gradient, as if every token were fresh."""

from __future__ import annotations

import torch

from sdar.algorithms.corrections import CORRECTIONS, PolicyScores, Weighing


@CORRECTIONS.register("none")
def none(scores: PolicyScores, cap: float) -> Weighing:
    """Ratio 1 with the gradient of log pi, weight 1."""
    # Relative to itself the current policy has ratio 1, and the gradient of its log-prob.
    ones = torch.ones_like(scores.current)
    never = torch.zeros_like(scores.current, dtype=torch.bool)
    return Weighing(scores.current, ones, ones, never)
