"""The gateway's door to a real Kubernetes API server, with the chart's rights and no others."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Iterator
from itertools import chain
from typing import Any

import pytest
import yaml
from kubernetes import client, config

from sdar.contracts.errors import ConflictError, UnavailableError
from services.gateway.scaling.cluster import KubernetesCluster
from services.gateway.scaling.file import ScalingFile, Workload
from tests.kube.cluster import CHART, ROLES, Cluster, CommandError, run

# The kubeconfig decides whether the server's certificate is checked; a cluster of a test machine
# often has none to check.
pytestmark = pytest.mark.filterwarnings("ignore::urllib3.exceptions.InsecureRequestWarning")

GATEWAY = "sdar-gateway"
GRANTS = ("role", "rolebinding", "serviceaccount")


@pytest.fixture(scope="module")
def own() -> Iterator[Cluster]:
    """A namespace with the chart's rights for the gateway, and workloads whose pods can't run."""
    try:
        run(["kubectl", "get", "nodes"], timeout_s=20.0)
    except (CommandError, FileNotFoundError) as error:
        pytest.exit(f"make test-kube needs kubectl and a cluster that KUBECONFIG names: {error}", 2)
    own = Cluster(f"sdar-test-{secrets.token_hex(3)}")
    run(["kubectl", "create", "namespace", own.namespace])
    try:
        own.apply(*(render(own, f"templates/gateway/{name}.yaml")[0] for name in GRANTS))
        own.apply(
            *(describe_workload(workload) for workload in read_scaling_file(own).workloads.values())
        )
        yield own
    finally:
        own.kubectl("delete", "namespace", own.namespace, timeout_s=180.0)


@pytest.fixture(scope="module")
def workloads(own: Cluster) -> dict[str, Workload]:
    return {str(role): workload for role, workload in read_scaling_file(own).workloads.items()}


@pytest.fixture(scope="module")
def door(own: Cluster) -> KubernetesCluster:
    return KubernetesCluster(lambda: (sign_in(own), own.namespace))


def render(own: Cluster, *templates: str, **values: str) -> list[dict[str, Any]]:
    shown = [argument for name in templates for argument in ("--show-only", name)]
    changed = [
        argument for key, value in values.items() for argument in ("--set", f"{key}={value}")
    ]
    return [
        raw
        for raw in yaml.safe_load_all(own.helm("template", "sdar", str(CHART), *shown, *changed))
        if raw
    ]


def read_scaling_file(own: Cluster) -> ScalingFile:
    """The file that the chart gives the gateway, as the gateway reads it."""
    [found] = [
        raw
        for raw in render(own)
        if raw["kind"] == "ConfigMap" and raw["metadata"]["name"] == "sdar-scaling"
    ]
    return ScalingFile.model_validate(yaml.safe_load(found["data"]["scaling.yaml"]))


def describe_workload(workload: Workload) -> dict[str, Any]:
    labels = {"workload": workload.name}
    pod = {"nodeSelector": {"no": "node"}, "containers": [{"name": "none", "image": "none"}]}
    return {
        "apiVersion": "apps/v1",
        "kind": workload.kind,
        "metadata": {"name": workload.name},
        "spec": {
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": pod},
            **({"serviceName": workload.name} if workload.kind == "StatefulSet" else {}),
        },
    }


def sign_in(own: Cluster, account: str = GATEWAY) -> client.ApiClient:
    """A client with the token of a service account, as a pod of it has."""
    admin = config.new_client_from_config()
    spec: dict[str, Any] = {"spec": {"audiences": []}}
    answer: Any = client.CoreV1Api(admin).create_namespaced_service_account_token(
        account, own.namespace, spec
    )
    configuration: Any = client.Configuration()
    configuration.host, configuration.ssl_ca_cert = (
        admin.configuration.host,
        admin.configuration.ssl_ca_cert,
    )
    configuration.verify_ssl = admin.configuration.verify_ssl
    configuration.api_key = {"BearerToken": f"Bearer {answer.status.token}"}
    configuration.retries = False
    return client.ApiClient(configuration)


async def resize_when_quiet(door: KubernetesCluster, workload: Workload, replicas: int) -> None:
    """Resize, again where a controller wrote the object's status between reading and writing."""
    async with asyncio.timeout(30.0):
        while True:
            with contextlib.suppress(ConflictError):
                return await door.resize(workload, await door.read(workload), replicas)


def read_replicas(own: Cluster, workload: Workload) -> int:
    return int(own.get(workload.kind.lower(), workload.name)["spec"]["replicas"])


@pytest.mark.parametrize("role", ["rollout", "teacher", "envs", "learner"])
async def test_the_gateway_may_resize_every_workload_of_its_release_to_zero_and_back(
    role: str, own: Cluster, workloads: dict[str, Workload], door: KubernetesCluster
) -> None:
    workload = workloads[role]
    first = await door.read(workload)
    assert first.replicas == 1  # the chart names no number: Kubernetes begins with one
    await resize_when_quiet(door, workload, 0)
    assert ((await door.read(workload)).replicas, read_replicas(own, workload)) == (0, 0)
    await resize_when_quiet(door, workload, 2)
    assert ((await door.read(workload)).replicas, read_replicas(own, workload)) == (2, 2)


@pytest.mark.parametrize("role", ["rollout", "learner"])
async def test_who_acts_on_what_is_no_longer_so_is_refused(
    role: str, own: Cluster, workloads: dict[str, Workload], door: KubernetesCluster
) -> None:
    workload = workloads[role]
    seen = await door.read(workload)
    own.kubectl("scale", f"{workload.kind}/{workload.name}", "--replicas", "5")
    with pytest.raises(ConflictError, match="somebody else"):
        await door.resize(workload, seen, 0)
    assert read_replicas(own, workload) == 5


async def test_an_event_stands_beside_the_workload_that_it_tells_of(
    own: Cluster, workloads: dict[str, Workload], door: KubernetesCluster
) -> None:
    workload = workloads["learner"]
    size = await door.read(workload)
    await door.leave_event(
        workload, size, "Asleep", "The run is finished for 30 minutes. " + "x" * 5000
    )
    events = own.get("events", "--field-selector", "reason=Asleep")["items"]
    assert [event["involvedObject"]["name"] for event in events] == [workload.name]
    assert "The run is finished" in own.kubectl("describe", workload.kind, workload.name)


async def test_what_is_not_in_the_scaling_file_is_out_of_reach(
    own: Cluster, workloads: dict[str, Workload]
) -> None:
    stranger = workloads["rollout"].model_copy(update={"name": "stranger"})
    own.apply(describe_workload(stranger))
    door = KubernetesCluster(lambda: (sign_in(own), own.namespace))
    with pytest.raises(
        UnavailableError, match=r"answers 403 for Deployment stranger: .*scaling file"
    ):
        await door.read(stranger)
    gateway = client.AppsV1Api(sign_in(own))
    with pytest.raises(client.ApiException, match="Forbidden"):
        await asyncio.to_thread(
            gateway.read_namespaced_deployment, workloads["rollout"].name, own.namespace
        )


def test_turning_a_dry_run_on_leaves_every_size_as_it_is(own: Cluster) -> None:
    """Whoever turns it on while a release is large wants advice, not three workers less.

    No pod of it has to run.
    """
    nowhere = (("--set", f"{role}.nodeSelector.no=node") for role in (*ROLES, "redis"))
    own.helm(
        "install",
        "large",
        str(CHART),
        *chain.from_iterable(nowhere),
        "--set",
        "rollout.replicas.max=4",
    )
    own.kubectl("scale", "deployment/large-sdar-rollout", "--replicas", "4")
    for level in ("info", "debug"):  # as it is turned on, and at an upgrade while it is on
        own.helm(
            "upgrade",
            "large",
            str(CHART),
            "--reuse-values",
            "--set",
            f"autoscaling.dryRun=true,logLevel={level}",
        )
        sizes = {
            thing["metadata"]["name"]: thing["spec"]["replicas"]
            for thing in own.get("deployments")["items"]
        }
        assert sizes["large-sdar-rollout"] == 4
        assert {sizes[f"large-sdar-{role}"] for role in ("gateway", "teacher", "envs")} == {1}
    own.helm("uninstall", "large")


async def test_a_workload_that_was_removed_is_named(
    own: Cluster, workloads: dict[str, Workload], door: KubernetesCluster
) -> None:
    workload = workloads["teacher"]
    own.kubectl("delete", workload.kind.lower(), workload.name)
    with pytest.raises(UnavailableError, match=f"answers 404 for Deployment {workload.name}"):
        await door.read(workload)


async def test_an_api_server_that_is_not_there_is_told_of_within_seconds(
    workloads: dict[str, Workload],
) -> None:
    def connect() -> tuple[client.ApiClient, str]:
        configuration: Any = client.Configuration()
        configuration.host, configuration.retries = "https://127.0.0.1:9", False
        return client.ApiClient(configuration), "default"

    async with asyncio.timeout(5.0):
        with pytest.raises(UnavailableError, match="cannot be reached"):
            await KubernetesCluster(connect).read(workloads["rollout"])


async def test_outside_a_cluster_the_way_in_is_named(
    workloads: dict[str, Workload], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(UnavailableError, match="SDAR_SCALING"):
        await KubernetesCluster().read(workloads["rollout"])
