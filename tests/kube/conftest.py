"""Fixtures of the cluster test, its two options, and the collection of evidence.

See docs/kubernetes.md.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from loadtest.page import describe_machine
from tests.kube.cluster import CHART, ROLES, Cluster, CommandError, find_helm, run, say
from tests.kube.release import Release, describe_cluster
from tests.kube.report import Claim, write_report
from tests.kube.volumes import Volumes, has_default_storage_class

_MOST_IMAGES = 50
_claims = pytest.StashKey[dict[str, Claim]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--values",
        action="append",
        default=[],
        help="values file for every release, such as one with a registry",
    )
    parser.addoption(
        "--namespace",
        help="namespace to use, and to leave with everything in it, such as after a failure",
    )
    parser.addoption("--report", help="Markdown page that gets the claims and their evidence")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_claims] = {}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    config.stash[_claims].update({item.nodeid: Claim.parse(item.name) for item in items})


def pytest_runtest_logstart(nodeid: str) -> None:
    print()
    say(f"== {Claim.parse(nodeid.rpartition('::')[2]).text}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    item.config.stash[_claims][item.nodeid].note(report.outcome, call.duration)
    if report.when == "teardown":
        _write_report(item.config)
    return report


def _write_report(config: pytest.Config) -> None:
    """After every test, so that what was shown outlives whatever comes next."""
    if path := config.getoption("--report"):
        helm = run([find_helm() or "helm", "version", "--short"]).strip()
        machine = describe_machine().split(", Python")[0]
        where = f"{describe_cluster([f'helm {helm}'])}; the test on {machine}."
        write_report(list(config.stash[_claims].values()), Path(path), where=where)


@pytest.fixture
def evidence(request: pytest.FixtureRequest) -> list[str]:
    """What a test adds here stands beside its claim in the report."""
    return request.config.stash[_claims][request.node.nodeid].evidence


@pytest.fixture(scope="session")
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """A namespace of the test's own, with volumes where the cluster makes none.

    The session ends here without a cluster.
    """
    kept = request.config.getoption("--namespace")
    cluster = Cluster(
        kept or f"sdar-test-{secrets.token_hex(3)}", request.config.getoption("--values")
    )
    _check_surroundings(cluster)
    say(f"namespace {cluster.namespace} on {describe_cluster()}")
    cluster.apply(_describe_namespace(cluster.namespace))
    try:
        if has_default_storage_class():
            yield cluster
        else:
            say(
                "no default StorageClass: "
                "the test makes a volume of a node's directory for each claim"
            )
            with Volumes(cluster, _image("gateway", cluster), is_kept=bool(kept)):
                yield cluster
    finally:
        if not kept:
            cluster.kubectl("delete", "namespace", cluster.namespace, timeout_s=180.0)


@pytest.fixture(scope="module")
def installed(request: pytest.FixtureRequest, cluster: Cluster) -> Iterator[Release]:
    """`helm install sdar ./helm`, with default values.

    The tests of test_release.py follow its life.
    """
    with Release(cluster, "sdar", is_kept=bool(request.config.getoption("--namespace"))) as release:
        if not release.is_installed:
            say(release.install())
        yield release


def _check_surroundings(cluster: Cluster) -> None:
    """End the session with one sentence where a test could only fail."""
    try:
        run(["kubectl", "get", "nodes"], timeout_s=20.0)
    except (CommandError, FileNotFoundError) as error:
        pytest.exit(f"make test-kube needs kubectl and a cluster that KUBECONFIG names: {error}", 2)
    try:
        run([find_helm() or "helm", "version"], timeout_s=20.0)
    except (CommandError, FileNotFoundError) as error:
        pytest.exit(f"make test-kube needs helm on PATH or in $HELM: {error}", 2)
    nodes = [node["status"]["images"] for node in cluster.get("nodes")["items"]]
    if any(len(images) >= _MOST_IMAGES for images in nodes):
        return  # a node tells of its largest ones only
    images = {name for images in nodes for image in images for name in image["names"]}

    def is_there(name: str) -> bool:
        return any(_is_same(name, other) for other in images)

    missing = [name for role in ROLES if not is_there(name := _image(role, cluster))]
    if missing and not cluster.values:
        pytest.exit(
            f"No node has {', '.join(missing)}. Build them with `make images` and load them "
            "(docs/kubernetes.md), or name a registry that has them: make test-kube VALUES=FILE.",
            2,
        )


def _image(role: str, cluster: Cluster) -> str:
    """The image that the chart gives a role with this test's values."""
    for raw in yaml.safe_load_all(cluster.helm("template", "sdar", str(CHART), *cluster.values)):
        labels: dict[str, Any] = (raw or {}).get("metadata", {}).get("labels", {})
        if labels.get("app.kubernetes.io/component") == role and raw["kind"] in (
            "Deployment",
            "StatefulSet",
        ):
            return str(raw["spec"]["template"]["spec"]["containers"][0]["image"])
    raise AssertionError(f"The chart has no workload of component {role}.")


def _is_same(wanted: str, found: str) -> bool:
    """Nodes tell names with their registry."""
    return found == wanted or found.endswith(f"/{wanted}")


def _describe_namespace(name: str) -> dict[str, Any]:
    """With the strictest pod security that the cluster knows, so it refuses wider pods."""
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}
