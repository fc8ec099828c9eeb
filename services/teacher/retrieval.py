"""Owns the choice of skills for a task. Reads the task's own type and sentence and nothing else:
observations name every object and every action, so words matched there would retrieve anything.
Never reads files, never builds prompts.

`prepare` first, which may wait for the bus, then `retrieve`, which only looks up.
"""

from __future__ import annotations

import hashlib
import math
import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from sdar.contracts.errors import ConfigurationError
from sdar.contracts.types import Task
from services.teacher.embedding import SkillIndex
from services.teacher.skills import Skill, SkillLibrary
from services.teacher.utility import SkillUtility

RetrievalKind = Literal["task_type", "keyword", "embedding", "ucb", "all", "random", "none"]

_SWAPPABLE: tuple[RetrievalKind, ...] = ("task_type", "keyword", "embedding")
"""Kinds whose skills may be swapped. Not ucb: what it is to learn from would be the end of an
episode with another skill.
"""

_WORD = re.compile(r"[^\W_]+")


@dataclass(frozen=True, slots=True)
class Retrieval:
    """What is shown: general skills first, then specific ones, best first.

    Attributes:
        is_swapped: the specific skills are another task type's, on purpose.
        is_miss: something specific was looked for and nothing was found.
    """

    general: tuple[Skill, ...]
    specific: tuple[Skill, ...]
    kind: RetrievalKind
    is_swapped: bool = False
    is_miss: bool = False

    @property
    def label(self) -> str:
        """The kind as it is recorded with a score: what was looked for, and whether it was swapped."""
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
        kind: task_type: skills for the task's type, in index order. keyword: skills that share
            telling words with the task's sentence. embedding: those nearest in meaning to it. ucb:
            skills for the task's type, those with the best bound on their utility. all: every
            specific skill, whatever `num_skills` says. random: a draw by the key. none: no skill at
            all, general ones included.
        num_skills: most specific skills.
        wrong_skill_fraction: share of keys whose specific skills are swapped for those of another
            task type.
        index: of the library's specific skills; embedding needs it. utility: ucb needs it.

    Raises:
        ConfigurationError: swapping is asked for where nothing can be swapped.
    """

    def __init__(
        self,
        library: SkillLibrary,
        *,
        kind: RetrievalKind,
        num_skills: int,
        wrong_skill_fraction: float = 0.0,
        index: SkillIndex | None = None,
        utility: SkillUtility | None = None,
    ) -> None:
        assert (kind == "embedding") == (index is not None)
        assert (kind == "ucb") == (utility is not None)
        self.skill_library = library
        self.kind = kind
        self._num_skills = num_skills
        self._wrong_skill_fraction = wrong_skill_fraction
        self._index, self._utility = index, utility
        choices: dict[RetrievalKind, Callable[[Task, str], tuple[Skill, ...]]] = {
            "task_type": lambda task, key: self._list_of_type(task.task_type)[:num_skills],
            "keyword": lambda task, key: self._by_keyword(task.description),
            "embedding": lambda task, key: self._by_nearness(task.description),
            "ucb": lambda task, key: self._by_utility(task.task_type, key),
            "all": lambda task, key: library.specific,
            "random": lambda task, key: self._by_draw(key),
            "none": lambda task, key: (),
        }
        self._choose = choices[kind]
        self._words = {skill.skill_id: _words(skill) for skill in library.specific}
        self._num_skills_with = Counter(word for words in self._words.values() for word in words)
        if wrong_skill_fraction and (kind not in _SWAPPABLE or len(library.task_types) < 2):
            raise ConfigurationError(
                f"teacher.wrong_skill_fraction {wrong_skill_fraction} with retrieval {kind} and a "
                "library for "
                f"{len(library.task_types)} task types: there is no wrong skill to swap in. Use "
                f"{' or '.join(_SWAPPABLE)} "
                "and a library for at least two types, or set the fraction to 0."
            )

    async def prepare(self, task: Task, key: str) -> None:
        """To be called before `retrieve`: ucb agrees with the run's other teachers on what the key
        gets, once.

        Raises:
            BusUnavailableError: they cannot be asked.
        """
        if self._utility is not None and (candidates := self._list_of_type(task.task_type)):
            ids = [skill.skill_id for skill in candidates]
            await self._utility.choose(key, task.task_type, ids, self._num_skills)

    def retrieve(self, task: Task, key: str) -> Retrieval:
        """Skills for a task. `key` (the group id) seeds every draw, so that all episodes of a group
        see the same text.
        """
        if self.kind == "none":
            return Retrieval((), (), self.kind)
        specific = self._choose(task, key)
        is_swapped = bool(specific) and _draw(f"wrong-skill:{key}") < self._wrong_skill_fraction
        shown = self._swap(task, key, specific) if is_swapped else specific
        return Retrieval(
            self.skill_library.general, shown, self.kind, is_swapped, is_miss=not specific
        )

    def _list_of_type(self, task_type: str) -> tuple[Skill, ...]:
        return tuple(
            skill for skill in self.skill_library.specific if task_type in skill.task_types
        )

    def _by_keyword(self, description: str) -> tuple[Skill, ...]:
        asked = set(_WORD.findall(description.lower()))
        scores = {
            skill: self._compute_overlap(asked, skill) for skill in self.skill_library.specific
        }
        best = sorted(
            (skill for skill in scores if scores[skill] > 0), key=lambda skill: -scores[skill]
        )
        return tuple(best[: self._num_skills])

    def _compute_overlap(self, asked: set[str], skill: Skill) -> float:
        """Sum over shared words of log(skills / skills with the word): a word that every skill has
        tells nothing.
        """
        num_skills = len(self.skill_library.specific)
        return sum(
            math.log(num_skills / self._num_skills_with[word])
            for word in sorted(asked & self._words[skill.skill_id])
        )

    def _by_nearness(self, description: str) -> tuple[Skill, ...]:
        assert self._index is not None
        return self._index.find_nearest(description, self._num_skills)

    def _by_utility(self, task_type: str, key: str) -> tuple[Skill, ...]:
        assert self._utility is not None
        candidates = {skill.skill_id: skill for skill in self._list_of_type(task_type)}
        # A choice may be older than this library, where a run goes on with another one.
        chosen = self._utility.get_choice(key) if candidates else ()
        return tuple(candidates[skill_id] for skill_id in chosen if skill_id in candidates)

    def _by_draw(self, key: str) -> tuple[Skill, ...]:
        count = min(self._num_skills, len(self.skill_library.specific))
        return tuple(
            random.Random(f"random-skills:{key}").sample(self.skill_library.specific, count)
        )

    def _swap(self, task: Task, key: str, right: tuple[Skill, ...]) -> tuple[Skill, ...]:
        """As many skills of one other task type, none of which is right for this task."""
        wrong = {
            task_type: [
                s
                for s in self._list_of_type(task_type)[: self._num_skills]
                if task.task_type not in s.task_types
            ]
            for task_type in self.skill_library.task_types
        }
        candidates = [
            skills for skills in wrong.values() if skills and not set(skills) & set(right)
        ]
        if not candidates:
            raise ConfigurationError(
                f"teacher.wrong_skill_fraction {self._wrong_skill_fraction}: every skill is right "
                "for task type "
                f"{task.task_type!r}. Add skills for other types, or set the fraction to 0."
            )
        chosen = candidates[int(_draw(f"wrong-type:{key}") * len(candidates))]
        return tuple(chosen[: len(right)])


def _words(skill: Skill) -> frozenset[str]:
    return frozenset(_WORD.findall(" ".join((skill.title, skill.text, *skill.task_types)).lower()))


def _draw(key: str) -> float:
    """A number in [0, 1) that depends on the key alone, on every machine."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:6], "big") / 2**48
