"""One stack of docker-compose.yml under its own project name: up, down, kills, its answers.

Everything runs by the commands that a person types. A crash is a SIGKILL of a container's first
process from beside it: after `docker kill`, which counts as a stop by hand, Docker starts nothing
again.
"""

from __future__ import annotations

import itertools
import json
import os
import secrets
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any, Self

import httpx

from sdar.contracts.roles import Role
from sdar.process.ports import find_free_port
from tests.kube.cluster import ROOT, CommandError, run, say, wait

ROLES = tuple(map(str, Role))
GROWING = ("issued", "generated", "trained", "skipped", "stale", "failed", "cancelled")
_UP_TIMEOUT_S = 600.0
_COMMAND_TIMEOUT_S = 240.0


class Stack:
    """As a context manager its containers and volumes are removed at the end."""

    def __init__(self) -> None:
        self.project = f"sdar-test-{secrets.token_hex(3)}"
        self.ports = {name: find_free_port("127.0.0.1") for name in ("gateway", "prometheus")}
        os.environ |= {
            "COMPOSE_PROJECT_NAME": self.project,
            "COMPOSE_FILE": str(ROOT / "docker-compose.yml"),
            "SDAR_GATEWAY_PORT": str(self.ports["gateway"]),
            "SDAR_PROMETHEUS_PORT": str(self.ports["prometheus"]),
        }
        self.statuses: list[dict[str, Any]] = []
        """Each answer that `read_status` got."""
        self._token = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            print(self.compose("ps"), self.compose("logs", "--tail=25", *ROLES, "redis"), sep="\n")
        self.compose("down", "--volumes", "--timeout", "5")

    # ---- commands

    def compose(self, *arguments: str, timeout_s: float = _COMMAND_TIMEOUT_S) -> str:
        return run([*find_compose(), *arguments], timeout_s=timeout_s)

    def up(self) -> None:
        began_s = time.monotonic()
        self.compose("up", "--detach", timeout_s=_UP_TIMEOUT_S)
        self._token = ""
        say(f"up in {time.monotonic() - began_s:.0f} s")

    def down(self) -> None:
        began_s = time.monotonic()
        self.compose("down")
        say(f"down in {time.monotonic() - began_s:.0f} s")

    def sdar(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """The `sdar` command of this checkout, from outside."""
        command = [str(ROOT / ".venv" / "bin" / "sdar"), *arguments]
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=_COMMAND_TIMEOUT_S,
            cwd=ROOT,
            check=False,
        )

    # ---- containers

    def find(self, service: str) -> str:
        """Id of a service's container."""
        return self.compose("ps", "--quiet", service).strip()

    def inspect(self, service: str) -> dict[str, Any]:
        return dict(json.loads(run(["docker", "inspect", self.find(service)]))[0])

    def crash(self, service: str) -> None:
        state = self.inspect(service)["State"]
        image = self.inspect("gateway")["Config"]["Image"]
        as_root = [
            "docker",
            "run",
            "--rm",
            "--pid=host",
            "--user",
            "0:0",
            "--entrypoint",
            "python",
            image,
        ]
        run([*as_root, "-c", f"import os; os.kill({int(state['Pid'])}, 9)"])

        def is_back() -> bool:
            now = self.inspect(service)
            return bool(now["State"]["Running"] and now["State"]["StartedAt"] != state["StartedAt"])

        wait(f"{service} to be started again", is_back, 60.0)
        say(f"killed {service}; Docker started it again")

    def copy(self, service: str, path: str, to: Path) -> None:
        run(["docker", "cp", f"{self.find(service)}:{path}", str(to)])

    def list_zombies(self, service: str) -> list[str]:
        """Names of the dead processes of a container that nobody has collected."""
        stats = self.compose(
            "exec", "-T", service, "sh", "-c", "cat /proc/[0-9]*/stat 2>/dev/null || true"
        )
        rows = [line.rpartition(")") for line in stats.splitlines()]
        return [head.partition("(")[2] for head, _, rest in rows if rest.split()[:1] == ["Z"]]

    # ---- what it says of itself

    @property
    def token(self) -> str:
        """The operate token that the stack made for itself."""
        if not self._token:
            lines = self.compose(
                "exec", "-T", "gateway", "cat", "/etc/sdar-auth/tokens"
            ).splitlines()
            self._token = next(
                line.partition(":")[2] for line in lines if line.startswith("operate:")
            )
        return self._token

    def ask(self, path: str, token: str | None = None) -> httpx.Response:
        """A GET of the gateway, by the port that Docker published.

        Raises httpx.HTTPError where it does not answer.
        """
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        return httpx.get(
            f"http://127.0.0.1:{self.ports['gateway']}{path}", headers=headers, timeout=5.0
        )

    def read_status(self) -> dict[str, Any] | None:
        """The run's status; None while the gateway doesn't answer or hasn't read it yet."""
        try:
            answer = self.ask("/v1/run", self.token)
        except (httpx.HTTPError, CommandError):
            return None
        status = answer.raise_for_status().json()
        if status["phase"] == "starting":
            return None
        self.statuses.append(status)
        return dict(status)

    def wait_for_updates(self, num_updates: int, timeout_s: float) -> dict[str, Any]:
        return self._wait(
            f"update {num_updates}", lambda status: status["num_updates"] >= num_updates, timeout_s
        )

    def wait_for_the_end(self, timeout_s: float) -> dict[str, Any]:
        return self._wait(
            "the end of the run",
            lambda status: status["phase"] in ("finished", "failed"),
            timeout_s,
        )

    def _wait(self, what: str, is_reached: Any, timeout_s: float) -> dict[str, Any]:
        def find() -> dict[str, Any] | None:
            status = self.read_status()
            return status if status and is_reached(status) else None

        def tell() -> str:
            return (
                f"update {self.statuses[-1]['num_updates']}"
                if self.statuses
                else "the gateway does not answer yet"
            )

        return wait(what, find, timeout_s, tell=tell)

    def query_targets(self) -> dict[str, str]:
        """Health of each target that Prometheus scrapes, by role."""
        answer = httpx.get(
            f"http://127.0.0.1:{self.ports['prometheus']}/api/v1/targets", timeout=5.0
        ).raise_for_status()
        targets = answer.json()["data"]["activeTargets"]
        return {target["labels"]["role"]: target["health"] for target in targets}


def find_compose() -> list[str]:
    """Compose v2 where docker has it, else docker-compose."""
    try:
        run(["docker", "compose", "version"])
    except CommandError:
        return ["docker-compose"]
    return ["docker", "compose"]


def missing_images() -> list[str]:
    """Images that docker-compose.yml names and this machine lacks.

    Raises CommandError without Docker.
    """
    if shutil.which("docker") is None:
        raise CommandError("there is no docker command")
    config = run([*find_compose(), "--file", str(ROOT / "docker-compose.yml"), "config"])
    wanted = sorted(
        {
            line.split("image:")[1].strip()
            for line in config.splitlines()
            if line.strip().startswith("image:")
        }
    )
    there = run(["docker", "images", "--format", "{{.Repository}}:{{.Tag}}"]).split()
    return [image for image in wanted if image not in there and "grafana" not in image]


def check_account(statuses: list[dict[str, Any]]) -> None:
    """Both equations hold in each status; what only grows never shrinks, over restarts."""
    for status in statuses:
        ledger = status["ledger"]
        closed = sum(
            ledger[name] for name in ("trained", "skipped", "stale", "failed", "cancelled")
        )
        assert status["ledger_gap"] == 0, status
        assert ledger["issued"] == ledger["running"] + ledger["generated"], ledger
        assert ledger["generated"] == closed + ledger["buffered"], ledger
    for before, after in itertools.pairwise(statuses):
        shrunk = [name for name in GROWING if after["ledger"][name] < before["ledger"][name]]
        assert not shrunk, (shrunk, before["ledger"], after["ledger"])
