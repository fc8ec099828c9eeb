from __future__ import annotations

from pathlib import Path

import pytest

from sdar.config import EnvironmentConfig, ModelConfig, RunConfig, TeacherConfig
from sdar.contracts.errors import ConfigurationError
from services.envs.household.demonstrations import skill_wording
from services.envs.household.game import PROCEDURES
from services.teacher.skills import (
    SHIPPED_LIBRARIES,
    format_skills,
    load_skill_library,
    open_skill_library,
)

INDEX = """
- {id: always, title: Always, kind: general, file: always.md}
- {id: cleaning, title: Cleaning, kind: specific, task_types: [clean], file: clean.md}
"""


def write_library(
    directory: Path, index: str = INDEX, clean: str = "# Cleaning\n\nUse the sink.\n"
) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "index.yaml").write_text(index)
    (directory / "always.md").write_text("Look first.\n")
    (directory / "clean.md").write_text(clean)
    return directory


def make_config(**teacher) -> RunConfig:
    return RunConfig(
        name="test",
        model=ModelConfig(path=Path("model")),
        environment=EnvironmentConfig(name="household"),
        teacher=TeacherConfig(**teacher),
    )


def test_a_skill_is_its_file_without_the_heading(tmp_path):
    library = load_skill_library(write_library(tmp_path))
    found = [(skill.skill_id, skill.text) for skill in library.skills]
    assert found == [("always", "Look first."), ("cleaning", "Use the sink.")]
    assert [skill.skill_id for skill in library.general] == ["always"]
    assert library.task_types == ("clean",)


def test_the_hash_is_of_the_content_and_of_nothing_else(tmp_path):
    first = load_skill_library(write_library(tmp_path / "a")).content_hash
    assert load_skill_library(write_library(tmp_path / "b")).content_hash == first
    reworded = load_skill_library(write_library(tmp_path / "c", clean="Use the sink!"))
    retyped = load_skill_library(write_library(tmp_path / "d", INDEX.replace("[clean]", "[wash]")))
    assert len({first, reworded.content_hash, retyped.content_hash}) == 3


def test_skills_are_shown_in_order_and_no_skills_are_no_text(tmp_path):
    library = load_skill_library(write_library(tmp_path))
    assert format_skills(library.skills) == "Look first.\n\nUse the sink."
    assert format_skills(()) == ""


@pytest.mark.parametrize(
    ("index", "complaint"),
    [
        ("nonsense: [", "not valid YAML"),
        ("{}", "valid list"),
        ("[]", "lists no skills"),
        ("- {id: a, title: A, kind: general, file: always.md, colour: red}", "colour"),
        ("- {id: a, title: A, kind: specific, file: always.md}", "Name the task types"),
        (
            "- {id: a, title: A, kind: general, task_types: [x], file: always.md}",
            "Remove task_types",
        ),
        ("- {id: a, title: A, kind: general, file: ../secret.md}", "outside the library"),
        ("- {id: a, title: A, kind: general, file: absent.md}", "cannot read"),
        (INDEX + INDEX, "used twice"),
    ],
)
def test_a_malformed_library_is_refused_with_its_place_and_fix(tmp_path, index, complaint):
    with pytest.raises(ConfigurationError, match=complaint) as caught:
        load_skill_library(write_library(tmp_path, index))
    assert str(tmp_path) in caught.value.message


def test_an_empty_skill_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="no text below its heading"):
        load_skill_library(write_library(tmp_path, clean="# Cleaning\n\n"))


def test_a_missing_library_is_refused_unless_nothing_is_retrieved(tmp_path):
    with pytest.raises(ConfigurationError, match="Cannot read the skill library"):
        open_skill_library(make_config(skills=tmp_path / "absent"))
    assert (
        open_skill_library(make_config(skills=tmp_path / "absent", retrieval="none")).skills == ()
    )


def test_the_shipped_household_library_teaches_every_procedure_word_for_word():
    library = open_skill_library(make_config())
    assert library == load_skill_library(SHIPPED_LIBRARIES / "household")
    expected = {
        (task_type,): skill_wording(task_type, procedure)
        for task_type, procedure in PROCEDURES.items()
    }
    assert {skill.task_types: skill.text for skill in library.skills} == expected
