"""Access to the cluster: kubectl and helm as child processes, own namespaces, waiting.

Nothing here names a machine: the cluster is the one of KUBECONFIG (or kubectl's default), helm the
one of $HELM or PATH.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from sdar.contracts.roles import Role

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm"
ROLES = tuple(map(str, Role))
NAME = "app.kubernetes.io/name=sdar"
_POLL_S = 2.0
_TELL_EVERY_S = 15.0
_began_s = time.monotonic()

T = TypeVar("T")


def say(text: str) -> None:
    """One line of progress, with the seconds since the test began."""
    print(f"{time.monotonic() - _began_s:7.1f} s  {text}", flush=True)


class CommandError(AssertionError):
    """A command that should have succeeded did not; the message holds what it said."""


def run(command: Sequence[str], *, stdin: str | None = None, timeout_s: float = 120.0) -> str:
    """Standard output of a command. Raises CommandError: it failed, or did not end in time."""
    try:
        done = subprocess.run(
            command, input=stdin, capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise CommandError(
            f"{' '.join(command[:6])} did not end within {timeout_s:.0f} s."
        ) from error
    if done.returncode != 0:
        raise CommandError(f"{' '.join(command[:12])}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def wait(
    what: str,
    find: Callable[[], T | None],
    timeout_s: float,
    *,
    tell: Callable[[], str] | None = None,
    poll_s: float = _POLL_S,
) -> T:
    """What `find` returns once that is true; says every 15 s what is waited for. Raises
    AssertionError after `timeout_s`.
    """
    began_s = told_s = time.monotonic()
    while True:
        found = find()
        if found:
            return found
        now_s = time.monotonic()
        if now_s - began_s > timeout_s:
            raise AssertionError(
                f"Waited {timeout_s:.0f} s in vain for {what}. {tell() if tell else ''}"
            )
        if now_s - told_s > _TELL_EVERY_S:
            told_s = now_s
            say(f"waiting for {what}{': ' + tell() if tell else ''}")
        time.sleep(poll_s)


@dataclass(frozen=True, slots=True)
class Pod:
    """What the test asks of a pod; `role` is its component label."""

    name: str
    uid: str
    role: str
    is_ready: bool
    is_ending: bool
    num_restarts: int
    phase: str

    @classmethod
    def parse(cls, raw: dict[str, Any]) -> Pod:
        metadata, status = raw["metadata"], raw.get("status", {})
        conditions = {
            condition["type"]: condition["status"] for condition in status.get("conditions", ())
        }
        return cls(
            metadata["name"],
            metadata["uid"],
            metadata.get("labels", {}).get("app.kubernetes.io/component", ""),
            conditions.get("Ready") == "True",
            "deletionTimestamp" in metadata,
            sum(container["restartCount"] for container in status.get("containerStatuses", ())),
            status.get("phase", "Unknown"),
        )


class Cluster:
    """kubectl within one namespace, and helm.

    Args:
        values: files that every release is installed with, such as one that names a registry.
    """

    def __init__(self, namespace: str, values: Sequence[str] = ()) -> None:
        self.namespace = namespace
        self.values = tuple(argument for path in values for argument in ("--values", path))
        self._helm = find_helm() or "helm"

    def kubectl(self, *arguments: str, stdin: str | None = None, timeout_s: float = 120.0) -> str:
        return run(
            ["kubectl", "--namespace", self.namespace, *arguments], stdin=stdin, timeout_s=timeout_s
        )

    def helm(self, *arguments: str, timeout_s: float = 600.0) -> str:
        return run([self._helm, "--namespace", self.namespace, *arguments], timeout_s=timeout_s)

    def get(self, *arguments: str) -> Any:
        """`kubectl get`, parsed."""
        return json.loads(self.kubectl("get", *arguments, "--output", "json"))

    def apply(self, *manifests: dict[str, Any]) -> None:
        listed = {"apiVersion": "v1", "kind": "List", "items": list(manifests)}
        self.kubectl("apply", "--filename", "-", stdin=json.dumps(listed))

    def list_pods(self, selector: str = NAME) -> list[Pod]:
        return [Pod.parse(raw) for raw in self.get("pods", "--selector", selector)["items"]]

    def run_python(
        self, target: str, script: str, *arguments: str, timeout_s: float = 120.0
    ) -> str:
        """What `script` prints inside a pod; `target` is a pod, or kind/name of what owns one."""
        return self.kubectl(
            "exec",
            "--stdin",
            target,
            "--",
            "python",
            "-",
            *arguments,
            stdin=script,
            timeout_s=timeout_s,
        )

    def diagnose(self, selector: str = NAME) -> str:
        """For a failure: pods, newest events, and the last words of whatever is not ready."""
        parts = [self._try("get", "pods,pvc", "--output", "wide")]
        parts.append(
            "\n".join(self._try("get", "events", "--sort-by", ".lastTimestamp").splitlines()[-15:])
        )
        for pod in self.list_pods(selector):
            if not pod.is_ready:
                parts += [
                    f"--- {pod.name}",
                    self._try("logs", pod.name, "--all-containers", "--tail", "15"),
                ]
            if pod.num_restarts:
                parts += [
                    f"--- {pod.name}, before",
                    self._try("logs", pod.name, "--previous", "--tail", "15"),
                ]
        return "\n".join(parts)

    def _try(self, *arguments: str) -> str:
        try:
            return self.kubectl(*arguments)
        except CommandError as error:
            return str(error)


def find_helm() -> str | None:
    return os.environ.get("HELM") or shutil.which("helm")
