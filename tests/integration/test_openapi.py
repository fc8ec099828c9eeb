"""The gateway's HTTP API against its own OpenAPI document, and its port against other bytes.

A real gateway serves on a socket. Schemathesis makes requests that fit the document and requests
that do not, hundreds a route from a fixed seed: no 5xx but 503, every status documented, every body
of the documented form, bad data refused.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
import queue
import random
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import schemathesis
import structlog
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from prometheus_client import CollectorRegistry
from schemathesis import GenerationMode

from sdar.contracts import codec
from sdar.contracts.streams import ConsumerGroup, Stream
from sdar.contracts.types import MetricRecord
from sdar.wire.http_server import bind_http, build_http_server
from services.gateway.app import build_app
from services.gateway.watch import Watch
from tests.fuzzing import Fuzzer, resident_bytes
from tests.unit.gateway.fakes import build_config, play
from tests.unit.gateway.test_scheduler import Run, begin

EXAMPLES_PER_ROUTE = 120
NUM_RUBBISH = 400
MIN_ROUTES_WITH_INPUT = 6
ANSWER_WITHIN_S = 10.0
MAX_GROWTH_BYTES = 128 << 20
SERVER_ERRORS_ALLOWED = {503}


async def serve(ready: queue.Queue[int], over: threading.Event) -> None:
    """A gateway in mid-run, with trajectories, numbers that are not finite and dead letters."""
    run = Run(build_config())
    _, training = await begin(run)
    trajectory = dataclasses.replace(play(training[0], 0), duration_s=math.nan)
    await run.bus.publish(Stream.TRAJECTORIES, [codec.encode_trajectory(trajectory)])
    records = [
        MetricRecord("test", "learner", "l", v, float(v), {"loss": math.nan, "norm": math.inf})
        for v in range(3)
    ]
    await run.bus.publish(
        Stream.METRICS, [codec.encode_metric_record(record) for record in records]
    )
    for payload in (b"\xff", codec.encode_task_group(training[1])):
        await run.bus.publish(Stream.TASKS, [payload])
    for delivery in await run.bus.read(Stream.TASKS, ConsumerGroup.ROLLOUT, "r", 2):
        await run.bus.dead_letter(delivery, "because \0 \ud7ff")
    await run.scheduler.history.follow(run.bus)
    watch = Watch(run.scheduler, run.bus)
    app = build_app(run.scheduler, watch, run.bus, registry=CollectorRegistry())
    listener = bind_http("127.0.0.1", 0)
    server = build_http_server(app, "127.0.0.1")
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    ready.put(listener.getsockname()[1])
    await asyncio.to_thread(over.wait)
    server.should_exit = True
    await serving
    await run.stop()


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    ready: queue.Queue[int] = queue.Queue()
    over = threading.Event()
    with structlog.testing.capture_logs(), ThreadPoolExecutor(1) as thread:
        running = thread.submit(lambda: asyncio.run(serve(ready, over)))
        try:
            yield ready.get(timeout=ANSWER_WITHIN_S)
        finally:
            over.set()
            running.result(timeout=ANSWER_WITHIN_S)


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_every_route_answers_as_documented_whatever_it_is_asked(
    port: int, mode: GenerationMode
) -> None:
    schema = schemathesis.openapi.from_url(f"http://127.0.0.1:{port}/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) >= 15
    seen: Counter[tuple[str, int]] = Counter()
    never_wrong: set[str] = set()
    for operation in operations:

        @settings(
            max_examples=EXAMPLES_PER_ROUTE,
            derandomize=True,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def ask(case: schemathesis.Case) -> None:
            response = case.call()
            case.validate_response(response)
            seen[case.operation.path, response.status_code] += 1

        try:
            ask()
        except Unsatisfiable:
            assert mode is GenerationMode.NEGATIVE, operation.label
            never_wrong.add(operation.label)
    assert not [key for key in seen if key[1] >= 500 and key[1] not in SERVER_ERRORS_ALLOWED]
    # Routes without anything to choose can be asked in one way only; all others were asked many
    # times, and both ways.
    assert len(operations) - len(never_wrong) >= MIN_ROUTES_WITH_INPUT, never_wrong
    assert sum(seen.values()) >= EXAMPLES_PER_ROUTE * MIN_ROUTES_WITH_INPUT, seen


def exchange(port: int, data: bytes) -> bytes:
    """What a server answers to these bytes; it may hang up on whoever speaks no HTTP."""
    with socket.create_connection(("127.0.0.1", port), timeout=ANSWER_WITHIN_S) as connection:
        try:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            answer = b""
            while piece := connection.recv(65536):
                answer += piece
        except (ConnectionResetError, BrokenPipeError):
            return b""
        return answer


def make_rubbish(fuzzer: Fuzzer, index: int) -> bytes:
    body = b'{"name": "x", "address": "a:1"}  '
    good = b"POST /v1/environments HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 33\r\n\r\n" + body
    match index % 4:
        case 0:
            return fuzzer.make_bytes()
        case 1:
            header = fuzzer.random.choice(
                (b"X: ", b"Cookie: ", b"Authorization: Bearer ", b"Content-Length: ")
            )
            return (
                b"GET /v1/run HTTP/1.1\r\nHost: 127.0.0.1\r\n"
                + header
                + fuzzer.make_bytes() * 40
                + b"\r\n\r\n"
            )
        case _:
            return fuzzer.mutate(good)


def test_what_is_no_http_is_refused_without_a_crash_and_memory_stays(port: int) -> None:
    fuzzer = Fuzzer(2)
    exchange(port, b"")
    before = resident_bytes()
    for index in range(NUM_RUBBISH):
        answer = exchange(port, make_rubbish(fuzzer, index))
        status = int(answer[9:12]) if answer.startswith(b"HTTP/1.1 ") else 400
        assert status < 500 or status in SERVER_ERRORS_ALLOWED, answer[:500]
    assert resident_bytes() - before < MAX_GROWTH_BYTES
    assert httpx.get(f"http://127.0.0.1:{port}/v1/run", timeout=ANSWER_WITHIN_S).status_code == 200


def test_many_requests_that_never_end_keep_nobody_else_from_an_answer(port: int) -> None:
    """Slow loris: connections that send a request byte by byte and never finish."""
    begun = (
        b"POST /v1/environments HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000\r\nX-Padding: "
    )
    rng = random.Random(3)
    waiting = [
        socket.create_connection(("127.0.0.1", port), timeout=ANSWER_WITHIN_S) for _ in range(200)
    ]
    try:
        for connection in waiting:
            connection.sendall(begun[: rng.randint(1, len(begun))])
        for _ in range(20):
            for connection in rng.sample(waiting, 20):
                connection.sendall(b"a")
            assert (
                httpx.get(f"http://127.0.0.1:{port}/v1/run", timeout=ANSWER_WITHIN_S).status_code
                == 200
            )
    finally:
        for connection in waiting:
            connection.close()
