"""Registries: an entry is one file, and what the configuration allows is what there is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sdar.config import MethodConfig, OneOf, TeacherConfig
from sdar.contracts.errors import ConfigurationError, ContractError
from sdar.contracts.registry import Registry, list_entries

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


TOYS = {
    "sdar.algorithms.gates": """
from sdar.algorithms.gates import GATES

@GATES.register("toy")
def toy(inputs, sharpness):
    return (inputs.teacher_gap > 0).float()
""",
    "sdar.algorithms.corrections": """
import torch
from sdar.algorithms.corrections import CORRECTIONS, Weighing

@CORRECTIONS.register("toy")
def toy(scores, cap):
    weights = torch.full_like(scores.current, 0.5)
    return Weighing(scores.current, weights, weights, weights > 1)
""",
    "sdar.algorithms.terms": """
from sdar.algorithms.distillation import compute_live_gap
from sdar.algorithms.terms import TERMS

@TERMS.register("toy")
def toy(inputs, settings):
    return 2 * compute_live_gap(inputs.policy_logprobs, inputs.teacher_gap), {}
""",
    "sdar.algorithms.shaping": """
from sdar.algorithms.shaping import SHAPINGS

@SHAPINGS.register("toy")
def toy(inputs, settings):
    return inputs.advantages + inputs.teacher_gap
""",
    "sdar.algorithms.reducers": """
from sdar.algorithms.reducers import REDUCERS

@REDUCERS.register("toy")
def toy(teacher_gap, is_scored, micro_batch):
    return teacher_gap.mean().expand(len(teacher_gap))
""",
    "sdar.algorithms.schedules": """
from sdar.algorithms.schedules import SCHEDULES

@SCHEDULES.register("toy")
def toy(update_index, settings):
    return 0.25
""",
    "services.teacher.retrieval_kinds": """
from services.teacher.retrieval_kinds import RETRIEVAL_KINDS, RetrievalKind

@RETRIEVAL_KINDS.register("toy")
class ToyRetrieval(RetrievalKind):
    def choose(self, task, key):
        return self.sources.library.specific[-1:]
""",
}
ADD_FOLDERS = """
import importlib, sys

for package in sys.argv[2:]:
    importlib.import_module(package).__path__.append(f"{sys.argv[1]}/{package}")
"""
READ_CONFIGURATION = """
# Some of these packages read it: once more, as a process does that starts with the files there.
import sdar.config
importlib.reload(sdar.config)
"""


def run_with_toys(directory: Path, code: str, table: str = "") -> str:
    """What `code` prints where each registry's folder holds one file more."""
    for package, text in TOYS.items():
        (directory / package).mkdir()
        (directory / package / "toy.py").write_text(text)
    program = ADD_FOLDERS + table + READ_CONFIGURATION + code
    command = [sys.executable, "-c", program, str(directory), *TOYS]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


USE_GATE = """
import torch
from sdar.algorithms.corrections import compute_off_policy_weights
from sdar.algorithms.gates import compute_gate
from sdar.config import MethodConfig
from tests.unit.algorithms.builders import make_inputs

settings = MethodConfig(gate="toy", off_policy="toy")
zeros = torch.zeros(2)
weights = compute_off_policy_weights(settings.off_policy, zeros, zeros, None, cap=5.0)
print(compute_gate(settings.gate, make_inputs([1.0, -1.0]), 5.0).tolist())
print(weights.policy_weight.tolist())
"""


def test_a_gate_and_a_correction_are_one_file_each(tmp_path: Path) -> None:
    """Put into its folder, and nothing else: the configuration takes the name, the loss uses it."""
    assert run_with_toys(tmp_path, USE_GATE).splitlines() == ["[1.0, 0.0]", "[0.5, 0.5]"]


ROWS = """
from sdar.contracts.methods import METHODS, TERM_FACTS, Method

TERM_FACTS["toy"] = TERM_FACTS["sdar"]
METHODS["toy"] = Method("toy", ("policy", "toy"), shaping="toy", reducer="toy", schedule="toy")
"""
USE_METHOD = """
from sdar.config import MethodConfig
from tests.unit.algorithms.test_loss import four_tokens, loss_of

settings = MethodConfig(name="toy", distillation_weight=1.0, off_policy="none")
batch = four_tokens(advantage=1.0)
_, gradient, _ = loss_of("toy", batch, [-1.0, -2.0, -0.5, -3.0], settings)
print(settings.row.needs_teacher, settings.row.learns_without_advantage, gradient)
"""


def test_a_term_and_all_that_a_row_names_are_one_file_and_a_line_of_the_table(
    tmp_path: Path,
) -> None:
    """The mean gap is .5: advantage 1 + .5, and the term's 2 at a quarter of lambda, over 4."""
    assert run_with_toys(tmp_path, USE_METHOD, ROWS).strip() == f"True True {[-2.0 / 4] * 4}"


USE_RETRIEVAL = """
from sdar.config import TeacherConfig
from services.teacher.retrieval import Retriever
from tests.unit.teacher.builders import CLEAN, LIBRARY

kind = TeacherConfig(retrieval="toy").retrieval
print(Retriever(LIBRARY, kind=kind, num_skills=3).retrieve(CLEAN, "g0").skill_ids)
"""


def test_a_retrieval_kind_is_one_file(tmp_path: Path) -> None:
    assert run_with_toys(tmp_path, USE_RETRIEVAL).strip() == "('general', 'cool')"
