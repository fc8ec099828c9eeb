"""Group-relative advantages: how much better an episode did than the others of its task.

Never mixes groups and never sees tokens; `batching` spreads a turn's advantage over its tokens.

Axes: G episodes of a group, R rows that are compared (episodes, or turns of all episodes).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from jaxtyping import Float

from sdar.contracts.errors import ContractError
from sdar.contracts.methods import AdvantageLevel
from sdar.contracts.types import Trajectory

Array = npt.NDArray[np.float64]

EPSILON = 1e-6
"""Added to the deviation (the paper's value). A spread below it counts as rounding."""


def normalize_scores(
    scores: Float[Array, " R"], rounding: float = 0.0, epsilon: float = EPSILON
) -> Float[Array, " R"]:
    """(score - mean) / (std + epsilon) with ddof 1: GRPO (arXiv:2402.03300, section 4.1.2).

    Exactly zero for one row, and for rows that differ by rounding only, which would come out at up
    to 0.7 otherwise. Finite for all finite scores, up to the largest float64.

    Args:
        rounding: largest difference that rounding alone makes between two scores (see
            `bound_rounding`).

    Raises:
        ContractError: a score is not finite.
    """
    if not np.isfinite(scores).all():
        raise ContractError(
            f"Scores {scores.tolist()} of a group are not all finite, so none can be compared. "
            "Refuse the group, and mend the environment's rewards."
        )
    # By a power of two, which changes no digit: differences and squares of scaled scores are small.
    exponent = int(np.frexp(np.abs(scores).max(initial=0.0))[1])
    scaled = np.ldexp(scores, -exponent)
    with np.errstate(over="ignore"):  # of scores far below epsilon: then it is infinite, rightly
        least, added = np.ldexp((max(rounding, epsilon), epsilon), -exponent)
    if len(scores) < 2 or np.ptp(scaled) <= least:
        return np.zeros(len(scores))
    normalized: Array = (scaled - scaled.mean()) / (scaled.std(ddof=1) + added)
    return normalized


def bound_rounding(group: Sequence[Trajectory]) -> float:
    """The largest difference that rounding alone makes between two returns of a group.

    Rewards travel as float64, and many an environment computes them in float32. Where float32 holds
    every reward of the group, each is trusted to half a float32 step of its size, elsewhere to half
    a float64 step; an integer below 2**24 is exact in both. So returns of 1000001 and 1000000
    differ, and 0.1 + 0.2 and 0.3 do not, in either precision.
    """
    rewards = [
        np.abs([turn.reward for turn in trajectory.turns], dtype=np.float64) for trajectory in group
    ]
    precision = np.float32 if all(map(_fits_float32, rewards)) else np.float64
    return 2 * max((_bound_sum(of_episode, precision) for of_episode in rewards), default=0.0)


def _fits_float32(rewards: Float[Array, " turns"]) -> bool:
    with np.errstate(over="ignore"):
        return bool((rewards.astype(np.float32) == rewards).all())


def _bound_sum(rewards: Float[Array, " turns"], precision: type[np.floating[Any]]) -> float:
    """How far off a sum of rewards (absolute values) may be: half a step each, and half a float64
    step of the sum for each addition.
    """
    is_exact = (rewards < 2**24) & (rewards == np.rint(rewards))
    steps = np.where(is_exact, 0.0, np.spacing(rewards.astype(precision)).astype(np.float64))
    # No partial sum is larger than so many times the largest reward.
    added = len(rewards) ** 2 * np.spacing(rewards.max(initial=0.0))
    return float(steps.sum() + added) / 2


def compute_advantages(
    group: Sequence[Trajectory],
    level: AdvantageLevel = "trajectory",
    invalid_action_penalty: float = 0.0,
) -> list[Float[Array, " turns"]]:
    """Advantage of every turn of every episode of one group.

    Args:
        level: trajectory: one row an episode, its return less the penalty once if any of its
            actions was invalid; every turn gets its episode's advantage.
            turn: one row a turn, as the paper's code does: the episode's return, less the penalty
            if that turn's own action was invalid. Long episodes weigh more in mean and deviation.
        invalid_action_penalty: in units of reward, not negative; 0 where the environment's rewards
            already hold it.

    Returns:
        for each trajectory, one value per turn, in order.

    Raises:
        ContractError: the rewards of an episode add up to no finite number.
    """
    if level == "trajectory":
        return _compare_episodes(group, invalid_action_penalty)
    return _compare_turns(group, invalid_action_penalty)


def _compare_episodes(group: Sequence[Trajectory], penalty: float) -> list[Float[Array, " turns"]]:
    scores = [_score_episode(trajectory, penalty) for trajectory in group]
    advantages = normalize_scores(np.array(scores, dtype=np.float64), bound_rounding(group))
    pairs = zip(group, advantages, strict=True)
    return [np.full(len(trajectory.turns), value) for trajectory, value in pairs]


def _compare_turns(group: Sequence[Trajectory], penalty: float) -> list[Float[Array, " turns"]]:
    rows = [_score_turns(trajectory, penalty) for trajectory in group]
    # One long list of rows for the statistics, then cut into trajectories again.
    ends = np.cumsum([len(row) for row in rows])
    return np.split(normalize_scores(np.concatenate(rows), bound_rounding(group)), ends[:-1])


def _find_invalid(trajectory: Trajectory) -> npt.NDArray[np.bool_]:
    return np.array([not turn.is_action_valid for turn in trajectory.turns], dtype=np.bool_)


def _score_episode(trajectory: Trajectory, penalty: float) -> float:
    return trajectory.episode_return - penalty * bool(_find_invalid(trajectory).any())


def _score_turns(trajectory: Trajectory, penalty: float) -> Float[Array, " turns"]:
    is_invalid = _find_invalid(trajectory).astype(np.float64)
    return trajectory.episode_return - penalty * is_invalid


def has_signal(advantages: Sequence[Float[Array, " turns"]]) -> bool:
    """Whether any turn of the group has an advantage; if none has, its policy gradient is zero."""
    return any(bool(values.any()) for values in advantages)
