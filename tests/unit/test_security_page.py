"""docs/security.md says what the code does: roles, limits and settings."""

import re
from pathlib import Path

from sdar.environments import sessions
from sdar.process import settings
from sdar.v1 import environment_pb2, gateway_pb2, policy_pb2, teacher_pb2
from sdar.wire import http_server, rpc_methods, tokens
from sdar.wire.rpc_methods import find_needed_role
from services.envs.search import retriever_service

PAGE = (Path(__file__).parents[2] / "docs" / "security.md").read_text(encoding="utf-8")


def test_the_roles_on_the_page_are_those_of_the_contract():
    told = dict(re.findall(r"^\| `(\w+Service\.\w+)` \| (\w+) \|$", PAGE, re.MULTILINE))
    files = (environment_pb2, gateway_pb2, policy_pb2, teacher_pb2)
    asked = {
        f"{service.name}.{method.name}": find_needed_role(
            f"/{service.full_name}/{method.name}"
        ).name.lower()
        for file in files
        for service in file.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }
    assert told == asked


def test_what_nobody_declared_takes_the_operate_role():
    assert find_needed_role("/sdar.v1.NewService/Anything") is tokens.Role.OPERATE
    assert find_needed_role("/grpc.health.v1.Health/Check") is None
    assert find_needed_role("/grpc.health.v1.Healthier/Check") is tokens.Role.OPERATE
    assert (
        find_needed_role("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")
        is tokens.Role.READ
    )


def test_the_limits_on_the_page_are_those_of_the_code():
    rows = dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \| [^|]+ \|$", PAGE, re.MULTILINE))
    assert f"{rpc_methods.MAX_MESSAGE_BYTES >> 20} MiB" == rows["a gRPC message"]
    at_the_retriever = f"{retriever_service.MAX_BODY_BYTES >> 20} MiB at the retriever"
    bodies = f"{http_server.MAX_BODY_BYTES >> 20} MiB, {at_the_retriever}"
    assert rows["an HTTP body"] == f"{bodies}; {http_server.BODY_TIMEOUT_S:g} s to arrive"
    assert f"{http_server.MAX_HEADER_BYTES >> 10} KiB HTTP" in rows["headers"]
    assert f", {settings.MAX_CALLS_PER_S:g}," in rows["calls of a client in a second"]
    assert rows["gRPC calls at once"] == str(rpc_methods.MAX_CONCURRENT_CALLS)
    assert rows["HTTP connections and requests at once"] == str(http_server.MAX_CONNECTIONS)
    texts = f"{sessions.SessionLimits().max_text_bytes >> 20} MiB, {sessions.MAX_KEY_CHARACTERS}"
    found = rows["a text of an episode, a session key, a task id"]
    assert found == f"{texts} and {sessions.MAX_TASK_ID_CHARACTERS} characters"
    assert f"{tokens.MIN_TOKEN_CHARACTERS} to {tokens.MAX_TOKEN_CHARACTERS} letters" in PAGE


def test_every_variable_on_the_page_exists():
    known = {f"SDAR_{name.upper()}" for name in settings.Settings.model_fields}
    assert set(re.findall(r"`?(SDAR_[A-Z_]+)", PAGE)) <= known


def test_the_open_paths_on_the_page_are_those_of_the_guard():
    for path in http_server.OPEN_PATHS:
        assert f"`{path}`" in PAGE
