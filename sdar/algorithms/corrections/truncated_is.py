"""Truncated importance sampling: each token weighs min(current / behavior, cap)."""

from __future__ import annotations

from sdar.algorithms.corrections import CORRECTIONS, PolicyScores, Weighing, cap_weights


@CORRECTIONS.register("truncated_is")
def truncated_is(scores: PolicyScores, cap: float) -> Weighing:
    """Ratio 1 with the gradient of log pi, weight min(current / behavior, cap)."""
    return cap_weights(scores.current, scores, cap)
