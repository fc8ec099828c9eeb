"""Retrieval by keyword: the skills that share rare words with the task's sentence."""

from __future__ import annotations

import math
import re
from collections import Counter

from sdar.contracts.types import Task
from services.teacher.retrieval_kinds import RETRIEVAL_KINDS, RetrievalKind, SkillSources
from services.teacher.skills import Skill

_WORD = re.compile(r"[^\W_]+")


@RETRIEVAL_KINDS.register("keyword")
class KeywordRetrieval(RetrievalKind):
    """Most overlap first, of equal ones the first in the library; no overlap is no skill."""

    is_swappable = True

    def __init__(self, sources: SkillSources) -> None:
        super().__init__(sources)
        self._words = {
            skill.skill_id: _find_words(skill) for skill in sources.skill_library.specific
        }
        self._num_skills_with: Counter[str] = Counter()
        for words in self._words.values():
            self._num_skills_with.update(words)

    def choose(self, task: Task, key: str) -> tuple[Skill, ...]:
        asked = set(_WORD.findall(task.description.lower()))
        skills = self.sources.skill_library.specific
        scores = {skill: self._compute_overlap(asked, skill) for skill in skills}
        found = [skill for skill in skills if scores[skill] > 0]
        # Stable: of equal scores the library's order stays.
        best = sorted(found, key=lambda skill: -scores[skill])
        return tuple(best[: self.sources.num_skills])

    def _compute_overlap(self, asked: set[str], skill: Skill) -> float:
        """Sum over shared words of log(skills / skills with the word)."""
        # The logarithm is 0 for a word that every skill has: it says nothing. Sorted, for a sum of
        # floats depends on its order, and a set's order differs between processes.
        num_skills = len(self._words)
        shared = sorted(asked & self._words[skill.skill_id])
        return sum(math.log(num_skills / self._num_skills_with[word]) for word in shared)


def _find_words(skill: Skill) -> frozenset[str]:
    text = " ".join((skill.title, skill.text, *skill.task_types))
    return frozenset(_WORD.findall(text.lower()))
