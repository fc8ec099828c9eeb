"""The shipped skill libraries: whole, short, for every task type, true to environments."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from sdar.environments.registry import BUILT_IN, EnvironmentSource
from services.teacher.retrieval import Retriever
from services.teacher.skills import INDEX_FILE, SHIPPED_LIBRARIES, load_skill_library

DATA = SHIPPED_LIBRARIES.parent / "examples" / "data"
NAMES = sorted(path.name for path in SHIPPED_LIBRARIES.iterdir() if path.is_dir())
BENCHMARKS = {
    "alfworld": {
        "pick_and_place_simple",
        "look_at_obj_in_light",
        "pick_clean_then_place_in_recep",
        "pick_heat_then_place_in_recep",
        "pick_cool_then_place_in_recep",
        "pick_two_obj_and_place",
    },
    "webshop": {"beauty", "electronics", "fashion", "garden", "grocery"},
    "search": {
        *("one_hop", "nq", "triviaqa", "popqa"),
        *("two_hop", "hotpotqa", "2wikimultihopqa", "musique", "bamboogle"),
    },
}
COMMAND = re.compile(r"`([^`]+)`")


def test_every_environment_that_ships_has_a_library():
    assert set(NAMES) == {"household", *BENCHMARKS}


@pytest.mark.parametrize("name", NAMES)
def test_every_file_of_a_library_is_in_its_index(name):
    library = load_skill_library(SHIPPED_LIBRARIES / name)
    files = [path for path in (SHIPPED_LIBRARIES / name).rglob("*") if path.name != INDEX_FILE]
    assert all(path.suffix == ".md" for path in files)
    assert len(files) == len(library.skills)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_task_type_of_a_benchmark_has_exactly_one_skill(name):
    library = load_skill_library(SHIPPED_LIBRARIES / name)
    types = [task_type for skill in library.specific for task_type in skill.task_types]
    assert sorted(types) == sorted(BENCHMARKS[name])
    assert 1 <= len(library.general) <= 3


@pytest.mark.parametrize("name", BENCHMARKS)
def test_no_task_of_the_shipped_data_is_without_a_specific_skill(name, tmp_path, monkeypatch):
    monkeypatch.setenv("SDAR_CACHE", str(tmp_path))
    environment = EnvironmentSource(BUILT_IN[name], {"data_dir": str(DATA / name)}).build()
    retriever = Retriever(
        load_skill_library(SHIPPED_LIBRARIES / name), kind="task_type", num_skills=3
    )
    tasks = [task for split in environment.splits for task in environment.list_tasks(split)]
    assert len(tasks) > 10
    assert {task.task_type for task in tasks if retriever.retrieve(task, "g0").is_miss} == set()


@pytest.mark.parametrize("name", BENCHMARKS)
def test_what_a_task_is_shown_costs_few_words(name):
    """The teacher reads it with every episode."""
    library = load_skill_library(SHIPPED_LIBRARIES / name)
    lengths = {skill.skill_id: len(skill.text.split()) for skill in library.skills}
    assert max(lengths.values()) <= 80
    general = sum(lengths[skill.skill_id] for skill in library.general)
    assert general + max(lengths[skill.skill_id] for skill in library.specific) <= 180


def test_alfworlds_commands_are_the_engines():
    """Each command in backticks, X and Y being names, fits a template of the engine's grammar."""
    (package,) = importlib.util.find_spec("alfworld").submodule_search_locations
    templates = re.findall(
        r'template :: "([^"]+)"', (Path(package) / "data" / "alfred.twl2").read_text()
    )
    patterns = [
        re.sub(r"\\\[.*?\\\]|\\\{.*?\\\}", r"[\\w ]+", re.escape(template))
        for template in templates
    ]
    library = load_skill_library(SHIPPED_LIBRARIES / "alfworld")
    commands = {command for skill in library.skills for command in COMMAND.findall(skill.text)} - {
        "use"
    }
    assert {command.split()[0] for command in commands} == {
        "take",
        "move",
        "use",
        "clean",
        "heat",
        "cool",
    }
    for command in commands:
        assert any(re.fullmatch(pattern, command) for pattern in patterns), command
