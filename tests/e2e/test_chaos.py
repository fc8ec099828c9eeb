"""A short `make chaos`: services are killed and paused, connections cut; nothing is lost."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from loadtest.chaos.faults import SERVICES
from sdar.cli.processes import end_with_parent

ROOT = Path(__file__).parents[2]
MINUTES = 1.0
SEED = 27
_TIMEOUT_S = 900.0


@dataclass
class Outcome:
    code: int
    output: str
    report: dict[str, Any]

    @property
    def broken(self) -> list[str]:
        return [
            f"{check['promise']}: {check['evidence']}"
            for check in self.report["checks"]
            if not check["is_kept"]
        ]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    directory = tmp_path_factory.mktemp("chaos")
    command = [
        sys.executable,
        "-m",
        "loadtest.chaos",
        "--minutes",
        str(MINUTES),
        "--seed",
        str(SEED),
        "--out",
        str(directory),
    ]
    done = subprocess.run(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=_TIMEOUT_S,
        check=False,
        preexec_fn=end_with_parent,
    )
    assert (directory / "chaos.json").exists(), done.stdout[-4000:]
    return Outcome(done.returncode, done.stdout, json.loads((directory / "chaos.json").read_text()))


def test_a_run_whose_every_service_is_killed_keeps_every_promise(outcome: Outcome) -> None:
    assert outcome.broken == []
    assert outcome.code == 0


def test_its_faults_are_kills_of_every_service_a_pause_and_severed_connections(
    outcome: Outcome,
) -> None:
    done = Counter((fault["kind"], fault["target"]) for fault in outcome.report["faults"])
    assert {target for kind, target in done if kind == "kill"} == {
        *SERVICES,
        "rollout-0",
        "rollout-1",
    }
    assert {kind for kind, _ in done} >= {"kill", "kill child", "pause", "sever"}


def test_it_says_how_long_every_service_took_to_come_back(outcome: Outcome) -> None:
    measured = {row["service"]: row["ready_p50_s"] for row in outcome.report["recoveries"]}
    assert measured.keys() == {*SERVICES, "rollout"}
    assert all(seconds is not None and seconds >= 0.0 for seconds in measured.values())


def test_every_fault_is_told_with_the_time_it_came(outcome: Outcome) -> None:
    told = re.findall(r"^ *[\d.]+ s  fault \d+/", outcome.output, flags=re.MULTILINE)
    assert len(told) == len(outcome.report["faults"])
