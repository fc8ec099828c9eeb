"""Each image alone: no root, a read-only file system, no port without tokens, ends on SIGTERM."""

from __future__ import annotations

import json
import secrets
import signal
import subprocess
import time

import pytest
import yaml

from tests.compose.stack import ROLES
from tests.kube.cluster import ROOT, run, wait

# What `docker run` needs to be as strict as the compose file and the chart are.
STRICT = (
    "--read-only",
    "--cap-drop=ALL",
    "--security-opt=no-new-privileges",
    "--tmpfs=/tmp",
    "--tmpfs=/var/cache/sdar:uid=10001",
)
HOUSEHOLD = (
    "--volume",
    f"{ROOT}/examples:/etc/sdar/examples:ro",
    "--env",
    "SDAR_CONFIG=/etc/sdar/examples/household.yaml",
)
_LOG_TIMEOUT_S = 120.0


SERVICES = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
ENVS = SERVICES["envs"]["image"]


@pytest.fixture(params=ROLES)
def image(request):
    return SERVICES[request.param]["image"]


def start(image: str, *options: str) -> str:
    name = f"sdar-test-{secrets.token_hex(4)}"
    run(["docker", "run", "--detach", "--name", name, *STRICT, *HOUSEHOLD, *options, image])
    return name


def read_log(name: str) -> str:
    done = subprocess.run(
        ["docker", "logs", name], capture_output=True, text=True, check=True, timeout=30
    )
    return done.stdout + done.stderr


def has_said(name: str, event: str) -> bool:
    """Whether the log holds the event. Raises AssertionError if the container ended without."""
    is_running = (
        run(["docker", "inspect", "--format", "{{.State.Running}}", name]).strip() == "true"
    )
    log = read_log(name)
    assert is_running or event in log, log
    return event in log


def test_an_image_says_what_it_is_and_runs_without_root(image):
    config = json.loads(run(["docker", "inspect", image]))[0]["Config"]
    role = image.removeprefix("sdar-").partition(":")[0]
    assert config["User"] == "10001:10001"
    assert (config["Entrypoint"], config["Cmd"]) == (["sdar"], ["serve", role])
    assert config["Healthcheck"]["Test"] == ["CMD", "python", "-m", "sdar.process.probe"]
    assert config["Labels"]["org.opencontainers.image.title"] == f"sdar-{role}"
    assert set(config["Labels"]) >= {
        f"org.opencontainers.image.{name}" for name in ("version", "revision", "licenses")
    }


def test_light_images_hold_no_torch(image):
    look = "import importlib.util; print(importlib.util.find_spec('torch'))"
    command = ["docker", "run", "--rm", "--entrypoint", "python", image, "-c", look]
    is_light = image.startswith(("sdar-gateway:", "sdar-envs:"))
    assert (run(command).strip() == "None") is is_light


def test_a_container_ends_on_sigterm_while_it_starts(image):
    name = start(
        image, "--env", "SDAR_INSECURE=true", "--env", "SDAR_REDIS_URL=redis://127.0.0.1:1/0"
    )
    try:
        wait("a handler of SIGTERM", lambda: is_handling(name, signal.SIGTERM), 30.0, poll_s=0.1)
        began_s = time.monotonic()
        run(["docker", "stop", "--time", "60", name], timeout_s=90)
        state = json.loads(run(["docker", "inspect", name]))[0]["State"]
        assert state["ExitCode"] != 128 + signal.SIGKILL, read_log(name)
        assert time.monotonic() - began_s < 30
    finally:
        run(["docker", "rm", "--force", "--volumes", name])


def is_handling(name: str, number: int) -> bool:
    status = run(["docker", "exec", name, "grep", "SigCgt", "/proc/1/status"])
    return bool(int(status.split()[1], 16) >> (number - 1) & 1)


def test_a_container_without_tokens_ends_with_a_sentence_instead_of_listening():
    name = start(ENVS)
    try:
        assert run(["docker", "wait", name], timeout_s=120).strip() == "2", read_log(name)
        assert "SDAR_TOKENS_FILE" in read_log(name)
    finally:
        run(["docker", "rm", "--force", "--volumes", name])


@pytest.mark.parametrize("config", ["alfworld-tiny.yaml", "webshop-tiny.yaml", "search-tiny.yaml"])
def test_environments_of_every_kind_are_served_by_their_image(config):
    name = start(
        ENVS, "--env", "SDAR_INSECURE=true", "--env", f"SDAR_CONFIG=/etc/sdar/examples/{config}"
    )
    try:
        wait(
            "the environment to be served, or an end",
            lambda: has_said(name, "environments_served"),
            _LOG_TIMEOUT_S,
        )
        run(["docker", "exec", name, "python", "-m", "sdar.process.probe", "--ready"])
    finally:
        run(["docker", "rm", "--force", "--volumes", name])
