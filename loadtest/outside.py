"""The command of `make loadtest`: more and more users of `locustfile.py`, until a server is full.

Without addresses it starts its own: an environment server with one worker, then a small real run
whose gateway is asked once the run is paused. Each has a core, its users another; CPU time is
measured too, since its figures hold where cores are shared. With addresses (`--gateway`, `--envs`)
it drives what is there, prints, and keeps nothing.
"""

from __future__ import annotations

from locust.env import Environment  # before all else that opens sockets: it patches them for gevent

# isort: split
import argparse
import contextlib
import dataclasses
import datetime
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import gevent
import grpc
import httpx
import psutil

from loadtest.environment_sessions import OURS, serve_on_core
from loadtest.locustfile import REFRESH_S, SEED, TURN_S, EnvironmentUser, GatewayUser
from loadtest.page import ROOT, describe_machine, format_table
from loadtest.ramp import Ramp, Stage, build_stages_table, climb, format_block, replace_block
from sdar.contracts.errors import SdarError

RESULTS = ROOT / "loadtest" / "results_outside.json"
PAGE = ROOT / "docs" / "operations.md"
CAPACITY = 8192
SPAWN_S = 3.0
SETTLE_S = 2.0
MEASURE_S = 6.0
START_TIMEOUT_S = 240.0
STOP_TIMEOUT_S = 60.0
NUM_UPDATES = 5
"""Of the small run, before it is paused, so that its gateway has something to answer."""
FIRST_SESSIONS = 100
FIRST_PAGES = 50


def main() -> None:
    arguments = _parse()
    logging.getLogger("locust").setLevel(logging.ERROR)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    if arguments.envs:
        show(ramp_environments(arguments.envs, None))
    if arguments.gateway:
        show(ramp_gateway(arguments.gateway, None))
    if arguments.envs or arguments.gateway:
        return

    # A page without its marks is an error now, not after the measurement.
    replace_block(PAGE.read_text(encoding="utf-8"), "")
    ramps = measure_own_servers()
    if not arguments.dry_run:
        keep(ramps, arguments.circumstances)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.outside",
        description="Drive servers from outside until they are full.",
    )
    parser.add_argument("--gateway", metavar="URL", help="a gateway that is there already")
    parser.add_argument(
        "--envs", metavar="HOST:PORT", help="environment servers that are there already"
    )
    parser.add_argument(
        "--circumstances", default="", help='for the page, such as "beside other work"'
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="keep nothing, leave the page as it is"
    )
    return parser.parse_args()


def measure_own_servers() -> list[Ramp]:
    """Ramps of servers that are started here, each on a core of its own.

    Raises SdarError: the machine has one core only.
    """
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise SdarError(
            "Figures of one core need another for the users; this machine has one. "
            "Give addresses of servers elsewhere."
        )
    own = psutil.Process()

    pin(own, cores[1:])
    server = dataclasses.replace(OURS, command=_serve_household)
    with serve_on_core(server, CAPACITY, cores[0]) as (process, port):
        address = f"127.0.0.1:{port}"
        wait_for_environments(address)
        of_environments = ramp_environments(address, process)
        show(of_environments)

    # The run inherits this process's cores; only its gateway is asked, so only that has one core.
    pin(own, cores)
    with small_run() as (url, gateway):
        pin(own, cores[1:])
        pin(gateway, cores[:1])
        of_gateway = ramp_gateway(url, gateway)
        show(of_gateway)

    # The machine is described by what this process may use.
    pin(own, cores)
    return [of_environments, of_gateway]


def ramp_environments(address: str, server: psutil.Process | None) -> Ramp:
    what = "environment server and worker, household"
    with contextlib.closing(Drive(EnvironmentUser, address, server)) as drive:
        return climb(drive.try_out, FIRST_SESSIONS, what, "sessions", TURN_S)


def ramp_gateway(url: str, server: psutil.Process | None) -> Ramp:
    what = "gateway, a paused run of the household"
    with contextlib.closing(Drive(GatewayUser, url, server)) as drive:
        return climb(drive.try_out, FIRST_PAGES, what, "open pages", REFRESH_S)


class Drive:
    """Plays stages: brings the users to a number, lets them settle, and measures."""

    def __init__(self, users: type, host: str, server: psutil.Process | None) -> None:
        self._environment = Environment(user_classes=[users], host=host)
        self._runner = self._environment.create_local_runner()
        self._server = server

    def try_out(self, num_users: int) -> Stage:
        self._bring(num_users)
        gevent.sleep(SETTLE_S)

        self._environment.stats.reset_all()
        began = time.monotonic()
        before = measure_cpu(self._server)
        gevent.sleep(MEASURE_S)
        duration_s = time.monotonic() - began

        stage = self._build_stage(num_users, measure_cpu(self._server) - before, duration_s)
        print(
            f"  {num_users} users: {stage.requests_per_s:.0f}/s, p99 {stage.p99_ms:.0f} ms, "
            f"{stage.num_failed} failed, other work on {stage.others_share:.2f} cores",
            flush=True,
        )
        for error in self._environment.stats.errors.values():
            what = f"{error.method} {error.name}: {error.error}"
            print(f"    {error.occurrences} x {what}", flush=True)
        return stage

    def close(self) -> None:
        self._runner.quit()

    def _bring(self, num_users: int) -> None:
        difference = abs(num_users - self._runner.user_count)
        self._runner.start(num_users, spawn_rate=max(1.0, difference / SPAWN_S))
        with gevent.Timeout(START_TIMEOUT_S):
            while self._runner.user_count != num_users:
                gevent.sleep(0.05)

    def _build_stage(self, num_users: int, cpu: CpuSeconds, duration_s: float) -> Stage:
        total = self._environment.stats.total
        # None before the first answer.
        stage = Stage(
            num_users,
            requests_per_s=total.num_requests / duration_s,
            num_failed=total.num_failures,
            p50_ms=float(total.get_response_time_percentile(0.5) or 0.0),
            p95_ms=float(total.get_response_time_percentile(0.95) or 0.0),
            p99_ms=float(total.get_response_time_percentile(0.99) or 0.0),
            generator_share=cpu.generator / duration_s,
            others_share=max(0.0, cpu.others / duration_s),
        )
        if self._server is None:
            return stage
        memory_bytes = sum(process.memory_full_info().uss for process in family(self._server))
        return dataclasses.replace(
            stage,
            server_share=(cpu.server + cpu.workers) / duration_s,
            workers_share=cpu.workers / duration_s,
            memory_bytes=float(memory_bytes),
        )


def family(process: psutil.Process) -> list[psutil.Process]:
    return [process, *process.children(recursive=True)]


@dataclasses.dataclass(frozen=True, slots=True)
class CpuSeconds:
    """Seconds of CPU time: of the server, its children, this process and the whole machine."""

    server: float
    workers: float
    generator: float
    machine: float

    @property
    def others(self) -> float:
        return self.machine - self.server - self.workers - self.generator

    def __sub__(self, before: CpuSeconds) -> CpuSeconds:
        return CpuSeconds(
            self.server - before.server,
            self.workers - before.workers,
            self.generator - before.generator,
            self.machine - before.machine,
        )


def measure_cpu(server: psutil.Process | None) -> CpuSeconds:
    """So far."""
    # The server's own seconds first, then those of its children; none of a server elsewhere.
    processes = [] if server is None else family(server)
    times = [sum(process.cpu_times()[:2]) for process in processes]

    machine = psutil.cpu_times()
    busy = (
        machine.user + machine.nice + machine.system + machine.irq + machine.softirq + machine.steal
    )
    generator = sum(psutil.Process().cpu_times()[:2])
    return CpuSeconds(sum(times[:1]), sum(times[1:]), generator, busy)


def pin(process: psutil.Process, cores: list[int]) -> None:
    """All threads there are; those to come inherit it."""
    for thread in process.threads():
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(thread.id, cores)


def _serve_household(port: int, capacity: int) -> list[str]:
    command = [sys.executable, "-m", "sdar.cli.main", "env", "serve", "household"]
    address = ["--host", "127.0.0.1", "--port", str(port)]
    return [*command, *address, "--capacity", str(capacity), "--workers", "1"]


def wait_for_environments(address: str) -> None:
    with grpc.insecure_channel(address) as channel:
        grpc.channel_ready_future(channel).result(timeout=START_TIMEOUT_S)


@contextlib.contextmanager
def small_run() -> Iterator[tuple[str, psutil.Process]]:
    """URL and process of the gateway of a run that has done some updates and was then paused."""
    command = [sys.executable, "-m", "sdar.cli.main", "run", "examples/household.yaml"]
    for setting in ("training.num_updates=100000", "evaluation.num_tasks=20"):
        command += ["--set", setting]
    with tempfile.TemporaryDirectory(prefix="sdar-loadtest-") as directory:
        log = Path(directory) / "run.log"
        with log.open("wb") as file:
            started = subprocess.Popen(
                [*command, "--runs-dir", directory],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
            )
        try:
            url = _wait_for_run(started, log)
            yield url, _find_gateway(psutil.Process(started.pid))
        finally:
            _stop(started)


def _find_gateway(run: psutil.Process) -> psutil.Process:
    [gateway] = [one for one in family(run) if one.cmdline()[-2:] == ["serve", "gateway"]]
    return gateway


def _stop(run: subprocess.Popen[bytes]) -> None:
    """A second SIGTERM ends at once a run that doesn't end after the first."""
    run.terminate()
    try:
        run.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        run.terminate()
        run.wait(STOP_TIMEOUT_S)


def _wait_for_run(started: subprocess.Popen[bytes], log: Path) -> str:
    """The gateway's URL, once the run has its updates, is paused and plays nothing any more."""
    deadline = time.monotonic() + START_TIMEOUT_S
    url = ""
    is_paused = False
    with httpx.Client(trust_env=False, timeout=10.0) as http:
        while started.poll() is None and time.monotonic() < deadline:
            gevent.sleep(0.5)
            if not url:
                url = _read_url(log)
                continue

            run = http.get(f"{url}/v1/run").json()
            if not is_paused and run["num_updates"] >= NUM_UPDATES:
                is_paused = http.post(f"{url}/v1/run/pause").is_success
            if is_paused and not run["ledger"]["running"]:
                return url
    raise SdarError(
        f"The small run did not come to {NUM_UPDATES} updates. It said: "
        f"{log.read_text(errors='replace')[-2000:]}"
    )


def _read_url(log: Path) -> str:
    """The gateway's, from the line that `sdar run` prints once all is ready; else empty."""
    found = re.search(r"ready\. Gateway: (http://\S+)", log.read_text(errors="replace"))
    return found[1] if found else ""


def show(ramp: Ramp) -> None:
    print(
        f"\n{format_table(build_stages_table(ramp))}\n"
        f"\nholds {ramp.best.num_users} {ramp.unit}; then {ramp.limit}\n",
        flush=True,
    )


def keep(ramps: list[Ramp], circumstances: str) -> None:
    results = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": "make loadtest",
        "seed": SEED,
        "machine": describe_machine().split(";")[0],
        "circumstances": circumstances,
        "ramps": [ramp.to_json() for ramp in ramps],
    }
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    page = replace_block(PAGE.read_text(encoding="utf-8"), format_block(results))
    PAGE.write_text(page, encoding="utf-8")
    print(f"Written: {RESULTS.relative_to(ROOT)}, {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    try:
        main()
    except (SdarError, ValueError) as problem:
        sys.exit(f"error: {problem}")
    except KeyboardInterrupt:
        sys.exit(130)
