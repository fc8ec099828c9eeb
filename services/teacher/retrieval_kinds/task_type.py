"""Retrieval by task type: the skills for the type that the environment gives the task."""

from __future__ import annotations

from sdar.contracts.types import Task
from services.teacher.retrieval_kinds import RETRIEVAL_KINDS, RetrievalKind
from services.teacher.skills import Skill


@RETRIEVAL_KINDS.register("task_type")
class TaskTypeRetrieval(RetrievalKind):
    """The first skills of the type, in the library's order."""

    is_swappable = True

    def choose(self, task: Task, key: str) -> tuple[Skill, ...]:
        return self.sources.list_of_type(task.task_type)[: self.sources.num_skills]
