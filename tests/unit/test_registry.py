"""Registries: an entry is one file, and what the configuration allows is what there is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sdar.config import MethodConfig, OneOf, TeacherConfig
from sdar.contracts.errors import ConfigurationError, ContractError
from sdar.contracts.methods import Method
from sdar.contracts.registry import Registry, index_by_name, list_entries

PACKAGES = {
    "sdar.algorithms.gates": (MethodConfig, "gate"),
    "sdar.algorithms.corrections": (MethodConfig, "off_policy"),
    "services.teacher.retrieval_kinds": (TeacherConfig, "retrieval"),
}


def make_package(directory: Path, monkeypatch: pytest.MonkeyPatch, **modules: str) -> str:
    """A package of one registry whose modules hold the given text."""
    name = f"colours_{directory.name}".replace("-", "_")
    (directory / name).mkdir()
    (directory / name / "__init__.py").write_text(
        "from sdar.contracts.registry import Registry\n"
        "COLOURS: Registry[int] = Registry('colour', __name__)\n"
    )
    for module, text in modules.items():
        head = f"from {name} import COLOURS\n"
        (directory / name / f"{module}.py").write_text(head + text)
    monkeypatch.syspath_prepend(str(directory))
    return name


def get_registry(package: str) -> Registry[int]:
    registry: Registry[int] = __import__(package).COLOURS
    return registry


def test_an_entry_is_found_under_the_name_of_its_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = make_package(
        tmp_path,
        monkeypatch,
        red="COLOURS.register('red')(1)\n",
        blue="COLOURS.register('blue')(2)\n",
    )
    colours = get_registry(package)
    assert list_entries(package) == colours.names() == ("blue", "red")
    assert colours["red"] == 1
    with pytest.raises(ConfigurationError, match=r"Unknown colour 'green'\. Known: blue, red\."):
        colours["green"]


def test_a_module_that_registers_another_name_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = make_package(tmp_path, monkeypatch, red="COLOURS.register('rot')(1)\n")
    with pytest.raises(ContractError, match=r"red registers no colour named 'red'"):
        get_registry(package).names()


def test_a_name_is_registered_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = make_package(
        tmp_path,
        monkeypatch,
        blue="COLOURS.register('blue')(2)\n",
        red="COLOURS.register('red')(1)\nCOLOURS.register('blue')(3)\n",
    )
    with pytest.raises(ContractError, match=r"register the colour 'blue'"):
        get_registry(package).names()


def test_two_rows_of_a_table_may_not_have_one_name() -> None:
    rows = [Method("grpo", ("policy",)), Method("grpo", ("policy", "sdar"))]
    with pytest.raises(ContractError, match="'grpo'"):
        index_by_name(rows)
    assert list(index_by_name(rows[:1])) == ["grpo"]


def test_a_package_that_is_not_there_is_named() -> None:
    with pytest.raises(ContractError, match=r"sdar\.nowhere"):
        list_entries("sdar.nowhere")


@pytest.mark.parametrize("package", PACKAGES)
def test_the_configuration_allows_exactly_what_is_registered(package: str) -> None:
    section, key = PACKAGES[package]
    (allowed,) = [c for c in section.model_fields[key].metadata if isinstance(c, OneOf)]
    registries = [
        value
        for value in vars(__import__(package, fromlist=["_"])).values()
        if isinstance(value, Registry)
    ]
    assert [registry.names() for registry in registries] == [allowed.names]


def test_reading_a_configuration_loads_no_torch() -> None:
    code = "import sys, sdar.config; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
