"""gRPC here: errors keep their type on the wire, retries are safe, health is true."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager

import grpc
import pytest
from google.protobuf import descriptor_pb2
from google.rpc import status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from sdar.contracts.errors import (
    BusUnavailableError,
    CapacityError,
    ConflictError,
    CorruptionError,
    EnvironmentFailedError,
    ForbiddenError,
    InvalidInputError,
    RefusedError,
    SdarError,
    StaleError,
    UnauthenticatedError,
    UnavailableError,
    UnknownResourceError,
)
from sdar.v1 import (
    environment_pb2,
    environment_pb2_grpc,
    error_pb2,
    gateway_pb2,
    gateway_pb2_grpc,
    policy_pb2,
    teacher_pb2,
)
from sdar.wire.rpc_client import call, connect
from sdar.wire.rpc_errors import error_from_rpc
from sdar.wire.rpc_server import RpcServer, RpcService, build_server

SERVICE = "sdar.v1.EnvironmentService"
Answer = Callable[[environment_pb2.StepRequest], Awaitable[environment_pb2.StepResponse]]


class OneAnswer(environment_pb2_grpc.EnvironmentServiceServicer):
    """Answers every Step with a given coroutine and counts the calls."""

    def __init__(self, answer: Answer) -> None:
        self.answer, self.num_calls = answer, 0

    async def Step(
        self, request: environment_pb2.StepRequest, context: object
    ) -> environment_pb2.StepResponse:
        self.num_calls += 1
        return await self.answer(request)


async def answer_ok(request: environment_pb2.StepRequest) -> environment_pb2.StepResponse:
    return environment_pb2.StepResponse(observation=request.text)


def raising(*errors: Exception) -> Answer:
    """Raise the errors one a call, then answer."""
    left = list(errors)

    async def answer(request: environment_pb2.StepRequest) -> environment_pb2.StepResponse:
        if left:
            raise left.pop(0)
        return await answer_ok(request)

    return answer


@asynccontextmanager
async def serving(answer: Answer, **options: int) -> AsyncIterator[tuple[RpcServer, OneAnswer]]:
    servicer = OneAnswer(answer)
    service = RpcService(
        SERVICE, environment_pb2_grpc.add_EnvironmentServiceServicer_to_server, servicer
    )
    server = build_server("127.0.0.1", 0, [service], **options)
    await server.start()
    try:
        yield server, servicer
    finally:
        await server.stop(0)


async def step(
    port: int, text: str = "look", timeout_s: float = 5.0
) -> environment_pb2.StepResponse:
    async with connect(f"127.0.0.1:{port}") as channel:
        stub = environment_pb2_grpc.EnvironmentServiceStub(channel)
        return await call(
            stub.Step, environment_pb2.StepRequest(text=text), timeout_s=timeout_s, peer="envs"
        )


def all_kinds(kind: type[SdarError] = SdarError) -> Iterator[type[SdarError]]:
    yield kind
    for child in kind.__subclasses__():
        if child.__module__ == "sdar.contracts.errors":
            yield from all_kinds(child)


async def test_a_call_is_answered_over_a_real_connection():
    async with serving(answer_ok) as (server, _):
        assert (await step(server.port, "héllo")).observation == "héllo"


@pytest.mark.parametrize(
    "kind", [kind for kind in all_kinds() if not issubclass(kind, UnavailableError)]
)
async def test_every_error_arrives_as_the_class_that_was_raised(kind):
    async with serving(raising(kind("What, where, got, fix.", session_id="s1", bound=3))) as (
        server,
        _,
    ):
        with pytest.raises(kind) as caught:
            await step(server.port)
    assert type(caught.value) is kind
    where = "Refused by envs: " if issubclass(kind, UnauthenticatedError | ForbiddenError) else ""
    assert caught.value.message == f"{where}What, where, got, fix."
    assert caught.value.fields == {
        "session_id": "s1",
        "bound": "3",
        "grpc_code": kind.grpc_status,
        "peer": "envs",
    }


@pytest.mark.parametrize("kind", [UnavailableError, BusUnavailableError, EnvironmentFailedError])
async def test_unavailable_errors_keep_their_class_when_retries_run_out(kind):
    async with serving(raising(*[kind("Away.")] * 4)) as (server, _):
        with pytest.raises(kind) as caught:
            await step(server.port)
    assert type(caught.value) is kind


@pytest.mark.parametrize("defect", [ZeroDivisionError, NotImplementedError])
async def test_an_unexpected_exception_tells_a_correlation_id_and_none_of_its_text(capsys, defect):
    async with serving(raising(defect("secret of the server"))) as (server, _):
        with pytest.raises(SdarError, match="correlation id") as caught:
            await step(server.port)
    assert caught.value.fields["grpc_code"] == "INTERNAL"
    assert "secret" not in caught.value.message
    assert caught.value.fields["correlation_id"] in capsys.readouterr().out


async def test_an_error_of_any_length_still_fits_the_headers():
    error = UnknownResourceError(
        "task ☃" * 100_000, **{f"field_{i}": "ü\ud800" * 10_000 for i in range(50)}
    )
    async with serving(raising(error)) as (server, _):
        with pytest.raises(UnknownResourceError) as caught:
            await step(server.port)
    assert caught.value.message.startswith("task ☃")
    assert caught.value.message.endswith("…")


async def test_an_unavailable_server_is_tried_again():
    async with serving(raising(UnavailableError("Starting."), UnavailableError("Starting."))) as (
        server,
        servicer,
    ):
        assert (await step(server.port)).observation == "look"
    assert servicer.num_calls == 3


@pytest.mark.parametrize(
    "error", [EnvironmentFailedError("Died."), StaleError("Old."), InvalidInputError("Bad.")]
)
async def test_an_answer_that_cannot_change_is_not_asked_for_again(error):
    async with serving(raising(error)) as (server, servicer):
        with pytest.raises(type(error)):
            await step(server.port)
    assert servicer.num_calls == 1


async def test_nobody_at_the_address_is_unavailable():
    async with serving(answer_ok) as (server, _):
        port = server.port
    with pytest.raises(UnavailableError, match="at envs") as caught:
        await step(port)
    assert caught.value.fields["grpc_code"] == "UNAVAILABLE"


async def test_a_passed_deadline_is_unavailable_and_cancels_the_handler():
    cancelled = asyncio.Event()

    async def hang(request: environment_pb2.StepRequest) -> environment_pb2.StepResponse:
        try:
            return await asyncio.get_running_loop().create_future()
        finally:
            cancelled.set()

    async with serving(hang) as (server, _):
        with pytest.raises(UnavailableError) as caught:
            await step(server.port, timeout_s=0.2)
        await asyncio.wait_for(cancelled.wait(), 5)
    assert caught.value.fields["grpc_code"] == "DEADLINE_EXCEEDED"


async def test_a_message_over_the_limit_is_the_callers_mistake_not_a_lack_of_capacity():
    async with serving(answer_ok, max_message_bytes=1000) as (server, _):
        with pytest.raises(InvalidInputError, match="size limit"):
            await step(server.port, "x" * 2000)


async def test_a_megabyte_of_text_passes():
    async with serving(answer_ok) as (server, _):
        assert len((await step(server.port, "ä" * 1_000_000)).observation) == 1_000_000


async def test_a_method_nobody_serves_is_the_callers_mistake():
    async with serving(answer_ok) as (server, _), connect(f"127.0.0.1:{server.port}") as channel:
        stub = gateway_pb2_grpc.GatewayServiceStub(channel)
        with pytest.raises(InvalidInputError, match="UNIMPLEMENTED"):
            await call(stub.GetRunStatus, gateway_pb2.GetRunStatusRequest(), timeout_s=5)


async def test_a_method_a_servicer_leaves_out_is_not_a_fault_of_the_server():
    async with serving(answer_ok) as (server, _), connect(f"127.0.0.1:{server.port}") as channel:
        stub = environment_pb2_grpc.EnvironmentServiceStub(channel)
        with pytest.raises(InvalidInputError, match="Describe is not offered") as caught:
            await call(stub.Describe, environment_pb2.DescribeRequest(), timeout_s=5)
    assert caught.value.fields["grpc_code"] == "UNIMPLEMENTED"


@pytest.mark.parametrize(
    "data", [b"\x1a\x02\xff\xfe", b"\xff\xff"], ids=["text that is not UTF-8", "no message"]
)
async def test_a_request_that_cannot_be_read_is_the_callers_mistake(data):
    async with (
        serving(answer_ok) as (server, servicer),
        connect(f"127.0.0.1:{server.port}") as channel,
    ):
        with pytest.raises(InvalidInputError, match="are not its request"):
            await call(channel.unary_unary(f"/{SERVICE}/Step"), data, timeout_s=5)
    assert servicer.num_calls == 0


async def test_too_many_calls_at_once_is_a_lack_of_capacity():
    started, release = asyncio.Event(), asyncio.Event()

    async def wait(request: environment_pb2.StepRequest) -> environment_pb2.StepResponse:
        started.set()
        await release.wait()
        return environment_pb2.StepResponse()

    async with serving(wait, max_concurrent_calls=1) as (server, _):
        first = asyncio.create_task(step(server.port))
        await started.wait()
        with pytest.raises(CapacityError):
            await step(server.port)
        release.set()
        await first


async def test_a_busy_port_is_refused_in_a_sentence():
    async with serving(answer_ok) as (server, _):
        with pytest.raises(ConflictError, match=f"127.0.0.1:{server.port}.*SDAR_GRPC_PORT"):
            build_server("127.0.0.1", server.port, [])


async def test_health_says_serving_only_when_ready():
    async with serving(answer_ok) as (server, _), connect(f"127.0.0.1:{server.port}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)

        async def statuses() -> set[int]:
            return {
                (await stub.Check(health_pb2.HealthCheckRequest(service=name))).status
                for name in ("", SERVICE)
            }

        assert await statuses() == {health_pb2.HealthCheckResponse.NOT_SERVING}
        await server.set_ready(True)
        assert await statuses() == {health_pb2.HealthCheckResponse.SERVING}
        await server.set_ready(False)
        assert await statuses() == {health_pb2.HealthCheckResponse.NOT_SERVING}


async def test_reflection_lists_the_service():
    async with serving(answer_ok) as (server, _), connect(f"127.0.0.1:{server.port}") as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        stream = stub.ServerReflectionInfo(
            iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        )
        names = [
            service.name
            async for answer in stream
            for service in answer.list_services_response.service
        ]
    assert SERVICE in names
    assert "grpc.health.v1.Health" in names


async def test_stop_lets_a_running_call_finish():
    started, release = asyncio.Event(), asyncio.Event()

    async def wait(request: environment_pb2.StepRequest) -> environment_pb2.StepResponse:
        started.set()
        await release.wait()
        return await answer_ok(request)

    async with serving(wait) as (server, _):
        running = asyncio.create_task(step(server.port))
        await started.wait()
        stopping = asyncio.create_task(server.stop(grace_s=10))
        release.set()
        assert (await running).observation == "look"
        await stopping


@pytest.mark.parametrize(("is_sticky", "num_servers_called"), [(False, 2), (True, 1)])
async def test_calls_go_round_unless_the_channel_is_sticky(is_sticky, num_servers_called):
    async with serving(answer_ok) as (one, first), serving(answer_ok) as (two, second):
        target = f"ipv4:127.0.0.1:{one.port},127.0.0.1:{two.port}"
        async with connect(target, is_sticky=is_sticky) as channel:
            stub = environment_pb2_grpc.EnvironmentServiceStub(channel)
            while first.num_calls + second.num_calls < 20:
                await call(stub.Step, environment_pb2.StepRequest(), timeout_s=5)
                if not is_sticky and first.num_calls and second.num_calls:
                    break
    assert bool(first.num_calls) + bool(second.num_calls) == num_servers_called


def rpc_error(
    code: grpc.StatusCode, text: str = "told", *trailers: tuple[str, bytes]
) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(
        code, grpc.aio.Metadata(), grpc.aio.Metadata(*trailers), details=text
    )


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, InvalidInputError),
        (grpc.StatusCode.NOT_FOUND, UnknownResourceError),
        (grpc.StatusCode.FAILED_PRECONDITION, RefusedError),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, CapacityError),
        (grpc.StatusCode.UNAVAILABLE, UnavailableError),
        (grpc.StatusCode.DEADLINE_EXCEEDED, UnavailableError),
        (grpc.StatusCode.DATA_LOSS, CorruptionError),
        (grpc.StatusCode.UNKNOWN, SdarError),
    ],
)
def test_a_server_without_typed_details_is_understood_by_its_status(code, kind):
    assert type(error_from_rpc(rpc_error(code))) is kind


def test_details_that_cannot_be_read_fall_back_to_the_status():
    error = error_from_rpc(
        rpc_error(grpc.StatusCode.NOT_FOUND, "gone", ("grpc-status-details-bin", b"\xff\xff\xff"))
    )
    assert type(error) is UnknownResourceError
    assert "gone" in error.message


def test_a_reason_of_a_newer_server_falls_back_to_the_status():
    status = status_pb2.Status()
    status.details.add().Pack(
        error_pb2.ErrorDetail(reason="FROM_THE_FUTURE", message="new", fields={"message": "field"})
    )
    trailer = ("grpc-status-details-bin", status.SerializeToString())
    error = error_from_rpc(rpc_error(grpc.StatusCode.FAILED_PRECONDITION, "new", trailer))
    assert type(error) is RefusedError
    assert error.fields["message"] == "field"


def test_every_method_of_the_contract_says_whether_it_may_be_repeated():
    for file in (environment_pb2, gateway_pb2, policy_pb2, teacher_pb2):
        for service in file.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                level = method.GetOptions().idempotency_level
                assert level != descriptor_pb2.MethodOptions.IDEMPOTENCY_UNKNOWN, method.full_name


async def test_a_burst_of_thousands_of_calls_over_one_channel_is_answered_whole():
    """gRPC's default cancels at random beyond a thousand waiting calls of one worker."""
    num_calls = 3000
    async with (
        serving(answer_ok) as (server, servicer),
        connect(f"127.0.0.1:{server.port}") as channel,
    ):
        stub = environment_pb2_grpc.EnvironmentServiceStub(channel)
        asked = [
            call(stub.Step, environment_pb2.StepRequest(text="look"), timeout_s=60)
            for _ in range(num_calls)
        ]
        answers = await asyncio.gather(*asked)
    assert [answer.observation for answer in answers] == ["look"] * num_calls
    assert servicer.num_calls == num_calls
