"""The door over real connections: what lets in, and what turns callers away with a reason."""

import asyncio
import contextlib
import datetime
import os
import socket
import ssl
import time
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from pydantic import SecretStr

from sdar.bus.embedded_redis import EmbeddedRedis
from sdar.contracts.errors import (
    CapacityError,
    ConfigurationError,
    EnvironmentFailedError,
    ForbiddenError,
    InvalidInputError,
    UnauthenticatedError,
    UnavailableError,
)
from sdar.contracts.types import Task
from sdar.environments.server import SERVICE_NAME, build_environment_server
from sdar.environments.sessions import SessionLimits, SessionManager
from sdar.in_process.environment_host import InProcessHost
from sdar.process.settings import Settings
from sdar.v1 import environment_pb2 as pb
from sdar.v1 import environment_pb2_grpc
from sdar.wire.http_client import client_options, open_http
from sdar.wire.http_server import bind_http, build_http_server
from sdar.wire.rpc_client import call, connect
from sdar.wire.rpc_server import build_server
from sdar.wire.security import Security
from services.envs.household.environment import HouseholdEnvironment
from services.envs.search.retriever_service import RetrieverState, build_app
from services.rollout.environment_client import GrpcEnvironmentClient
from tests.certificates import Authority, Files
from tests.integration.commands import ROOT, SDAR, run_sdar, server_process

TASK_ID = "place-plate-desk-cabinet"
READ_TOKEN, OPERATE_TOKEN = "r" * 40, "o" * 40
SSL_SHUTDOWN_S = 30.0
"""How long asyncio waits for the other side of a TLS connection to close it too."""
EXPIRED = datetime.timedelta(hours=-1)


@dataclass
class Place:
    """Certificates and tokens of a test."""

    directory: Path
    authority: Authority
    server: Files
    client: Files
    tokens: Path

    def build(self, files: Files | None = None, ca: Path | None = None, **settings) -> Security:
        """Of a process with these certificates; `ca` is our own authority if not told otherwise."""
        return Security.from_settings(
            Settings(
                tls_cert=files and files.certificate,
                tls_key=files and files.key,
                tls_ca=ca or self.authority.certificate,
                **settings,
            )
        )

    def build_server(self, files: Files | None = None, **settings) -> Security:
        settings = {"tls_client_auth": "grpc", "tokens_file": self.tokens, **settings}
        return self.build(files or self.server, **settings)

    def build_client(
        self, token: str = OPERATE_TOKEN, files: Files | None = None, **settings
    ) -> Security:
        return self.build(files or self.client, token=SecretStr(token), **settings)


@pytest.fixture
def place(tmp_path):
    authority, tokens = Authority(tmp_path), tmp_path / "tokens"
    tokens.write_text(f"read:{READ_TOKEN}\noperate:{OPERATE_TOKEN}\n")
    return Place(tmp_path, authority, authority.issue("server"), authority.issue("client"), tokens)


@asynccontextmanager
async def household(security: Security, limits: SessionLimits | None = None):
    """Address of a running environment server behind its door."""
    sessions = SessionManager(
        InProcessHost({"household": HouseholdEnvironment}), limits or SessionLimits()
    )
    await sessions.start()
    server = build_environment_server(sessions, "127.0.0.1", 0, security)
    await server.start()
    await server.set_ready(True)
    try:
        yield f"127.0.0.1:{server.port}"
    finally:
        await server.stop(grace_s=0.0)
        await sessions.close_all()


async def describe(address: str, security: Security) -> str:
    async with connect(address, security) as channel:
        stub = environment_pb2_grpc.EnvironmentServiceStub(channel)
        response = await call(stub.Describe, pb.DescribeRequest(), timeout_s=10, peer=address)
        return response.environments[0].name


async def open_session(address: str, security: Security) -> str:
    async with connect(address, security) as channel:
        stub = environment_pb2_grpc.EnvironmentServiceStub(channel)
        request = pb.OpenSessionRequest(environment="household", task_id=TASK_ID)
        return (await call(stub.OpenSession, request, timeout_s=10, peer=address)).session_id


# ---- who comes in over gRPC


async def test_an_episode_is_played_over_mutual_tls_with_a_token(place):
    async with household(place.build_server()) as address:
        client = GrpcEnvironmentClient(
            address, place.build_client(), step_timeout_s=10.0, open_patience_s=1.0
        )
        try:
            assert (await client.describe("household")).identity.name == "household"
            session = await client.open_session(
                Task("household", "train", TASK_ID, "place", "place it", 0), "key"
            )
            assert (await client.step(session.session_id, 0, "take plate")).is_action_valid
            await client.close_session(session.session_id)
        finally:
            await client.close()


async def test_the_read_role_reads_and_does_not_operate(place):
    async with household(place.build_server()) as address:
        security = place.build_client(READ_TOKEN)
        assert await describe(address, security) == "household"
        with pytest.raises(ForbiddenError, match="role is read, this call needs operate"):
            await open_session(address, security)


@pytest.mark.parametrize("token", ["", "w" * 40])
async def test_a_missing_or_wrong_token_is_refused_on_every_method_and_told_so(place, token):
    async with household(place.build_server()) as address:
        for attempt in (describe, open_session):
            with pytest.raises(UnauthenticatedError, match=r"Bearer TOKEN.*SDAR_TOKEN") as caught:
                await attempt(address, place.build_client(token))
            assert not token or token not in str(caught.value)


async def test_a_rollouts_client_says_why_it_was_refused(place):
    async with household(place.build_server()) as address:
        client = GrpcEnvironmentClient(
            address, place.build_client("w" * 40), step_timeout_s=5.0, open_patience_s=0.5
        )
        with pytest.raises((EnvironmentFailedError, UnauthenticatedError), match="not accepted"):
            await client.describe("household")
        await client.close()


async def test_what_is_sent_is_not_parsed_before_the_token_is_judged(place):
    async with household(place.build_server()) as address:
        for token, refusal in (
            (OPERATE_TOKEN, "are not its request"),
            ("w" * 40, "asks for a token"),
        ):
            async with connect(address, place.build_client(token)) as channel:
                with pytest.raises(Exception, match=refusal):
                    await call(
                        channel.unary_unary(f"/{SERVICE_NAME}/Step"), b"\xff\xff", timeout_s=5
                    )


async def test_a_strangers_message_stays_outside(place):
    """Whoever may not come in is refused before a message is read or bounded."""
    server = build_server("127.0.0.1", 0, [], place.build_server(), max_message_bytes=1000)
    await server.start()
    try:
        address, method = (
            f"127.0.0.1:{server.port}",
            "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
        )
        for token, refusal in (
            (OPERATE_TOKEN, InvalidInputError),
            ("w" * 40, UnauthenticatedError),
        ):
            async with connect(address, place.build_client(token)) as channel:
                with pytest.raises(refusal):
                    await call(channel.unary_unary(method), bytes(100_000), timeout_s=5)
    finally:
        await server.stop(grace_s=0.0)


async def test_open_calls_count_and_none_can_be_held(place):
    async with (
        household(place.build_server(max_calls_per_s=1.0)) as address,
        connect(address, place.build(place.client)) as channel,
    ):
        stub = health_pb2_grpc.HealthStub(channel)
        with pytest.raises(grpc.aio.AioRpcError, match="Method not found"):
            await stub.Watch(health_pb2.HealthCheckRequest()).read()
        checks = [call(stub.Check, health_pb2.HealthCheckRequest(), timeout_s=5) for _ in range(10)]
        answers = await asyncio.gather(*checks, return_exceptions=True)
        assert {type(answer) for answer in answers} == {
            health_pb2.HealthCheckResponse,
            CapacityError,
        }


def strangers_certificate(place):
    return place.build_client(files=Authority(place.directory, "stranger").issue("stranger-client"))


def no_certificate(place):
    return place.build(token=SecretStr(OPERATE_TOKEN))


def expired_certificate(place):
    return place.build_client(files=place.authority.issue("expired", EXPIRED))


def strange_authority(place):
    return place.build_client(ca=Authority(place.directory, "stranger").certificate)


def plaintext(place):
    return Security.from_settings(Settings(token=SecretStr(OPERATE_TOKEN)))


@pytest.mark.parametrize(
    "build",
    [strangers_certificate, no_certificate, expired_certificate, strange_authority, plaintext],
    ids=lambda f: f.__name__,
)
async def test_no_connection_is_made_with(place, build):
    async with household(place.build_server()) as address:
        assert await describe(address, place.build_client()) == "household"
        with pytest.raises(
            UnavailableError, match=r"certificates the other accepts.*SDAR_TLS_CERT, SDAR_TLS_CA"
        ):
            await describe(address, build(place))


async def test_a_server_whose_certificate_is_over_gets_no_call(place):
    async with household(place.build_server(place.authority.issue("old", EXPIRED))) as address:
        with pytest.raises(UnavailableError, match="certificate has expired"):
            await describe(address, place.build_client())


async def test_a_client_that_speaks_tls_gives_no_token_to_a_server_that_does_not(place):
    plain = Security.from_settings(Settings(tokens_file=place.tokens))
    async with household(plain) as address:
        with pytest.raises(UnavailableError, match="SDAR_TLS_CERT"):
            await describe(address, place.build_client())


@pytest.mark.parametrize("is_verifying", [True, False])
def test_an_address_without_tls_gets_no_token_of_a_process_that_verifies_its_peers(
    place, is_verifying
):
    shown = []

    def answer(request: httpx.Request) -> httpx.Response:
        shown.append(request.headers.get("authorization"))
        return httpx.Response(200)

    security = place.build_client() if is_verifying else Security(own_token=OPERATE_TOKEN)
    with httpx.Client(**client_options(security), transport=httpx.MockTransport(answer)) as http:
        http.post("http://retriever:8000/retrieve")
        http.post("https://retriever:8000/retrieve")
    bearer = f"Bearer {OPERATE_TOKEN}"
    assert shown == [None if is_verifying else bearer, bearer]


async def test_a_renewed_certificate_is_shown_without_a_restart(place):
    async with household(place.build_server()) as address:
        assert await describe(address, place.build_client()) == "household"
        other = Authority(place.directory, "other")
        renewed = other.issue("renewed")
        os.replace(renewed.certificate, place.server.certificate)
        os.replace(renewed.key, place.server.key)
        with pytest.raises(UnavailableError, match="CERTIFICATE_VERIFY_FAILED"):
            await describe(address, place.build_client())
        assert await describe(address, place.build_client(ca=other.certificate)) == "household"


async def test_health_is_open_and_reflection_takes_the_read_role(place):
    async with household(place.build_server()) as address:
        async with connect(address, place.build(place.client)) as channel:
            asked = health_pb2.HealthCheckRequest(service=SERVICE_NAME)
            answer = await health_pb2_grpc.HealthStub(channel).Check(asked, timeout=5)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
            with pytest.raises(Exception, match="asks for a token"):
                await list_services(channel)
        async with connect(address, place.build_client(READ_TOKEN)) as channel:
            assert SERVICE_NAME in await list_services(channel)


async def list_services(channel) -> list[str]:
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    found = []
    async for response in stub.ServerReflectionInfo(iter([request]), timeout=5):
        found += [service.name for service in response.list_services_response.service]
    return found


# ---- limits


async def test_a_client_over_its_rate_is_told_when_to_come_back(place):
    async with household(place.build_server(max_calls_per_s=1)) as address:
        security = place.build_client()
        for _ in range(2):
            await describe(address, security)
        with pytest.raises(CapacityError, match="Too many calls") as caught:
            await describe(address, security)
        assert 0 < float(caught.value.fields["retry_after_s"]) <= 1
        assert await describe(address, place.build_client(READ_TOKEN)) == "household"


async def test_one_client_cannot_take_all_sessions(place):
    other_token = "p" * 40
    with place.tokens.open("a") as file:
        file.write(f"operate:{other_token}\n")
    async with household(
        place.build_server(), SessionLimits(max_sessions=3, max_sessions_per_client=2)
    ) as address:
        for _ in range(2):
            await open_session(address, place.build_client())
        with pytest.raises(
            CapacityError, match=r"holds its 2 sessions.*SDAR_MAX_SESSIONS_PER_CLIENT"
        ):
            await open_session(address, place.build_client())
        await open_session(address, place.build_client(other_token))
        with pytest.raises(CapacityError, match="All 3 sessions"):
            await open_session(address, place.build_client(other_token))


async def test_a_server_beyond_loopback_without_tokens_does_not_start(place):
    with pytest.raises(ConfigurationError, match=r"Listening on 0\.0\.0\.0.*SDAR_TOKENS_FILE"):
        build_server("0.0.0.0", 0, [])
    process = await asyncio.create_subprocess_exec(
        *SDAR,
        "env",
        "serve",
        "household",
        "--port",
        "0",
        "--host",
        "0.0.0.0",
        cwd=ROOT,
        stderr=asyncio.subprocess.PIPE,
    )
    _, told = await process.communicate()
    assert process.returncode == 2
    assert "SDAR_TOKENS_FILE" in told.decode().splitlines()[-1]


# ---- processes


@asynccontextmanager
async def gateway_process(environment: dict[str, str]):
    """A gateway of the household example."""
    command = [*SDAR, "serve", "gateway", "--config", str(ROOT / "examples" / "household.yaml")]
    process = await asyncio.create_subprocess_exec(
        *command, cwd=ROOT, env={**os.environ, **environment}
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def until_the_gateway_lists(
    http: httpx.Client, name: str, process: asyncio.subprocess.Process
) -> None:
    """Return once the gateway has described the environment; else its log goes to stderr."""
    async with asyncio.timeout(90):
        while True:
            assert process.returncode is None
            with contextlib.suppress(httpx.ConnectError):
                answer = await asyncio.to_thread(http.get, "/v1/environments")
                if name in [one["name"] for one in answer.raise_for_status().json()]:
                    return
            await asyncio.sleep(0.1)


async def test_a_gateway_and_an_environment_server_meet_behind_locked_doors(place):
    """`sdar env serve` and `sdar serve gateway` beyond loopback: mutual TLS, HTTPS, tokens."""
    shared = {
        "SDAR_TLS_CERT": str(place.server.certificate),
        "SDAR_TLS_KEY": str(place.server.key),
        "SDAR_TLS_CA": str(place.authority.certificate),
        "SDAR_TLS_CLIENT_AUTH": "grpc",
        "SDAR_TOKENS_FILE": str(place.tokens),
    }
    async with AsyncExitStack() as stack:
        redis = stack.enter_context(EmbeddedRedis(place.directory / "redis"))
        serve = ["env", *[f"{name}={value}" for name, value in shared.items()], *SDAR]
        served = await stack.enter_async_context(
            server_process(
                [
                    *serve,
                    "env",
                    "serve",
                    "household",
                    "--port",
                    "0",
                    "--host",
                    "0.0.0.0",
                    "--workers",
                    "1",
                ]
            )
        )
        ports = free_ports(2)
        own = {
            "SDAR_REDIS_URL": redis.url,
            "SDAR_HOST": "0.0.0.0",
            "SDAR_HTTP_PORT": str(ports[0]),
            "SDAR_GRPC_PORT": str(ports[1]),
            "SDAR_ENVS_ADDRESS": served.address.replace("0.0.0.0", "127.0.0.1"),
        }
        gateway = await stack.enter_async_context(gateway_process(shared | own))
        address = f"127.0.0.1:{ports[0]}"
        http = stack.enter_context(open_http(address, place.build_client(), timeout_s=10))
        await until_the_gateway_lists(http, "household", gateway)
        checked = await run_sdar(
            "env", "check", own["SDAR_ENVS_ADDRESS"], "--json", environment=shared
        )
        assert (checked.code, checked.told["num_failed"]) == (0, 0), checked.stderr
        refused = await run_sdar(
            "env", "check", own["SDAR_ENVS_ADDRESS"], environment=shared | {"SDAR_TOKEN": "w" * 40}
        )
        assert (refused.code, "not accepted" in refused.stderr) == (2, True)
        await asyncio.to_thread(check_https, place, address)


def free_ports(number: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def check_https(place: Place, address: str) -> None:
    statuses = {}
    for name, token in (
        ("none", ""),
        ("wrong", "w" * 40),
        ("read", READ_TOKEN),
        ("operate", OPERATE_TOKEN),
    ):
        with open_http(address, place.build_client(token)) as http:
            paths = ("/", "/healthz", "/metrics", "/v1/run", "/v1/trajectories", "/openapi.json")
            statuses[name] = [http.get(path).status_code for path in paths]
            statuses[name].append(http.post("/v1/run/resume").status_code)
    assert statuses == {
        "none": [200, 200, 200, 401, 401, 401, 401],
        "wrong": [200, 200, 200, 401, 401, 401, 401],
        "read": [200, 200, 200, 200, 200, 200, 403],
        "operate": [200, 200, 200, 200, 200, 200, 409],
    }
    deceived = place.build_client(ca=Authority(place.directory, "stranger").certificate)
    with (
        open_http(address, deceived) as http,
        pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"),
    ):
        http.get("/healthz")
    with pytest.raises(httpx.TransportError):
        httpx.get(f"http://{address}/healthz", trust_env=False)


# ---- HTTP of one process


@asynccontextmanager
async def retriever(security: Security):
    """Address of a running retriever that loads for ever: what its door decides needs none."""
    listener = bind_http("127.0.0.1", 0)
    server = build_http_server(
        build_app(RetrieverState()), "127.0.0.1", security, read_posts=("/retrieve",)
    )
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        yield f"127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        await serving


async def test_a_client_that_keeps_its_connection_does_not_keep_a_server_from_stopping(place):
    async with AsyncExitStack() as stack:
        async with retriever(place.build(place.server)) as address:
            http = stack.enter_context(open_http(address, place.build_client()))
            assert (await asyncio.to_thread(http.get, "/healthz")).status_code == 200
            began_s = time.monotonic()
        assert time.monotonic() - began_s < SSL_SHUTDOWN_S / 2


async def test_http_may_demand_certificates_too_and_shows_a_renewed_one(place):
    security = place.build(place.server, tls_client_auth="all")
    async with retriever(security) as address:

        def get(security: Security) -> int:
            with open_http(address, security) as http:
                return http.get("/healthz").status_code

        assert await asyncio.to_thread(get, place.build_client()) == 200
        for stranger in (
            no_certificate(place),
            expired_certificate(place),
            strangers_certificate(place),
        ):
            with pytest.raises((httpx.TransportError, ssl.SSLError)):
                await asyncio.to_thread(get, stranger)
        renewed = place.authority.issue("renewed")
        renewed_bytes = renewed.certificate.read_bytes()
        os.replace(renewed.certificate, place.server.certificate)
        os.replace(renewed.key, place.server.key)
        assert await asyncio.to_thread(get, place.build_client()) == 200
        shown = await asyncio.to_thread(fetch_certificate, address, place)
        assert shown == ssl.PEM_cert_to_DER_cert(renewed_bytes.decode())


def fetch_certificate(address: str, place: Place) -> bytes | None:
    context = place.build_client().tls.build_client_context()
    host, _, port = address.partition(":")
    with (
        socket.create_connection((host, int(port)), timeout=5) as plain,
        context.wrap_socket(plain, server_hostname=host) as tls,
    ):
        return tls.getpeercert(binary_form=True)
