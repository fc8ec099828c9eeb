"""The processes of a run under faults: Redis, every service, and the links between them.

Supervised as `sdar run` does.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator

import psutil

from loadtest.chaos.faults import ENVS, GATEWAY, LEARNER, REDIS, TEACHER
from loadtest.chaos.proxy import Link
from sdar.bus.embedded_redis import EmbeddedRedis
from sdar.cli.processes import Fleet, ServiceProcess, choose_port
from sdar.cli.run_directory import RunDirectory
from sdar.config import RunConfig

_HOST = "127.0.0.1"
_MAX_RESTARTS = 100
"""More than any schedule kills one service: only one that dies by itself reaches it."""
_STOP_TIMEOUT_S = 30.0
MARKER = "CHAOS_RUN"
"""Environment variable that every process of the run inherits, to find those that outlive it."""


class Deployment:
    """All processes of one run.

    Each service reaches Redis over a link of its own, and all clients reach the environments over
    one. With method `sdar` nothing talks to the teacher but Redis, so there is no link to cut
    there.
    """

    def __init__(self, config: RunConfig, directory: RunDirectory) -> None:
        self.config = config
        self.directory = directory
        self.redis = EmbeddedRedis(directory.redis, fsync="always")
        self.fleet = Fleet(max_restarts=_MAX_RESTARTS)
        self.links: dict[str, Link] = {}
        """By the service whose connections they carry; `envs` carries its clients'."""
        self.is_redis_held_down = False
        self.num_restarts: dict[str, int] = {}
        self._probe_ports: dict[str, int] = {}
        self._ever_seen: set[psutil.Process] = set()

    @property
    def names(self) -> list[str]:
        """Services in the order they are started."""
        rollouts = [f"rollout-{index}" for index in range(self.config.rollout.num_workers)]
        return [*rollouts, LEARNER, TEACHER, ENVS, GATEWAY]

    @property
    def gateway_url(self) -> str:
        return self.probe_url(GATEWAY)

    def probe_url(self, name: str) -> str:
        return f"http://{_HOST}:{self._probe_ports[name]}"

    async def open_links(self) -> None:
        """In the event loop that is to carry them."""
        redis_port = int(self.redis.url.rpartition(":")[2].partition("/")[0])
        self._envs_port = choose_port(_HOST)
        for name in self.names:
            link = Link(self._envs_port if name == ENVS else redis_port)
            await link.open()
            self.links[name] = link

    def start(self, marker: str) -> None:
        """Start Redis' clients. Call it from the thread that stays: the services end with it."""
        shared = {
            "SDAR_CONFIG": str(self.directory.config),
            "SDAR_WEIGHTS_URL": str(self.directory.weights.resolve()),
            "SDAR_CHECKPOINTS": str(self.directory.checkpoints.resolve()),
            "SDAR_HOST": _HOST,
            "SDAR_LOG_FORMAT": "json",
            "SDAR_ENVS_ADDRESS": f"{_HOST}:{self.links[ENVS].port}",
            MARKER: marker,
        }
        for name in self.names:
            self._probe_ports[name] = choose_port(_HOST)
            values = shared | self._name_own_variables(name)
            command = ("serve", name.split("-")[0])
            log_path = self.directory.logs / f"{name}.log"
            self.fleet.add(ServiceProcess(name, command, values, log_path, self.probe_url(name)))

    def _name_own_variables(self, name: str) -> dict[str, str]:
        # The environments' clients are hurt on their way to it, so its own way to Redis is direct.
        redis_url = f"redis://{_HOST}:{self.links[name].port}/0"
        return {
            "SDAR_REDIS_URL": self.redis.url if name == ENVS else redis_url,
            "SDAR_GRPC_PORT": str(self._envs_port if name == ENVS else choose_port(_HOST)),
            "SDAR_PROBE_PORT": str(self._probe_ports[name]),
            "SDAR_HTTP_PORT": str(self._probe_ports[name]),
            "SDAR_INSTANCE": name,
        }

    def keep_up(self) -> list[str]:
        """Start again what died; returns the names."""
        restarted = []
        if not self.is_redis_held_down and not self.redis.is_running():
            self.redis.start()
            restarted.append(REDIS)
        restarted += self.fleet.check()
        for name in restarted:
            self.num_restarts[name] = self.num_restarts.get(name, 0) + 1
        return restarted

    def stop(self) -> list[str]:
        """End the services in the order of the data's flow; returns those that had to be killed."""
        killed = []
        for names in (("rollout",), ("teacher",), ("learner",), ("gateway", "envs")):
            killed += self.fleet.stop(names, _STOP_TIMEOUT_S)
        return killed

    # ---- hurting it

    def pid(self, name: str) -> int | None:
        if name == REDIS:
            return self.redis.pid
        process = self._service(name).process
        return process.pid if process is not None and process.poll() is None else None

    def is_running(self, name: str) -> bool:
        return self.pid(name) is not None

    def kill(self, name: str) -> None:
        """SIGKILL of the process alone: what it started is the supervisor's to clear away."""
        pid = self.pid(name)
        assert pid is not None, f"{name} is not running"
        os.kill(pid, signal.SIGKILL)

    def kill_child(self, name: str, which: int) -> bool:
        """SIGKILL of one process that the service started; tells whether there was one."""
        children = [child for child in self.children(name) if _is_worker(child)]
        if not children:
            return False
        with contextlib.suppress(psutil.NoSuchProcess):
            children[which % len(children)].kill()
        return True

    def signal_all(self, name: str, number: signal.Signals) -> None:
        """Send a signal to the service and what it started."""
        if (pid := self.pid(name)) is not None:
            for process in (psutil.Process(pid), *self.children(name)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(number)

    def children(self, name: str) -> list[psutil.Process]:
        """Living processes that a service started, and those that they started, oldest first."""
        pid = self.pid(name)
        if pid is None:
            return []
        with contextlib.suppress(psutil.NoSuchProcess):
            found = list(psutil.Process(pid).children(recursive=True))
            self._ever_seen.update(found)
            return found
        return []

    def resident_bytes(self, name: str) -> int | None:
        """Resident memory of the service and what it started; None while it is away."""
        pid = self.pid(name)
        if pid is None:
            return None
        total = 0
        for process in (
            [psutil.Process(pid), *self.children(name)] if psutil.pid_exists(pid) else []
        ):
            with contextlib.suppress(psutil.NoSuchProcess):
                total += process.memory_info().rss
        return total or None

    def _service(self, name: str) -> ServiceProcess:
        return next(service for service in self.fleet.services if service.name == name)

    def list_left(self, marker: str) -> list[psutil.Process]:
        """Living processes of the run: those with its marker, and those once seen as a child
        (vLLM's writes its title over its environment)."""
        return [
            process for process in self._ever_seen | set(_find_marked(marker)) if _is_alive(process)
        ]


def _find_marked(marker: str) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if process.environ().get(MARKER) == marker and process.pid != os.getpid():
                yield process


def _is_alive(process: psutil.Process) -> bool:
    """Not a zombie, and not another process under its number."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _is_worker(process: psutil.Process) -> bool:
    """Not multiprocessing's bookkeeper: the ones that do the service's work."""
    try:
        return not any("resource_tracker" in part for part in process.cmdline())
    except psutil.NoSuchProcess:
        return False
