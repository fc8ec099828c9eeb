"""A short run of real processes, vLLM, DeepSpeed, Redis and gRPC ends well when disturbed."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from sdar.bus.embedded_redis import EmbeddedRedis
from sdar.bus.protocol import BEFORE_FIRST
from sdar.bus.redis import RedisBus
from sdar.cli.processes import end_with_parent
from sdar.config import RunConfig, load_config
from sdar.contracts import codec
from sdar.contracts.streams import Stream
from sdar.contracts.types import ScoredTrajectory
from tests.collector import Received, collecting
from tests.e2e.test_bad_input import read_command

ROOT = Path(__file__).parents[2]
SETTINGS = {
    "name": "e2e",
    # an update takes 0.1 s: there must be some left when the disturber has looked
    "training.num_updates": 80,
    "training.groups_per_update": 2,
    "training.group_size": 4,
    "training.checkpoint_every": 2,
    "evaluation.num_tasks": 24,
    "rollout.max_concurrent_episodes": 32,
}
FORGED_GROUP = "group-99999999"


@dataclass
class Sitting:
    """One `sdar run` process and what it printed."""

    process: subprocess.Popen[str]
    events: list[dict[str, Any]] = field(default_factory=list)

    def read_until(self, event: str, timeout_s: float = 240.0) -> dict[str, Any]:
        deadline = time.monotonic() + timeout_s
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.events.append(json.loads(line))
            if self.events[-1]["event"] == event:
                return self.events[-1]
            assert time.monotonic() < deadline, f"no {event} after {timeout_s} s"
        raise AssertionError(f"the run ended without {event}: {self.events[-3:]}")

    def read_until_update(self, number: int) -> dict[str, Any]:
        while (status := self.read_until("update")["status"])["num_updates"] < number:
            pass
        return dict(status)

    def end(self) -> int:
        assert self.process.stdout is not None
        self.events += [json.loads(line) for line in self.process.stdout]
        return self.process.wait(60)

    def __enter__(self) -> Sitting:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


def start(
    runs_dir: Path, redis_url: str, variables: Mapping[str, str] | None = None, **changes: object
) -> Sitting:
    options = [
        text for key, value in (SETTINGS | changes).items() for text in ("--set", f"{key}={value}")
    ]
    command = [
        sys.executable,
        "-m",
        "sdar.cli.main",
        "run",
        "examples/household.yaml",
        "--runs-dir",
        str(runs_dir),
    ]
    command += ["--redis", redis_url, "--output", "json", *options]
    environment = os.environ | (variables or {})
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment,
        preexec_fn=end_with_parent,
    )
    return Sitting(process)


def ask(runs_dir: Path, *arguments: str) -> str:
    """What `sdar` says of the run that is under `runs_dir`."""
    command = [sys.executable, "-m", "sdar.cli.main", *arguments, "--runs-dir", str(runs_dir)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def services_of(sitting: Sitting) -> dict[str, psutil.Process]:
    """The run's service processes by name (their instance name stands in their environment)."""
    children = psutil.Process(sitting.process.pid).children()
    return {
        child.environ()["SDAR_INSTANCE"]: child
        for child in children
        if "serve" in read_command(child)
    }


async def first_scored_group(bus: RedisBus, config: RunConfig) -> list[ScoredTrajectory]:
    """All trajectories of one group of the first policy, as the learner gets them."""
    groups: dict[str, list[ScoredTrajectory]] = {}
    cursor = BEFORE_FIRST
    async with asyncio.timeout(240):
        while True:
            for entry in await bus.tail(Stream.SCORED, cursor, 100, block_s=1.0):
                cursor = entry.entry_id
                scored = codec.decode_scored_trajectory(entry.payload)
                group = groups.setdefault(scored.trajectory.group_id, [])
                group.append(scored)
                if len(group) == config.training.group_size and all(
                    s.trajectory.max_policy_version == 0 for s in group
                ):
                    return group


async def forge_stale_group(bus: RedisBus, group: list[ScoredTrajectory]) -> None:
    """Publish a copy of an old group under a name of its own: whole, well-formed and too old."""
    payloads = []
    for scored in group:
        assert scored.score is not None
        trajectory_id = scored.trajectory.trajectory_id.replace(
            scored.trajectory.group_id, FORGED_GROUP
        )
        trajectory = dataclasses.replace(
            scored.trajectory, group_id=FORGED_GROUP, trajectory_id=trajectory_id
        )
        score = dataclasses.replace(scored.score, trajectory_id=trajectory_id)
        payloads.append(codec.encode_scored_trajectory(ScoredTrajectory(trajectory, score)))
    await bus.publish(Stream.SCORED, payloads)


async def disturb(
    sitting: Sitting, config: RunConfig, redis_url: str, runs_dir: Path
) -> dict[str, int]:
    """Pause, kill the rollout worker, slip in a stale group; returns the process ids before."""
    bus = RedisBus(redis_url, config.name, config.stream_consumers)
    group = await first_scored_group(bus, config)
    await asyncio.to_thread(sitting.read_until_update, 3)
    assert "e2e is paused" in ask(runs_dir, "pause")
    assert json.loads(ask(runs_dir, "status", "--json"))["phase"] == "paused"
    assert "e2e is running" in ask(runs_dir, "resume")
    before = services_of(sitting)
    os.kill(before["rollout-0"].pid, signal.SIGKILL)
    await asyncio.to_thread(sitting.read_until_update, config.training.max_staleness + 2)
    await forge_stale_group(bus, group)
    await bus.close()
    return {name: process.pid for name, process in before.items()}


@dataclass
class Finished:
    directory: Path
    summary: dict[str, Any]
    updates: list[dict[str, Any]]
    pids: dict[str, int]
    code: int
    messages: list[str]
    spans: list[Received]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    runs_dir = tmp_path_factory.mktemp("runs")
    config = load_config(ROOT / "examples" / "household.yaml", dict(SETTINGS))
    with (
        EmbeddedRedis(tmp_path_factory.mktemp("redis")) as redis,
        collecting() as (collector, endpoint),
        start(runs_dir, redis.url, {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint}) as sitting,
    ):
        pids = asyncio.run(disturb(sitting, config, redis.url, runs_dir))
        sitting.read_until("finished")
        code = sitting.end()
        directory = runs_dir / "e2e"
        lines = [
            json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()
        ]
        updates = [
            line["values"]
            for line in lines
            if line["service"] == "learner" and "success_mean" in line["values"]
        ]
        messages = [event["message"] for event in sitting.events if event["event"] == "message"]
        summary = json.loads((directory / "summary.json").read_text())
        yield Finished(directory, summary, updates, pids, code, messages, collector.spans)


def test_the_run_finishes_all_its_updates_and_the_policy_version_advances(
    finished: Finished,
) -> None:
    assert finished.code == 0
    assert finished.summary["num_updates"] == SETTINGS["training.num_updates"]
    assert finished.summary["evaluations"][-1]["policy_version"] >= SETTINGS["training.num_updates"]


def test_a_killed_rollout_worker_does_not_stop_the_run(finished: Finished) -> None:
    assert any(
        "rollout-0 service died and was started again" in message for message in finished.messages
    )
    assert finished.summary["ledger"]["failed"] == 0


def test_a_stale_group_is_refused(finished: Finished) -> None:
    assert sum(values["num_groups_stale"] for values in finished.updates) >= 1


def test_no_trained_token_is_staler_than_the_bound(finished: Finished) -> None:
    assert finished.summary["staleness_max"] <= finished.summary["max_staleness"]
    assert (
        max(values["staleness_max"] for values in finished.updates)
        <= finished.summary["max_staleness"]
    )


def test_the_ledger_closes(finished: Finished) -> None:
    ledger = finished.summary["ledger"]
    closed = sum(ledger[name] for name in ("trained", "skipped", "stale", "failed", "cancelled"))
    assert ledger["gap"] == 0
    assert ledger["issued"] == closed
    found = ledger["trained"]
    assert found == SETTINGS["training.num_updates"] * SETTINGS["training.groups_per_update"]


def test_both_evaluations_are_complete_and_pooled_over_the_fixed_list(finished: Finished) -> None:
    evaluations = finished.summary["evaluations"]
    found = [(e["num_updates"], e["is_greedy"]) for e in evaluations]
    assert found == [(0, False), (0, True), (80, False), (80, True)]
    assert {e["num_episodes"] for e in evaluations} == {24}
    assert {e["num_failed"] for e in evaluations} == {0}


def test_the_run_leaves_its_files(finished: Finished) -> None:
    expected = (
        "config.yaml",
        "metrics.jsonl",
        "report.html",
        "summary.json",
        "logs/learner.log",
        "plots/success.png",
    )
    assert [name for name in expected if not (finished.directory / name).is_file()] == []
    assert list((finished.directory / "checkpoints").iterdir())


def test_the_logs_of_all_services_are_read_in_the_order_of_time(finished: Finished) -> None:
    lines = [
        json.loads(line) for line in ask(finished.directory.parent, "logs", "--json").splitlines()
    ]
    assert {line["source"] for line in lines} >= {
        "gateway",
        "rollout-0",
        "teacher",
        "envs",
        "learner",
    }
    assert any("batch_trained" in line.get("message", "") for line in lines)
    assert "batch_trained" not in ask(
        finished.directory.parent, "logs", "learner", "--level", "warning"
    )


def test_the_processes_of_a_run_trace_a_group_together(finished: Finished) -> None:
    """Each process sends its own spans; the killed one took its last with it."""
    traces: defaultdict[bytes, list[Received]] = defaultdict(list)
    for span in finished.spans:
        traces[span.trace_id].append(span)
    wanted = {"gateway.issue", "teacher.score", "learner.trained"}
    whole = [trace for trace in traces.values() if wanted.issubset(span.name for span in trace)]
    assert whole
    for trace in whole:
        ids = {span.span_id for span in trace}
        assert len(ids) == len(trace)
        services = {
            span.resource["service.name"]
            for span in trace
            if not span.parent_id or span.parent_id in ids
        }
        if services == {"sdar-gateway", "sdar-rollout", "sdar-teacher", "sdar-learner"}:
            break
    else:
        raise AssertionError("no trace has the spans of all four")
    # vLLM can trace too, which nobody asked for.
    assert {span.name.split(".")[0] for span in finished.spans} == {
        "gateway",
        "rollout",
        "environment",
        "teacher",
        "learner",
    }


def test_no_process_outlives_the_run(finished: Finished) -> None:
    assert [name for name, pid in finished.pids.items() if psutil.pid_exists(pid)] == []


def test_an_interrupted_run_drains_and_resumes_without_training_anything_twice(
    tmp_path: Path,
) -> None:
    # More updates than the drain can finish: one takes 0.1 s.
    changes = {"name": "resumed", "training.num_updates": 40}
    with EmbeddedRedis(tmp_path / "redis") as redis:
        with start(tmp_path / "runs", redis.url, **changes) as first:
            before = first.read_until_update(2)
            first.process.send_signal(signal.SIGINT)
            assert first.end() == 130
        with start(tmp_path / "runs", redis.url, **changes) as second:
            status = second.read_until("update")["status"]
            assert status["num_updates"] >= before["num_updates"]
            # Equal if nothing was trained while draining.
            assert status["policy_version"] >= before["policy_version"]
            summary = second.read_until("finished")["summary"]
            assert second.end() == 0
    assert summary["num_updates"] == 40
    assert summary["ledger"]["trained"] == 80
    assert summary["ledger"]["gap"] == 0
