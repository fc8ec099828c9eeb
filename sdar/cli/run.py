"""`sdar run`: a whole run on one machine, every service a process.

It starts the services in order, restarts what dies, shows what the gateway reports, and drains the
services in order. It decides nothing about training; the gateway does.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

import httpx

from sdar.bus.embedded_redis import EmbeddedRedis
from sdar.cli.live import JsonView, LineView, LiveView, View
from sdar.cli.metrics_log import MetricsLog
from sdar.cli.processes import Fleet, ServiceFailedError, ServiceProcess, choose_port
from sdar.cli.report import build_summary, write_report
from sdar.cli.run_directory import RunDirectory
from sdar.cli.status import format_gap
from sdar.config import RunConfig
from sdar.connect import locate_model
from sdar.contracts.errors import BusUnavailableError, CorruptionError
from sdar.contracts.roles import CALLED, REPORTING, ROLES, Port, Role
from sdar.process.settings import load_settings
from sdar.process.text import hide_credentials
from sdar.wire.http_client import find_base_url, open_http
from sdar.wire.security import OPEN, Security

_HOST = "127.0.0.1"
_POLL_S = 1.0
_READY_POLL_S = 0.25
_DRAIN_POLL_S = 0.2
_START_TIMEOUT_S = 300.0
_DRAIN_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 30.0
_FLOW = tuple((role,) for role in REPORTING)
"""Services in the order of the data's flow, in which they are stopped one after the other."""
_AROUND = tuple(role for role in ROLES if role not in REPORTING)
"""Those that the others need to the end."""
INTERRUPTED_EXIT_CODE = 130


class _Interrupted(Exception):
    """The user asked to stop."""


def list_services(config: RunConfig) -> dict[Role, list[str]]:
    """Names of the processes of a run by role, in the order in which they are started.

    Engines come up slowest, so those through which data flow come first. The gateway is last: it
    is ready once a policy is there, which the learner publishes and everyone waits for.
    """
    names: dict[Role, list[str]] = {}
    for role in (*REPORTING, *reversed(_AROUND)):
        row = ROLES[role]
        if not config.has(row.presence):
            continue
        names[role] = [role.value]
        if row.copies:
            num_copies = int(attrgetter(row.copies)(config))
            names[role] = [f"{role}-{index}" for index in range(num_copies)]
    return names


def run_locally(
    config: RunConfig, runs_dir: Path, *, port: int, redis_url: str | None, is_json: bool
) -> int:
    """Run `config` to its end on this machine.

    Returns:
        0 when the run finished, 130 when it was interrupted and drained before its end.

    Raises:
        SdarError: it cannot begin, a service cannot go on, or the account of groups has a gap; what
            was started is stopped.
    """
    # What can be found out now is not left to four services that fail a minute later.
    config = locate_model(config)
    choose_port(_HOST, port)
    if redis_url is not None:
        _check_redis(redis_url)

    view = _open_view(config, is_json)
    with RunDirectory(runs_dir / config.name) as directory, _interruptible():
        is_resumed = directory.prepare(config)
        if is_resumed and directory.summary.exists():
            view.say(
                f"{directory.root} already holds this run, finished. Its report: "
                f"{directory.root / 'report.html'}"
            )
            return 0

        view.say(f"{'Resuming' if is_resumed else 'Starting'} {config.name} in {directory.root}")
        with contextlib.ExitStack() as stack:
            redis: EmbeddedRedis | str
            if redis_url is None:
                # What a commit has promised must be on the disk before it is answered.
                redis = stack.enter_context(EmbeddedRedis(directory.redis, fsync="always"))
            else:
                redis = redis_url
            sitting = _Sitting(config, directory, redis, choose_port(_HOST, port), view)
            # Before Redis ends: services that lost it would only wait for it.
            stack.callback(sitting.fleet.kill)
            return sitting.run()


def _open_view(config: RunConfig, is_json: bool) -> View:
    if is_json:
        return JsonView()
    if sys.stdout.isatty():
        return LiveView(config)
    return LineView(config)


class _Sitting:
    """One sitting of a run: from starting the services to stopping them. A run that is resumed has
    several.
    """

    def __init__(
        self,
        config: RunConfig,
        directory: RunDirectory,
        redis: EmbeddedRedis | str,
        http_port: int,
        view: View,
    ) -> None:
        self.config = config
        self.directory = directory
        self.fleet = Fleet()
        self.view = view
        self.address = f"{_HOST}:{http_port}"
        self._security = Security.from_settings(load_settings())
        self.url = find_base_url(self.address, self._security)
        self._redis = redis
        self._http_port = http_port
        self._http = open_http(self.address, self._security)
        self._metrics = MetricsLog(directory.metrics)
        self._earlier_s = directory.read_wall_s()
        self._began = time.monotonic()

    def run(self) -> int:
        """Run to the end or until Ctrl-C; the exit code, as `run_locally` returns it."""
        try:
            self._start()
            status = self._watch()
        except _Interrupted:
            self.view.say(
                "Draining: finishing running episodes and writing a checkpoint. Ctrl-C again to "
                "stop at once."
            )
            finished = self._drain()
            if finished is None:
                self.view.say(
                    "Stopped. `sdar run` with the same configuration resumes in "
                    f"{self.directory.root}."
                )
                return INTERRUPTED_EXIT_CODE
            status = finished
        except ServiceFailedError:
            self._stop_all()
            raise
        finally:
            self._save_wall_clock()
            self.directory.gateway.unlink(missing_ok=True)
            self.view.close()
        return self._finish(status)

    @property
    def wall_s(self) -> float:
        """Seconds that the run has taken, earlier sittings included."""
        return self._earlier_s + time.monotonic() - self._began

    # ---- up

    def _start(self) -> None:
        self.directory.write_json(self.directory.gateway, {"address": self.address})
        # Tasks in flight name these servers, so each keeps its port over restarts.
        ports = self.directory.choose_ports(_HOST, CALLED)
        shared = self._build_environment(ports)
        for role, names in list_services(self.config).items():
            for name in names:
                grpc_port = ports.get(role) or choose_port(_HOST)
                self._add(name, role, shared | {"SDAR_GRPC_PORT": str(grpc_port)})
        self._wait_until_ready()
        self.view.say(f"All services are ready. Gateway: {self.url}")

    def _build_environment(self, ports: dict[str, int]) -> dict[str, str]:
        """The variables that all services have in common."""
        redis_url = self._redis.url if isinstance(self._redis, EmbeddedRedis) else self._redis
        shared = {
            "SDAR_CONFIG": str(self.directory.config),
            "SDAR_REDIS_URL": redis_url,
            "SDAR_WEIGHTS_URL": str(self.directory.weights.resolve()),
            "SDAR_CHECKPOINTS": str(self.directory.checkpoints.resolve()),
            "SDAR_HOST": _HOST,
        }
        for role in CALLED:
            shared[f"SDAR_{role.upper()}_ADDRESS"] = f"{_HOST}:{ports[role]}"
        return shared

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + _START_TIMEOUT_S
        waiting = self.fleet.not_ready()
        while waiting:
            self._keep_redis()
            self.fleet.check()
            self.view.starting(waiting)
            if time.monotonic() > deadline:
                raise ServiceFailedError(
                    f"Not ready after {_START_TIMEOUT_S:.0f} s: {', '.join(waiting)}. Their logs "
                    f"are in {self.directory.logs}."
                )
            time.sleep(_READY_POLL_S)
            waiting = self.fleet.not_ready()

    def _add(self, name: str, role: Role, environment: dict[str, str]) -> None:
        # The gateway answers probes on the port of its API, over TLS where the run has it.
        is_probed_by_http = ROLES[role].probe_port is Port.HTTP
        probe_port = self._http_port if is_probed_by_http else choose_port(_HOST)
        own = {
            "SDAR_PROBE_PORT": str(probe_port),
            "SDAR_HTTP_PORT": str(self._http_port),
            "SDAR_INSTANCE": name,
        }

        log_path = self.directory.logs / f"{name}.log"
        probe_url = self.url if is_probed_by_http else f"http://{_HOST}:{probe_port}"
        service = ServiceProcess(name, ("serve", role), environment | own, log_path, probe_url)
        service.security = self._security if is_probed_by_http else OPEN
        self.fleet.add(service)

    # ---- watching

    def _watch(self) -> dict[str, Any]:
        """Keep everything up until the run is over; returns its status then."""
        while True:
            self._keep_redis()
            for name in self.fleet.check():
                self.view.say(
                    f"The {name} service died and was started again; its log is "
                    f"{self.directory.logs / name}.log"
                )

            status = self._status()
            if status is not None:
                self.view.show(status, self._metrics, self.wall_s)
                if status["phase"] == "finished":
                    return status
                if status["phase"] == "failed":
                    raise ServiceFailedError(
                        f"The run gave up: {status['detail']} Logs are in {self.directory.logs}."
                    )
            time.sleep(_POLL_S)

    def _keep_redis(self) -> None:
        """Start a Redis that died again: on the same port, with what it had on the disk. Meanwhile
        the services wait.
        """
        if isinstance(self._redis, EmbeddedRedis) and not self._redis.is_running():
            self.view.say(f"Redis died and was started again; its log is {self._redis.log_path}")
            self._redis.start()

    def _status(self) -> dict[str, Any] | None:
        """The gateway's answer; None while it restarts and cannot say where the run stands."""
        try:
            status = self._http.get("/v1/run").raise_for_status().json()
            page = self._http.get("/v1/metrics", params=self._metrics.query()).raise_for_status()
            self._metrics.extend(page.json())
        except httpx.HTTPError:
            return None
        # Below 0 there is no policy yet, so the gateway has nothing to report.
        if status["policy_version"] < 0:
            return None
        return dict(status)

    # ---- down

    def _drain(self) -> dict[str, Any] | None:
        """Stop issuing, let running episodes end, then stop the services in the order of the data's
        flow.

        Returns:
            The run's last status if it came to its end meanwhile, else None.
        """
        status = None
        # A second Ctrl-C cuts all of this short.
        with contextlib.suppress(_Interrupted):
            # Without a gateway nothing is issued either.
            with contextlib.suppress(httpx.HTTPError):
                self._http.post("/v1/run/pause", params={"until_restart": True})
            status = self._wait_for_episodes()
            self._stop(_FLOW)
            # What the learner reported at its end may have been the last that was missing.
            status = self._status()
            self._stop((_AROUND,))

        if status is None or status["phase"] != "finished":
            return None
        return status

    def _wait_for_episodes(self) -> dict[str, Any] | None:
        """Wait for running episodes as long as that helps; the last status that was read."""
        status = None
        deadline = time.monotonic() + _DRAIN_TIMEOUT_S
        while time.monotonic() < deadline:
            status = self._status()
            if status is None:
                break
            is_done = status["ledger"]["running"] == 0 or status["phase"] == "finished"
            # While Redis is away or full, no episode can be handed in.
            is_stuck = status["bus"]["state"] != "ok"
            if is_done or is_stuck:
                break
            time.sleep(_DRAIN_POLL_S)
        return status

    def _stop_all(self) -> None:
        self._stop((*_FLOW, _AROUND))

    def _stop(self, flow: Sequence[tuple[Role, ...]]) -> None:
        for names in flow:
            for killed in self.fleet.stop(names, _STOP_TIMEOUT_S):
                self.view.say(
                    f"The {killed} service did not stop within {_STOP_TIMEOUT_S:.0f} s and was "
                    "killed."
                )

    def _finish(self, status: dict[str, Any]) -> int:
        """Stop everything and write the summary and the report of a run that is over."""
        self._stop_all()
        summary = build_summary(self.config, status, self._metrics.records(), self.wall_s)
        self.directory.write_json(self.directory.summary, summary)
        report = write_report(self.directory.root)
        self.view.finished(summary, report)

        # After the report, which shows what is wrong.
        if status["ledger_gap"]:
            raise CorruptionError(
                f"The run finished with a defect. {format_gap(status)} Keep {self.directory.root} "
                "and tell the project."
            )
        return 0

    def _save_wall_clock(self) -> None:
        self.directory.wall_clock.write_text(f"{self.wall_s:.1f}\n")


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """SIGINT and SIGTERM become `_Interrupted` in the main thread."""

    def interrupt(number: int, frame: object) -> None:
        raise _Interrupted

    before_int = signal.signal(signal.SIGINT, interrupt)
    before_term = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before_int)
        signal.signal(signal.SIGTERM, before_term)


def _check_redis(url: str) -> None:
    import redis

    try:
        client = redis.Redis.from_url(url, socket_timeout=5, socket_connect_timeout=5)
        client.ping()
        client.close()
    except (redis.RedisError, ValueError, OSError) as error:
        reason = str(error).rstrip(".")
        raise BusUnavailableError(
            f"No Redis answers at {hide_credentials(url)}: {reason}. Start one there, correct "
            "--redis, or leave it out to "
            "have one started."
        ) from error
