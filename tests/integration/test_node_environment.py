"""The Node example passes the conformance suite and is played by a rollout worker."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from sdar.contracts.errors import InvalidInputError
from sdar.contracts.types import Task
from services.rollout.environment_client import GrpcEnvironmentClient
from tests.integration.commands import ROOT, check_in_full, run_sdar, server_process

EXAMPLE = ROOT / "examples" / "environments" / "node"
CACHE = ROOT / "build" / "node-example"
INSTALL_TIMEOUT_S = 300.0

# Four litres with jugs of three and five: 5|0 -> 2|3 -> 2|0 -> 0|2 -> 5|2 -> 4|3.
SOLUTION = (
    "fill large",
    "pour large into small",
    "empty small",
    "pour large into small",
    "fill large",
    "pour large into small",
)
TASK = Task(
    environment="jugs",
    split="train",
    task_id="jugs-3-5-4",
    task_type="measure",
    description="",
    seed=0,
)


@pytest.fixture(scope="module")
def packages() -> Path:
    """The example's packages as its lock file has them, installed once and kept under build/."""
    if shutil.which("npm") is None:
        pytest.fail(
            "The Node example needs Node.js with npm. Install Node.js 18 or later, "
            "then run this test again."
        )
    lock = (EXAMPLE / "package-lock.json").read_bytes()
    kept = CACHE / hashlib.sha256(lock).hexdigest()[:16] / "node_modules"
    if not kept.exists():
        install(kept.parent)
    return kept


def install(directory: Path) -> None:
    """`npm ci` elsewhere, then one rename: no partial install is taken for a whole one."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as aside:
        for name in ("package.json", "package-lock.json"):
            shutil.copy(EXAMPLE / name, aside)
        command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
        done = subprocess.run(
            command,
            cwd=aside,
            capture_output=True,
            text=True,
            timeout=INSTALL_TIMEOUT_S,
            check=False,
        )
        assert done.returncode == 0, (
            f"npm ci failed; does this machine reach a package registry? {done.stderr[-500:]}"
        )
        directory.mkdir(exist_ok=True)
        os.rename(Path(aside) / "node_modules", directory / "node_modules")


@pytest.fixture
def command(packages: Path) -> list[str]:
    # The sources run in place, for they read ../../../proto; the packages are elsewhere.
    return ["env", f"NODE_PATH={packages}", "node", "server.js", "--port", "0", "--capacity", "16"]


async def test_the_node_server_passes_the_conformance_suite_in_full(command: list[str]) -> None:
    async with server_process(command, EXAMPLE) as server:
        await check_in_full(server.address)
    assert server.code == 0


@pytest.mark.parametrize("capacity", ["many", "0", "1.5"])
def test_a_node_server_without_a_sensible_capacity_does_not_start(
    command: list[str], capacity: str
) -> None:
    ended = subprocess.run(
        [*command, f"--capacity={capacity}"],
        cwd=EXAMPLE,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert ended.returncode == 2
    assert f"--capacity is {capacity}, expected a number of sessions" in ended.stderr


async def test_a_rollout_worker_plays_an_episode_on_the_node_server(command: list[str]) -> None:
    async with server_process(command, EXAMPLE) as server:
        client = GrpcEnvironmentClient(server.address, step_timeout_s=5.0, open_patience_s=5.0)
        profile = await client.describe("jugs")
        assert (profile.identity.name, profile.identity.version) == ("jugs", "1")
        session = await client.open_session(TASK, "key")
        assert session.observation == "The small jug holds 0 of 3 litres, the large jug 0 of 5."
        outcomes = [
            await client.step(session.session_id, index, text)
            for index, text in enumerate(SOLUTION)
        ]
        with pytest.raises(InvalidInputError, match="has no task"):
            await client.open_session(Task("jugs", "train", "chess", "", "", 0), "other key")
        await client.close_session(session.session_id)
        await client.close()
    assert [outcome.reward for outcome in outcomes] == [0, 0, 0, 0, 0, 1]
    assert [outcome.is_terminated for outcome in outcomes] == [False] * 5 + [True]
    assert outcomes[-1].observation == "The small jug holds 3 of 3 litres, the large jug 4 of 5."
    assert outcomes[-1].is_success
    assert outcomes[-1].reward_components == {"success": 1.0}


async def test_a_person_plays_the_node_server_with_a_seed(command: list[str]) -> None:
    """Seed 2: the small jug has two litres, so after the first move two are left to go."""
    async with server_process(command, EXAMPLE) as server:
        play = ("env", "play", server.address, "--task", "jugs-3-5-4", "--seed", "2")
        typed = "\n".join(
            ("pour small into large", "fill small", "pour small into large", "dig", "")
        )
        ended = await run_sdar(*play, typed=typed)
    assert ended.code == 0, ended.stderr
    assert "The small jug holds 2 of 3 litres, the large jug 0 of 5." in ended.stdout
    assert "The small jug holds 0 of 3 litres, the large jug 5 of 5." in ended.stdout
    assert "Nothing happens. " in ended.stdout


def test_the_lock_file_names_no_registry() -> None:
    lock = json.loads((EXAMPLE / "package-lock.json").read_text())
    assert len(lock["packages"]) > 5
    assert not [name for name, package in lock["packages"].items() if "resolved" in package]
    assert all("integrity" in package for name, package in lock["packages"].items() if name)
