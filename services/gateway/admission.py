"""Which training groups are issued: as many as capacity allows, each with its account opened."""

from __future__ import annotations

from sdar.bus.ledger import LedgerAccount, format_group_id
from sdar.config import RunConfig
from sdar.contracts.types import GroupOutcome, LedgerEvent, Task
from sdar.process import tracing

from .capacity import count_due_groups
from .commit import Draft
from .policy import NewestPolicy
from .tasks import TaskSource


class Admission:
    """Issues training groups into a draft."""

    def __init__(self, config: RunConfig, tasks: TaskSource, policy: NewestPolicy) -> None:
        self._config = config
        self._tasks = tasks
        self._policy = policy

    def issue_due(self, draft: Draft, ledger: LedgerAccount, num_workers: int) -> None:
        """Issue what may be issued now, in the training order.

        Args:
            num_workers: rollout workers that are heard from; those of the configuration are counted
                on anyway.
        """
        training = self._tasks.training
        assert training is not None, "groups are issued only after the task list was loaded"
        num_due = count_due_groups(
            self._config.training,
            ledger,
            num_updates=self._policy.num_updates,
            max_concurrent_groups=self._count_places(num_workers),
        )
        for _ in range(num_due):
            self.issue(draft, training.at(draft.state.next_group_number))

    def issue(self, draft: Draft, task: Task) -> str:
        """Open the account of a new training group and send it out; returns its id."""
        version = self._policy.version
        group_id = format_group_id(draft.state.next_group_number)
        # With the account's entry below in one commit, so the two never differ.
        draft.state.next_group_number += 1
        draft.publish(self._tasks.build_training_group(draft.state, group_id, task, version))
        draft.transitions.append(
            LedgerEvent(self._config.name, group_id, GroupOutcome.ISSUED, 0, version)
        )
        draft.spans.append(
            tracing.open_group(
                group_id, task_id=task.task_id, task_type=task.task_type, policy_version=version
            )
        )
        return group_id

    def _count_places(self, num_workers: int) -> int:
        """Groups that the rollout workers can play at once."""
        rollout = self._config.rollout
        places = rollout.max_concurrent_episodes // self._config.training.group_size
        # Before the first workers report, those of the configuration are about to come.
        return max(rollout.num_workers, num_workers) * places
