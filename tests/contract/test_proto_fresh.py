"""The stubs in sdar/v1 are what proto/ generates, and what is installed can load them."""

import importlib.metadata
import itertools
import re
import subprocess
import sys
from pathlib import Path

import google.protobuf
import grpc
import pytest

ROOT = Path(__file__).resolve().parents[2]
PROTOS = sorted((ROOT / "proto" / "sdar" / "v1").glob("*.proto"))


def version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:3])


def test_stubs_are_what_the_protos_generate(tmp_path):
    """`make proto` writes them; this runs the same command into an empty folder."""
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    plugin = Path(sys.executable).with_name("protoc-gen-mypy_grpc")
    outputs += [f"--plugin=protoc-gen-mypy_grpc={plugin}", f"--mypy_grpc_out=quiet:{tmp_path}"]
    command = [
        sys.executable,
        "-m",
        "grpc_tools.protoc",
        f"-I{ROOT / 'proto'}",
        *outputs,
        *map(str, PROTOS),
    ]
    subprocess.run(command, check=True, cwd=ROOT)
    fresh = {path.name: path.read_text() for path in (tmp_path / "sdar" / "v1").iterdir()}
    kept = {path.name: path.read_text() for path in (ROOT / "sdar" / "v1").glob("*_pb2*.py*")}
    differing = sorted(
        name for name in fresh.keys() | kept.keys() if fresh.get(name) != kept.get(name)
    )
    assert not differing, "Run `make proto` and commit the result."


@pytest.mark.parametrize("generator", ["grpcio-tools", "mypy-protobuf"])
def test_the_generators_are_pinned_exactly(generator):
    """Another version writes other stubs."""
    pin = re.search(rf'"{generator}==([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert pin is not None
    assert importlib.metadata.version(generator) == pin[1]


@pytest.mark.parametrize(
    "requirement",
    ["grpcio", "grpcio-health-checking", "grpcio-reflection", "grpcio-status", "protobuf"],
)
def test_the_least_version_that_may_be_installed_can_load_the_stubs(requirement):
    """Generated code refuses older runtimes, so pyproject.toml has floors for them."""
    floor = re.search(rf'"{requirement}>=([\d.]+)', (ROOT / "pyproject.toml").read_text())
    stub = (ROOT / "sdar" / "v1" / "policy_pb2.py").read_text()
    grpc_stub = (ROOT / "sdar" / "v1" / "policy_pb2_grpc.py").read_text()
    pattern, text = (
        ("Protobuf Python Version: (.*)", stub)
        if requirement == "protobuf"
        else ("GENERATED_VERSION = '(.*)'", grpc_stub)
    )
    needed = re.search(pattern, text)
    assert floor is not None
    assert needed is not None
    assert version(floor[1]) >= version(needed[1])


def test_the_installed_runtime_can_load_the_stubs():
    for name in (path.stem for path in PROTOS):
        importlib.import_module(f"sdar.v1.{name}_pb2_grpc")
    assert version(google.protobuf.__version__) >= (7, 35, 1)
    assert version(grpc.__version__) >= (1, 85, 1)


@pytest.mark.parametrize("proto", PROTOS, ids=lambda path: path.stem)
def test_every_message_and_service_is_explained(proto):
    """A definition follows a comment, except messages that their method explains."""
    lines = proto.read_text().splitlines()
    for before, line in itertools.pairwise(lines):
        if re.match(r"(message|enum|service) (?!\w+(Request|Response)\b)|  rpc ", line):
            assert before.lstrip().startswith("//"), line
