"""Environments are found by name or by class path."""

from __future__ import annotations

import pytest

from sdar.contracts.errors import ConfigurationError
from services.envs.household import HouseholdEnvironment
from services.envs.registry import BUILT_IN, load_environments


def test_a_built_in_name_and_a_class_path_both_load():
    names = ["household", "services.envs.household:HouseholdEnvironment"]
    assert load_environments(names) == dict.fromkeys(names, HouseholdEnvironment)


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_built_in_environment_has_the_name_it_is_found_by(name):
    assert load_environments([name])[name].name == name


@pytest.mark.parametrize(
    ("name", "why"),
    [("chess", "Unknown environment 'chess'"), ("no_such_package:Chess", "cannot be imported"), ("json:loads", "subclass")],
)
def test_what_is_no_environment_is_refused(name, why):
    with pytest.raises(ConfigurationError, match=why):
        load_environments([name])
