"""Environments are found by name, class path or file, and built with checked options."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdar.contracts.errors import ConfigurationError, EnvironmentFailedError
from sdar.environments import serve
from sdar.environments.base import Environment, Observation, StepResult
from sdar.environments.registry import (
    BUILT_IN,
    EnvironmentSource,
    is_loading,
    load_environment,
    locate_class,
)
from services.envs.household import HouseholdEnvironment

HERE = __name__
ROOT = Path(__file__).parents[3]


class Walled(Environment):
    """A garden of `size`; other sizes than positive ones it refuses, and 13 it cannot bear."""

    name = "walled"
    version = "1"
    splits = ("train",)
    max_turns = 3

    def __init__(self, size: int, wall: str = "stone") -> None:
        self.size, self.wall = size, wall
        if size < 1:
            raise ConfigurationError(f"size is {size}, expected at least 1.")
        if size == 13:
            raise OSError("no luck")

    def reset(self, task_id: str, seed: int) -> Observation:
        return Observation(self.wall)

    def step(self, text: str) -> StepResult:
        return StepResult(Observation(self.wall))


class Nameless(Walled):
    name = ""


class Endless(Walled):
    max_turns = 0


class Eternal(Walled):
    max_turns = 2**40


class Absent(Walled):
    """Needs a server that is not there."""

    def __init__(self, size: int) -> None:
        raise EnvironmentFailedError("The server does not answer. Start it first.")


class Splitless(Walled):
    splits = "train"


def test_a_name_and_a_class_path_find_the_same_class():
    for name in ("household", "services.envs.household:HouseholdEnvironment"):
        assert load_environment(name).load_class() is HouseholdEnvironment


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_built_in_environment_has_the_name_it_is_found_by(name):
    assert load_environment(name).load_class().name == name


def test_a_class_is_found_in_a_file_that_is_on_no_path(tmp_path):
    file = tmp_path / "json.py"
    file.write_text(f"from {HERE} import Walled\nclass Garden(Walled):\n    name = 'garden'\n")
    garden = load_environment(f"{file}:Garden", {"size": 2}).build()
    assert (garden.name, garden.size) == ("garden", 2)


def test_options_become_keyword_arguments():
    walled = load_environment(f"{HERE}:Walled", {"size": 3, "wall": "brick"}).build()
    assert (walled.size, walled.wall) == (3, "brick")


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"size": 1, "colour": "red"}, "no option 'colour'.*Its options: size, wall"),
        ({"size": 1, "wall": 5}, r"option 'wall' is 5, not a text \(in YAML, quote it\)"),
        ({"size": True}, "option 'size' is True, not a whole number"),
        ({"size": 1.5}, "option 'size' is 1.5, not a whole number"),
        ({}, "option 'size' is required"),
        ({"size": 0}, "size is 0, expected at least 1"),
        ({"size": 13}, "cannot be built with options .*'size': 13.*OSError: no luck"),
    ],
)
def test_options_that_cannot_be_used_are_refused_and_the_known_ones_named(options, why):
    with pytest.raises(ConfigurationError, match=why):
        load_environment(f"{HERE}:Walled", options).build()


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("Nameless", "name is ''"),
        ("Endless", "max_turns is 0"),
        ("Eternal", "max_turns is 1099"),
        ("Splitless", "splits is"),
    ],
)
def test_an_environment_that_leaves_out_what_it_must_declare_is_refused(kind, why):
    with pytest.raises(ConfigurationError, match=why):
        load_environment(f"{HERE}:{kind}", {"size": 1}).build()


def test_what_an_environment_says_of_its_construction_is_told_in_its_own_words():
    with pytest.raises(ConfigurationError, match=r"^The server does not answer. Start it first.$"):
        load_environment(f"{HERE}:Absent", {"size": 1}).build()


def test_an_unknown_name_is_refused_before_anything_is_started():
    with pytest.raises(ConfigurationError, match=r"Unknown environment 'chess'.*household"):
        load_environment("chess")


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("no_such_package:Chess", "cannot be imported: No module named"),
        ("no_such_file.py:Chess", "there is no Python file"),
        ("json:loads", "subclass"),
        ("json:Chess", "is None, expected a subclass"),
    ],
)
def test_what_is_no_environment_is_refused(path, why):
    with pytest.raises(ConfigurationError, match=why):
        EnvironmentSource(path).build()


def test_a_module_that_breaks_is_named_with_its_error(tmp_path):
    (tmp_path / "broken.py").write_text("1 / 0\n")
    with pytest.raises(
        ConfigurationError, match=r"broken.py:Chess cannot be imported: ZeroDivisionError"
    ):
        EnvironmentSource(f"{tmp_path / 'broken.py'}:Chess").build()
    assert not is_loading()


def test_a_class_at_hand_is_located_for_other_processes():
    assert locate_class(HouseholdEnvironment).load_class() is HouseholdEnvironment


def test_a_class_that_another_process_cannot_import_is_refused():
    class Local(Walled):
        pass

    with pytest.raises(ConfigurationError, match="top level"):
        locate_class(Local)


@pytest.mark.parametrize("kinds", [(), (Nameless,), (Walled, Walled)])
def test_classes_without_names_of_their_own_are_not_served(kinds):
    with pytest.raises(ConfigurationError, match="a name of its own"):
        serve(*kinds)


def test_the_example_in_the_documentation_is_the_one_that_is_tested():
    example = (ROOT / "examples" / "environments" / "guess_number.py").read_text()
    assert f"```python\n{example}```" in (ROOT / "docs" / "environments.md").read_text()


def test_the_documentation_lists_every_environment_that_is_built_in():
    documentation = (ROOT / "docs" / "environments.md").read_text()
    assert [name for name in BUILT_IN if f"| `{name}` |" not in documentation] == []
