"""A real server whose environments, workers and callers misbehave: who learns what."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
import time
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from sdar.contracts.errors import (
    CapacityError,
    ConfigurationError,
    EnvironmentFailedError,
    InvalidInputError,
    UnavailableError,
    UnknownResourceError,
)
from sdar.environments.registry import EnvironmentSource
from sdar.environments.server import SERVICE_NAME, serve_environments
from sdar.environments.sessions import MAX_TASK_ID_CHARACTERS, SessionLimits, SessionManager
from sdar.environments.workers import WorkerHost
from sdar.process.telemetry import Health
from sdar.v1 import environment_pb2 as pb
from sdar.wire.rpc_client import connect
from tests.integration.environment_server import Client, serving
from tests.support import until

EXAMPLE = Path(__file__).parents[2] / "examples" / "environments" / "guess_number.py"
ABANDONED_LEASE_S = 2.0
"""Longer than a busy machine takes to open two hundred sessions before the first is reaped."""
NONSENSE = {
    "reward nan": "reward nan",
    "reward inf": "reward inf",
    "component -inf": "score -inf",
    "text reward": "reward '1.0', expected a finite number",
    "both ends": "at most one end",
    "maybe": "is_success None",
    "surrogate": r"no Unicode text",
    "surrogate info": r"no Unicode text",
    "number info": "info\\['key'\\] 3, expected text",
    "one action": "admissible_actions 'stay'",
    "bytes": "neither text, number nor boolean",
    "nothing": "returned None, expected a StepResult",
    "enormous": "40000.* bytes, the limit is",
    "full": "CapacityError: no chair is free in step",
    "unknown": "UnknownResourceError: .* in step",
    "raise": "ZeroDivisionError: by zero in step",
}


@asynccontextmanager
async def misbehaving(num_workers: int = 1, limits: SessionLimits | None = None):
    """A client of a server whose environment breaks on command, and the host of its workers."""
    host = WorkerHost(
        {"misbehaving": EnvironmentSource("tests.misbehaving:Misbehaving")}, num_workers
    )
    async with serving(limits, host, drain_s=0.0) as (client, _, _):
        yield client, host


@pytest.fixture
async def client():
    async with misbehaving() as (client, _):
        yield client


async def open_session(client: Client, number: int = 0, **fields) -> str:
    return (await client.open(f"task {number}", "misbehaving", **fields)).session_id


@pytest.mark.parametrize("command", NONSENSE)
async def test_nonsense_fails_its_session_only_with_a_typed_error(client, command):
    broken, whole = await open_session(client), await open_session(client)
    for _ in range(2):  # a retry is told the same
        with pytest.raises(EnvironmentFailedError, match=NONSENSE[command]) as error:
            await client.step(broken, 0, command)
        assert error.value.fields["grpc_code"] == "UNAVAILABLE"
    assert (await client.step(whole, 0, "")).reward == 1
    assert (await client.describe()).environments[0].capacity.num_open_sessions == 1


@pytest.mark.parametrize(
    ("seed", "why"), [(-1, "OSError: no such file in reset"), (-2, "no Unicode text")]
)
async def test_an_episode_that_does_not_start_is_a_typed_error_and_holds_no_place(
    client, seed, why
):
    with pytest.raises(EnvironmentFailedError, match=why):
        await open_session(client, seed=seed)
    assert (await client.describe()).environments[0].capacity.num_open_sessions == 0


async def test_an_environment_that_is_full_says_so_and_holds_no_place(client):
    with pytest.raises(CapacityError, match="no chair is free"):
        await open_session(client, seed=-4)
    assert (await client.describe()).environments[0].capacity.num_open_sessions == 0


@pytest.mark.parametrize(
    "text", ["echo", "echo \0\x1b\x7f", "echo 한국어 🦜 ́", "echo " + "é" * 500_000]
)
async def test_texts_of_all_kinds_come_through_unchanged(client, text):
    assert (await client.step(await open_session(client), 0, text)).observation == text


async def test_an_empty_text_is_played(client):
    assert (await client.step(await open_session(client), 0, "")).reward == 1


async def test_a_text_over_the_limit_is_refused_and_the_session_goes_on(client):
    session = await open_session(client)
    with pytest.raises(InvalidInputError, match="1048577 bytes"):
        await client.step(session, 0, "x" * (2**20 + 1))
    assert (await client.step(session, 0, "x" * 2**20)).reward == 1


async def test_bytes_that_are_no_text_are_refused(client):
    step = client.channel.unary_unary(f"/{SERVICE_NAME}/Step")
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await step(pb.StepRequest(text="?").SerializeToString().replace(b"?", b"\xff"))
    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_what_nobody_has_is_not_found(client):
    for asked in (
        client.open("no task", "misbehaving"),
        client.open("task 0", "chess"),
        client.step("no session", 0, ""),
    ):
        with pytest.raises(UnknownResourceError):
            await asked
    with pytest.raises(InvalidInputError, match="characters"):
        await client.open("x" * (MAX_TASK_ID_CHARACTERS + 1), "misbehaving")


async def test_a_big_observation_passes(client):
    assert len((await client.step(await open_session(client), 0, "big")).observation) == 1_000_000


async def test_a_hung_environment_is_killed_at_its_deadline_and_takes_only_its_own_worker_with_it():
    async with misbehaving(2, SessionLimits(step_timeout_s=1.0)) as (client, host):
        sessions = [await open_session(client, number) for number in range(16)]
        pids = [int((await client.step(session, 0, "")).observation) for session in sessions]
        with pytest.raises(EnvironmentFailedError, match=r"hung for 1 s in step"):
            await client.step(sessions[0], 1, "hang")
        for session, pid in zip(sessions, pids, strict=True):
            if pid == pids[0]:
                with pytest.raises(EnvironmentFailedError, match="hung"):
                    await client.step(session, 1, "")
            else:
                assert (await client.step(session, 1, "")).reward == 1
        assert len(set(pids)) == 2
        await until(lambda: len(host.pids) == 2, timeout_s=10)


async def test_a_worker_killed_under_load_fails_its_sessions_and_no_other_and_capacity_returns():
    async with misbehaving(2) as (client, host):
        sessions = [await open_session(client, number) for number in range(48)]
        pids = {
            session: int((await client.step(session, 0, "")).observation) for session in sessions
        }
        steps = dict.fromkeys(sessions, 1)
        is_over = asyncio.Event()

        async def play(session: str) -> None:
            while not is_over.is_set() and steps[session] < 90:
                await client.step(session, steps[session], "sleep 0.002")
                steps[session] += 1

        victim = host.pids[0]
        playing = {session: asyncio.create_task(play(session)) for session in sessions}
        await until(lambda: min(steps.values()) >= 4, timeout_s=10)
        seen = dict(steps)
        os.kill(victim, signal.SIGKILL)
        lost = [session for session, pid in pids.items() if pid == victim]
        others = [session for session, pid in pids.items() if pid != victim]
        await until(lambda: all(playing[session].done() for session in lost), timeout_s=10)
        await until(
            lambda: all(steps[session] >= seen[session] + 4 for session in others), timeout_s=10
        )
        is_over.set()
        ends = dict(
            zip(
                playing,
                await asyncio.gather(*playing.values(), return_exceptions=True),
                strict=True,
            )
        )
        assert {type(ends[session]) for session in lost} == {EnvironmentFailedError}
        assert {ends[session] for session in others} == {None}

        await until(lambda: len(host.pids) == 2, timeout_s=10)
        again = [await open_session(client, number) for number in range(48)]
        assert {int((await client.step(session, 0, "")).observation) for session in again} == set(
            host.pids
        )


async def test_a_server_is_ready_only_while_a_worker_lives(tmp_path):
    trap = tmp_path / "trap"
    host = WorkerHost(
        {"misbehaving": EnvironmentSource("tests.misbehaving:Misbehaving", {"trap": str(trap)})}, 1
    )
    async with serving(None, host, drain_s=0.0, reap_every_s=0.05) as (client, _, health):
        assert health.is_ready
        trap.touch()
        os.kill(host.pids[0], signal.SIGKILL)
        await until(lambda: not health.is_ready, timeout_s=10)
        stub = health_pb2_grpc.HealthStub(client.channel)
        answer = await stub.Check(health_pb2.HealthCheckRequest(service=SERVICE_NAME))
        assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
        trap.unlink()
        await until(lambda: health.is_ready, timeout_s=10)
        assert (await client.step(await open_session(client), 0, "")).reward == 1


def list_children() -> set[int]:
    """Processes that this one has started, those of other tests among them."""
    return {process.pid for process in psutil.Process().children()}


def start_server(stopping: asyncio.Event, **options) -> asyncio.Task[None]:
    host = WorkerHost(
        {"misbehaving": EnvironmentSource("tests.misbehaving:Misbehaving", options)}, 1
    )
    sessions = SessionManager(host, SessionLimits())
    return asyncio.create_task(
        serve_environments(stopping, sessions=sessions, host="127.0.0.1", port=0, health=Health())
    )


async def test_a_server_whose_environment_cannot_be_built_does_not_start():
    others = list_children()
    with pytest.raises(ConfigurationError, match="no option 'volume'"):
        await start_server(asyncio.Event(), volume=11)
    assert list_children() <= others


async def test_a_server_does_not_wait_for_an_episode_that_hangs_as_it_begins():
    async with misbehaving() as (client, _):
        opening = asyncio.create_task(open_session(client, seed=-3))
        async with asyncio.timeout(5):
            while not (await client.describe()).environments[0].capacity.num_open_sessions:
                pass
        began_s = time.monotonic()
    assert time.monotonic() - began_s < 15  # a reset may take 30 s
    await asyncio.gather(opening, return_exceptions=True)


async def test_tasks_that_are_none_fail_their_page_in_typed_form():
    host = WorkerHost(
        {"misbehaving": EnvironmentSource("tests.misbehaving:Misbehaving", {"seed": "many"})}, 1
    )
    async with serving(None, host, drain_s=0.0) as (client, _, _):
        with pytest.raises(
            UnavailableError, match=r"cannot be listed: .* with seed 'many', expected"
        ):
            await client.list_tasks("train", environment="misbehaving")


async def test_a_server_that_is_still_starting_stops_when_told_to():
    stopping, others = asyncio.Event(), list_children()
    server = start_server(stopping, delay_s=3600.0)
    await until(lambda: not list_children() <= others)
    stopping.set()
    async with asyncio.timeout(10):
        await server
    assert list_children() <= others


# ---- servers as processes of their own, from a script as a user writes it


@asynccontextmanager
async def running(script: Path):
    """A started script that serves: its process as asyncio and psutil know it, and a client."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        script,
        cwd=script.parent,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    server = psutil.Process(process.pid)
    try:
        async with asyncio.timeout(30):
            line = (await process.stdout.readline()).decode()
        told = re.fullmatch(r"Serving (\w+) on (\S+). Check it: sdar env check \2\n", line)
        async with connect(told[2]) as channel:
            yield process, server, Client(channel, told[2])
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@pytest.fixture
def example(tmp_path) -> Path:
    """The example, on a port that is free."""
    script = tmp_path / "guess_number.py"
    source = EXAMPLE.read_text()
    assert "serve(GuessNumber)\n" in source
    script.write_text(
        source.replace("serve(GuessNumber)\n", "serve(GuessNumber, port=0, num_workers=1)\n")
    )
    return script


async def guess(client: Client, task_id: str) -> bool:
    opened = await client.open(task_id, "guess_number")
    low, high = 1, 100
    for index in range(7):
        step = await client.step(opened.session_id, index, str(middle := (low + high) // 2))
        if step.terminated:
            break
        low, high = (middle + 1, high) if "higher" in step.observation else (low, middle - 1)
    await client.close(opened.session_id)
    return step.is_success and step.reward == 1


async def test_the_example_is_served_from_its_script_played_and_stopped(example):
    async with running(example) as (process, server, client):
        assert all([await guess(client, f"train-{number}") for number in range(10)])
        workers = server.children(recursive=True)
        assert workers
        process.terminate()
        async with asyncio.timeout(10):
            assert await process.wait() == 0
        assert not [worker for worker in workers if worker.is_running()]


async def test_two_hundred_abandoned_sessions_are_reaped_and_their_memory_given_back(example):
    async with running(example) as (_, server, client):

        def measure_bytes() -> int:
            return sum(
                one.memory_full_info().uss for one in (server, *server.children(recursive=True))
            )

        async def count_open() -> int:
            return (await client.describe()).environments[0].capacity.num_open_sessions

        async def abandon() -> None:
            opening = [
                client.open("train-0", "guess_number", lease_s=ABANDONED_LEASE_S)
                for _ in range(200)
            ]
            await asyncio.gather(*opening)
            assert await count_open() == 200
            async with asyncio.timeout(20):
                while await count_open():  # noqa: ASYNC110
                    await asyncio.sleep(0.05)

        await abandon()  # what is allocated once
        num_fds, before = server.num_fds(), measure_bytes()
        await abandon()
        assert measure_bytes() <= 1.1 * before
        assert server.num_fds() <= num_fds


async def test_workers_end_when_their_server_is_killed_even_one_that_hangs(tmp_path):
    script = tmp_path / "server.py"
    script.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parents[2])!r})\n"
        "from sdar.environments import serve\n"
        "from tests.misbehaving import Misbehaving\n"
        'if __name__ == "__main__":\n'
        "    serve(Misbehaving, port=0, num_workers=2)\n"
    )
    async with running(script) as (process, server, client):
        hanging = asyncio.create_task(client.step(await open_session(client), 0, "hang"))
        workers = server.children(recursive=True)
        assert len(workers) == 2
        await until(lambda: any(worker.status() == psutil.STATUS_SLEEPING for worker in workers))
        process.kill()
        await until(lambda: not any(worker.is_running() for worker in workers), timeout_s=10)
        await asyncio.gather(hanging, return_exceptions=True)


async def test_a_script_without_a_guard_is_told_to_write_one(example):
    example.write_text(example.read_text().replace('if __name__ == "__main__":', "if True:"))
    process = await asyncio.create_subprocess_exec(
        sys.executable, example, stderr=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(30):
        _, told = await process.communicate()
    assert process.returncode == 1
    assert b'Put the call of serve() under `if __name__ == "__main__":`' in told
