"""Retrieval by meaning: the skills whose titles are nearest to the task's sentence."""

from __future__ import annotations

from sdar.contracts.types import Task
from services.teacher.retrieval_kinds import RETRIEVAL_KINDS, RetrievalKind, SkillSources
from services.teacher.skills import Skill


@RETRIEVAL_KINDS.register("embedding")
class EmbeddingRetrieval(RetrievalKind):
    """Always finds something, where the library has any specific skill."""

    is_swappable = True
    needs_index = True

    def __init__(self, sources: SkillSources) -> None:
        super().__init__(sources)
        assert sources.index is not None
        self._index = sources.index

    def choose(self, task: Task, key: str) -> tuple[Skill, ...]:
        return self._index.find_nearest(task.description, self.sources.num_skills)
