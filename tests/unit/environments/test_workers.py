"""Real worker processes without a wire: what a hang, death or queue does to sessions."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import socket
from collections import Counter
from contextlib import asynccontextmanager

import psutil
import pytest

from sdar.contracts.errors import (
    ConfigurationError,
    EnvironmentFailedError,
    UnavailableError,
    UnknownResourceError,
)
from sdar.environments.frames import MAX_FRAME_BYTES, FrameReader, FrameTooLargeError, pack_frame
from sdar.environments.registry import EnvironmentSource
from sdar.environments.workers import WorkerHost, count_usable_cores
from tests.support import until

TASK = "task 0"


@asynccontextmanager
async def hosting(
    *, num_workers: int = 1, step_timeout_s: float = 10.0, kind: str = "Misbehaving", **options
):
    """A started host of one environment, `it`, and the ids of sessions it reports lost.

    Leaves no process and no file.
    """
    own = psutil.Process()
    children, num_fds = set(own.children(recursive=True)), own.num_fds()
    host = WorkerHost({"it": EnvironmentSource(f"tests.misbehaving:{kind}", options)}, num_workers)
    lost: list[str] = []
    try:
        await host.start(step_timeout_s, lambda session_ids, reason: lost.extend(session_ids))
        yield host, lost
    finally:
        await host.stop()
        assert set(own.children(recursive=True)) <= children
        assert own.num_fds() == num_fds


async def open_on_each(host: WorkerHost, num_sessions: int) -> dict[str, int]:
    """Sessions of as many tasks, and the process that plays each."""
    for number in range(num_sessions):
        await host.open(f"s{number}", "it", f"task {number}", 0)
    return {
        f"s{number}": int((await host.step(f"s{number}", "it", "")).observation.text)
        for number in range(num_sessions)
    }


async def test_environments_live_in_other_processes_which_share_the_sessions():
    async with hosting(num_workers=2) as (host, _):
        counts = Counter((await open_on_each(host, 40)).values())
        assert set(counts) == set(host.pids)
        assert os.getpid() not in counts
        assert min(counts.values()) >= 10


async def test_sessions_of_a_task_share_a_worker_until_it_is_clearly_fuller():
    async with hosting(num_workers=2) as (host, _):
        for number in range(30):
            await host.open(f"s{number}", "it", TASK, 0)
        pids = [(await host.step(f"s{number}", "it", "")).observation.text for number in range(30)]
        assert len(set(pids[:9])) == 1
        assert 9 <= Counter(pids)[pids[0]] <= 21


async def test_a_hung_call_kills_its_worker_only_and_the_log_says_where_it_hung(capfd):
    async with hosting(num_workers=2, step_timeout_s=1.0) as (host, lost):
        pids = await open_on_each(host, 12)
        with pytest.raises(EnvironmentFailedError, match=r"hung for 1 s in step"):
            await host.step("s0", "it", "hang")
        assert sorted(lost) == sorted(session for session, pid in pids.items() if pid == pids["s0"])
        for session, pid in pids.items():
            if pid != pids["s0"]:
                assert (await host.step(session, "it", "")).observation.text == str(pid)
        await until(lambda: len(host.pids) == 2, timeout_s=10)
        assert not psutil.pid_exists(pids["s0"])
    assert "misbehaving.py" in (log := capfd.readouterr().err)
    assert "in step" in log


async def test_a_call_that_holds_the_interpreter_is_killed_too():
    async with hosting(step_timeout_s=1.0) as (host, _):
        (pid,) = (await open_on_each(host, 1)).values()
        with pytest.raises(EnvironmentFailedError, match="hung"):
            await host.step("s0", "it", "hang hard")
        await until(lambda: not psutil.pid_exists(pid), timeout_s=10)


async def test_a_reset_that_hangs_is_killed_too():
    async with hosting(step_timeout_s=1.0) as (host, lost):
        with pytest.raises(EnvironmentFailedError, match=r"hung for 1 s in reset"):
            await host.open("s0", "it", TASK, -3)
        assert lost == ["s0"]


async def test_a_deadline_begins_when_the_call_does_not_while_it_queues():
    async with hosting(step_timeout_s=1.5) as (host, lost):
        await open_on_each(host, 6)
        await asyncio.gather(*(host.step(f"s{number}", "it", "sleep 0.3") for number in range(6)))
        assert not lost


async def test_blocking_environments_of_one_worker_overlap():
    async with hosting(kind="Waiting") as (host, _):
        await open_on_each(host, 2)
        await asyncio.gather(host.step("s0", "it", "meet"), host.step("s1", "it", "meet"))


async def test_a_blocking_call_that_hangs_kills_its_worker():
    async with hosting(kind="Waiting", step_timeout_s=1.0) as (host, lost):
        await open_on_each(host, 2)
        with pytest.raises(EnvironmentFailedError, match="hung"):
            await host.step("s0", "it", "hang")
        assert sorted(lost) == ["s0", "s1"]


@pytest.mark.parametrize("kind", ["Misbehaving", "Waiting"])
@pytest.mark.parametrize(
    ("command", "why"),
    [
        ("exit", "raised SystemExit: 4 in step"),
        ("raise mute", "raised Mute: .* in step"),
        ("raise enormous", "raised ValueError: x+ in step"),
    ],
)
async def test_what_an_environment_raises_ends_its_session_only_however_it_does_so(
    kind, command, why
):
    async with hosting(kind=kind) as (host, lost):
        await open_on_each(host, 2)
        with pytest.raises(EnvironmentFailedError, match=why) as error:
            await host.step("s0", "it", command)
        assert len(error.value.message) < 2000
        assert (await host.step("s1", "it", "")).reward == 1
        assert not lost


async def test_a_worker_that_dies_is_replaced_and_its_sessions_are_told():
    async with hosting() as (host, lost):
        (pid,) = (await open_on_each(host, 1)).values()
        with pytest.raises(EnvironmentFailedError, match="lost its worker process"):
            await host.step("s0", "it", "die")
        assert lost == ["s0"]
        with pytest.raises(EnvironmentFailedError, match="lost its worker process"):
            await host.step("s0", "it", "")
        with pytest.raises(UnavailableError, match="No worker process"):
            await host.open("s1", "it", TASK, 0)
        await until(lambda: host.is_ready, timeout_s=10)
        await host.open("s1", "it", TASK, 0)
        assert host.pids != [pid]


async def test_the_death_of_a_worker_is_seen_though_a_process_it_started_holds_its_connection():
    async with hosting() as (host, lost):
        (pid,) = (await open_on_each(host, 1)).values()
        await host.step("s0", "it", "start child")
        os.kill(pid, signal.SIGKILL)
        await until(lambda: lost == ["s0"], timeout_s=5)
        await until(lambda: host.is_ready, timeout_s=10)
        assert host.pids != [pid]


async def test_tasks_that_a_dying_worker_was_asked_for_are_asked_for_again():
    async with hosting() as (host, _):
        await open_on_each(host, 1)
        asked = asyncio.gather(
            host.step("s0", "it", "die"),
            host.list_tasks("it", "train", 0, 1),
            return_exceptions=True,
        )
        assert [type(error) for error in await asked] == [EnvironmentFailedError, UnavailableError]
        await until(lambda: host.is_ready, timeout_s=10)
        assert len(await host.list_tasks("it", "train", 0, 1)) == 1


async def test_a_worker_that_finds_no_file_descriptor_is_tried_again(monkeypatch):
    """By a system that refuses: the real limit would hit the tests' own process."""
    async with hosting() as (host, _):
        is_refused, build_pair = asyncio.Event(), socket.socketpair

        def refuse_once() -> tuple[socket.socket, socket.socket]:
            if is_refused.is_set():
                return build_pair()
            is_refused.set()
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

        monkeypatch.setattr(socket, "socketpair", refuse_once)
        os.kill(host.pids[0], signal.SIGKILL)
        await asyncio.wait_for(is_refused.wait(), 10)
        await until(lambda: host.is_ready, timeout_s=10)


async def test_a_worker_that_dies_at_every_start_is_tried_again_until_it_lives(tmp_path):
    trap = tmp_path / "trap"
    async with hosting(trap=str(trap)) as (host, _):
        trap.touch()
        seen = {host.pids[0]}
        os.kill(host.pids[0], signal.SIGKILL)
        own = psutil.Process()

        def count_tried() -> int:
            seen.update(child.pid for child in own.children())
            return len(seen)

        await until(lambda: count_tried() >= 3, timeout_s=10)
        assert not host.is_ready
        trap.unlink()
        await until(lambda: host.is_ready, timeout_s=10)


@pytest.mark.parametrize(
    ("source", "why"),
    [
        (EnvironmentSource("tests.misbehaving:Nobody"), "expected a subclass"),
        (
            EnvironmentSource("tests.misbehaving:Misbehaving", {"volume": 11}),
            "no option 'volume'.*Its options: trap",
        ),
        (
            EnvironmentSource("tests.misbehaving:Misbehaving", {"trap": __file__}),
            "did not start: it ended",
        ),
    ],
)
async def test_an_environment_that_cannot_be_built_fails_the_start(source, why):
    host = WorkerHost({"it": source}, 2)
    with pytest.raises(ConfigurationError, match=why):
        await host.start(10.0, lambda session_ids, reason: None)
    await host.stop()
    assert not host.pids


async def test_a_start_that_is_given_up_leaves_nothing(tmp_path):
    own = psutil.Process()
    children = set(own.children(recursive=True))
    host = WorkerHost(
        {"it": EnvironmentSource("tests.misbehaving:Misbehaving", {"delay_s": 3600.0})}, 1
    )
    starting = asyncio.create_task(host.start(10.0, lambda session_ids, reason: None))
    await until(lambda: set(own.children(recursive=True)) > children, timeout_s=10)
    starting.cancel()
    await asyncio.gather(starting, return_exceptions=True)
    await host.stop()
    assert set(own.children(recursive=True)) <= children


@pytest.mark.parametrize(
    ("quota", "most"), [("150000 100000", 2), ("50000 100000", 1), ("max 100000", 1024), ("", 1024)]
)
def test_a_container_gets_as_many_workers_as_it_is_granted_cores(tmp_path, quota, most):
    (tmp_path / "cpu.max").write_text(quota)
    assert count_usable_cores(tmp_path / "cpu.max") == min(most, len(os.sched_getaffinity(0)))
    assert count_usable_cores(tmp_path / "none") == len(os.sched_getaffinity(0))


async def test_what_a_worker_prints_is_no_answer(capfd):
    async with hosting() as (host, _):
        await open_on_each(host, 1)
        assert (await host.step("s0", "it", "print")).reward == 1
    captured = capfd.readouterr()
    assert "a print is no answer" in captured.err
    assert "a print" not in captured.out


async def test_an_unknown_task_is_refused_and_costs_nothing():
    async with hosting() as (host, lost):
        with pytest.raises(UnknownResourceError, match="no task 'chess'"):
            await host.open("s0", "it", "chess", 0)
        assert not lost


def test_frames_arrive_whole_however_they_are_cut():
    values = [{"id": 1, "text": "a"}, {"id": 2, "text": "é\ud800"}, {"id": 3, "text": ""}]
    stream = b"".join(map(pack_frame, values))
    for size in (1, 3, len(stream)):
        reader = FrameReader()
        pieces = [stream[start : start + size] for start in range(0, len(stream), size)]
        assert [value for piece in pieces for value in reader.feed(piece)] == values


def test_a_frame_over_the_limit_is_neither_packed_nor_read():
    with pytest.raises(FrameTooLargeError):
        pack_frame({"text": "x" * MAX_FRAME_BYTES})
    with pytest.raises(ValueError, match="limit"):
        list(FrameReader().feed(b"\xff\xff\xff\xff"))
