"""The tables of docs/architecture.md are what the code does."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from sdar.config import load_config
from sdar.contracts.roles import ROLES, Port, Role
from sdar.contracts.streams import BROADCAST_MAX_ENTRIES, Stream
from tests.support import EXAMPLES
from tests.unit.connections import REDIS, list_connections
from tests.unit.project_copy import read_table
from tools.chart_schema import find_port_number

ROOT = Path(__file__).parents[2]

# ---- streams

STREAMS = {name.strip("`"): (writers, to) for name, writers, to, _ in read_table("What flows")}


def list_roles(cell: str) -> set[str]:
    return set(re.findall(r"\w+", cell)) & set(Role)


def test_the_table_of_streams_has_each_once() -> None:
    assert sorted(STREAMS) == sorted(Stream)


@pytest.mark.parametrize("stream", Stream)
def test_a_streams_line_names_those_that_write_it_and_take_its_entries(stream: Stream) -> None:
    writers, to = STREAMS[stream]
    assert list_roles(writers) == {role for role in Role if writes(role, stream)}
    rows = {row.name: {*row.reads, *(row.reads_unscored or ())} for row in ROLES.values()}
    assert list_roles(to) == {name for name, read in rows.items() if stream in read}
    assert (to == "broadcast") == (stream in BROADCAST_MAX_ENTRIES)


def writes(role: Role, stream: Stream) -> bool:
    """Whether a service's code hands entries of a stream to a commit or publishes them."""
    code = "\n".join(path.read_text() for path in (ROOT / "services" / role).rglob("*.py"))
    return re.search(rf"(\bpublish\(\s*|\{{)Stream\.{stream.name}\b", code) is not None


# ---- connections

CONNECTIONS = [line[:3] for line in read_table("Where it runs")]


def test_the_connections_between_services_are_those_of_the_table_of_services() -> None:
    named = set()
    for from_, to, port in CONNECTIONS:
        ends = list_roles(from_), (set(Role) | {REDIS}) & {to}
        named |= {(one, other, port) for one in ends[0] for other in ends[1]}
    # Ranks of a learner that is spread over pods; they are one service.
    named.remove((Role.LEARNER, Role.LEARNER, "any"))
    skill_grpo = load_config(EXAMPLES / "household.yaml", {"method.name": "skill_grpo"})
    sdar = load_config(EXAMPLES / "household.yaml")
    opened = list_connections(skill_grpo) | list_connections(sdar)
    assert named == {(one, other, str(port)) for one, other, port in opened}


def test_the_connections_from_outside_are_to_the_ports_that_listen() -> None:
    ports = {(from_, to): port for from_, to, port in CONNECTIONS}
    assert ports["people, `sdar`, Prometheus", "gateway"] == str(find_port_number(Port.HTTP))
    probes = ports["Prometheus, probes", "everyone"]
    own = dict(re.findall(r"(\w+) (\d+)", probes))
    told = {role: int(own.get(role, probes.split()[0])) for role in ROLES}
    assert told == {role: find_port_number(row.probe_port) for role, row in ROLES.items()}
    (users,) = (from_ for from_, to, _ in CONNECTIONS if to == "weight store")
    assert list_roles(users) == {row.name for row in ROLES.values() if row.may_hold_gpus}


# ---- rooms

ROOMS = {room.strip("`"): never for room, _, never in read_table("Rooms")}
LIBRARIES = {
    "FastAPI": {"fastapi", "uvicorn"},
    "HTTP": {"httpx", "fastapi", "uvicorn"},
}
"""What is more than the one package of its name."""


def read_contracts() -> list[dict[str, Any]]:
    tables = tomllib.loads((ROOT / "pyproject.toml").read_text())
    return list(tables["tool"]["importlinter"]["contracts"])


def find_module(path: str) -> str:
    return path.removesuffix(".py").replace("/", ".")


def list_forbidden(never: str) -> set[str]:
    """The modules of a cell: `path`s, and libraries by the names that people call them."""
    words = re.sub(r"\(.*?\)|^directly:", "", never).replace("`", "").split(",")
    names = [word.strip() for word in words if word.strip()]
    sets = [
        LIBRARIES.get(name, {find_module(name if "/" in name else name.lower())}) for name in names
    ]
    return set().union(*sets)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_never_imports_what_its_contract_forbids(room: str) -> None:
    contracts = [
        one for one in read_contracts() if one.get("source_modules") == [find_module(room)]
    ]
    forbidden = {name for one in contracts for name in one["forbidden_modules"]}
    assert list_forbidden(ROOMS[room]) == forbidden
    for contract in contracts:
        is_direct = contract.get("allow_indirect_imports", False)
        assert is_direct == ROOMS[room].startswith("directly:")


def test_the_rooms_are_all_there_are_in_the_order_of_the_layers() -> None:
    (order,) = (one["layers"] for one in read_contracts() if one["type"] == "layers")
    layers = [set(layer.split(" | ")) for layer in order]
    modules = [find_module(room) for room in ROOMS]
    in_order = []
    for layer in layers:
        beside = [one for one in modules if one in layer or one.partition(".")[0] in layer]
        assert set(beside) == layer or layer == {"services"}
        in_order += beside
    assert modules == in_order
    paths = [*(ROOT / "sdar").glob("*"), *(ROOT / "services").glob("*")]
    there = [path for path in paths if path.suffix == ".py" or any(path.glob("*.py"))]
    named = {find_module(str(path.relative_to(ROOT))) for path in there if path.stem != "__init__"}
    assert set(modules) == named
