"""What scrapes a release: ServiceMonitors for the Prometheus operator, deploy/prometheus for
others. Both find each process.
"""

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from sdar.contracts.roles import Role
from tests.helm.chart import find, of_kind, render

ROOT = Path(__file__).resolve().parents[2]
ROLES = set(map(str, Role))
POD_LABEL = "__meta_kubernetes_pod_label_"


def relabel(labels, rules):
    """Prometheus' relabelling, as far as it is used; None for a target that is dropped."""
    for rule in rules:
        value = ";".join(labels.get(name, "") for name in rule.get("source_labels", ()))
        match = re.fullmatch(rule.get("regex", "(.*)"), value)
        action = rule.get("action", "replace")
        if (action == "keep" and not match) or (action == "drop" and match):
            return None
        if action == "replace" and match:
            labels = labels | {
                rule["target_label"]: match.expand(
                    rule.get("replacement", r"\1").replace("$", "\\")
                )
            }
    return labels


def discover(things):
    """What Prometheus' pod discovery finds of the release's pods: a target for each port."""
    for thing in of_kind(things, "Deployment", "StatefulSet"):
        template = thing["spec"]["template"]
        found = {
            POD_LABEL + re.sub(r"\W", "_", name): value
            for name, value in template["metadata"]["labels"].items()
        }
        for container in template["spec"]["containers"]:
            for port in container.get("ports", ()):
                name = {"__meta_kubernetes_pod_container_port_name": port["name"]}
                yield (
                    found
                    | name
                    | {
                        "__meta_kubernetes_pod_phase": "Running",
                        "__address__": str(port["containerPort"]),
                    }
                )


def test_a_prometheus_without_the_operator_finds_each_service_at_the_port_with_its_metrics():
    config = yaml.safe_load((ROOT / "deploy" / "prometheus" / "kubernetes.yml").read_text())
    rules = config["scrape_configs"][0]["relabel_configs"]
    targets = [
        target for pod in discover(render(release="first")) if (target := relabel(pod, rules))
    ]
    assert {target["role"] for target in targets} == ROLES
    assert len(targets) == len(ROLES)
    assert {target["run"] for target in targets} == {"first"}
    assert {target["role"]: target["__address__"] for target in targets} == {
        **dict.fromkeys(ROLES, "9100"),
        "gateway": "8080",
    }


def test_a_service_monitor_of_each_role_finds_its_pods_and_names_run_and_role():
    things = render(release="first")
    monitors = of_kind(things, "ServiceMonitor")
    assert len(monitors) == len(ROLES)
    for monitor in monitors:
        endpoint = monitor["spec"]["endpoints"][0]
        labels = {rule["targetLabel"]: rule["replacement"] for rule in endpoint["relabelings"]}
        wanted = monitor["spec"]["selector"]["matchLabels"].items()
        services = [
            s for s in of_kind(things, "Service") if wanted <= s["metadata"]["labels"].items()
        ]
        ports = {
            port["name"]: port.get("targetPort")
            for service in services
            for port in service["spec"]["ports"]
        }
        pods = [
            container
            for thing in of_kind(things, "Deployment", "StatefulSet")
            if services[0]["spec"]["selector"].items()
            <= thing["spec"]["template"]["metadata"]["labels"].items()
            for container in thing["spec"]["template"]["spec"]["containers"]
        ]
        assert len(services) == len(pods) == 1
        assert ports[endpoint["port"]] in {port["name"] for port in pods[0]["ports"]}
        assert labels == {
            "run": "first",
            "role": monitor["metadata"]["labels"]["app.kubernetes.io/component"],
        }


def test_a_gateway_with_tls_is_scraped_by_tls():
    monitor = find(render("defaults", "tls.enabled=true"), "ServiceMonitor", "sdar-gateway")
    endpoint = monitor["spec"]["endpoints"][0]
    assert endpoint["scheme"] == "https"
    assert endpoint["tlsConfig"]["serverName"] == "sdar-gateway"
    secret = endpoint["tlsConfig"]["ca"]["secret"]["name"]
    assert "ca.crt" in find(render("defaults", "tls.enabled=true"), "Secret", secret)["data"]


def test_a_release_watches_itself_and_leaves_the_rules_of_others_to_them():
    rule = find(render(release="first"), "PrometheusRule", "first-sdar")
    expressions = [each["expr"] for group in rule["spec"]["groups"] for each in group["rules"]]
    assert len(expressions) > 15
    for expression in expressions:
        assert 'run="first"' in expression
        assert "run=~" not in expression


def test_a_release_brings_three_dashboards_for_the_sidecar():
    maps = [
        m
        for m in of_kind(render(), "ConfigMap")
        if m["metadata"]["labels"].get("grafana_dashboard") == "1"
    ]
    keys = sorted(key for each in maps for key in each["data"])
    assert keys == ["sdar-health.json", "sdar-learning.json", "sdar-throughput.json"]
    for each in maps:
        for key, text in each["data"].items():
            assert text == (ROOT / "helm" / "dashboards" / key.removeprefix("sdar-")).read_text()


@pytest.mark.parametrize("kind", ["ServiceMonitor", "PrometheusRule"])
def test_what_the_cluster_does_not_serve_or_nobody_wants_is_left_out(kind):
    switch = {"ServiceMonitor": "serviceMonitors", "PrometheusRule": "rules"}[kind]
    assert of_kind(render(apis=()), kind) == []
    assert of_kind(render("defaults", f"monitoring.{switch}=false"), kind) == []
    assert of_kind(render(), kind) != []


def test_the_operators_own_labels_come_on_top():
    things = render("defaults", "monitoring.labels.release=prometheus")
    found = of_kind(things, "ServiceMonitor", "PrometheusRule")
    assert {each["metadata"]["labels"]["release"] for each in found} == {"prometheus"}
    assert {each["metadata"]["labels"]["app.kubernetes.io/instance"] for each in found} == {"sdar"}


def test_promtool_takes_the_configuration_of_compose_with_the_rules_beside_it(tmp_path):
    (tmp_path / "prometheus.yml").write_text(
        (ROOT / "deploy" / "prometheus" / "compose.yml").read_text()
    )
    (tmp_path / "alerts").mkdir()
    (tmp_path / "alerts" / "sdar.yaml").write_text(
        (ROOT / "helm" / "alerts" / "sdar.yaml").read_text()
    )
    done = subprocess.run(
        ["promtool", "check", "config", tmp_path / "prometheus.yml"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "1 rule files found" in done.stdout


def test_both_ways_of_scraping_name_the_same_labels():
    named = []
    for path in (ROOT / "deploy" / "prometheus").glob("*.yml"):
        rules = yaml.safe_load(path.read_text())["scrape_configs"][0]["relabel_configs"]
        named.append({"run", "role"} <= {rule.get("target_label") for rule in rules})
    assert named == [True, True]
