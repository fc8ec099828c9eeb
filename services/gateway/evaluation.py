"""Evaluations on fixed held-out tasks: counts pooled over tasks, with their intervals. Pure.

Each evaluation is pinned to one policy version.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from sdar.contracts.types import Trajectory

NORMAL_QUANTILE_95 = 1.959963984540054
"""97.5% of a standard normal distribution lie below it: the bound of a two-sided 95% interval."""
_MAX_INDEX_DIGITS = 7
"""As the largest `evaluation.num_tasks` has; a longer text is no index of ours."""


def compute_wilson_interval(num_successes: int, num_trials: int) -> tuple[float, float]:
    """95% score interval of a success rate (Wilson 1927); (0, 1) without trials.

    Unlike the normal interval it stays in [0, 1].
    """
    if num_trials == 0:
        return 0.0, 1.0
    z2 = NORMAL_QUANTILE_95**2
    rate = num_successes / num_trials
    centre = (rate + z2 / (2 * num_trials)) / (1 + z2 / num_trials)
    spread = math.sqrt(rate * (1 - rate) / num_trials + z2 / (4 * num_trials**2))
    half = NORMAL_QUANTILE_95 / (1 + z2 / num_trials) * spread
    return max(0.0, centre - half), min(1.0, centre + half)


def compute_change_interval(
    before: float,
    before_interval: tuple[float, float],
    after: float,
    after_interval: tuple[float, float],
) -> tuple[float, float]:
    """95% interval of `after - before`, two rates with their Wilson intervals (Newcombe 1998,
    method 10).

    It takes the two for independent. Rates on the same tasks go together a little, so it is rather
    too wide than too narrow.
    """
    change = after - before
    down = math.hypot(after - after_interval[0], before_interval[1] - before)
    up = math.hypot(after_interval[1] - after, before - before_interval[0])
    return change - down, change + up


@dataclass
class Evaluation:
    """One pass over the held-out list under one policy version.

    Attributes:
        pending: task indexes without a result.
        successes: by task type, [successes, episodes]; pooled, never averaged over batches.
        failed: indexes of the tasks whose episode could not be played; they count as no success.
        component_sums: reward components by name, summed over turns and episodes: a benchmark's own
            score is one of them.
    """

    evaluation_id: str
    policy_version: int
    num_updates: int
    is_greedy: bool
    num_tasks: int
    pending: list[int] = field(default_factory=list)
    successes: dict[str, list[int]] = field(default_factory=dict)
    failed: list[int] = field(default_factory=list)
    num_turns: int = 0
    component_sums: dict[str, float] = field(default_factory=dict)

    @classmethod
    def begin(
        cls, policy_version: int, num_updates: int, *, is_greedy: bool, num_tasks: int
    ) -> Evaluation:
        kind = "greedy" if is_greedy else "sampled"
        return cls(
            f"{kind}-{num_updates:06d}-v{policy_version:06d}",
            policy_version,
            num_updates,
            is_greedy,
            num_tasks,
            pending=list(range(num_tasks)),
        )

    @property
    def is_complete(self) -> bool:
        return not self.pending

    def group_id(self, task_index: int) -> str:
        return f"{self.evaluation_id}-{task_index:05d}"

    def find_index(self, text: str) -> int | None:
        """The task index that ends the id of one of this evaluation's groups; None for any other
        text.
        """
        if not (text.isascii() and text.isdigit() and len(text) <= _MAX_INDEX_DIGITS):
            return None
        index = int(text)
        # The text as it stands in the id: 7 and 00007 would be one index otherwise.
        is_own = index < self.num_tasks and self.group_id(index).endswith(f"-{text}")
        return index if is_own else None

    def add(self, task_index: int, trajectory: Trajectory) -> bool:
        """Count one episode; False, and nothing changed, if its task has a result already."""
        if task_index not in self.pending:
            return False
        self._count(task_index, trajectory.task.task_type, trajectory.is_success)
        self.num_turns += len(trajectory.turns)
        for turn in trajectory.turns:
            for name, value in turn.reward_components.items():
                self.component_sums[name] = self.component_sums.get(name, 0.0) + value
        return True

    def add_failure(self, task_index: int, task_type: str) -> bool:
        """Count an episode that could not be played."""
        if task_index not in self.pending:
            return False
        self._count(task_index, task_type, False)
        self.failed.append(task_index)
        return True

    def reopen(self, task_index: int, task_type: str) -> bool:
        """Wait again for an episode that could not be played; returns whether one is awaited."""
        if task_index in self.failed:
            self.failed.remove(task_index)
            self.successes[task_type][1] -= 1
            self.pending.append(task_index)
        return task_index in self.pending

    def is_pinned(self, trajectory: Trajectory) -> bool:
        """Whether every token was sampled under the version this evaluation is about."""
        return trajectory.min_policy_version == trajectory.max_policy_version == self.policy_version

    @property
    def num_successes(self) -> int:
        return sum(counts[0] for counts in self.successes.values())

    @property
    def num_episodes(self) -> int:
        return sum(counts[1] for counts in self.successes.values())

    @property
    def success(self) -> float:
        """Successes over episodes, pooled; 0 before the first."""
        return self.num_successes / max(1, self.num_episodes)

    def summary(self) -> dict[str, object]:
        """Pooled success with its interval, in total and by task type; reward components as means
        over all episodes.
        """
        return {
            "evaluation_id": self.evaluation_id,
            "policy_version": self.policy_version,
            "num_updates": self.num_updates,
            "is_greedy": self.is_greedy,
            "is_complete": self.is_complete,
            "num_tasks": self.num_tasks,
            "num_episodes": self.num_episodes,
            "num_failed": len(self.failed),
            "success": self.success,
            "interval": compute_wilson_interval(self.num_successes, self.num_episodes),
            "reward_components": self._compute_component_means(),
            "by_task_type": {kind: tuple(self.successes[kind]) for kind in sorted(self.successes)},
        }

    def _compute_component_means(self) -> dict[str, float]:
        num_episodes = max(1, self.num_episodes)
        return {name: total / num_episodes for name, total in sorted(self.component_sums.items())}

    def _count(self, task_index: int, task_type: str, is_success: bool) -> None:
        self.pending.remove(task_index)
        counts = self.successes.setdefault(task_type, [0, 0])
        counts[0] += is_success
        counts[1] += 1


def find_evaluation(
    evaluations: Sequence[Evaluation], group_id: str
) -> tuple[Evaluation | None, int]:
    """The evaluation to which a group belongs, and the index of its task; (None, -1) if to none."""
    evaluation_id, _, text = group_id.rpartition("-")
    for evaluation in evaluations:
        if evaluation.evaluation_id == evaluation_id:
            index = evaluation.find_index(text)
            if index is not None:
                return evaluation, index
    return None, -1
