"""What every pod of the chart keeps to: restricted, probed, bounded, spoken to along the arrows of
the architecture only.
"""

from __future__ import annotations

import pytest
import yaml

from sdar.contracts.roles import ROLES
from tests.helm.chart import (
    CHART,
    VALUES_FILES,
    component,
    containers,
    find,
    helm,
    of_kind,
    pods,
    render,
)

every_values_file = pytest.mark.parametrize("values", VALUES_FILES)
SERVICES = {"gateway", "rollout", "teacher", "envs", "learner", "redis"}


@every_values_file
def test_every_pod_is_restricted(values):
    for _, pod in pods(render(values)):
        security = pod["spec"]["securityContext"]
        assert security["runAsNonRoot"] is True
        assert security["runAsUser"] == security["runAsGroup"] == security["fsGroup"] == 10001
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod["spec"])
        assert not any("hostPath" in volume for volume in pod["spec"]["volumes"])
    for _, container in containers(render(values)):
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }


@every_values_file
def test_every_container_of_a_service_has_all_three_probes(values):
    for role, container in containers(render(values)):
        if role != "check":
            assert {"startupProbe", "readinessProbe", "livenessProbe"} <= set(container), role
            ports = {port["name"] for port in container["ports"]}
            for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                assert container[probe].get("httpGet", {"port": "redis"})["port"] in ports


@every_values_file
def test_every_container_asks_for_what_it_needs_and_is_bounded(values):
    for role, container in containers(render(values)):
        assert {"cpu", "memory"} <= set(container["resources"]["requests"]), role
        assert {"cpu", "memory"} <= set(container["resources"]["limits"]), role
        # Kubernetes 1.20 refuses a number from a server-side apply, which is how Helm 4 installs.
        assert all(
            isinstance(amount, str)
            for kind in container["resources"].values()
            for amount in kind.values()
        ), role


def test_the_default_release_fits_two_cores_and_eight_gibibytes():
    def size(quantity):
        units = {"m": 1e-3, "Mi": 2**20, "Gi": 2**30}
        unit = next((unit for unit in units if str(quantity).endswith(unit)), "")
        return float(str(quantity).removesuffix(unit)) * units.get(unit, 1)

    requests = [
        container["resources"]["requests"]
        for role, container in containers(render())
        if role != "check"
    ]

    assert sum(size(request["cpu"]) for request in requests) < 1
    assert sum(size(request["memory"]) for request in requests) < 5 * 2**30


@every_values_file
def test_only_a_scaling_gateway_may_talk_to_kubernetes(values):
    things = render(values)
    scales = find(things, "Deployment", "sdar-gateway") and bool(of_kind(things, "Role"))

    assert scales == (values != "existing")  # the one with autoscaling.mode none
    for role, pod in pods(things):
        assert pod["spec"]["automountServiceAccountToken"] is (role == "gateway" and scales)
        assert pod["spec"]["enableServiceLinks"] is False
    for account in of_kind(things, "ServiceAccount"):
        assert account["automountServiceAccountToken"] is False
    names = {account["metadata"]["name"] for account in of_kind(things, "ServiceAccount")}
    assert all(
        pod["spec"]["serviceAccountName"] in names for role, pod in pods(things) if role != "check"
    )


def test_the_gateway_may_change_sizes_of_its_own_release_and_write_events_and_nothing_else():
    things = render()
    (role,) = of_kind(things, "Role")
    rules = {resource: rule for rule in role["rules"] for resource in rule["resources"]}
    workloads = of_kind(things, "Deployment", "StatefulSet")
    own = {
        thing["metadata"]["name"]
        for thing in workloads
        if component(thing) in ("rollout", "teacher", "envs", "learner")
    }

    assert set(rules) == {"deployments/scale", "statefulsets/scale", "events"}
    assert {name for rule in rules.values() for name in rule.get("resourceNames", [])} == own
    assert (
        rules["deployments/scale"]["verbs"]
        == rules["statefulsets/scale"]["verbs"]
        == ["get", "update"]
    )
    assert rules["events"]["verbs"] == ["create"]
    (binding,) = of_kind(things, "RoleBinding")
    assert [subject["name"] for subject in binding["subjects"]] == ["sdar-gateway"]


@every_values_file
def test_selectors_of_workloads_services_and_budgets_find_their_pods_and_no_others(values):
    things = render(values)
    labels = {role: pod["metadata"]["labels"] for role, pod in pods(things)}

    def chosen(selector):
        return {role for role, own in labels.items() if selector.items() <= own.items()}

    for thing in of_kind(things, "Deployment", "StatefulSet", "PodDisruptionBudget"):
        assert chosen(thing["spec"]["selector"]["matchLabels"]) == {component(thing)}
    for thing in of_kind(things, "Service"):
        assert chosen(thing["spec"]["selector"]) == {component(thing)}
    assert {component(thing) for thing in of_kind(things, "PodDisruptionBudget")} == set(labels) - {
        "check"
    }
    assert all(
        thing["spec"]["maxUnavailable"] == 1 for thing in of_kind(things, "PodDisruptionBudget")
    )


@pytest.mark.parametrize(
    ("version", "told"), [("1.34.1-eks-113cf36", "AlwaysAllow"), ("1.26.0", None), ("0.0.0", None)]
)
def test_a_pod_that_is_not_ready_may_leave_its_node_where_kubernetes_can_be_told(version, told):
    done = helm("template", "sdar", str(CHART), "--kube-version", version)
    budgets = of_kind(
        [thing for thing in yaml.safe_load_all(done.stdout) if thing], "PodDisruptionBudget"
    )

    assert len(budgets) == len(SERVICES)
    assert {budget["spec"].get("unhealthyPodEvictionPolicy") for budget in budgets} == {told}


@every_values_file
def test_every_pod_is_denied_what_no_policy_names(values):
    things = render(values)
    policies = of_kind(things, "NetworkPolicy")
    assert bool(policies) == (values != "existing")  # the one with networkPolicy.enabled false
    if policies:
        denial = find(things, "NetworkPolicy", "sdar-default-deny")
        assert denial["spec"]["policyTypes"] == ["Ingress", "Egress"]
        assert "ingress" not in denial["spec"]
        for _, pod in pods(things):
            assert (
                denial["spec"]["podSelector"]["matchLabels"].items()
                <= pod["metadata"]["labels"].items()
            )


ARROWS = {
    *((role, "redis", 6379) for role, row in ROLES.items() if row.uses_bus),
    *((role, callee, 9090) for role, row in ROLES.items() for callee in row.calls),
    *(("check", "gateway", 8080), ("check", "envs", 9090), ("check", "rollout", 9090)),
}
"""Who opens a connection to whom: what the table of roles says, and the chart's own test."""
NO_SKILLS = {("rollout", "teacher", 9090)}
"""Only a student that is shown skills asks for them."""


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ("defaults", ARROWS - NO_SKILLS),
        ("skill_grpo", ARROWS),
        ("everything", ARROWS - NO_SKILLS | {("learner", "learner", None)}),
    ],
)
def test_pods_of_a_release_reach_each_other_along_the_arrows_only(values, expected):
    role_of = "app.kubernetes.io/component"
    ways_in, ways_out = set(), set()
    for policy in of_kind(render(values), "NetworkPolicy"):
        own = policy["spec"]["podSelector"]["matchLabels"].get(role_of)
        for direction, key, ways in (("ingress", "from", ways_in), ("egress", "to", ways_out)):
            for rule in policy["spec"].get(direction, []):
                for peer in rule.get(key, []):
                    other = peer.get("podSelector", {}).get("matchLabels", {}).get(role_of)
                    for port in rule.get("ports", [{}]):
                        if other is not None:
                            ends = (other, own) if direction == "ingress" else (own, other)
                            ways.add((*ends, port.get("port")))
    # The gateway answers both its ports to whoever may call it.
    ways_in.discard(("check", "gateway", 9090))
    # Redis knows nobody's method: it lets every reader of streams in.
    assert ways_in == ways_out == expected


def test_the_way_out_of_the_cluster_is_open_only_where_something_is_out_there():
    def ways(values, role, *settings):
        policy = find(render(values, *settings), "NetworkPolicy", f"sdar-{role}")
        return {
            port["port"]
            for rule in policy["spec"]["egress"]
            for port in rule["ports"]
            if not _is_to_pods(rule)
        }

    assert (
        ways("defaults", "rollout")
        == ways("defaults", "teacher")
        == ways("defaults", "learner")
        == set()
    )
    assert ways("defaults", "gateway") == {
        443,
        6443,
        8443,
        16443,
    }  # the API server, as clusters have it
    assert ways("everything", "rollout") == {443, 4317}
    assert ways("keda", "learner") == {6380}
    assert ways("grpo", "rollout") == {50051}
    for role in ("rollout", "learner"):
        hosts = ("redis.url=redis://redis1/0", "tracing.endpoint=http://collector2")
        assert ways("keda", role, *hosts) == {
            6379,
            4317,
        }  # the usual ports, not the last digit of a host
    for rule in find(render("everything"), "NetworkPolicy", "sdar-rollout")["spec"]["egress"]:
        for peer in rule.get("to", []):
            assert (
                "ipBlock" not in peer or peer["ipBlock"]["except"]
            )  # never the cloud's metadata service


def _is_to_pods(rule):
    return any("podSelector" in peer for peer in rule.get("to", []))


def test_only_the_learner_writes_the_claim():
    for values in ("defaults", "everything"):
        mounts = {
            role: mount.get("readOnly", False)
            for role, container in containers(render(values))
            for mount in container["volumeMounts"]
            if mount["name"] == "data" and role != "redis"
        }
        assert mounts == {"learner": False} | (
            {"rollout": True, "teacher": True} if values == "defaults" else {}
        )


@pytest.mark.parametrize(
    ("values", "settings", "together"),
    [
        ("defaults", (), {"rollout", "teacher", "learner"}),
        ("defaults", ("rollout.affinity.nodeAffinity.a=b",), {"rollout", "teacher", "learner"}),
        ("defaults", ("storage.accessModes[0]=ReadWriteMany",), set()),
        ("defaults", ("storage.existingClaim=theirs",), set()),
        ("defaults", ("storage.weightsUrl=s3://bucket",), set()),
        ("everything", (), set()),
    ],
)
def test_pods_that_share_a_claim_of_one_node_are_put_on_one_node(values, settings, together):
    things = render(values, *settings)
    labels = {role: pod["metadata"]["labels"] for role, pod in pods(things)}
    bound = {}
    for role, pod in pods(things):
        for term in (
            pod["spec"]
            .get("affinity", {})
            .get("podAffinity", {})
            .get("requiredDuringSchedulingIgnoredDuringExecution", [])
        ):
            (expression,) = term["labelSelector"]["matchExpressions"]
            assert term["topologyKey"] == "kubernetes.io/hostname"
            assert term["labelSelector"]["matchLabels"].items() <= labels[role].items()
            # Each is one of those that it wants to be beside: else the first of them would find no
            # node.
            bound[role] = set(expression["values"])

    assert bound == dict.fromkeys(together, together)
    if settings and "nodeAffinity" in settings[0]:
        rollout = next(pod for role, pod in pods(things) if role == "rollout")
        assert rollout["spec"]["affinity"]["nodeAffinity"] == {"a": "b"}  # one's own stays


def test_a_learner_of_several_pods_meets_before_anyone_is_ready():
    things = render("everything")
    service, learner = (
        find(things, "Service", "sdar-learner"),
        find(things, "StatefulSet", "sdar-learner"),
    )

    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True
    assert learner["spec"]["serviceName"] == "sdar-learner"
    assert learner["spec"]["podManagementPolicy"] == "Parallel"
    assert learner["spec"]["template"]["spec"]["shareProcessNamespace"] is True


def test_environments_are_reached_one_by_one_and_only_when_they_are_ready():
    service = find(render(), "Service", "sdar-envs")

    assert service["spec"]["clusterIP"] == "None"
    assert not service["spec"].get("publishNotReadyAddresses", False)


def test_no_drain_outlives_a_spot_interruption_but_the_learners():
    grace = {role: pod["spec"].get("terminationGracePeriodSeconds") for role, pod in pods(render())}

    assert all(seconds < 120 for role, seconds in grace.items() if role not in ("learner", "check"))
    assert grace["envs"] > grace["rollout"]  # sessions outlive the rollouts that drain


def test_gpus_are_asked_for_where_they_are_said():
    gpus = {
        role: container["resources"]["limits"].get("nvidia.com/gpu")
        for role, container in containers(render("everything"))
    }

    assert (gpus["rollout"], gpus["teacher"], gpus["learner"], gpus["gateway"], gpus["envs"]) == (
        "2",
        "2",
        "4",
        None,
        None,
    )
    limits = next(
        container["resources"]["limits"]
        for role, container in containers(render("everything"))
        if role == "learner"
    )
    assert limits["vpc.amazonaws.com/efa"] == "1"
    assert limits["memory"]  # what was not said stays
