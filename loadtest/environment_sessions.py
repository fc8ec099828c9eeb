"""Measures the sessions that one core of an environment server holds, against OpenEnv's server.

Every client steps once a second, at times fixed in advance, so a slow server gets no rest. A server
holds a number of sessions if 95% of the steps are answered in time, counted from when they were
due. Server and worker share one core, the clients have another; their own lateness is measured too,
and where it may be why a number is not held, that is void.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import itertools
import json
import math
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    asynccontextmanager,
    contextmanager,
)
from dataclasses import dataclass, field
from typing import Literal

import grpc.aio
import psutil
import websockets.asyncio.client as websockets_client
from websockets.exceptions import WebSocketException

from loadtest.comparison import (
    Comparison,
    Measurement,
    Say,
    Table,
    Target,
    describe_pair,
    format_figure,
)
from loadtest.instant import ACTION
from loadtest.page import ROOT
from sdar.contracts.errors import SdarError
from sdar.v1 import environment_pb2, environment_pb2_grpc

NUM_PAIRS = 2
FIRST_NUM_SESSIONS = 256
FIRST_FACTOR = 2.0
"""Factor by which numbers grow until one is not held, in the first search."""
NEXT_FACTOR = 1.25
"""The same in later searches, which begin near the number that was held before."""
LAST_RATIO = 1.12
"""The search ends when the next larger number tried is at most this times the number held."""
GOAL_NUM_SESSIONS = 512
NUM_CHANNELS = 4
NUM_OPENING = 16
START_TIMEOUT_S = 60.0
CALL_TIMEOUT_S = 30.0
NUM_TRIES = 3

Step = Callable[[], Awaitable[object]]
Open = Callable[[], Awaitable[Step]]


@dataclass(frozen=True, slots=True)
class Schedule:
    """When clients step: the first rounds warm up, the others count."""

    period_s: float = 1.0
    num_warmups: int = 2
    num_rounds: int = 6
    limit_s: float = 0.1


@dataclass(frozen=True, slots=True)
class Server:
    """How to start a server for so many sessions at a port, and how to connect to it."""

    name: str
    command: Callable[[int, int], list[str]]
    connect: Callable[[int], AbstractAsyncContextManager[Open]]


@dataclass(slots=True)
class Timings:
    """Seconds of each counted step: from when it was due to its answer, and to its sending.

    The sending counts only if its client was free.
    """

    latencies: list[float] = field(default_factory=list)
    latenesses: list[float] = field(default_factory=list)
    num_missed: int = 0


@dataclass(frozen=True, slots=True)
class Trial:
    """What came of one number of sessions. Shares are of a core."""

    num_sessions: int
    timings: Timings
    memory_bytes: float
    server_share: float
    client_share: float

    @property
    def lateness_s(self) -> float:
        """Of the clients themselves; 0 if the server kept every one waiting all the time."""
        if not self.timings.latenesses:
            return 0.0
        return compute_percentile(self.timings.latenesses, 0.95)

    def judge(self, limit_s: float) -> Literal["held", "not held", "void"]:
        """Void: not held, but perhaps only because the clients were late themselves."""
        if self.timings.num_missed:
            return "not held"
        over_s = compute_percentile(self.timings.latencies, 0.95) - limit_s
        if over_s < 0:
            return "held"
        # Twice: a client may be late in sending and again in receiving.
        if over_s <= 2 * self.lateness_s:
            return "void"
        return "not held"


def measure(say: Say) -> Measurement:
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise SdarError(
            "Sessions per core need two cores, one for the server and one for its clients; "
            "this machine has one."
        )
    _allow_many_files()
    os.sched_setaffinity(0, cores[1:])

    schedule = Schedule()
    ours: list[Trial] = []
    theirs: list[Trial] = []
    for index in range(NUM_PAIRS):
        for server, done in ((OURS, ours), (PEER, theirs)):
            try_out = functools.partial(
                run_trial, server, schedule=schedule, core=cores[0], say=say
            )
            done.append(_find_next(try_out, schedule.limit_s, done))

        pair = (float(ours[-1].num_sessions), float(theirs[-1].num_sessions))
        say(describe_pair(index + 1, NUM_PAIRS, pair))
    return build_measurement(ours, theirs, schedule)


def _allow_many_files() -> None:
    """The peer has a socket for each session, and the server inherits the limit."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _find_next(try_out: Callable[[int], Trial], limit_s: float, done: Sequence[Trial]) -> Trial:
    """The largest number held, searched from where the last search ended."""
    if done:
        return find_largest(try_out, limit_s, done[-1].num_sessions, NEXT_FACTOR)
    return find_largest(try_out, limit_s, FIRST_NUM_SESSIONS, FIRST_FACTOR)


def build_measurement(
    ours: Sequence[Trial], theirs: Sequence[Trial], schedule: Schedule
) -> Measurement:
    """Rows for the trials of the largest numbers held, a pair each."""
    limits = f"a step every {schedule.period_s:g} s, 95% under {schedule.limit_s * 1000:g} ms"
    what = f"environment server on one core, sessions held: {limits}"
    held: list[tuple[float, float]] = []
    goal: list[tuple[float, float]] = []
    memory: list[tuple[float, float]] = []
    for one, other in zip(ours, theirs, strict=True):
        held.append((float(one.num_sessions), float(other.num_sessions)))
        goal.append((float(one.num_sessions), float(GOAL_NUM_SESSIONS)))
        memory.append((one.memory_bytes / 1024, other.memory_bytes / 1024))

    comparisons = (
        Comparison(what, PEER.name, "sessions", tuple(held)),
        Comparison(what, "the number to reach", "sessions", tuple(goal), Target("at_least", 1)),
        Comparison("environment server, memory of a session", PEER.name, "KiB", tuple(memory)),
    )
    return Measurement(comparisons, (_build_table(ours, theirs),), _list_notes(schedule))


def _list_notes(schedule: Schedule) -> tuple[str, ...]:
    return (
        "An environment that answers at once with 230 characters; the agent's texts have 110. "
        f"Every client has its own session and steps every {schedule.period_s:g} s, spread "
        f"evenly; latency counts from when the step was due. {schedule.num_rounds} steps a "
        f"session after {schedule.num_warmups} to warm up. Numbers grow until one is not held, "
        f"then are narrowed down to {LAST_RATIO - 1:.0%}, each on a fresh server.",
        "Ours: `sdar env serve` with one worker process, over gRPC; server and worker share the "
        "core. Peer: openenv-core under uvicorn, one process, one WebSocket a session, its "
        "`max_concurrent_envs` raised from 1; it plays in the server's own process, on uvloop, "
        "where an environment that hangs or dies takes every session with it. "
        "Clients are on another core.",
        "The last column is the delay of the clients themselves. If it, in sending or in "
        "receiving, could be the reason why a number is not held, the measurement is void and "
        "fails.",
        "Memory of a session: the growth of the server's private memory from one session to all of "
        "them, divided by the number of sessions.",
    )


def _build_table(ours: Sequence[Trial], theirs: Sequence[Trial]) -> Table:
    columns = (
        "server",
        "sessions",
        "p50, ms",
        "p95, ms",
        "server, of a core",
        "clients, of a core",
        "clients late, p95, ms",
    )
    rows = []
    for server, trials in ((OURS, ours), (PEER, theirs)):
        rows += [(server.name, *_format_trial(trial)) for trial in trials]
    return Table("At the largest number held", columns, tuple(rows))


def _format_trial(trial: Trial) -> tuple[str, ...]:
    latencies = trial.timings.latencies
    return (
        str(trial.num_sessions),
        format_figure(1000 * compute_percentile(latencies, 0.5)),
        format_figure(1000 * compute_percentile(latencies, 0.95)),
        f"{trial.server_share:.0%}",
        f"{trial.client_share:.0%}",
        format_figure(1000 * trial.lateness_s),
    )


def find_largest(
    try_out: Callable[[int], Trial], limit_s: float, first: int, factor: float
) -> Trial:
    """The trial of the largest number of sessions that is held.

    From `first` the number goes up or down by the factor, then the rest is halved. Raises
    SdarError: not even one session is held.
    """
    best: Trial | None = None
    failed = math.inf
    number = first
    while best is None or failed > best.num_sessions * LAST_RATIO:
        trial = try_out(number)
        if trial.judge(limit_s) == "held":
            best = trial
        else:
            failed = number

        if best is None and number == 1:
            raise SdarError(
                "The server holds not one session within the limit. "
                "The machine is busy: measure on a quiet one."
            )
        if best is None:
            number = int(number / factor)
        elif failed == math.inf:
            number = math.ceil(number * factor)
        else:
            # Halfway by factors.
            number = round(math.sqrt(best.num_sessions * failed))
            if number in (best.num_sessions, failed):
                break
    return best


def run_trial(server: Server, num_sessions: int, schedule: Schedule, core: int, say: Say) -> Trial:
    """Start the server anew on a core and play so many sessions.

    Raises SdarError: the server does not start, or the trial is void time and again.
    """
    for _ in range(NUM_TRIES):
        with serve_on_core(server, num_sessions + 1, core) as (process, port):
            trial = asyncio.run(_play_trial(server, process, port, num_sessions, schedule))
        verdict = trial.judge(schedule.limit_s)
        p95_ms = 1000 * compute_percentile(trial.timings.latencies, 0.95)
        late_ms = 1000 * trial.lateness_s
        say(
            f"{server.name}, {num_sessions} sessions: p95 {p95_ms:.0f} ms, "
            f"{trial.timings.num_missed} missed, clients late by {late_ms:.1f} ms, {verdict}"
        )
        if verdict != "void":
            return trial
    raise SdarError(
        f"The clients of {num_sessions} sessions of {server.name} were themselves late by "
        f"{late_ms:.0f} ms: this measures them, not the server, and is void. "
        "Measure on a quieter machine."
    )


@contextmanager
def serve_on_core(
    server: Server, num_sessions: int, core: int
) -> Iterator[tuple[psutil.Process, int]]:
    """A server process, pinned with all its children, and its port. It is killed at the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with _start_on_core(server.command(port, num_sessions), core) as started:
        process = psutil.Process(started.pid)
        try:
            yield process, port
        finally:
            for member in _list_family(process) if process.is_running() else ():
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.send_signal(signal.SIGKILL)


def _start_on_core(command: list[str], core: int) -> subprocess.Popen[bytes]:
    own = os.sched_getaffinity(0)
    # What is started now inherits it, and so does all that it starts.
    os.sched_setaffinity(0, {core})
    try:
        environment = {**os.environ, "SDAR_LOG_LEVEL": "warning"}
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, env=environment)
    finally:
        os.sched_setaffinity(0, own)


async def _play_trial(
    server: Server, process: psutil.Process, port: int, num_sessions: int, schedule: Schedule
) -> Trial:
    async with server.connect(port) as open_session:
        await _open_when_ready(open_session, process)
        memory_bytes = _measure_memory(process)
        steps = await _open_sessions(open_session, num_sessions)

        began = time.monotonic()
        server_s = _measure_cpu(process)
        client_s = time.process_time()
        timings = await play(steps, schedule)

        duration_s = time.monotonic() - began
        return Trial(
            num_sessions,
            timings,
            memory_bytes=(_measure_memory(process) - memory_bytes) / num_sessions,
            server_share=(_measure_cpu(process) - server_s) / duration_s,
            client_share=(time.process_time() - client_s) / duration_s,
        )


async def _open_when_ready(open_session: Open, process: psutil.Process) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            step = await open_session()
            await step()
            return
        except (grpc.aio.AioRpcError, OSError, WebSocketException) as error:
            is_gone = not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
            if is_gone or time.monotonic() > deadline:
                raise SdarError(
                    f"A server to measure did not start: {error}. Read what it wrote above."
                ) from error
            await asyncio.sleep(0.1)


async def _open_sessions(open_session: Open, num_sessions: int) -> list[Step]:
    places = asyncio.Semaphore(NUM_OPENING)

    async def open_one() -> Step:
        async with places:
            return await open_session()

    return await asyncio.gather(*(open_one() for _ in range(num_sessions)))


async def play(steps: Sequence[Step], schedule: Schedule) -> Timings:
    """Step every session on schedule; what fails or isn't sent by its end is missed."""
    loop = asyncio.get_running_loop()
    timings = Timings()
    num_rounds = schedule.num_warmups + schedule.num_rounds
    begin = loop.time() + schedule.period_s / 10
    end = begin + num_rounds * schedule.period_s

    async def play_session(step: Step, offset_s: float) -> None:
        for number in range(num_rounds):
            due = begin + offset_s + number * schedule.period_s
            is_counted = number >= schedule.num_warmups
            # Else the answer to the step before came after this one was due.
            is_free = due > loop.time()
            if is_free:
                await asyncio.sleep(due - loop.time())

            sent = loop.time()
            try:
                if sent > end + schedule.period_s:
                    raise TimeoutError
                await step()
            except (grpc.aio.AioRpcError, OSError, WebSocketException):
                timings.num_missed += num_rounds - number
                return

            if is_counted:
                timings.latencies.append(loop.time() - due)
            if is_counted and is_free:
                timings.latenesses.append(sent - due)

    with _no_collection():
        offsets_s = [index * schedule.period_s / len(steps) for index in range(len(steps))]
        await asyncio.gather(*map(play_session, steps, offsets_s))
    return timings


@contextmanager
def _no_collection() -> Iterator[None]:
    """A collection over the objects of thousands of sessions would hold all clients up."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@asynccontextmanager
async def _connect_to_ours(port: int) -> AsyncIterator[Open]:
    async with AsyncExitStack() as stack:
        stubs = []
        for _ in range(NUM_CHANNELS):
            # A pool of its own: channels to one address would share one connection.
            options = [("grpc.use_local_subchannel_pool", 1)]
            channel = await stack.enter_async_context(
                grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options)
            )
            stubs.append(environment_pb2_grpc.EnvironmentServiceStub(channel))
        turns = itertools.cycle(stubs)
        yield lambda: _open_on(next(turns))


async def _open_on(stub: environment_pb2_grpc.EnvironmentServiceAsyncStub) -> Step:
    request = environment_pb2.OpenSessionRequest(environment=INSTANT, task_id="only", lease_s=3600)
    opened = await stub.OpenSession(request, timeout=CALL_TIMEOUT_S, wait_for_ready=True)
    indices = itertools.count()

    async def step() -> object:
        request = environment_pb2.StepRequest(
            session_id=opened.session_id, step_index=next(indices), text=ACTION
        )
        return await stub.Step(request, timeout=CALL_TIMEOUT_S)

    return step


@asynccontextmanager
async def _connect_to_openenv(port: int) -> AsyncIterator[Open]:
    connections: list[websockets_client.ClientConnection] = []
    reset = json.dumps({"type": "reset", "data": {"seed": 0}})

    async def open_session() -> Step:
        connection = await websockets_client.connect(f"ws://127.0.0.1:{port}/ws").__aenter__()
        connections.append(connection)

        async def ask(message: str) -> object:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                await connection.send(message)
                answer = json.loads(await connection.recv())
            if answer["type"] != "observation":
                raise OSError(f"OpenEnv answered {answer}")
            return answer

        await ask(reset)
        return lambda: ask(json.dumps({"type": "step", "data": {"text": ACTION}}))

    yield open_session
    for connection in connections:
        connection.transport.abort()
    await asyncio.gather(*(connection.wait_closed() for connection in connections))


INSTANT = "loadtest.instant:InstantEnvironment"


def _serve_ours(port: int, num_sessions: int) -> list[str]:
    command = [sys.executable, "-m", "sdar.cli.main", "env", "serve", INSTANT]
    address = ["--host", "127.0.0.1", "--port", str(port)]
    return [*command, *address, "--capacity", str(num_sessions), "--workers", "1"]


def _serve_openenv(port: int, num_sessions: int) -> list[str]:
    return [sys.executable, "-m", "loadtest.instant_openenv", str(port), str(num_sessions)]


OURS = Server("ours", _serve_ours, _connect_to_ours)
PEER = Server("OpenEnv's server", _serve_openenv, _connect_to_openenv)


def compute_percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that this share of the values does not exceed; infinite if none is."""
    if not values:
        return math.inf
    place = math.ceil(share * len(values)) - 1
    return sorted(values)[max(0, place)]


def _list_family(process: psutil.Process) -> list[psutil.Process]:
    return [process, *process.children(recursive=True)]


def _measure_memory(process: psutil.Process) -> int:
    """Bytes that no other process shares."""
    return sum(member.memory_full_info().uss for member in _list_family(process))


def _measure_cpu(process: psutil.Process) -> float:
    """Seconds in user and system mode so far."""
    return sum(sum(member.cpu_times()[:2]) for member in _list_family(process))
