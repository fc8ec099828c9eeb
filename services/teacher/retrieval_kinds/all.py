"""Retrieval of everything: every specific skill, whatever `num_skills` says."""

from __future__ import annotations

from sdar.contracts.types import Task
from services.teacher.retrieval_kinds import RETRIEVAL_KINDS, RetrievalKind
from services.teacher.skills import Skill


@RETRIEVAL_KINDS.register("all")
class AllRetrieval(RetrievalKind):
    """The whole library."""

    def choose(self, task: Task, key: str) -> tuple[Skill, ...]:
        return self.sources.skill_library.specific
