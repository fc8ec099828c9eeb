"""Reads the skill library from its directory, checks it, and names its content by a hash.

A library is a directory with an `index.yaml`, a list of entries::

    - id: household-clean            unique in the library
      title: How to clean an object
      kind: specific                 shown with tasks of its types; a general one with every task
      task_types: [clean]            none for a general skill, at least one for a specific skill
      file: clean.md                 inside the directory; the skill is its text, less a first line
                                     `# heading`
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

import services
from sdar.config import RunConfig
from sdar.contracts.errors import ConfigurationError

INDEX_FILE = "index.yaml"
SHIPPED_LIBRARIES = Path(services.__file__).resolve().parent.parent / "skills"
"""skills/ beside the `services` package.

It is there in a checkout, an editable installation and the container image alike.
"""


@dataclass(frozen=True, slots=True)
class Skill:
    """One piece of advice. `text` is shown word for word; a general skill has no task types."""

    skill_id: str
    title: str
    text: str
    task_types: tuple[str, ...] = ()

    @property
    def is_specific(self) -> bool:
        return bool(self.task_types)


@dataclass(frozen=True)
class SkillLibrary:
    """Skills in the order of their index."""

    skills: tuple[Skill, ...]

    @cached_property
    def content_hash(self) -> str:
        """16 hex digits over every id, title, type and text, in order.

        Scores under another library are not comparable.
        """
        digest = hashlib.sha256()
        for skill in self.skills:
            for part in (skill.skill_id, skill.title, skill.text, *skill.task_types):
                # Its length first: two skills whose parts read alike in a row differ.
                data = part.encode()
                digest.update(len(data).to_bytes(8, "little") + data)
            digest.update(b"\n")
        return digest.hexdigest()[:16]

    @cached_property
    def general(self) -> tuple[Skill, ...]:
        return tuple(skill for skill in self.skills if not skill.is_specific)

    @cached_property
    def specific(self) -> tuple[Skill, ...]:
        return tuple(skill for skill in self.skills if skill.is_specific)

    @cached_property
    def task_types(self) -> tuple[str, ...]:
        """Every task type that some skill is for, sorted."""
        found: set[str] = set()
        for skill in self.specific:
            found.update(skill.task_types)
        return tuple(sorted(found))


class _IndexEntry(BaseModel):
    model_config = ConfigDict(extra="forbid")

    id: str = Field(min_length=1)
    title: str = Field(min_length=1)
    kind: Literal["general", "specific"]
    task_types: tuple[str, ...] = ()
    file: str = Field(min_length=1)


_INDEX = TypeAdapter(list[_IndexEntry])


def open_skill_library(config: RunConfig) -> SkillLibrary:
    """The library of a run: `teacher.skills`, else the shipped one of its environment.

    With retrieval `none` it is empty, and nothing is read.

    Raises:
        ConfigurationError: see `load_skill_library`.
    """
    if config.teacher.retrieval == "none":
        return SkillLibrary(())
    return load_skill_library(config.teacher.skills or SHIPPED_LIBRARIES / config.environment.name)


def load_skill_library(directory: Path) -> SkillLibrary:
    """Read and check a library.

    Raises:
        ConfigurationError: no index there, or an entry that cannot be used; names the entry, what
            was found and the fix.
    """
    entries = _read_index(directory / INDEX_FILE)
    skills = tuple(_read_skill(directory, entry) for entry in entries)
    ids = [skill.skill_id for skill in skills]
    if repeated := sorted({skill_id for skill_id in ids if ids.count(skill_id) > 1}):
        raise ConfigurationError(
            f"{directory / INDEX_FILE}: id {', '.join(repeated)} is used twice. Give every skill "
            "its own id."
        )
    return SkillLibrary(skills)


def format_skills(skills: Sequence[Skill]) -> str:
    """The text that a prompt shows: the skills in order, an empty line between two."""
    return "\n\n".join(skill.text for skill in skills)


def _read_index(path: Path) -> list[_IndexEntry]:
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        entries = _INDEX.validate_python(raw)
    except OSError as error:
        raise ConfigurationError(
            f"Cannot read the skill library's index {path}: {error.strerror}. Point teacher.skills "
            f"at a directory with an {INDEX_FILE}, or set teacher.retrieval: none."
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} is not valid YAML: {error}. Fix it there.") from error
    except ValidationError as error:
        raise ConfigurationError(
            f"{path}: {_describe(error)}. List entries of id, title, kind, task_types, file."
        ) from error
    if not entries:
        raise ConfigurationError(
            f"{path} lists no skills. Add some, or set teacher.retrieval: none."
        )
    return entries


def _describe(error: ValidationError) -> str:
    """All problems of an index: where each is, what is wrong, what was found."""
    problems = []
    for problem in error.errors():
        place = ".".join(map(str, problem["loc"])) or "index"
        problems.append(f"{place}: {problem['msg']}, got {problem['input']!r}")
    return "; ".join(problems)


def _read_skill(directory: Path, entry: _IndexEntry) -> Skill:
    where = f"{directory / INDEX_FILE}: skill {entry.id}"
    _check_kind(entry, where)
    text = _read_text(directory, entry, where)
    # The heading is for people who browse the library; prompts show what stands below.
    if text.startswith("# "):
        text = text.partition("\n")[2]
    if not text.strip():
        path = (directory / entry.file).resolve()
        raise ConfigurationError(
            f"{where}: {path} holds no text below its heading. An empty skill would teach nothing; "
            "write it."
        )
    return Skill(entry.id, entry.title, text.strip(), entry.task_types)


def _check_kind(entry: _IndexEntry, where: str) -> None:
    if (entry.kind == "specific") != bool(entry.task_types):
        fix = (
            "Name the task types it is for"
            if entry.kind == "specific"
            else "Remove task_types, or make it specific"
        )
        raise ConfigurationError(
            f"{where} is {entry.kind} with task_types {list(entry.task_types)}. {fix}."
        )


def _read_text(directory: Path, entry: _IndexEntry, where: str) -> str:
    path = (directory / entry.file).resolve()
    # After links are resolved: a library must not bring other files of the machine into prompts.
    if not path.is_relative_to(directory.resolve()):
        raise ConfigurationError(
            f"{where} names {entry.file}, outside the library. Move the file into {directory}."
        )
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(
            f"{where}: cannot read {path}: {error.strerror}. Add the file or correct the entry."
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(
            f"{where}: {path} is not UTF-8 text: {error}. Save it as UTF-8."
        ) from error
