"""Retrieval by utility: of the type's skills, those with the best upper confidence bound."""

from __future__ import annotations

from sdar.contracts.types import Task
from services.teacher.retrieval_kinds import RETRIEVAL_KINDS, RetrievalKind, SkillSources
from services.teacher.skills import Skill


@RETRIEVAL_KINDS.register("ucb")
class UcbRetrieval(RetrievalKind):
    """The run's teachers agree on what a key gets, once.

    Not swappable: what it would learn from is the end of an episode with another skill.
    """

    learns = True

    def __init__(self, sources: SkillSources) -> None:
        super().__init__(sources)
        assert sources.utility is not None
        self._utility = sources.utility

    async def prepare(self, task: Task, key: str) -> None:
        candidates = self.sources.list_of_type(task.task_type)
        if candidates:
            ids = [skill.skill_id for skill in candidates]
            await self._utility.choose(key, task.task_type, ids, self.sources.num_skills)

    def choose(self, task: Task, key: str) -> tuple[Skill, ...]:
        candidates = {skill.skill_id: skill for skill in self.sources.list_of_type(task.task_type)}
        # A choice may be older than this library, where a run goes on with another one.
        chosen = self._utility.get_choice(key) if candidates else ()
        return tuple(candidates[skill_id] for skill_id in chosen if skill_id in candidates)
