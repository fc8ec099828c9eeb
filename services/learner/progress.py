"""How far the learner has come: updates, their policy version, groups that were trained. Pure."""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Self

from sdar.contracts.errors import CorruptionError

REMEMBERED_UPDATES = 2000
"""Updates whose group ids are remembered. It must be at least the largest `checkpoint_every` there
can be (an entry comes again until a checkpoint holds its effect) plus the largest `max_staleness`
(a duplicate from before that is too stale to be trained, even if a policy sampled it that had got
further and was lost)."""


@dataclass(frozen=True, slots=True)
class Progress:
    """State between two updates; what a checkpoint says beside its tensors.

    Versions and updates count alike until a crash loses updates: a version never names two weights,
    so the policy restored at update 20 after version 25 was published continues as version 26.
    Staleness is therefore counted in updates: `lineage` holds (first version, its number of
    updates) of each life of the run, oldest first. Without a crash it is ((0, 0),).
    """

    num_updates: int = 0
    policy_version: int = 0
    lineage: tuple[tuple[int, int], ...] = ((0, 0),)
    trained_groups: tuple[tuple[str, ...], ...] = ()
    """Group ids of each of the last updates, oldest first: what must not be trained again."""
    num_groups: int = 0
    """Groups trained since the run began."""
    refused_groups: tuple[str, ...] = ()
    """Groups that these updates left out since the checkpoint before, as their optimizer step was
    not finite: what is booked as failed with the next checkpoint."""

    def after_update(self, group_ids: Iterable[str], refused_ids: Iterable[str] = ()) -> Self:
        """One update later: the next version, these groups trained, those refused."""
        batch = tuple(group_ids)
        return replace(
            self,
            num_updates=self.num_updates + 1,
            policy_version=self.policy_version + 1,
            trained_groups=(*self.trained_groups, batch)[-REMEMBERED_UPDATES:],
            num_groups=self.num_groups + len(batch),
            refused_groups=(*self.refused_groups, *refused_ids),
        )

    def after_booking(self) -> Self:
        """The same once the checkpoint's groups are booked."""
        return replace(self, refused_groups=())

    def continue_after(self, newest_version: int) -> Self:
        """The same weights under the version after `newest_version`: another life of the run."""
        version = newest_version + 1
        return replace(
            self, policy_version=version, lineage=(*self.lineage, (version, self.num_updates))
        )

    def count_updates(self, policy_version: int) -> int:
        """Updates that the weights of a version had seen."""
        first_versions = [first for first, _ in self.lineage]
        # The last life that had begun by that version; the first one for any older.
        life = max(0, bisect.bisect_right(first_versions, policy_version) - 1)
        first, num_updates = self.lineage[life]
        return num_updates + policy_version - first

    def version_after(self, num_updates: int) -> int:
        """The version that the weights got with their update of this number, from 1."""
        # A later life begins again at an earlier update, and it is the one whose weights are left.
        lives = [(first, start) for first, start in self.lineage if start < num_updates]
        first, start = lives[-1]
        return first + num_updates - start

    def list_trained(self) -> dict[str, int]:
        """Group id -> the version its update led to, for every group that is remembered."""
        first = self.num_updates - len(self.trained_groups) + 1
        versions = [self.version_after(number) for number in range(first, self.num_updates + 1)]
        trained: dict[str, int] = {}
        for group_ids, version in zip(self.trained_groups, versions, strict=True):
            trained |= dict.fromkeys(group_ids, version)
        return trained

    def compute_staleness(self, policy_version: int) -> int:
        """Updates between the policy of `policy_version` and now, never negative.

        A policy of a lost life may have got further than this one has.
        """
        return max(0, self.num_updates - self.count_updates(policy_version))

    def to_json(self) -> dict[str, Any]:
        return {
            "num_updates": self.num_updates,
            "policy_version": self.policy_version,
            "lineage": list(map(list, self.lineage)),
            "trained_groups": list(map(list, self.trained_groups)),
            "num_groups": self.num_groups,
            "refused_groups": list(self.refused_groups),
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """Raises CorruptionError where a field is missing or of another kind."""
        try:
            if not value["lineage"]:
                raise ValueError("its lineage is empty")
            lineage = [(int(version), int(updates)) for version, updates in value["lineage"]]
            trained = [tuple(map(str, group_ids)) for group_ids in value["trained_groups"]]
            return cls(
                int(value["num_updates"]),
                int(value["policy_version"]),
                tuple(lineage),
                tuple(trained),
                int(value["num_groups"]),
                # Absent from checkpoints of before there were any.
                tuple(map(str, value.get("refused_groups", ()))),
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise CorruptionError(
                f"A checkpoint's progress cannot be read: {error!r}. Remove that checkpoint."
            ) from error
