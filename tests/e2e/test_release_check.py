"""What `helm test` runs, against a real run on this machine."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sdar.bus.embedded_redis import EmbeddedRedis
from tests.e2e.test_local_run import ask, services_of, start

Check = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def runs_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def check(runs_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Check]:
    """The command with the variables that the chart gives it, while a long run trains."""
    changes = {"name": "checked", "training.num_updates": 10_000}
    with (
        EmbeddedRedis(tmp_path_factory.mktemp("redis")) as redis,
        start(runs_dir, redis.url, **changes) as sitting,
    ):
        sitting.read_until_update(1)
        services = {name: process.environ() for name, process in services_of(sitting).items()}
        policy = f"127.0.0.1:{services['rollout-0']['SDAR_GRPC_PORT']}"
        variables = {
            name: services["rollout-0"][name] for name in ("SDAR_CONFIG", "SDAR_ENVS_ADDRESS")
        }
        variables["SDAR_GATEWAY_URL"] = f"http://127.0.0.1:{services['gateway']['SDAR_HTTP_PORT']}"

        def run(**arguments: str) -> subprocess.CompletedProcess[str]:
            options = [
                word
                for name, value in ({"policy": policy} | arguments).items()
                for word in (f"--{name}", value)
            ]
            command = [sys.executable, "-m", "sdar.cli.release_check", *options]
            return subprocess.run(
                command,
                capture_output=True,
                text=True,
                env=os.environ | variables,
                timeout=120,
                check=False,
            )

        yield run


def test_a_run_that_trains_passes_by_an_episode_of_its_policy_and_a_newer_version(
    check: Check,
) -> None:
    done = check()

    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"household, played by the policy: [1-8] turns, reward", done.stdout)
    before = int(re.search(r"running, policy version (\d+)", done.stdout)[1])  # type: ignore[index]
    moved = re.search(r"Policy version (\d+): it moves", done.stdout)
    assert moved is not None
    assert int(moved[1]) > before


def test_a_policy_that_nobody_serves_fails_with_its_address(check: Check) -> None:
    done = check(policy="127.0.0.1:1", **{"timeout-s": "2"})

    assert done.returncode == 1
    assert "127.0.0.1:1" in done.stderr


def test_a_run_that_stands_still_fails_with_what_it_waits_for(check: Check, runs_dir: Path) -> None:
    ask(runs_dir, "pause")
    # What was on its way is still trained, at most three batches of it.
    done = next(done for _ in range(5) if (done := check(**{"timeout-s": "5"})).returncode)

    assert done.returncode == 1
    assert re.search(r"After 5 s: The policy is still at version \d+: paused", done.stderr)
