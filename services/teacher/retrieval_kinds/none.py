"""Retrieval of nothing: the teacher reads what the student read."""

from __future__ import annotations

from sdar.contracts.types import Task
from services.teacher.retrieval_kinds import RETRIEVAL_KINDS, RetrievalKind
from services.teacher.skills import Skill


@RETRIEVAL_KINDS.register("none")
class NoRetrieval(RetrievalKind):
    """No skill at all, general ones included."""

    shows_skills = False

    def choose(self, task: Task, key: str) -> tuple[Skill, ...]:
        return ()
