"""Volumes for a cluster that makes none: a node's directory per claim, as a PersistentVolume.

A cluster with a default StorageClass never needs this. hostPath volumes know no fsGroup: the
directories are open to all users.
"""

from __future__ import annotations

import json
import threading
from typing import Any, Self

from tests.kube.cluster import Cluster, CommandError, run, say, wait

_KEEPER = "keeper"
_DIRECTORY = "/var/tmp"
_LOOK_EVERY_S = 1.0
_LABEL = "sdar-kube-test"


class Volumes:
    """Answers every waiting claim of `cluster`'s namespace while it is open, and removes all it
    made at the end.

    Args:
        image: any image of the nodes that has a shell.
        is_kept: leaves everything as it is at the end.
    """

    def __init__(self, cluster: Cluster, image: str, *, is_kept: bool = False) -> None:
        self._cluster = cluster
        self._keeper = Cluster(f"{cluster.namespace}-volumes")
        self._image = image
        self._is_kept = is_kept
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="volumes", daemon=True)
        self.failure: CommandError | None = None

    def __enter__(self) -> Self:
        self._keeper.apply(
            {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": self._keeper.namespace}}
        )
        self._node = _find_node(self._cluster)
        self._keeper.apply(self._describe_keeper())
        wait(
            "the pod that makes directories",
            lambda: any(pod.is_ready for pod in self._keeper.list_pods("app=keeper")),
            120.0,
            tell=lambda: self._keeper.diagnose("app=keeper"),
        )
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._is_kept:
            return
        self._keeper.kubectl(
            "exec", _KEEPER, "--", "rm", "-rf", f"/volumes/{self._cluster.namespace}"
        )
        self._keeper.kubectl(
            "delete",
            "persistentvolumes",
            "--selector",
            f"{_LABEL}={self._cluster.namespace}",
            "--wait=false",
        )
        self._keeper.kubectl("delete", "namespace", self._keeper.namespace, "--wait=false")

    def _serve(self) -> None:
        made: set[str] = set()
        while not self._ended.wait(_LOOK_EVERY_S):
            try:
                claims = self._cluster.get("persistentvolumeclaims")["items"]
                for claim in claims:
                    uid = claim["metadata"]["uid"]
                    if claim["status"].get("phase") == "Pending" and uid not in made:
                        self._make(claim)
                        made.add(uid)
            except CommandError as error:
                self.failure = error
                say(f"volumes: {error}")

    def _make(self, claim: dict[str, Any]) -> None:
        name = claim["metadata"]["name"]
        uid = claim["metadata"]["uid"]
        spec = claim["spec"]
        directory = f"{self._cluster.namespace}/{name}-{uid[:8]}"
        self._keeper.kubectl(
            "exec",
            _KEEPER,
            "--",
            "sh",
            "-c",
            f"mkdir -p /volumes/{directory} && chmod 777 /volumes/{directory}",
        )
        self._keeper.apply(
            {
                "apiVersion": "v1",
                "kind": "PersistentVolume",
                "metadata": {
                    "name": f"{self._cluster.namespace}-{uid[:8]}",
                    "labels": {_LABEL: self._cluster.namespace},
                },
                "spec": {
                    "capacity": {"storage": spec["resources"]["requests"]["storage"]},
                    "accessModes": spec["accessModes"],
                    "storageClassName": spec.get("storageClassName", ""),
                    "persistentVolumeReclaimPolicy": "Retain",
                    "claimRef": {"namespace": self._cluster.namespace, "name": name, "uid": uid},
                    "hostPath": {"path": f"{_DIRECTORY}/{directory}", "type": "Directory"},
                    "nodeAffinity": {
                        "required": {
                            "nodeSelectorTerms": [{"matchExpressions": [self._match_node()]}]
                        }
                    },
                },
            }
        )
        say(f"made a volume for claim {name}")

    def _match_node(self) -> dict[str, Any]:
        return {"key": "kubernetes.io/hostname", "operator": "In", "values": [self._node]}

    def _describe_keeper(self) -> dict[str, Any]:
        return {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": _KEEPER, "labels": {"app": "keeper"}},
            "spec": {
                "terminationGracePeriodSeconds": 1,
                "nodeSelector": {"kubernetes.io/hostname": self._node},
                "automountServiceAccountToken": False,
                "containers": [
                    {
                        "name": _KEEPER,
                        "image": self._image,
                        "command": ["sleep", "infinity"],
                        "securityContext": {"runAsUser": 0},
                        "volumeMounts": [{"name": "volumes", "mountPath": "/volumes"}],
                    }
                ],
                "volumes": [
                    {"name": "volumes", "hostPath": {"path": _DIRECTORY, "type": "Directory"}}
                ],
            },
        }


def has_default_storage_class() -> bool:
    """Whether claims that name no class are served."""
    classes = json.loads(run(["kubectl", "get", "storageclasses", "--output", "json"]))["items"]
    mark = "storageclass.kubernetes.io/is-default-class"
    return any(item["metadata"].get("annotations", {}).get(mark) == "true" for item in classes)


def _find_node(cluster: Cluster) -> str:
    """The host name of the first node that takes pods."""
    nodes = [
        node
        for node in cluster.get("nodes")["items"]
        if not node["spec"].get("unschedulable") and not node["spec"].get("taints")
    ]
    assert nodes, "No node takes pods without tolerations. Give the cluster one."
    return str(nodes[0]["metadata"]["labels"]["kubernetes.io/hostname"])
