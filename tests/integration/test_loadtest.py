"""The load test's users against real gateway and environments behind tokens and mutual TLS."""

import asyncio
import json
import os
import sys
from asyncio.subprocess import PIPE
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from loadtest.workloads import build_household_groups
from sdar.bus.embedded_redis import EmbeddedRedis
from sdar.bus.redis import RedisBus
from sdar.cli.processes import Fleet, ServiceProcess, choose_port
from sdar.config import load_config, save_config
from sdar.contracts import codec
from sdar.contracts.streams import Stream
from sdar.process.settings import Settings
from sdar.wire.http_client import client_options
from sdar.wire.security import Security
from tests.certificates import Authority
from tests.integration.commands import ROOT

TOKEN = "o" * 40
REQUESTS = {
    "GatewayUser": {
        "/",
        "/v1/environments",
        "/v1/run",
        "/v1/metrics",
        "/v1/trajectories",
        "/v1/trajectories/ID",
        "/metrics",
    },
    "EnvironmentUser": {"Describe", "ListTasks", "OpenSession", "Step", "CloseSession"},
}
START_TIMEOUT_S = 60.0


@dataclass
class Place:
    gateway: str
    envs: str
    variables: dict[str, str]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A gateway that has a trajectory to tell of, and its environment server."""
    directory = tmp_path_factory.mktemp("loadtest")
    authority, tokens = Authority(directory), directory / "tokens"
    files = authority.issue("server")
    tokens.write_text(f"operate:{TOKEN}\n")
    config = load_config(ROOT / "examples" / "household.yaml", {"method.name": "grpo"})
    save_config(config, directory / "run.yaml")
    ports = {name: choose_port("127.0.0.1") for name in ("gateway", "envs", "probe", "grpc")}
    tls = {
        "SDAR_TLS_CERT": str(files.certificate),
        "SDAR_TLS_KEY": str(files.key),
        "SDAR_TLS_CA": str(authority.certificate),
    }
    with EmbeddedRedis(directory / "redis") as redis:
        asyncio.run(publish_trajectory(redis.url, config))
        shared = tls | {
            "SDAR_TLS_CLIENT_AUTH": "all",
            "SDAR_TOKENS_FILE": str(tokens),
            "SDAR_CONFIG": str(directory / "run.yaml"),
            "SDAR_REDIS_URL": redis.url,
            "SDAR_ENVS_ADDRESS": f"127.0.0.1:{ports['envs']}",
            "SDAR_PROBE_PORT": str(ports["probe"]),
            "SDAR_HTTP_PORT": str(ports["gateway"]),
        }
        url = f"https://127.0.0.1:{ports['gateway']}"
        fleet = Fleet(max_restarts=0)
        try:
            for name, grpc_port in (("envs", ports["envs"]), ("gateway", ports["grpc"])):
                variables = shared | {"SDAR_GRPC_PORT": str(grpc_port)}
                fleet.add(
                    ServiceProcess(name, ("serve", name), variables, directory / f"{name}.log", url)
                )
            security = Security.from_settings(
                Settings(
                    tls_cert=files.certificate,
                    tls_key=files.key,
                    tls_ca=authority.certificate,
                    token=TOKEN,
                )
            )
            asyncio.run(wait_until_told(url, security, fleet))
            yield Place(url, shared["SDAR_ENVS_ADDRESS"], tls)
        finally:
            fleet.kill()


async def publish_trajectory(url, config):
    bus = RedisBus(url, config.name, config.stream_consumers)
    ((trajectory,),) = build_household_groups(1, 1)
    await bus.publish(Stream.TRAJECTORIES, [codec.encode_trajectory(trajectory)])
    await bus.close()


async def wait_until_told(url, security, fleet):
    """The gateway knows its environment and the trajectory."""
    async with (
        asyncio.timeout(START_TIMEOUT_S),
        httpx.AsyncClient(base_url=url, **client_options(security)) as http,
    ):
        while True:
            fleet.check()
            try:
                told = [
                    (await http.get(path)).json()
                    for path in ("/v1/environments", "/v1/trajectories")
                ]
            except httpx.TransportError:
                told = []
            if told and all(told):
                return
            await asyncio.sleep(0.1)


async def drive(place: Place, users: str, names: set[str], token: str) -> dict[str, Any]:
    """Results of users fifty times as busy as people, until these requests were made."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("SDAR_")
    }
    environment |= place.variables | {"SDAR_TOKEN": token, "LOADTEST_PACE": "0.02"}
    host = place.gateway if users == "GatewayUser" else place.envs
    command = [sys.executable, "-m", "tests.integration.locust_users", users, host, *names]
    process = await asyncio.create_subprocess_exec(
        *command, cwd=ROOT, env=environment, stdout=PIPE, stderr=PIPE
    )
    told, said = await process.communicate()
    assert process.returncode == 0, said.decode()
    return dict(json.loads(told))


@pytest.mark.parametrize("users", REQUESTS)
async def test_every_kind_of_request_is_made_and_succeeds(place, users):
    driven = await drive(place, users, REQUESTS[users], TOKEN)
    assert (driven["errors"], driven["exceptions"]) == ([], [])
    assert set(driven["counts"]) == REQUESTS[users]
    assert all(
        num_made > 0 and num_failed == 0 for num_made, num_failed in driven["counts"].values()
    )


@pytest.mark.parametrize(
    ("users", "name", "error"),
    [("GatewayUser", "/v1/run", "401"), ("EnvironmentUser", "Describe", "UNAUTHENTICATED")],
)
async def test_what_a_wrong_token_is_answered_is_counted_as_failed(place, users, name, error):
    driven = await drive(place, users, {name}, "w" * 40)
    num_made, num_failed = driven["counts"][name]
    assert num_made == num_failed > 0
    assert driven["exceptions"] == []
    assert all(error in text for text in driven["errors"])
