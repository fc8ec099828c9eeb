"""One release of the chart: install, upgrade, uninstall, its gateway's answers and its pods."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import httpx
from prometheus_client.parser import text_string_to_metric_families

from loadtest.chaos.observer import Sample
from sdar.bus.ledger import LedgerAccount
from sdar.cli.processes import end_with_parent
from sdar.contracts.types import GroupOutcome
from tests.kube.cluster import CHART, NAME, Cluster, CommandError, Pod, run, say, wait

GATEWAY_PORT = 8080
PROBE_PORT = 9100
READY_TIMEOUT_S = 420.0
_HTTP_TIMEOUT_S = 5.0
_COMMAND_TIMEOUT_S = 120.0
_SAMPLE_EVERY_S = 1.0
_SCRIPTS = Path(__file__).parent / "inside"


class AwayError(Exception):
    """The gateway does not answer now."""


class Gateway:
    """HTTP to a gateway through `kubectl port-forward`, opened anew when its pod has gone."""

    def __init__(self, cluster: Cluster, fullname: str) -> None:
        self._cluster = cluster
        self._fullname = fullname
        self._forward: subprocess.Popen[str] | None = None
        self._http: httpx.Client | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._http is not None:
            self._http.close()
            self._http = None
        if self._forward is not None:
            self._forward.terminate()
            self._forward.wait()
            assert self._forward.stdout is not None
            self._forward.stdout.close()
            self._forward = None

    def ask(self, method: str, path: str) -> Any:
        """The parsed answer. Raises AwayError."""
        try:
            if self._http is None:
                self._open()
            assert self._http is not None
            answer = self._http.request(method, path)
            answer.raise_for_status()
            return (
                answer.json()
                if answer.headers.get("content-type", "").startswith("application/json")
                else answer.text
            )
        except (httpx.HTTPError, CommandError, json.JSONDecodeError) as error:
            self.close()
            raise AwayError(str(error)) from error

    def _open(self) -> None:
        token = self._read_token()
        self._forward = subprocess.Popen(
            [
                *("kubectl", "--namespace", self._cluster.namespace),
                *("port-forward", f"deployment/{self._fullname}-gateway", f":{GATEWAY_PORT}"),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=end_with_parent,
        )
        assert self._forward.stdout is not None
        line = self._forward.stdout.readline()
        found = re.search(r"127\.0\.0\.1:(\d+) ->", line)
        if found is None:
            raise CommandError(f"kubectl port-forward: {line.strip() or 'ended'}")
        self._http = httpx.Client(
            base_url=f"http://127.0.0.1:{found[1]}",
            headers={"Authorization": f"Bearer {token}"},
            timeout=_HTTP_TIMEOUT_S,
            trust_env=False,
        )

    def _read_token(self) -> str:
        secret = self._cluster.get("secret", f"{self._fullname}-auth")["data"]
        lines = base64.b64decode(secret["tokens"]).decode().splitlines()
        return next(line.removeprefix("operate:") for line in lines if line.startswith("operate:"))


class Watch:
    """Reads the status each second in a thread, so no moment of the account is missed."""

    def __init__(self, cluster: Cluster, fullname: str) -> None:
        self.samples: list[Sample] = []
        self.num_missed = 0
        self._gateway = Gateway(cluster, fullname)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, name="watch", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        with self._gateway as gateway:
            while not self._ended.wait(_SAMPLE_EVERY_S):
                try:
                    status = gateway.ask("GET", "/v1/run")
                except AwayError:
                    self.num_missed += 1
                    continue
                if status["phase"] == "starting":
                    self.num_missed += (
                        1  # a gateway that reads where the run stands has no numbers yet
                    )
                    continue
                self.samples.append(
                    Sample(
                        time.time(),
                        status["ledger"],
                        status["ledger_gap"],
                        int(status["bus"]["used_bytes"]),
                    )
                )


class Release:
    """One release in the cluster's namespace. As a context manager it is uninstalled and its claims
    are deleted at the end.

    Args:
        is_kept: goes on with one that is installed, and leaves it.
    """

    def __init__(self, cluster: Cluster, name: str, *, is_kept: bool = False) -> None:
        self.cluster = cluster
        self.name = name
        self.fullname = name if "sdar" in name else f"{name}-sdar"
        self.selector = f"{NAME},app.kubernetes.io/instance={name}"
        self.gateway = Gateway(cluster, self.fullname)
        self.is_installed = is_kept and name in cluster.helm("list", "--short").split()
        self._is_kept = is_kept

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.gateway.close()
        if self._is_kept:
            return
        if self.is_installed:
            self.uninstall()
        self.cluster.kubectl(
            "delete",
            "persistentvolumeclaims",
            "--selector",
            f"app.kubernetes.io/instance={self.name}",
        )

    # ---- helm

    def install(self, **values: Any) -> str:
        say(f"helm install {self.name} ./helm{_show(values)}")
        self.is_installed = True
        return self.cluster.helm(
            "install", self.name, str(CHART), *self.cluster.values, *_set(values)
        )

    def upgrade(self, **values: Any) -> None:
        """Change some values and keep all others."""
        say(f"helm upgrade {self.name} ./helm --reuse-values{_show(values)}")
        self.cluster.helm("upgrade", self.name, str(CHART), "--reuse-values", *_set(values))

    def uninstall(self) -> str:
        say(f"helm uninstall {self.name}")
        self.gateway.close()
        self.is_installed = False
        told = self.cluster.helm("uninstall", self.name)
        wait("the pods to be gone", lambda: not self.pods(), 180.0, tell=self._tell_pods)
        return told

    def test(self) -> str:
        return self.cluster.helm("test", self.name, "--timeout", "300s")

    # ---- pods

    def pods(self, role: str = "") -> list[Pod]:
        """Those of one role or of all, without the one of `helm test`."""
        found = self.cluster.list_pods(
            self.selector + (f",app.kubernetes.io/component={role}" if role else "")
        )
        return [pod for pod in found if pod.role != "check"]

    def lives(self) -> dict[str, tuple[str, int]]:
        """Uid and restarts by name, to see that a pod is the same; of none on its way out."""
        return {pod.name: (pod.uid, pod.num_restarts) for pod in self.pods() if not pod.is_ending}

    def sdar(self, *arguments: str, expected_code: int = 0) -> str:
        """What the `sdar` command of this checkout says about the release, its error included."""
        command = [sys.executable, "-m", "sdar.cli.main", *arguments]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_COMMAND_TIMEOUT_S, check=False
        )
        assert done.returncode == expected_code, (
            f"sdar {' '.join(arguments)}: {done.stdout}{done.stderr}"
        )
        return done.stdout + done.stderr

    @property
    def address(self) -> tuple[str, ...]:
        """The options of `sdar` that name it."""
        return ("--release", self.name, "--namespace", self.cluster.namespace)

    def wait_ready(self, counts: Mapping[str, int], timeout_s: float = READY_TIMEOUT_S) -> float:
        """Wait until each role has just so many ready pods; returns the seconds that took."""
        began_s = time.monotonic()

        def is_ready() -> bool:
            pods = self.pods()
            for role, number in counts.items():
                own = [pod for pod in pods if pod.role == role]
                if len(own) != number or not all(map(_is_up, own)):
                    return False
            return True

        try:
            wait(f"ready pods ({_join(counts)})", is_ready, timeout_s, tell=self._tell_pods)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.cluster.diagnose(self.selector)}") from None
        return time.monotonic() - began_s

    def delete_pod(self, role: str) -> float:
        """Delete one pod of a role; returns the seconds until another is ready in its place."""
        before = [pod for pod in self.pods(role) if not pod.is_ending]
        gone = before[0]
        began_s = time.monotonic()
        self.cluster.kubectl("delete", "pod", gone.name, "--wait=false")

        def is_replaced() -> bool:
            up = {pod.uid for pod in self.pods(role) if _is_up(pod)}
            return len(up - {gone.uid}) == len(before)

        wait(f"another {role} pod", is_replaced, READY_TIMEOUT_S, tell=self._tell_pods, poll_s=1.0)
        return time.monotonic() - began_s

    def _tell_pods(self) -> str:
        return ", ".join(
            f"{pod.name} "
            f"{'ready' if pod.is_ready else pod.phase}{' ending' if pod.is_ending else ''}"
            for pod in self.pods()
        )

    def scrape(self, pod: Pod) -> dict[str, float]:
        """A pod's metrics, summed over labels; asked inside it, past every network policy."""
        port = GATEWAY_PORT if pod.role == "gateway" else PROBE_PORT
        url = f"http://127.0.0.1:{port}/metrics"
        script = f"""
from urllib.request import urlopen
print(urlopen({url!r}, timeout=5).read().decode())
"""
        values: dict[str, float] = {}
        for family in text_string_to_metric_families(self.cluster.run_python(pod.name, script)):
            for sample in family.samples:
                values[sample.name] = values.get(sample.name, 0.0) + sample.value
        return values

    # ---- the run

    def find_status(self) -> dict[str, Any]:
        """The gateway's status; empty while it doesn't answer or doesn't know the run's state."""
        try:
            status: dict[str, Any] = self.gateway.ask("GET", "/v1/run")
        except AwayError:
            return {}
        return status if status["phase"] != "starting" else {}

    def wait_status(self, what: str, is_reached: Any, timeout_s: float) -> dict[str, Any]:
        newest: dict[str, Any] = {}

        def find() -> dict[str, Any] | None:
            newest.clear()
            newest.update(self.find_status())
            return dict(newest) if newest and is_reached(newest) else None

        try:
            return wait(what, find, timeout_s, tell=lambda: describe(newest))
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.cluster.diagnose(self.selector)}") from None

    def wait_updates(self, more: int, timeout_s: float = 300.0) -> float:
        """Wait until `more` further updates are made; returns the seconds that took."""
        began_s = time.monotonic()
        now = self.wait_status("the gateway's answer", bool, timeout_s)["num_updates"]
        self.wait_status(
            f"update {now + more}", lambda status: status["num_updates"] >= now + more, timeout_s
        )
        return time.monotonic() - began_s

    def read_account(self) -> tuple[LedgerAccount, dict[GroupOutcome, list[int]]]:
        """The account as Redis keeps it, and the numbers of all closed groups by outcome."""
        raw = json.loads(self._run_inside(f"deployment/{self.fullname}-gateway", "account.py"))
        closed = {GroupOutcome(name): numbers for name, numbers in raw["closed"].items()}
        counts = {outcome: raw["counts"][outcome.value] for outcome in closed}
        still_open = {int(number): is_generated for number, is_generated in raw["open"].items()}
        account = LedgerAccount(raw["issued"], raw["generated"], counts, still_open)
        return account, closed

    def read_trained_groups(self) -> list[list[str]]:
        """Group ids of each optimizer step, from the learner's newest checkpoint."""
        found: list[list[str]] = json.loads(
            self._run_inside(f"statefulset/{self.fullname}-learner", "trained_groups.py")
        )
        return found

    def _run_inside(self, target: str, script: str) -> str:
        return self.cluster.run_python(target, (_SCRIPTS / script).read_text()).splitlines()[-1]


def describe(status: Mapping[str, Any]) -> str:
    """Where a run stands, in one line."""
    if not status:
        return "no answer"
    workers = ", ".join(f"{number} {name}" for name, number in status["instances"].items())
    alarms = "".join(f", {alarm['name']}" for alarm in status["alarms"])
    progress = f"update {status['num_updates']} of {status['target_updates']}"
    return f"{status['phase']}, {progress}, {workers}{alarms}"


def list_left(cluster: Cluster, instance: str) -> dict[str, list[str]]:
    """Every object of the namespace that carries the release's label, by kind."""
    kinds = run(
        ["kubectl", "api-resources", "--namespaced", "--verbs=list,delete", "--output=name"]
    ).split()
    selector = f"app.kubernetes.io/instance={instance}"
    found = cluster.get(",".join(kinds), "--selector", selector)["items"]
    left: dict[str, list[str]] = {}
    for item in found:
        left.setdefault(item["kind"], []).append(item["metadata"]["name"])
    return left


def _is_up(pod: Pod) -> bool:
    return pod.is_ready and not pod.is_ending


def _set(values: Mapping[str, Any]) -> list[str]:
    """`--set-json` arguments; a key's dots are written as two underscores."""
    return [
        part
        for key, value in values.items()
        for part in ("--set-json", f"{key.replace('__', '.')}={json.dumps(value)}")
    ]


def _show(values: Mapping[str, Any]) -> str:
    return "".join(f" --set {key.replace('__', '.')}={value}" for key, value in values.items())


def _join(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{number} {role}" for role, number in counts.items())


def describe_cluster(versions: Sequence[str] = ()) -> str:
    """Kubernetes' and helm's versions, nodes and what they have. Never a host name."""
    nodes = json.loads(run(["kubectl", "get", "nodes", "--output", "json"]))["items"]
    told = [
        f"{node['status']['nodeInfo']['kubeletVersion']} "
        f"with {node['status']['capacity']['cpu']} CPUs"
        for node in nodes
    ]
    return ", ".join([f"Kubernetes nodes: {' and '.join(told)}", *versions])
