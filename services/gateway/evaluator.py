"""When the newest policy is evaluated, and what its episodes add up to."""

from __future__ import annotations

import structlog

from sdar.config import RunConfig
from sdar.contracts.errors import RefusedError
from sdar.contracts.types import LedgerEvent, Trajectory

from .commit import Draft
from .evaluation import Evaluation, find_evaluation
from .policy import NewestPolicy
from .tasks import TaskSource

log = structlog.get_logger()

_LOGGED = ("evaluation_id", "success", "interval", "num_episodes")


class Evaluator:
    """Decides on evaluations in a draft: before the first update, now and then, after the last."""

    def __init__(self, config: RunConfig, tasks: TaskSource, policy: NewestPolicy) -> None:
        self._config = config.evaluation
        self._tasks = tasks
        self._policy = policy

    def begin_due(self, draft: Draft, *, is_last: bool) -> None:
        """Begin what is due; the first policy and the last one are evaluated sampled and greedy.

        Args:
            is_last: whether no further policy comes.
        """
        begun = draft.state.evaluations
        if is_last or not begun:
            for is_greedy in (False, True):
                if not self._is_begun(begun, is_greedy=is_greedy):
                    self._begin(draft, is_greedy=is_greedy)
        elif self._is_interval_over(begun):
            self._begin(draft, is_greedy=False)

    def is_over(self, draft: Draft) -> bool:
        """Whether the newest policy was evaluated greedy, and every evaluation has its results."""
        evaluations = draft.state.evaluations
        are_complete = all(evaluation.is_complete for evaluation in evaluations)
        return are_complete and self._is_begun(evaluations, is_greedy=True)

    def resend_pending(self, draft: Draft) -> None:
        """Publish again the tasks of every episode without a result."""
        for evaluation in draft.state.evaluations:
            for index in evaluation.pending:
                self._publish(draft, evaluation, index)

    def count(self, draft: Draft, trajectory: Trajectory) -> None:
        """Take in the episode of an evaluation; ignored if nobody waits for it."""
        evaluation, index = find_evaluation(draft.state.evaluations, trajectory.group_id)
        if evaluation is None or index not in evaluation.pending:
            return
        draft.state.failed_evaluation.clear()
        if not evaluation.is_pinned(trajectory):
            # Sampled across a change of weights: play it again, or the number would be about no
            # policy at all.
            log.warning(
                "evaluation_episode_unpinned",
                group_id=trajectory.group_id,
                wanted=evaluation.policy_version,
            )
            self._publish(draft, evaluation, index)
            return
        if evaluation.add(index, trajectory) and evaluation.is_complete:
            summary = evaluation.summary()
            log.info("evaluation_complete", **{name: summary[name] for name in _LOGGED})

    def count_failure(self, draft: Draft, event: LedgerEvent) -> None:
        """Take in that an episode of an evaluation cannot be played; ignored if nobody waits."""
        evaluation, index = find_evaluation(draft.state.evaluations, event.group_id)
        if evaluation is None or index not in evaluation.pending:
            return
        draft.state.failed_evaluation.add(event)
        evaluation.add_failure(index, self._tasks.get_heldout(index).task_type)
        log.warning("evaluation_episode_failed", group_id=event.group_id, reason=event.reason)

    def play_again(self, draft: Draft, group_id: str, payload: bytes) -> None:
        """Publish an evaluation's encoded task group again, as it was.

        Raises RefusedError if no evaluation waits for it, or would again.
        """
        evaluation, index = find_evaluation(draft.state.evaluations, group_id)
        if evaluation is None or not evaluation.reopen(
            index, self._tasks.get_heldout(index).task_type
        ):
            raise RefusedError(
                f"No evaluation waits for {group_id}: it has its result, or is none of this run's."
            )
        draft.tasks.append(payload)

    def _is_begun(self, evaluations: list[Evaluation], *, is_greedy: bool) -> bool:
        """Whether an evaluation of the newest policy was begun.

        Asked by version and not by updates: after a crash that lost updates, another policy may
        have seen as many.
        """
        version = self._policy.version
        return any(e.policy_version == version and e.is_greedy is is_greedy for e in evaluations)

    def _is_interval_over(self, begun: list[Evaluation]) -> bool:
        last = max(evaluation.num_updates for evaluation in begun)
        is_time = self._policy.num_updates >= last + self._config.every_updates
        are_complete = all(evaluation.is_complete for evaluation in begun)
        return bool(self._config.every_updates) and is_time and are_complete

    def _begin(self, draft: Draft, *, is_greedy: bool) -> None:
        # The list may be longer: for an evaluation that was begun when more tasks were wanted.
        num_tasks = min(self._config.num_tasks, len(self._tasks.heldout))
        evaluation = Evaluation.begin(
            self._policy.version,
            self._policy.num_updates,
            is_greedy=is_greedy,
            num_tasks=num_tasks,
        )
        draft.state.evaluations.append(evaluation)
        draft.is_changed = True
        for index in range(num_tasks):
            self._publish(draft, evaluation, index)
        log.info("evaluation_begun", evaluation_id=evaluation.evaluation_id, num_tasks=num_tasks)

    def _publish(self, draft: Draft, evaluation: Evaluation, index: int) -> None:
        draft.publish(self._tasks.build_evaluation_group(draft.state, evaluation, index))
