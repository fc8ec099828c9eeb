"""Measures a run's wall time: the share each service waits for work, and how busy its core is.

A short `sdar run` of the demo, every service a process. Rollout, teacher and learner say themselves
how long they had nothing to do (their records in metrics.jsonl); gateway and environments only
answer, so for them waiting is what the processor did not spend on them. The first updates and the
evaluations before and after are left out.
"""

from __future__ import annotations

import itertools
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from loadtest.comparison import Measurement, Say, Table
from loadtest.workloads import RUN_FILE
from sdar.cli.metrics_log import read_metrics
from sdar.contracts.errors import SdarError

RUN_NAME = "bench"
NUM_UPDATES = 20
NUM_LEFT_OUT = 4
OVERRIDES = {
    "name": RUN_NAME,
    "training.num_updates": NUM_UPDATES,
    "training.warmup_updates": 1,
    "evaluation.num_tasks": 16,
    "evaluation.every_updates": 0,
}
TIMEOUT_S = 420.0
SERVICES = ("gateway", "rollout", "teacher", "envs", "learner")

Record = dict[str, Any]


def measure(say: Say) -> Measurement:
    with tempfile.TemporaryDirectory(prefix="sdar-bench-") as runs:
        processor = _run(Path(runs), say)
        records = read_metrics(Path(runs) / RUN_NAME / "metrics.jsonl")
    window = find_window(records)
    waits = compute_waiting(records, window)
    rows = []
    for service in SERVICES:
        busy = processor.compute_share(service, window)
        rows.append((service, f"{waits.get(service, 1 - busy):.0%}", f"{busy:.0%}"))
    say(f"over {window.duration_s:.0f} s")
    return Measurement(
        tables=(
            Table("Share of wall time", ("service", "waits", "keeps a core busy"), tuple(rows)),
        ),
        notes=(
            f"examples/household.yaml, updates {NUM_LEFT_OUT + 1} to {NUM_UPDATES}: "
            f"{window.duration_s:.0f} s, "
            f"{window.duration_s / (NUM_UPDATES - NUM_LEFT_OUT):.1f} s an update.",
            "A service waits while it has nothing to do: rollout has no group in hand, the teacher "
            "has nothing to score, the learner has no whole batch (all by their own clocks). For "
            "gateway and envs the column is 100% less the share in which they keep a core busy. "
            "Processor time includes that of the processes that a service starts.",
        ),
    )


@dataclass(frozen=True, slots=True)
class Window:
    """Unix times between which shares are taken."""

    begin_s: float
    end_s: float

    @property
    def duration_s(self) -> float:
        return self.end_s - self.begin_s

    def holds(self, at_s: float) -> bool:
        return self.begin_s < at_s <= self.end_s


def find_window(records: Sequence[Record]) -> Window:
    """From the end of the last update that is left out to the end of the last one."""
    ends = [record["at_s"] for record in records if record["service"] == "learner"]
    if len(ends) <= NUM_LEFT_OUT:
        raise ValueError(
            f"The run reported {len(ends)} updates, "
            f"more than {NUM_LEFT_OUT} are needed. See its logs."
        )
    return Window(ends[NUM_LEFT_OUT - 1], ends[-1])


def compute_waiting(records: Sequence[Record], window: Window) -> dict[str, float]:
    """Share of the window that each service which reports it was waiting."""
    values: defaultdict[str, list[Record]] = defaultdict(list)
    for record in records:
        if window.holds(record["at_s"]):
            values[record["service"]].append(record["values"])
    shares = {}
    for service in ("rollout", "teacher"):
        if values[service]:
            # Records come at even intervals, so their mean is the share of the window.
            reported = [value["waiting_share"] for value in values[service]]
            shares[service] = statistics.mean(reported)
    waited_s = sum(value["wait_s"] for value in values["learner"])
    shares["learner"] = waited_s / sum(value["total_s"] for value in values["learner"])
    return shares


@dataclass
class ProcessorTime:
    """CPU seconds of each service over time: (Unix time, seconds so far)."""

    samples: defaultdict[str, list[tuple[float, float]]] = field(
        default_factory=lambda: defaultdict(list)
    )

    def sample(self, supervisor: psutil.Process) -> None:
        at_s = time.time()
        for process in supervisor.children():
            service = _service_of(process)
            if service:
                self.samples[service].append(
                    (at_s, sum(map(_cpu_seconds, [process, *_children(process)])))
                )

    def compute_share(self, service: str, window: Window) -> float:
        """CPU seconds a second inside the window."""
        inside = [sample for sample in self.samples[service] if window.holds(sample[0])]
        if len(inside) < 2:
            raise ValueError(
                f"{service} was seen {len(inside)} times in {window.duration_s:.0f} s: "
                "too short for a share."
            )
        (first_s, first), (last_s, last) = inside[0], inside[-1]
        return (last - first) / (last_s - first_s)


def _run(runs: Path, say: Say) -> ProcessorTime:
    """Run the demo to its end, looking at its processes every second."""
    command = [sys.executable, "-m", "sdar.cli.main", "run", str(RUN_FILE), "--runs-dir", str(runs)]
    for key, value in OVERRIDES.items():
        command += ["--set", f"{key}={value}"]
    processor = ProcessorTime()
    say(f"sdar run, {NUM_UPDATES} updates")
    with (
        (runs / "output").open("wb") as output,
        subprocess.Popen(command, stdout=output, stderr=output) as run,
    ):
        supervisor, deadline = psutil.Process(run.pid), time.monotonic() + TIMEOUT_S
        while run.poll() is None:
            if time.monotonic() > deadline:
                run.terminate()
                raise SdarError(
                    f"The run was not finished after {TIMEOUT_S:.0f} s: {_tail(runs / 'output')}"
                )
            processor.sample(supervisor)
            _wait(run, 1.0)
    if run.returncode:
        raise SdarError(f"The run failed: {_tail(runs / 'output')}")
    return processor


def _wait(process: subprocess.Popen[bytes], timeout_s: float) -> None:
    """Wait for the process, at most so long."""
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        return


def _service_of(process: psutil.Process) -> str:
    """The service a child of the supervisor runs, by its command line; empty for anything else."""
    try:
        words = process.cmdline()
    except psutil.Error:
        return ""
    return next(
        (name for word, name in itertools.pairwise(words) if word == "serve" and name in SERVICES),
        "",
    )


def _children(process: psutil.Process) -> Iterator[psutil.Process]:
    try:
        yield from process.children(recursive=True)
    except psutil.Error:
        return


def _cpu_seconds(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except psutil.Error:
        return 0.0
    return float(times.user + times.system)


def _tail(path: Path) -> str:
    return " / ".join(path.read_text(errors="replace").splitlines()[-5:])
