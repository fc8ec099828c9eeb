"""Many real environment servers behind one name, on 127.0.0.1 to .3; only look-up is fake."""

from __future__ import annotations

import asyncio
import itertools
import socket
import sys
import time
from asyncio.subprocess import DEVNULL, PIPE
from collections import Counter
from contextlib import AsyncExitStack

import pytest
from pydantic import SecretStr

from sdar.contracts.errors import EnvironmentFailedError, UnavailableError
from sdar.contracts.types import Task
from sdar.environments.server import serve_environments
from sdar.environments.sessions import SessionLimits, SessionManager
from sdar.in_process.environment_host import InProcessHost
from sdar.process.ports import find_free_port
from sdar.process.settings import Settings
from sdar.process.telemetry import Health
from sdar.v1 import environment_pb2
from sdar.wire.security import OPEN, Security
from services.envs.household.environment import HouseholdEnvironment
from services.rollout import environment_servers
from services.rollout.environment_client import GrpcEnvironmentDirectory
from tests.certificates import Authority
from tests.integration.environment_server import TASK_ID
from tests.support import until

TASK = Task("household", "train", TASK_ID, "place", "place it", 0)
HOSTS = ("127.0.0.1", "127.0.0.2", "127.0.0.3")


class Pods:
    """Servers that come and go, and what a name server would say of them."""

    def __init__(self, stack: AsyncExitStack) -> None:
        self._stack = stack
        self.port = find_free_port("127.0.0.1")
        self.listed: list[str] = []
        self.is_name_server_away = False
        self.num_failed_lookups = 0
        self.sessions: dict[str, SessionManager] = {}
        self.running: dict[str, tuple[asyncio.Event, asyncio.Task]] = {}

    async def start(
        self, host: str, max_sessions: int = 64, security: Security = OPEN, drain_s: float = 0.0
    ) -> None:
        sessions = SessionManager(
            InProcessHost({"household": HouseholdEnvironment}),
            SessionLimits(max_sessions=max_sessions),
        )
        stopping, health = asyncio.Event(), Health()
        serving = serve_environments(
            stopping,
            sessions=sessions,
            host=host,
            port=self.port,
            health=health,
            security=security,
            drain_s=drain_s,
        )
        self.running[host] = stopping, asyncio.create_task(serving)
        self.sessions[host] = sessions
        self._stack.push_async_callback(self.stop, host)
        await until(lambda: health.is_ready)
        self.listed.append(host)

    def ask_to_stop(self, host: str) -> asyncio.Task:
        """What SIGTERM does."""
        stopping, serving = self.running[host]
        stopping.set()
        return serving

    async def stop(self, host: str) -> None:
        await asyncio.wait_for(self.ask_to_stop(host), 20)

    async def resolve(self, host: str, port: int) -> list[str]:
        if self.is_name_server_away:
            self.num_failed_lookups += 1
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        assert host in ("envs.example", "localhost")
        return [f"{listed}:{port}" for listed in self.listed]

    def client(
        self, *, patience_s: float = 5.0, security: Security = OPEN, name: str = "envs.example"
    ):
        directory = GrpcEnvironmentDirectory(
            security, step_timeout_s=5.0, open_patience_s=patience_s, resolve=self.resolve
        )
        self._stack.push_async_callback(directory.close)
        return directory.get(f"{name}:{self.port}")

    def count(self) -> dict[str, int]:
        return {host: sessions.num_sessions for host, sessions in self.sessions.items()}


@pytest.fixture
async def pods(monkeypatch):
    monkeypatch.setattr(environment_servers, "_RESOLVE_EVERY_S", 0.05)
    async with AsyncExitStack() as stack:
        yield Pods(stack)


async def open_many(client, count: int, tag: str = "") -> list[str]:
    sessions = await asyncio.gather(
        *(client.open_session(TASK, f"{tag}{number}") for number in range(count))
    )
    return [session.session_id for session in sessions]


def host_of(session_id: str) -> str:
    return session_id.partition("@")[2].partition(":")[0]


async def opens_at(client, hosts) -> None:
    """Return once sessions begin at these hosts and no others: look-ups run beside the opens."""
    async with asyncio.timeout(10):
        for attempt in itertools.count():
            opened = await open_many(client, 4, f"{hosts}{attempt}.")
            for session_id in opened:
                await client.close_session(session_id)
            if set(map(host_of, opened)) == set(hosts):
                return


async def test_sessions_are_spread_evenly_and_new_ones_go_where_there_are_fewest(pods):
    for host in HOSTS:
        await pods.start(host)
    client = pods.client()
    opened = await open_many(client, 9)
    assert pods.count() == dict.fromkeys(HOSTS, 3)
    for session_id in opened:
        assert (await client.step(session_id, 0, "open drawer")).is_action_valid
    for session_id in opened:
        if host_of(session_id) == HOSTS[1]:
            await client.close_session(session_id)
    assert Counter(map(host_of, await open_many(client, 3, "again"))) == {HOSTS[1]: 3}


async def test_an_episode_waits_only_when_every_server_is_full_and_is_counted_while_it_does(pods):
    await pods.start(HOSTS[0], max_sessions=1)
    await pods.start(HOSTS[1], max_sessions=4)
    client = pods.client()
    opened = await open_many(client, 5)
    assert pods.count() == {HOSTS[0]: 1, HOSTS[1]: 4}
    sixth = asyncio.create_task(client.open_session(TASK, "sixth"))
    await until(lambda: client.num_waiting == 1)
    await client.close_session(opened[0])
    await sixth
    assert client.num_waiting == 0


async def test_a_killed_server_costs_its_own_sessions_and_no_others(pods):
    await pods.start(HOSTS[0])
    serve = (sys.executable, "-m", "sdar.cli.main", "env", "serve", "household", "--workers", "1")
    address = ("--host", HOSTS[1], "--port", str(pods.port))
    process = await asyncio.create_subprocess_exec(*serve, *address, stdin=DEVNULL, stdout=PIPE)
    try:
        async with asyncio.timeout(60):
            assert b"Serving household" in await process.stdout.readline()
        pods.listed.append(HOSTS[1])
        client = pods.client()
        opened = await open_many(client, 6)
        assert Counter(map(host_of, opened)) == {HOSTS[0]: 3, HOSTS[1]: 3}
    finally:
        process.kill()
        await process.wait()
    for session_id in opened:
        if host_of(session_id) == HOSTS[0]:
            assert (await client.step(session_id, 0, "open drawer")).is_action_valid
        else:
            with pytest.raises(UnavailableError):
                await client.step(session_id, 0, "open drawer")
        await client.close_session(session_id)
    # Still listed until its readiness fails, yet the next episodes soon begin elsewhere.
    began_s = time.monotonic()
    assert set(map(host_of, await open_many(client, 4, "again"))) == {HOSTS[0]}
    assert time.monotonic() - began_s < 4.0


async def test_a_server_that_appears_is_used_without_a_restart_and_one_that_vanished_is_not(pods):
    await pods.start(HOSTS[0])
    client = pods.client()
    [first] = await open_many(client, 1)
    await pods.start(HOSTS[1])
    await opens_at(client, HOSTS[:2])
    pods.listed.remove(HOSTS[0])
    await opens_at(client, HOSTS[1:2])
    assert (await client.step(first, 0, "open drawer")).is_action_valid, (
        "its episodes may end where they began"
    )


async def test_a_server_that_leaves_while_others_are_asked_costs_no_episode(pods):
    """Its channel closes with its place in the list, which is no defect of the environment."""
    for host in HOSTS[:2]:
        await pods.start(host)
    client = pods.client()
    await opens_at(client, HOSTS[:2])
    asked: list[str] = []

    async def attempt(server):
        asked.append(server.target)
        if len(asked) == 1:
            pods.listed = [host for host in HOSTS[:2] if server.target.startswith(f"{host}:")]
            await until(lambda: len(client._servers._servers) == 1)
            raise UnavailableError("It is away.")
        await server.stub.Describe(environment_pb2.DescribeRequest(environment="household"))

    async with asyncio.timeout(10):
        looking = asyncio.create_task(keep_looking_up(client))
        with pytest.raises(UnavailableError, match="It is away"):
            await client._try_each(attempt)
        looking.cancel()
    assert len(asked) == 1


async def keep_looking_up(client) -> None:
    while True:
        await client._servers.rank()
        await asyncio.sleep(0.02)


async def test_a_server_that_is_stopped_ends_its_episodes_and_begins_no_more(pods):
    await pods.start(HOSTS[0])
    await pods.start(HOSTS[1], drain_s=30.0)
    client = pods.client()
    opened = await open_many(client, 2)
    [leaving] = [session_id for session_id in opened if host_of(session_id) == HOSTS[1]]
    stopped = pods.ask_to_stop(HOSTS[1])
    await until(lambda: pods.sessions[HOSTS[1]]._is_draining)
    began_s = time.monotonic()
    assert set(map(host_of, await open_many(client, 4, "later"))) == {HOSTS[0]}
    assert time.monotonic() - began_s < 4.0, "refused at once, and opened elsewhere"
    assert (await client.step(leaving, 0, "open drawer")).is_action_valid
    assert not stopped.done()
    await client.close_session(leaving)
    await asyncio.wait_for(stopped, 5)


async def test_a_name_server_that_is_away_takes_no_server_along(pods):
    await pods.start(HOSTS[0])
    client = pods.client()
    await open_many(client, 1)
    pods.is_name_server_away = True
    async with asyncio.timeout(10):
        while pods.num_failed_lookups < 2:
            await opens_at(client, HOSTS[:1])
    await opens_at(client, HOSTS[:1])


async def test_a_name_that_leads_nowhere_is_waited_for_and_then_told(pods):
    client = pods.client(patience_s=0.5)
    with pytest.raises(EnvironmentFailedError, match=r"No server is known under envs\.example"):
        await client.open_session(TASK, "key")
    waiting = asyncio.create_task(pods.client().open_session(TASK, "key"))
    await pods.start(HOSTS[0])
    await waiting


async def test_certificates_are_checked_for_the_name_and_not_for_the_pod(pods, tmp_path):
    authority, token = Authority(tmp_path), "o" * 40
    files, tokens = authority.issue("server"), tmp_path / "tokens"
    tokens.write_text(f"operate:{token}\n")
    server = Settings(tls_cert=files.certificate, tls_key=files.key, tokens_file=tokens)
    await pods.start(HOSTS[1], security=Security.from_settings(server))
    security = Security.from_settings(
        Settings(tls_ca=authority.certificate, token=SecretStr(token))
    )
    session = await pods.client(security=security, name="localhost").open_session(TASK, "key")
    assert host_of(session.session_id) == HOSTS[1]
    with pytest.raises(EnvironmentFailedError, match="within 1 s"):
        await pods.client(security=security, patience_s=1.0).open_session(TASK, "key")


async def test_the_systems_resolver_finds_every_address_of_a_name():
    assert "127.0.0.1:80" in await environment_servers.resolve_host("localhost", 80)
