"""The door to Kubernetes: the scale of a workload, and events. Never decides a size.

A size is replaced only where nothing has changed since it was read (`resourceVersion`): of two who
act at the same time one is refused. Needs get and update on `deployments/scale` and
`statefulsets/scale`, and create on `events`, in its own namespace.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import functools
import json
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from sdar.contracts.errors import ConflictError, UnavailableError

from .file import Workload

T = TypeVar("T")

_NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
_TIMEOUT_S = (2.0, 5.0)
"""To connect, to answer."""
_MAX_MESSAGE_CHARACTERS = 1000
"""Kubernetes refuses an event with more than 1024."""


@dataclass(frozen=True, slots=True)
class Size:
    """A workload's size as of one moment.

    Attributes:
        replicas: as asked for.
        version: names this state of the object; a write that rests on it is refused once the object
            is another.
        uid: the object's own.
    """

    replicas: int
    version: str
    uid: str


class Cluster(Protocol):
    """Every method raises UnavailableError when the cluster does not answer, or refuses for good;
    its message says why.
    """

    async def read(self, workload: Workload) -> Size: ...

    async def resize(self, workload: Workload, size: Size, replicas: int) -> None:
        """Raises ConflictError if the workload is not as `size` says any more."""

    async def leave_event(self, workload: Workload, size: Size, reason: str, message: str) -> None:
        """Leave an event on the workload. `reason` is one CamelCase word."""


class KubernetesCluster:
    """`Cluster` by the API server.

    Args:
        connect: makes the client (kubernetes.client.ApiClient) and names the namespace. Called at
            the first use, in a thread: a gateway that scales nothing does not pay for the import.
    """

    def __init__(self, connect: Callable[[], tuple[Any, str]] | None = None) -> None:
        self._connect = functools.cache(connect or _connect_in_cluster)

    async def read(self, workload: Workload) -> Size:
        return await asyncio.to_thread(self._read, workload)

    async def resize(self, workload: Workload, size: Size, replicas: int) -> None:
        await asyncio.to_thread(self._resize, workload, size, replicas)

    async def leave_event(self, workload: Workload, size: Size, reason: str, message: str) -> None:
        await asyncio.to_thread(self._leave_event, workload, size, reason, message)

    def _read(self, workload: Workload) -> Size:
        with self._explained(workload) as (client, namespace):
            scale = self._call(client, "read", workload, namespace)
            # A workload without the field has one replica; one that was scaled to zero has a Scale
            # without the field.
            return Size(
                scale.spec.replicas or 0, scale.metadata.resource_version, scale.metadata.uid
            )

    def _resize(self, workload: Workload, size: Size, replicas: int) -> None:
        with self._explained(workload) as (client, namespace):
            # Both make the API server refuse if the object has changed, or is another of that name.
            metadata = {
                "name": workload.name,
                "namespace": namespace,
                "resourceVersion": size.version,
                "uid": size.uid,
            }
            body = {
                "apiVersion": "autoscaling/v1",
                "kind": "Scale",
                "metadata": metadata,
                "spec": {"replicas": replicas},
            }
            self._call(client, "replace", workload, namespace, body)

    def _leave_event(self, workload: Workload, size: Size, reason: str, message: str) -> None:
        with self._explained(workload) as (client, namespace):
            from kubernetes.client import CoreV1Api

            api: Any = CoreV1Api(client)
            event = _build_event(workload, size, namespace) | {
                "reason": reason,
                "message": message[:_MAX_MESSAGE_CHARACTERS],
            }
            api.create_namespaced_event(namespace, event, _request_timeout=_TIMEOUT_S)

    def _call(self, client: Any, verb: str, workload: Workload, namespace: str, *body: Any) -> Any:
        from kubernetes.client import AppsV1Api

        kind = {"Deployment": "deployment", "StatefulSet": "stateful_set"}[workload.kind]
        method = getattr(AppsV1Api(client), f"{verb}_namespaced_{kind}_scale")
        return method(workload.name, namespace, *body, _request_timeout=_TIMEOUT_S)

    @contextlib.contextmanager
    def _explained(self, workload: Workload) -> Iterator[tuple[Any, str]]:
        """The client and the namespace; what the API server or the way to it raises becomes an
        error of ours.
        """
        from kubernetes.client import ApiException
        from kubernetes.config import ConfigException
        from urllib3.exceptions import HTTPError

        where = f"{workload.kind} {workload.name}"
        try:
            yield self._connect()
        except ApiException as error:
            if error.status == 409:
                raise ConflictError(
                    f"{where} was changed by somebody else meanwhile. It is looked at again."
                ) from error
            raise UnavailableError(
                f"The API server answers {error.status} for {where}: {_read_message(error)}. See "
                "that the scaling file names "
                "what exists in the gateway's namespace, and that its Role allows get and update "
                "of the scale."
            ) from error
        except (HTTPError, OSError) as error:
            raise UnavailableError(
                f"The API server cannot be reached for {where}: {error}. It is asked again."
            ) from error
        except ConfigException as error:
            raise UnavailableError(
                f"No way to an API server: {error}. SDAR_SCALING is for a gateway in a pod with a "
                "service account's token."
            ) from error


def _build_event(workload: Workload, size: Size, namespace: str) -> dict[str, Any]:
    """An event on a workload, without what it says."""
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return {
        # A name that no other event has: one that is there already would be refused.
        "metadata": {"name": f"{workload.name}.{uuid.uuid4().hex[:16]}", "namespace": namespace},
        "involvedObject": {
            "apiVersion": "apps/v1",
            "kind": workload.kind,
            "name": workload.name,
            "namespace": namespace,
            "uid": size.uid,
        },
        "type": "Normal",
        "source": {"component": "sdar-gateway"},
        "firstTimestamp": now,
        "lastTimestamp": now,
        "count": 1,
    }


def _connect_in_cluster() -> tuple[Any, str]:
    from kubernetes import client, config

    configuration: Any = client.Configuration()
    load: Any = config.load_incluster_config
    load(configuration)
    # The next look tries again anyway; retries in here would outlast it.
    configuration.retries = False
    return client.ApiClient(configuration), _NAMESPACE_FILE.read_text(encoding="utf-8").strip()


def _read_message(error: Any) -> str:
    """The API server's own sentence, where it gave one."""
    try:
        return str(json.loads(error.body)["message"])
    except (TypeError, ValueError, KeyError):
        return str(error.reason)
