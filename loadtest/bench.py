"""The command `python -m loadtest.bench`: the list of measurements, run one after the other.

Each runs in a process of its own, so that thread counts, memory and a crash of one reach no other.
What is finished is saved at once; the exit code is 1 if any failed. A missed target is a result,
not a failure.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from loadtest.comparison import Measurement
from loadtest.page import ROOT, describe_machine, save_result, write_page
from loadtest.workloads import SEED
from sdar.process.telemetry import configure_logging

MEASUREMENTS = {
    "rollout": "loadtest.rollout_throughput",
    "learner": "loadtest.learner_step",
    "logprobs": "loadtest.logprob_memory",
    "stream": "loadtest.stream_throughput",
    "weights": "loadtest.weight_publication",
    "guarantees": "loadtest.guarantees",
    "waiting": "loadtest.service_waiting",
    "sessions": "loadtest.environment_sessions",
    "alfworld": "loadtest.alfworld_engine",
    "webshop": "loadtest.webshop_steps",
    "search": "loadtest.search_steps",
}
"""Name to the module whose `measure(say)` returns a `Measurement`, in the order of the page."""
GROUPS = {"environments": ("sessions", "alfworld", "webshop", "search")}
"""Name to measurements that are run by it."""


def main() -> None:
    arguments = _parse()
    if arguments.child:
        _measure_here(*arguments.child)
        return
    if arguments.page:
        write_page()
        return

    names = _list_names(arguments.only or MEASUREMENTS)
    failed = []
    for number, name in enumerate(names, start=1):
        if not _measure(name, f"{number}/{len(names)}", arguments.dry_run):
            failed.append(name)
    if failed:
        sys.exit(
            f"error: {', '.join(failed)} failed; the lines above say why. Their old figures stay."
        )


def _list_names(asked: Iterable[str]) -> list[str]:
    """The measurements asked for, those of a group in its place."""
    names: list[str] = []
    for name in asked:
        names += GROUPS.get(name, (name,))
    return names


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.bench", description="Measure against named peers."
    )
    known = (*MEASUREMENTS, *GROUPS)
    parser.add_argument(
        "--only", action="append", choices=known, metavar="NAME", help=f"of {', '.join(known)}"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="measure, print, and leave results and page as they are",
    )
    parser.add_argument(
        "--page",
        action="store_true",
        help="measure nothing, write docs/benchmarks.md from what is kept",
    )
    parser.add_argument("--child", nargs=2, metavar=("NAME", "FILE"), help=argparse.SUPPRESS)
    return parser.parse_args()


def _measure(name: str, place: str, is_dry_run: bool) -> bool:
    """Run one measurement in a child and save it; returns whether that worked."""
    print(f"[{place}] {name}", flush=True)
    began = time.monotonic()
    measurement = _measure_in_a_child(name)
    if measurement is None:
        return False
    show(measurement)
    if is_dry_run:
        return True

    entry = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "duration_s": round(time.monotonic() - began, 1),
        "command": f"python -m loadtest.bench --only {name}",
        "seed": SEED,
        "machine": describe_machine(),
        "measurement": measurement.to_json(),
    }
    save_result(name, entry, list(MEASUREMENTS))
    return True


def _measure_in_a_child(name: str) -> Measurement | None:
    """None where the child failed."""
    # One thread per process: two pools on one core are three times slower.
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", **os.environ}
    with tempfile.TemporaryDirectory(prefix="sdar-bench-") as directory:
        file = Path(directory) / "measurement.json"
        child = subprocess.run(
            [sys.executable, "-m", "loadtest.bench", "--child", name, str(file)],
            cwd=ROOT,
            env=environment,
        )
        if child.returncode or not file.exists():
            return None
        return Measurement.from_json(json.loads(file.read_text(encoding="utf-8")))


def show(measurement: Measurement) -> None:
    for comparison in measurement.comparisons:
        verdict = ""
        if comparison.is_met is not None:
            verdict = f", {comparison.target}: {'met' if comparison.is_met else 'MISSED'}"
        print(
            f"  {comparison.what}: {comparison.ratio:.3g} of {comparison.peer}{verdict}", flush=True
        )
    for table in measurement.tables:
        for row in (table.columns, *table.rows):
            print(f"  {' | '.join(row)}", flush=True)


def _measure_here(name: str, file: str) -> None:
    configure_logging("bench", name, "warning", "text")
    module = importlib.import_module(MEASUREMENTS[name])
    measurement: Measurement = module.measure(lambda text: print(f"  {text}", flush=True))
    Path(file).write_text(json.dumps(measurement.to_json()), encoding="utf-8")


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
