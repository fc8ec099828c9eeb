"""Retrieval at random, an ablation: a draw a group."""

from __future__ import annotations

import random

from sdar.contracts.types import Task
from services.teacher.retrieval_kinds import RETRIEVAL_KINDS, RetrievalKind
from services.teacher.skills import Skill


@RETRIEVAL_KINDS.register("random")
class RandomRetrieval(RetrievalKind):
    """Specific skills drawn without replacement; the key is the seed."""

    def choose(self, task: Task, key: str) -> tuple[Skill, ...]:
        skills = self.sources.skill_library.specific
        count = min(self.sources.num_skills, len(skills))
        return tuple(random.Random(f"random-skills:{key}").sample(skills, count))
