"""Chooses the skills for a task, by a retrieval kind; an experiment may have wrong ones shown.

Call `prepare` first, which may wait for the bus, then `retrieve`, which only looks up. What each
kind chooses by is in `retrieval_kinds`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from sdar.contracts.errors import ConfigurationError
from sdar.contracts.types import Task
from services.teacher.embedding import SkillIndex
from services.teacher.retrieval_kinds import RETRIEVAL_KINDS, SkillSources
from services.teacher.skills import Skill, SkillLibrary
from services.teacher.utility import SkillUtility


@dataclass(frozen=True, slots=True)
class Retrieval:
    """What is shown: general skills first, then specific ones, best first.

    Attributes:
        is_swapped: the specific skills are another task type's, on purpose.
        is_miss: something specific was looked for and nothing was found.
    """

    general: tuple[Skill, ...]
    specific: tuple[Skill, ...]
    kind: str
    is_swapped: bool = False
    is_miss: bool = False

    @property
    def label(self) -> str:
        """The kind as it is recorded with a score, and whether the skills were swapped."""
        return f"{self.kind}+swapped" if self.is_swapped else self.kind

    @property
    def skills(self) -> tuple[Skill, ...]:
        return self.general + self.specific

    @property
    def skill_ids(self) -> tuple[str, ...]:
        return tuple(skill.skill_id for skill in self.skills)


class Retriever:
    """Chooses skills: the same task and key, the same skills, in every process.

    Args:
        kind: name of a retrieval kind.
        num_skills: most specific skills.
        wrong_skill_fraction: share of keys whose specific skills are swapped for those of another
            task type.
        index: of the library's specific skills, for a kind that needs it.
        utility: what the episodes so far taught, for a kind that learns.

    Raises:
        ConfigurationError: there is no such kind, or swapping is asked for where nothing can be
            swapped.
    """

    def __init__(
        self,
        library: SkillLibrary,
        *,
        kind: str,
        num_skills: int,
        wrong_skill_fraction: float = 0.0,
        index: SkillIndex | None = None,
        utility: SkillUtility | None = None,
    ) -> None:
        self.skill_library = library
        self.kind = kind
        self._sources = SkillSources(library, num_skills, index, utility)
        self._choice = RETRIEVAL_KINDS[kind](self._sources)
        self.learns = self._choice.learns
        self._wrong_skill_fraction = wrong_skill_fraction
        if wrong_skill_fraction:
            self._check_swapping()

    def _check_swapping(self) -> None:
        num_types = len(self.skill_library.task_types)
        if self._choice.is_swappable and num_types >= 2:
            return
        kinds = [name for name in RETRIEVAL_KINDS.names() if RETRIEVAL_KINDS[name].is_swappable]
        raise ConfigurationError(
            f"teacher.wrong_skill_fraction {self._wrong_skill_fraction} with retrieval {self.kind} "
            f"and a library for {num_types} task types: there is no wrong skill to swap in. Use "
            f"{' or '.join(kinds)} and a library for at least two types, or set the fraction to 0."
        )

    async def prepare(self, task: Task, key: str) -> None:
        """To be called before `retrieve`.

        Kind ucb agrees with the run's other teachers on what the key gets, once.

        Raises:
            BusUnavailableError: they cannot be asked.
        """
        await self._choice.prepare(task, key)

    def retrieve(self, task: Task, key: str) -> Retrieval:
        """Skills for a task.

        `key`, the group id, seeds every draw: all episodes of a group see the same text.
        """
        if not self._choice.shows_skills:
            return Retrieval((), (), self.kind)
        specific = self._choice.choose(task, key)
        is_swapped = bool(specific) and _draw(f"wrong-skill:{key}") < self._wrong_skill_fraction
        shown = self._swap(task, key, specific) if is_swapped else specific
        return Retrieval(
            self.skill_library.general, shown, self.kind, is_swapped, is_miss=not specific
        )

    def _swap(self, task: Task, key: str, right: tuple[Skill, ...]) -> tuple[Skill, ...]:
        """As many skills of one other task type, none of which is right for this task."""
        candidates = []
        for task_type in self.skill_library.task_types:
            skills = self._sources.list_of_type(task_type)[: self._sources.num_skills]
            # A skill may be for several types, so another type's may still be right.
            wrong = [skill for skill in skills if task.task_type not in skill.task_types]
            if wrong and not set(wrong) & set(right):
                candidates.append(wrong)
        if not candidates:
            raise ConfigurationError(
                f"teacher.wrong_skill_fraction {self._wrong_skill_fraction}: every skill is right "
                f"for task type {task.task_type!r}. Add skills for other types, or set the "
                "fraction to 0."
            )
        chosen = candidates[int(_draw(f"wrong-type:{key}") * len(candidates))]
        return tuple(chosen[: len(right)])


def _draw(key: str) -> float:
    """A number in [0, 1) that depends on the key alone, on every machine."""
    # Six bytes fit a float's mantissa exactly. Python's own `hash` differs between processes.
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:6], "big") / 2**48
