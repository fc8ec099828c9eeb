"""Group-relative advantages: how much better an episode did than the others of its task.

Never mixes groups and never sees tokens; `batching` spreads a turn's advantage over its tokens.

Axes: G episodes of a group, R rows that are compared (episodes, or turns of all episodes).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from jaxtyping import Float

from sdar.contracts.methods import AdvantageLevel
from sdar.contracts.types import Trajectory

Array = npt.NDArray[np.float64]

EPSILON = 1e-6
"""Added to the deviation (the paper's value). A spread below it is rounding, not signal."""


def normalize_scores(scores: Float[Array, " R"], epsilon: float = EPSILON) -> Float[Array, " R"]:
    """(score - mean) / (std + epsilon) with ddof 1: GRPO (arXiv:2402.03300, section 4.1.2).

    Exactly zero for one row, and for rows that differ by rounding only: rewards that differ in the
    last float32 bit would come out at up to 0.7 otherwise.
    """
    # Relative to the scores' size, as rounding is; absolute for small ones.
    if len(scores) < 2 or np.ptp(scores) <= epsilon * max(1.0, float(np.abs(scores).max())):
        return np.zeros(len(scores))
    normalized: Array = (scores - scores.mean()) / (scores.std(ddof=1) + epsilon)
    return normalized


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
    """
    if level == "trajectory":
        return _compare_episodes(group, invalid_action_penalty)
    return _compare_turns(group, invalid_action_penalty)


def _compare_episodes(group: Sequence[Trajectory], penalty: float) -> list[Float[Array, " turns"]]:
    scores = [_score_episode(trajectory, penalty) for trajectory in group]
    advantages = normalize_scores(np.array(scores, dtype=np.float64))
    pairs = zip(group, advantages, strict=True)
    return [np.full(len(trajectory.turns), value) for trajectory, value in pairs]


def _compare_turns(group: Sequence[Trajectory], penalty: float) -> list[Float[Array, " turns"]]:
    rows = [_score_turns(trajectory, penalty) for trajectory in group]
    # One long list of rows for the statistics, then cut into trajectories again.
    ends = np.cumsum([len(row) for row in rows])
    return np.split(normalize_scores(np.concatenate(rows)), ends[:-1])


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
