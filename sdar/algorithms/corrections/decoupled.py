"""Decoupled PPO: clipped around the proximal policy, weighed against the behavior policy."""

from __future__ import annotations

from sdar.algorithms.corrections import CORRECTIONS, PolicyScores, Weighing, cap_weights


@CORRECTIONS.register("decoupled")
def decoupled(scores: PolicyScores, cap: float) -> Weighing:
    """Ratio current / proximal, weight min(proximal / behavior, cap) (AReaL, arXiv:2505.24298,
    eq. 5).
    """
    return cap_weights(scores.proximal, scores, cap)
