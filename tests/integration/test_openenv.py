"""The OpenEnv adapter against OpenEnv's own server with the example game, each server a process."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from sdar.contracts.errors import CapacityError, ConfigurationError, EnvironmentFailedError
from sdar.v1 import environment_pb2, environment_pb2_grpc
from sdar.wire.rpc_client import call, connect
from services.envs.adapters.openenv_adapter import OpenEnvEnvironment
from tests.integration.commands import SDAR, server_process

GAME = Path(__file__).parents[2] / "examples" / "environments" / "openenv_game.py"
CAPACITY = 16


@contextmanager
def playing_server():
    """The process and the url of a running OpenEnv server."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with subprocess.Popen([sys.executable, str(GAME), str(port)]) as process:
        try:
            _wait_until_healthy(process, url)
            yield process, url
        finally:
            process.kill()


def _wait_until_healthy(process, url, timeout_s=60.0):
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return httpx.get(f"{url}/health").raise_for_status()
        except httpx.TransportError:
            assert process.poll() is None, "the OpenEnv server ended"
            assert time.monotonic() < deadline, (
                f"the OpenEnv server did not answer in {timeout_s} s"
            )
            time.sleep(0.05)


@pytest.fixture(scope="module")
def url():
    with playing_server() as (_, url):
        yield url


@pytest.fixture
def game(url):
    game = OpenEnvEnvironment(url=url)
    yield game
    game.close()


def search(game):
    """Halve the interval until the number is found; all observations on the way."""
    first = 1
    last = 30
    results = []
    while not results or not results[-1].is_over:
        middle = (first + last) // 2
        results.append(game.step(f"<think>halve</think><action>{middle}</action>"))
        is_low = results[-1].observation.text == "Too low."
        first, last = (middle + 1, last) if is_low else (first, middle - 1)
    return results


def test_an_episode_is_played_to_its_end_and_again_the_same(url, game):
    first = game.reset("train-0", 0)
    assert first.text == "I think of a number from 1 to 30. Which?"
    results = search(game)
    assert (results[-1].observation.text, results[-1].reward) == ("Yes!", 1.0)
    found = (results[-1].terminated, results[-1].truncated, results[-1].is_success)
    assert found == (True, False, True)
    assert {result.is_success for result in results[:-1]} == {False}
    game.reset("train-0", 0)
    assert search(game) == results


def test_seeds_and_tasks_reach_the_server(game):
    def find_number(task_id, seed):
        game.reset(task_id, seed)
        return search(game)[-1].action

    assert len({find_number(f"train-{number}", 0) for number in range(20)}) > 5
    assert len({find_number("heldout-0", seed) for seed in range(20)}) > 5


def test_the_server_describes_itself(game):
    assert game.version == "2/GuessingGame-1.0.0"
    assert game.action_format == "The guess: any text, alone or in <action> tags."
    assert game.list_tasks("train")[0].task_type == "GuessingGame"


def test_a_whole_action_may_be_written_as_json(game):
    game.reset("train-0", 0)
    results = [game.step(text) for text in ('{"guess": "no"}', '{"gues": "1"}', '{"guess": 1}', "")]
    assert [result.is_action_valid for result in results] == [True, False, False, False]
    assert results[0].observation.text == "That is no number."
    found = results[1].observation.text
    assert found == "That is no action here. The guess: any text, alone or in <action> tags."


def test_long_and_strange_texts_come_through(game):
    game.reset("train-0", 0)
    for text in ("\N{SNOWMAN}\0\n", "x" * (1 << 20)):
        assert game.step(text).observation.text == "That is no number."


def test_a_full_server_says_so_and_a_closed_session_makes_room_at_once(url):
    games = [OpenEnvEnvironment(url=url) for _ in range(CAPACITY + 1)]
    try:
        for game in games[:-1]:
            game.reset("train-0", 0)
        with pytest.raises(CapacityError, match="max_concurrent_envs"):
            games[-1].reset("train-0", 0)
        for leaving in games[:10]:
            leaving.close()
            games[-1] = OpenEnvEnvironment(url=url)
            began = time.monotonic()
            games[-1].reset("train-0", 0)
            assert time.monotonic() - began < 1
            games.append(games[-1])
    finally:
        for game in games:
            game.close()


@pytest.mark.parametrize("field", ["metadata", "answer"])
def test_a_field_the_action_does_not_have_is_refused(url, field):
    with pytest.raises(ConfigurationError, match="Set option action_field to one of guess"):
        OpenEnvEnvironment(url=url, action_field=field)


def test_what_is_no_openenv_server_is_refused(url):
    with pytest.raises(EnvironmentFailedError, match="404"):
        OpenEnvEnvironment(url=f"{url}/nothing/here")


def test_a_server_that_dies_fails_the_episode_and_the_next_one():
    with playing_server() as (process, url):
        game, late = OpenEnvEnvironment(url=url), OpenEnvEnvironment(url=url)
        game.reset("train-0", 0)
        process.kill()
        process.wait()
        with pytest.raises(EnvironmentFailedError, match="hung up during step"):
            game.step("1")
        with pytest.raises(EnvironmentFailedError, match="cannot be reached"):
            late.reset("train-0", 0)
        game.close()


def test_a_server_that_hangs_fails_the_episode_in_time_and_closing_frees_who_waits():
    """Of a stopped server, one call ends by its limit, one by `close` from another thread."""
    with playing_server() as (process, url):
        patient, hasty = (
            OpenEnvEnvironment(url=url, timeout_s=60),
            OpenEnvEnvironment(url=url, timeout_s=0.2),
        )
        patient.reset("train-0", 0)
        hasty.reset("train-0", 0)
        os.kill(process.pid, signal.SIGSTOP)
        with pytest.raises(EnvironmentFailedError, match=r"no answer to step in 0.2 s"):
            hasty.step("1")
        with ThreadPoolExecutor() as threads:
            waiting = threads.submit(patient.step, "1")
            patient.close()
            with pytest.raises(EnvironmentFailedError):
                waiting.result(timeout=30)


async def test_a_full_openenv_server_is_resource_exhausted_and_a_dead_one_unavailable():
    with playing_server() as (process, url):
        command = [
            *SDAR,
            "env",
            "serve",
            "openenv",
            "--option",
            f"url={url}",
            "--port",
            "0",
            "--workers",
            "1",
        ]
        async with server_process(command) as server, connect(server.address) as channel:
            stub = environment_pb2_grpc.EnvironmentServiceStub(channel)
            request = environment_pb2.OpenSessionRequest(environment="openenv", task_id="train-0")
            opened = [await call(stub.OpenSession, request, timeout_s=10) for _ in range(CAPACITY)]
            with pytest.raises(CapacityError, match="Raise its max_concurrent_envs"):
                await call(stub.OpenSession, request, timeout_s=10)
            process.kill()
            process.wait()
            step = environment_pb2.StepRequest(session_id=opened[0].session_id, text="1")
            with pytest.raises(EnvironmentFailedError, match="hung up during step"):
                await call(stub.Step, step, timeout_s=10)
            with pytest.raises(EnvironmentFailedError, match="cannot be reached"):
                await call(stub.OpenSession, request, timeout_s=10)
            for session in opened:  # so that the server, told to stop, waits for none
                close = environment_pb2.CloseSessionRequest(session_id=session.session_id)
                await call(stub.CloseSession, close, timeout_s=10)
