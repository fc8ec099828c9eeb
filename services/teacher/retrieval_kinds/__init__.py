"""Retrieval kinds: each chooses which specific skills a task is shown, in a module of its own.

A kind is named as in `teacher.retrieval`.
A kind reads the task's own type and sentence and nothing else: observations name every object and
every action, so words matched there would retrieve anything.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from sdar.contracts.registry import Registry
from sdar.contracts.types import Task
from services.teacher.embedding import SkillIndex
from services.teacher.skills import Skill, SkillLibrary
from services.teacher.utility import SkillUtility


@dataclass(frozen=True, slots=True)
class SkillSources:
    """What a kind may choose by."""

    skill_library: SkillLibrary
    num_skills: int
    """Most specific skills that are shown."""
    index: SkillIndex | None = None
    """Nearness in meaning, for a kind that `needs_index`."""
    utility: SkillUtility | None = None
    """What earlier episodes taught, for a kind that `learns`."""

    def list_of_type(self, task_type: str) -> tuple[Skill, ...]:
        """Every specific skill for a task type, in the library's order."""
        skills = self.skill_library.specific
        return tuple(skill for skill in skills if task_type in skill.task_types)


class RetrievalKind(ABC):
    """One way to choose: the same task and key, the same skills, in every process."""

    is_swappable: ClassVar[bool] = False
    """Whether the wrong-skill experiment may swap what is chosen for another task type's."""
    shows_skills: ClassVar[bool] = True
    """False shows no skill at all, general ones included."""
    needs_index: ClassVar[bool] = False
    """Whether it chooses by nearness in meaning, which takes a sentence model."""
    learns: ClassVar[bool] = False
    """Whether it chooses by how earlier episodes ended; then their outcomes are published."""

    def __init__(self, sources: SkillSources) -> None:
        self.sources = sources

    async def prepare(self, task: Task, key: str) -> None:  # noqa: B027
        """Whatever has to be waited for before `choose`.

        Raises:
            BusUnavailableError: the run's other teachers cannot be asked.
        """

    @abstractmethod
    def choose(self, task: Task, key: str) -> tuple[Skill, ...]:
        """Specific skills, best first, if any fits. `key` (the group id) seeds draws."""


RETRIEVAL_KINDS: Registry[type[RetrievalKind]] = Registry("retrieval kind", __name__)
