"""The table of methods: what its rows say, and that whoever depends on a method asks its row."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sdar.algorithms.reducers import REDUCERS
from sdar.algorithms.schedules import SCHEDULES
from sdar.algorithms.shaping import SHAPINGS
from sdar.algorithms.terms import TERMS
from sdar.config import MethodConfig, RunConfig
from sdar.contracts.errors import ConfigurationError
from sdar.contracts.methods import METHODS, Method, get_method, needs_reference
from sdar.contracts.streams import Stream

ROOT = Path(__file__).resolve().parents[2]
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def names_where(fact: str) -> set[str]:
    return {name for name, method in METHODS.items() if getattr(method, fact)}


def test_methods_say_what_they_need() -> None:
    without_teacher = {"grpo", "skill_grpo"}
    assert names_where("needs_teacher") == set(METHODS) - without_teacher
    assert names_where("learns_without_advantage") == set(METHODS) - without_teacher - {"rlsd"}
    assert names_where("student_sees_skills") == {"skill_grpo"}
    assert names_where("runs_teacher") == set(METHODS) - {"grpo"}


@every_method
def test_a_row_names_what_is_registered(method: Method) -> None:
    assert METHODS[method.name] is method
    assert set(method.terms) <= set(TERMS.names())
    assert method.shaping is None or method.shaping in SHAPINGS.names()
    assert method.reducer in REDUCERS.names()
    assert method.schedule in SCHEDULES.names()


@every_method
def test_the_reference_is_needed_as_long_as_its_kl_has_weight(method: Method) -> None:
    assert needs_reference(MethodConfig(name=method.name, kl_coefficient=0.2))
    assert not needs_reference(MethodConfig(name=method.name, kl_coefficient=0.0))


@every_method
def test_the_configuration_takes_every_method_and_wires_it_as_its_row_says(method: Method) -> None:
    config = RunConfig.model_validate(
        {
            "name": "a",
            "model": {"path": "m"},
            "environment": {"name": "household"},
            "method": {"name": method.name},
        }
    )
    assert config.method.row is method
    assert (Stream.SCORED in config.stream_consumers) is method.needs_teacher


def test_an_unknown_method_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigurationError, match=r"Unknown method 'ppg'\. Known: constant_gate,"):
        get_method("ppg")


def test_no_other_file_compares_a_methods_name() -> None:
    """A condition on a name is a fact that its row lacks."""
    names = "|".join(METHODS)
    name = f"[\"']({names})[\"']"
    condition = re.compile(rf"(==|!=|\bin) *[(\[{{]?{name}|{name} *(==|!=)")
    found = []
    for folder in ("sdar", "services"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for number, line in enumerate(path.read_text().splitlines(), start=1):
                if condition.search(line):
                    found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert found == []
