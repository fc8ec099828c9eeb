"""A Prometheus in the test's namespace that scrapes a release as deploy/prometheus says."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import Any, Self

import httpx
import yaml

from sdar.cli.processes import end_with_parent
from tests.kube.cluster import NAME, ROOT, CommandError, run, say, wait
from tests.kube.release import Release

IMAGE = "prom/prometheus:latest"
_NAME = "prometheus"
_PORT = 9090
_TARGETS = "/data/pods.json"
_WITHOUT_DISCOVERY = "without-discovery.yml"
_READY_TIMEOUT_S = 120.0
_HTTP_TIMEOUT_S = 30.0


class Monitoring:
    """Use as a context manager: all it makes is removed at the end."""

    def __init__(self, release: Release) -> None:
        self._release = release
        self._cluster = release.cluster

    def __enter__(self) -> Self:
        self._cluster.apply(*self._describe())
        self._cluster.kubectl(
            "wait", "--for=condition=Ready", f"pod/{_NAME}", "--timeout", f"{_READY_TIMEOUT_S:.0f}s"
        )
        self._forward = subprocess.Popen(
            [
                "kubectl",
                "--namespace",
                self._cluster.namespace,
                "port-forward",
                f"pod/{_NAME}",
                f":{_PORT}",
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=end_with_parent,
        )
        assert self._forward.stdout is not None
        found = re.search(r"127\.0\.0\.1:(\d+) ->", self._forward.stdout.readline())
        assert found is not None
        self.url = f"http://127.0.0.1:{found[1]}"
        self.finds_pods_itself = "kubernetes_sd_configs" in self._ask("status/config")["yaml"]
        if not self.finds_pods_itself:
            say(
                "This Prometheus was built without discovery of pods: it is told them in a file, "
                "and relabels them as it would."
            )
            targets = json.dumps(self._list_targets())
            self._cluster.kubectl(
                "exec", "--stdin", _NAME, "--", "sh", "-c", f"cat > {_TARGETS}", stdin=targets
            )
        return self

    def __exit__(self, *_: object) -> None:
        self._forward.terminate()
        self._forward.wait()
        assert self._forward.stdout is not None
        self._forward.stdout.close()
        names = [f"{item['kind']}/{item['metadata']['name']}" for item in self._describe()]
        self._cluster.kubectl("delete", "--wait=false", *names)

    def wait_targets(self, pods: set[str]) -> set[str]:
        """Names of the pods scraped with success, once all of `pods` are and none fails."""

        def find() -> set[str] | None:
            results = self._ask("query", query="up")["result"]
            values = {result["metric"]["pod"]: result["value"][1] for result in results}
            return set(values) if pods <= set(values) and set(values.values()) == {"1"} else None

        return wait(f"targets {', '.join(sorted(pods))}", find, _READY_TIMEOUT_S, tell=self._tell)

    def check_dashboards(self) -> str:
        """Ask Prometheus each query of each dashboard; returns the last line of the findings."""
        command = [
            sys.executable,
            "-m",
            "tools.check_dashboards",
            "--prometheus",
            self.url,
            "--run",
            self._release.name,
        ]
        told: list[str] = []

        def find() -> bool:
            try:
                told[:] = run(command).strip().splitlines()
            except CommandError as error:
                told[:] = str(error).splitlines()
                return False
            return True

        wait(
            "data in every panel", find, _READY_TIMEOUT_S, tell=lambda: "; ".join(told), poll_s=10.0
        )
        say(told[-1])
        return told[-1]

    def check_rules(self) -> int:
        """The number of alert rules, all of which were evaluated without an error."""

        def find() -> int:
            rules = [rule for group in self._ask("rules")["groups"] for rule in group["rules"]]
            return len(rules) if rules and all(rule["health"] == "ok" for rule in rules) else 0

        return wait("every alert rule to be evaluated", find, _READY_TIMEOUT_S)

    def _ask(self, path: str, **query: str) -> dict[str, Any]:
        answer = httpx.get(
            f"{self.url}/api/v1/{path}", params=query, trust_env=False, timeout=_HTTP_TIMEOUT_S
        )
        answer.raise_for_status()
        found: dict[str, Any] = answer.json()["data"]
        return found

    def _tell(self) -> str:
        targets = self._ask("targets")["activeTargets"]
        return ", ".join(
            f"{target['scrapeUrl']} {target['health']} {target['lastError']}" for target in targets
        )

    def _list_targets(self) -> list[dict[str, Any]]:
        """What discovery would find: each container port of each pod, with its labels."""
        pods = self._cluster.get("pods", "--selector", NAME)["items"]
        return [
            _describe_target(pod, port)
            for pod in pods
            if "podIP" in pod["status"]
            for container in pod["spec"]["containers"]
            for port in container.get("ports", ())
        ]

    def _build_configs(self) -> dict[str, str]:
        """The project's configuration for this namespace; also for builds without discovery."""
        configs = {}
        for name in ("prometheus.yml", _WITHOUT_DISCOVERY):
            config = yaml.safe_load(
                (ROOT / "deploy" / "prometheus" / "kubernetes.yml").read_text(encoding="utf-8")
            )
            config["global"].update(scrape_interval="5s", evaluation_interval="5s")
            for job in config["scrape_configs"]:
                discoveries = job.pop("kubernetes_sd_configs")
                if name == _WITHOUT_DISCOVERY:
                    job["file_sd_configs"] = [{"files": [_TARGETS], "refresh_interval": "1s"}]
                else:
                    namespaces = {"namespaces": {"names": [self._cluster.namespace]}}
                    job["kubernetes_sd_configs"] = [
                        discovery | namespaces for discovery in discoveries
                    ]
            configs[name] = yaml.safe_dump(config)
        return configs

    def _describe(self) -> list[dict[str, Any]]:
        rules = (ROOT / "helm" / "alerts" / "sdar.yaml").read_text(encoding="utf-8")
        metadata = {"name": _NAME}
        rule = {"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch"]}
        return [
            {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata},
            {
                "apiVersion": "rbac.authorization.k8s.io/v1",
                "kind": "Role",
                "metadata": metadata,
                "rules": [rule],
            },
            {
                "apiVersion": "rbac.authorization.k8s.io/v1",
                "kind": "RoleBinding",
                "metadata": metadata,
                "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": _NAME},
                "subjects": [
                    {"kind": "ServiceAccount", "name": _NAME, "namespace": self._cluster.namespace}
                ],
            },
            {
                "apiVersion": "v1",
                "kind": "ConfigMap",
                "metadata": metadata,
                "data": {**self._build_configs(), "rules": rules},
            },
            {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {**metadata, "labels": {"app.kubernetes.io/name": _NAME}},
                "spec": _describe_pod(),
            },
        ]


def _describe_target(pod: dict[str, Any], port: dict[str, Any]) -> dict[str, Any]:
    labels = {
        "__meta_kubernetes_namespace": pod["metadata"]["namespace"],
        "__meta_kubernetes_pod_name": pod["metadata"]["name"],
        "__meta_kubernetes_pod_phase": pod["status"]["phase"],
        "__meta_kubernetes_pod_container_port_name": port["name"],
    }
    for name, value in pod["metadata"]["labels"].items():
        labels[f"__meta_kubernetes_pod_label_{re.sub('[^a-zA-Z0-9_]', '_', name)}"] = value
    return {"targets": [f"{pod['status']['podIP']}:{port['containerPort']}"], "labels": labels}


def _describe_pod() -> dict[str, Any]:
    """Its specification: Prometheus as nobody, with the configuration that it can read."""
    places = {
        "prometheus.yml": "prometheus.yml",
        _WITHOUT_DISCOVERY: _WITHOUT_DISCOVERY,
        "rules": "alerts/sdar.yaml",
    }
    items = [{"key": key, "path": path} for key, path in places.items()]
    return {
        "serviceAccountName": _NAME,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": 65534,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [_describe_container()],
        "volumes": [
            {"name": "config", "configMap": {"name": _NAME, "items": items}},
            {"name": "data", "emptyDir": {}},
        ],
    }


def _describe_container() -> dict[str, Any]:
    start = (
        "promtool check config /etc/sdar/prometheus.yml && config=prometheus.yml || "
        f"config={_WITHOUT_DISCOVERY}; exec prometheus --config.file=/etc/sdar/$config "
        "--storage.tsdb.path=/data"
    )
    return {
        "name": _NAME,
        "image": IMAGE,
        "imagePullPolicy": "IfNotPresent",
        "command": ["sh", "-c", start],
        "ports": [{"containerPort": _PORT}],
        "readinessProbe": {"httpGet": {"path": "/-/ready", "port": _PORT}},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [
            {"name": "config", "mountPath": "/etc/sdar"},
            {"name": "data", "mountPath": "/data"},
        ],
    }
