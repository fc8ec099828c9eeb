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
SPAWN_S, SETTLE_S, MEASURE_S = 3.0, 2.0, 6.0
START_TIMEOUT_S, STOP_TIMEOUT_S = 240.0, 60.0
NUM_UPDATES = 5
"""Of the small run, before it is paused: what the gateway then has to tell."""
FIRST_SESSIONS, FIRST_PAGES = 100, 50


def main() -> None:
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
    arguments = parser.parse_args()
    logging.getLogger("locust").setLevel(logging.ERROR)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    if arguments.gateway or arguments.envs:
        for address, measure in (
            (arguments.envs, ramp_environments),
            (arguments.gateway, ramp_gateway),
        ):
            if address:
                show(measure(address, None))
        return
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise SdarError(
            "Figures of one core need another for the users; this machine has one. "
            "Give addresses of servers elsewhere."
        )
    replace_block(PAGE.read_text(encoding="utf-8"), "")  # a page without its marks is said now
    ramps, own = [], psutil.Process()
    pin(own, cores[1:])
    server = dataclasses.replace(OURS, command=_serve_household)
    with serve_on_core(server, CAPACITY, cores[0]) as (process, port):
        wait_for_environments(f"127.0.0.1:{port}")
        ramps.append(ramp_environments(f"127.0.0.1:{port}", process))
        show(ramps[-1])
    pin(own, cores)  # the run inherits it
    with small_run() as (url, gateway):
        pin(own, cores[1:])
        pin(gateway, cores[:1])
        ramps.append(ramp_gateway(url, gateway))
        show(ramps[-1])
    pin(own, cores)  # the machine is described by what this process may use
    if not arguments.dry_run:
        keep(ramps, arguments.circumstances)


def ramp_environments(address: str, server: psutil.Process | None) -> Ramp:
    with driving(EnvironmentUser, address, server) as try_out:
        return climb(
            try_out, FIRST_SESSIONS, "environment server and worker, household", "sessions", TURN_S
        )


def ramp_gateway(url: str, server: psutil.Process | None) -> Ramp:
    with driving(GatewayUser, url, server) as try_out:
        return climb(
            try_out, FIRST_PAGES, "gateway, a paused run of the household", "open pages", REFRESH_S
        )


@contextlib.contextmanager
def driving(users: type, host: str, server: psutil.Process | None) -> Iterator:
    """What plays a stage: brings the users to a number, lets them settle, and measures."""
    environment = Environment(user_classes=[users], host=host)
    runner = environment.create_local_runner()

    def try_out(num_users: int) -> Stage:
        runner.start(num_users, spawn_rate=max(1.0, abs(num_users - runner.user_count) / SPAWN_S))
        with gevent.Timeout(START_TIMEOUT_S):
            while runner.user_count != num_users:
                gevent.sleep(0.05)
        gevent.sleep(SETTLE_S)
        environment.stats.reset_all()
        began, before = time.monotonic(), measure_cpu(server)
        gevent.sleep(MEASURE_S)
        duration_s, after = time.monotonic() - began, measure_cpu(server)
        own, workers, generated, busy = (
            (now - then) / duration_s for now, then in zip(after, before, strict=True)
        )
        total = environment.stats.total
        stage = Stage(
            num_users,
            requests_per_s=total.num_requests / duration_s,
            num_failed=total.num_failures,
            **{
                f"p{p}_ms": float(total.get_response_time_percentile(p / 100) or 0.0)
                for p in (50, 95, 99)
            },
            generator_share=generated,
            server_share=None if server is None else own + workers,
            workers_share=None if server is None else workers,
            memory_bytes=None
            if server is None
            else float(sum(one.memory_full_info().uss for one in family(server))),
            others_share=max(0.0, busy - own - workers - generated),
        )
        print(
            f"  {num_users} users: {stage.requests_per_s:.0f}/s, p99 {stage.p99_ms:.0f} ms, "
            f"{stage.num_failed} failed, other work on {stage.others_share:.2f} cores",
            flush=True,
        )
        for error in environment.stats.errors.values():
            print(
                f"    {error.occurrences} x {error.method} {error.name}: {error.error}", flush=True
            )
        return stage

    try:
        yield try_out
    finally:
        runner.quit()


def family(process: psutil.Process) -> list[psutil.Process]:
    return [process, *process.children(recursive=True)]


def measure_cpu(server: psutil.Process | None) -> tuple[float, float, float, float]:
    """Seconds of CPU time so far: of server, its children, this process and the machine."""
    own, *workers = (
        (sum(one.cpu_times()[:2]) for one in family(server)) if server is not None else (0.0,)
    )
    machine = psutil.cpu_times()
    busy = (
        machine.user + machine.nice + machine.system + machine.irq + machine.softirq + machine.steal
    )
    return own, sum(workers), sum(psutil.Process().cpu_times()[:2]), busy


def pin(process: psutil.Process, cores: list[int]) -> None:
    """All threads there are; those to come inherit it."""
    for thread in process.threads():
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(thread.id, cores)


def _serve_household(port: int, capacity: int) -> list[str]:
    return [
        *(
            sys.executable,
            "-m",
            "sdar.cli.main",
            "env",
            "serve",
            "household",
            "--host",
            "127.0.0.1",
        ),
        *("--port", str(port), "--capacity", str(capacity), "--workers", "1"),
    ]


def wait_for_environments(address: str) -> None:
    with grpc.insecure_channel(address) as channel:
        grpc.channel_ready_future(channel).result(timeout=START_TIMEOUT_S)


@contextlib.contextmanager
def small_run() -> Iterator[tuple[str, psutil.Process]]:
    """URL and process of the gateway of a run that has done some updates and was then paused."""
    with tempfile.TemporaryDirectory(prefix="sdar-loadtest-") as directory:
        log = Path(directory) / "run.log"
        settings = ("training.num_updates=100000", "evaluation.num_tasks=20")
        command = [
            sys.executable,
            "-m",
            "sdar.cli.main",
            "run",
            "examples/household.yaml",
            "--runs-dir",
            directory,
        ]
        command += [part for setting in settings for part in ("--set", setting)]
        with log.open("wb") as file:
            started = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=file, stderr=file
            )
        try:
            url = _wait_for_run(started, log)
            (gateway,) = (
                one
                for one in family(psutil.Process(started.pid))
                if one.cmdline()[-2:] == ["serve", "gateway"]
            )
            yield url, gateway
        finally:
            started.terminate()
            try:
                started.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                started.terminate()
                started.wait(STOP_TIMEOUT_S)


def _wait_for_run(started: subprocess.Popen, log: Path) -> str:
    deadline = time.monotonic() + START_TIMEOUT_S
    with httpx.Client(trust_env=False, timeout=10.0) as http:
        url, is_paused = "", False
        while started.poll() is None and time.monotonic() < deadline:
            gevent.sleep(0.5)
            if not url:
                found = re.search(r"ready\. Gateway: (http://\S+)", log.read_text(errors="replace"))
                url = found[1] if found else ""
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
    PAGE.write_text(
        replace_block(PAGE.read_text(encoding="utf-8"), format_block(results)), encoding="utf-8"
    )
    print(f"Written: {RESULTS.relative_to(ROOT)}, {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    try:
        main()
    except (SdarError, ValueError) as problem:
        sys.exit(f"error: {problem}")
    except KeyboardInterrupt:
        sys.exit(130)
