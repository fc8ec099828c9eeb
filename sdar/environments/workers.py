"""Starts an environment server's worker processes, and replaces those that hang or die.

It assigns sessions to workers. What becomes of one worker touches the sessions of no other. It
knows no lease and no gRPC.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import math
import os
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import structlog

from sdar.contracts.errors import ConfigurationError, EnvironmentFailedError, UnavailableError
from sdar.environments.frames import FrameReader, pack_frame
from sdar.environments.hosts import Host, OnLost, build_failure
from sdar.environments.measurements import METERS, RESTARTS, WORKERS
from sdar.environments.player import MAX_THREADS, Answer, Request
from sdar.environments.registry import EnvironmentSource

log = structlog.get_logger()

START_TIMEOUT_S = 3600.0
"""Building environments may read a catalogue or make an index of it."""

_ABORT_GRACE_S = 1.0
"""Between the signal at which a hung worker logs where it hangs, and the one it cannot refuse."""
_STOP_GRACE_S = 5.0
_LAST_ANSWERS_S = 0.5
"""After the end of a process, until what it has sent is read."""
_SHORTEST_DELAY_S = 0.1
_LONGEST_DELAY_S = 5.0
_SOUND_AFTER_S = 10.0
"""A worker that lived this long is replaced at once; sooner, and the next waits longer."""
_FULLER_FACTOR = 1.25
_FULLER_SESSIONS = 8
"""How much fuller than the emptiest a worker may be and still get the sessions of its tasks."""

_DEATH = "lost its worker process"
_PROGRAM = (
    "import sys; fd = int(sys.argv[1]); sys.path[:] = sys.argv[2:]; "
    "from sdar.environments.worker import main; main(fd)"
)
"""What a worker's interpreter runs: first of all it takes over the server's import path."""


def count_usable_cores(quota: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Cores this process may run on, or fewer if its container may use less time than they have."""
    num_cores = len(os.sched_getaffinity(0))
    # There is no such file outside of cgroups, and it holds "max" where there is no limit.
    with contextlib.suppress(OSError, ValueError):
        granted_us, period_us = map(int, quota.read_text().split())
        num_cores = min(num_cores, math.ceil(granted_us / period_us))
    return num_cores


@dataclass(slots=True, eq=False)
class _Call:
    request: Request
    lane: _Lane
    timeout_s: float
    answer: asyncio.Future[Answer]
    deadline: asyncio.TimerHandle | None = None


@dataclass(slots=True)
class _Lane:
    """Calls that a worker plays in one place, `width` at once and the others after them.

    A call's deadline begins when the call does, not while it waits in the lane.
    """

    width: int
    num_running: int = 0
    waiting: deque[_Call] = field(default_factory=deque)


class _Worker(asyncio.Protocol):
    """One worker process, seen from the server.

    `sessions` are the ids of those that it holds or is opening.
    """

    def __init__(self, slot: int, on_death: Callable[[_Worker, str], None]) -> None:
        self.slot = slot
        self.sessions: set[str] = set()
        self.is_alive = True
        self._on_death = on_death
        # By whether the environment blocks, as a player plays: in its one thread, or in many.
        self._lanes = {False: _Lane(1), True: _Lane(MAX_THREADS)}
        self._calls: dict[int, _Call] = {}
        self._last_id = 0
        self._frames = FrameReader()
        self._process: asyncio.subprocess.Process | None = None
        self._transport: asyncio.Transport | None = None
        self._watching: asyncio.Task[None] | None = None
        self.died = asyncio.Event()

    @property
    def pid(self) -> int:
        return self._process.pid if self._process else 0

    async def start(self, environments: Mapping[str, EnvironmentSource]) -> None:
        """Start the process, and have it build the environments.

        Raises:
            ConfigurationError: an environment cannot be built.
            EnvironmentFailedError: the process died of it.
        """
        self._process = await self._spawn()
        self._watching = asyncio.create_task(self._watch(self._process))

        sources = {name: dataclasses.asdict(source) for name, source in environments.items()}
        request = {"environments": sources}
        answer = await self.ask(request, is_threaded=False, timeout_s=START_TIMEOUT_S)
        if "configuration" in answer:
            raise ConfigurationError(answer["configuration"])

    async def _spawn(self) -> asyncio.subprocess.Process:
        ours, theirs = socket.socketpair()
        await asyncio.get_running_loop().create_unix_connection(lambda: self, sock=ours)
        with theirs:
            # A new interpreter, never a fork: gRPC and threads are at work here. A session of its
            # own: a Ctrl-C is the server's to answer, and a killed worker takes what it started
            # with it. Its prints are log lines, so they go to stderr.
            return await asyncio.create_subprocess_exec(
                *(sys.executable, "-c", _PROGRAM, str(theirs.fileno()), *sys.path),
                pass_fds=[theirs.fileno()],
                stdin=asyncio.subprocess.DEVNULL,
                stdout=2,
                start_new_session=True,
            )

    def ask(
        self, request: Request, *, is_threaded: bool, timeout_s: float
    ) -> asyncio.Future[Answer]:
        """Send a request; its answer comes, or EnvironmentFailedError once the worker is dead."""
        lane = self._lanes[is_threaded]
        call = _Call(request, lane, timeout_s, asyncio.get_running_loop().create_future())
        if not self.is_alive:
            call.answer.set_exception(build_failure(request.get("environment", ""), _DEATH))
            return call.answer
        if self._transport is None:
            raise RuntimeError("A worker is asked after its start.")

        self._last_id += 1
        frame = pack_frame({"id": self._last_id, **request})
        self._calls[self._last_id] = call
        self._transport.write(frame)
        lane.waiting.append(call)
        self._begin(lane)
        return call.answer

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        # Its callers have their errors already.
        if not self.is_alive:
            return
        try:
            for answer in self._frames.feed(data):
                self._settle(self._calls.pop(answer["id"]), answer)
        except (ValueError, KeyError, TypeError) as error:
            self.kill(f"sent its server what is no answer: {error!r}")

    def connection_lost(self, exc: Exception | None) -> None:
        self._die(_DEATH)

    def kill(self, reason: str) -> None:
        """End the process by a signal at which it writes to the log where it was."""
        if self.is_alive:
            log.error("environment_worker_killed", pid=self.pid, reason=reason)
            self._die(reason)
            self._send_signal(signal.SIGABRT)

    async def _watch(self, process: asyncio.subprocess.Process) -> None:
        """Notice the end of the process, also where the connection stays open.

        A process that the environment started may hold the connection.
        """
        await process.wait()
        with contextlib.suppress(TimeoutError):
            # What it has sent comes first: a worker that cannot build its environments says why
            # before it ends.
            async with asyncio.timeout(_LAST_ANSWERS_S):
                await self.died.wait()
        self._die(_DEATH)

    async def wait(self, timeout_s: float) -> int:
        """Wait for the end of the process; returns its exit code.

        After the timeout it is killed. What it has started ends with it in any case.
        """
        if self._transport is not None:
            self._transport.close()
        if self._process is None:
            return 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._process.wait()
        self._send_signal(signal.SIGKILL)
        return await self._process.wait()

    def _begin(self, lane: _Lane) -> None:
        while lane.waiting and lane.num_running < lane.width:
            call = lane.waiting.popleft()
            lane.num_running += 1
            call.deadline = asyncio.get_running_loop().call_later(call.timeout_s, self._hang, call)

    def _settle(self, call: _Call, answer: Answer) -> None:
        if call.deadline is not None:
            call.deadline.cancel()
        call.lane.num_running -= 1
        self._begin(call.lane)
        if not call.answer.done():
            call.answer.set_result(answer)

    def _hang(self, call: _Call) -> None:
        method = call.request.get("call", "its construction")
        what = f"hung for {call.timeout_s:g} s in {method}"
        if not call.answer.done():
            call.answer.set_exception(build_failure(call.request.get("environment", ""), what))
        self.kill(f"lost its worker process, killed because an episode {what}")

    def _die(self, reason: str) -> None:
        """Dead from here on, whatever the process still does."""
        if not self.is_alive:
            return
        self.is_alive = False
        for call in self._calls.values():
            if call.deadline is not None:
                call.deadline.cancel()
            if not call.answer.done():
                failure = build_failure(call.request.get("environment", ""), reason)
                call.answer.set_exception(failure)
                # Nobody waits for a close, and of an error that nobody reads asyncio would warn.
                call.answer.exception()
        self._calls.clear()
        self.died.set()
        self._on_death(self, reason)

    def _send_signal(self, number: signal.Signals) -> None:
        # To its group, so that what it started goes too; the group may outlive the process.
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)


class WorkerHost(Host):
    """Plays sessions in worker processes.

    Args:
        environments: by the names they are served under.
        num_workers: 0 for one per usable core.
    """

    def __init__(self, environments: Mapping[str, EnvironmentSource], num_workers: int = 0) -> None:
        super().__init__(environments)
        self._environments = environments
        self._num_workers = num_workers or count_usable_cores()
        self._workers: dict[int, _Worker] = {}
        self._places: dict[str, _Worker] = {}
        self._keepers: list[asyncio.Task[None]] = []

    @property
    def is_ready(self) -> bool:
        return bool(self._workers)

    @property
    def pids(self) -> list[int]:
        """Of the workers that live."""
        return [worker.pid for worker in self._workers.values()]

    async def start(self, step_timeout_s: float, on_lost: OnLost) -> None:
        """Start the workers. A call's deadline runs from when its environment begins with it.

        Raises:
            ConfigurationError: an environment cannot be built.
        """
        # One before the others: it finds what is wrong, and makes the indices on disk that the
        # others read.
        self._start_keeping(0, await self._start_first())
        await super().start(step_timeout_s, on_lost)

        starts = map(self._start_worker, range(1, self._num_workers))
        others = await asyncio.gather(*starts, return_exceptions=True)
        for slot, started in enumerate(others, start=1):
            if isinstance(started, BaseException):
                # The environment can be built, so this is of the moment: it is tried again.
                log.warning("environment_worker_did_not_start", slot=slot, error=str(started))
            self._start_keeping(slot, started if isinstance(started, _Worker) else None)

    async def _start_first(self) -> _Worker:
        try:
            return await self._start_worker(0)
        except EnvironmentFailedError as error:
            raise ConfigurationError(
                f"The first worker process did not start: it ended, or took over "
                f"{START_TIMEOUT_S:g} s, before {', '.join(self.names)} was built. "
                "What it wrote to the log says why."
            ) from error

    def _start_keeping(self, slot: int, worker: _Worker | None) -> None:
        self._keepers.append(asyncio.create_task(self._keep(slot, worker)))

    async def stop(self) -> None:
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        # Those that nobody keeps yet: the start was given up.
        left = list(self._workers.values())
        await asyncio.gather(*(worker.wait(_STOP_GRACE_S) for worker in left))

    def close(self, session_id: str, environment: str) -> None:
        worker = self._places.pop(session_id, None)
        if worker is None:
            return
        worker.sessions.discard(session_id)
        arguments = {"session_id": session_id}
        request = {"call": "close", "environment": environment, "arguments": arguments}
        is_threaded = self._is_threaded(environment)
        closing = worker.ask(request, is_threaded=is_threaded, timeout_s=self._step_timeout_s)
        closing.add_done_callback(_log_failed_close)

    async def open(self, session_id: str, environment: str, task_id: str, seed: int) -> Any:
        worker = self._choose(environment, task_id)
        self._places[session_id] = worker
        worker.sessions.add(session_id)
        return await super().open(session_id, environment, task_id, seed)

    async def _ask(self, session_id: str, request: Request) -> Answer:
        name = request["environment"]
        worker = self._places.get(session_id) if session_id else self._choose(name, "")
        if worker is None:
            raise build_failure(name, _DEATH)
        # A description counts every task, which may mean to read them all.
        timeout_s = START_TIMEOUT_S if request["call"] == "describe" else self._step_timeout_s
        return await worker.ask(request, is_threaded=self._is_threaded(name), timeout_s=timeout_s)

    def _is_threaded(self, environment: str) -> bool:
        described = self._descriptions.get(environment)
        return described is not None and described.is_blocking

    def _choose(self, environment: str, task_id: str) -> _Worker:
        """The worker whose caches know the task, unless it is clearly fuller than the emptiest.

        Each worker has a number for each task (rendezvous hashing); of those with room the one with
        the greatest number is taken, so that one worker's death moves only its own tasks.
        """
        if not self._workers:
            raise UnavailableError(
                "No worker process of this environment server is alive; one is being started. "
                "Retry soon."
            )

        workers = list(self._workers.values())
        num_emptiest = min(len(worker.sessions) for worker in workers)
        most = num_emptiest * _FULLER_FACTOR + _FULLER_SESSIONS
        with_room = [worker for worker in workers if len(worker.sessions) <= most]
        return max(with_room, key=lambda worker: _affinity(worker.slot, environment, task_id))

    async def _start_worker(self, slot: int) -> _Worker:
        worker = _Worker(slot, self._bury)
        try:
            await worker.start(self._environments)
            # It may have died since it answered.
            if not worker.is_alive:
                raise build_failure(", ".join(self.names), _DEATH)
        except BaseException:
            await worker.wait(_ABORT_GRACE_S)
            raise
        self._workers[slot] = worker
        METERS.set(WORKERS, len(self._workers))
        log.info("environment_worker_started", slot=slot, pid=worker.pid)
        return worker

    async def _keep(self, slot: int, worker: _Worker | None) -> None:
        """Keep the slot filled; cancelled at the end."""
        delay_s = _SHORTEST_DELAY_S
        try:
            while True:
                if worker is not None and await self._outlive(worker) > _SOUND_AFTER_S:
                    delay_s = _SHORTEST_DELAY_S
                await asyncio.sleep(delay_s)
                delay_s = min(2 * delay_s, _LONGEST_DELAY_S)

                # None first: a start that fails must not leave the dead one in the slot.
                worker = None
                try:
                    worker = await self._start_worker(slot)
                    METERS.count(RESTARTS)
                except (ConfigurationError, EnvironmentFailedError, OSError) as error:
                    log.error(
                        "environment_worker_did_not_start",
                        slot=slot,
                        retry_in_s=delay_s,
                        error=str(error),
                    )
        finally:
            if worker is not None:
                await worker.wait(_STOP_GRACE_S)

    async def _outlive(self, worker: _Worker) -> float:
        """Wait until the worker has died; returns the seconds for which that took."""
        began_s = time.monotonic()
        await worker.died.wait()
        exit_code = await worker.wait(_ABORT_GRACE_S)
        log.error("environment_worker_died", slot=worker.slot, pid=worker.pid, exit_code=exit_code)
        return time.monotonic() - began_s

    def _bury(self, worker: _Worker, reason: str) -> None:
        if self._workers.get(worker.slot) is worker:
            del self._workers[worker.slot]
            METERS.set(WORKERS, len(self._workers))
        # A copy, and cleared before anybody hears of it: whoever does closes these sessions.
        lost = list(worker.sessions)
        worker.sessions.clear()
        for session_id in lost:
            self._places.pop(session_id, None)
        self._on_lost(lost, reason)


def _affinity(slot: int, environment: str, task_id: str) -> bytes:
    """A worker's number for a task."""
    # A task id is a caller's text, and may hold what UTF-8 cannot.
    name = f"{slot}\0{environment}\0{task_id}".encode(errors="replace")
    return hashlib.blake2b(name, digest_size=8).digest()


def _log_failed_close(closing: asyncio.Future[Answer]) -> None:
    if closing.cancelled() or closing.exception() is not None:
        return
    answer = closing.result()
    if "failure" in answer:
        log.warning("environment_close_failed", reason=answer["failure"])
