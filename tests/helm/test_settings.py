"""What the chart hands to the services is what the services know: variables, commands, ports, keys,
hosts of certificates.
"""

from __future__ import annotations

import base64
import contextlib
import shlex
import ssl
import tomllib

import pytest
import yaml
from cryptography import x509

from sdar.cli.release_check import build_parser
from sdar.contracts.roles import Role
from sdar.contracts.streams import ConsumerGroup, RunKeys, Stream
from sdar.process.settings import Settings
from services.envs.alfworld import environment as alfworld
from services.envs.search import environment as search
from services.envs.webshop import environment as webshop
from tests.helm.chart import ROOT, VALUES_FILES, containers, find, of_kind, pods, render

every_values_file = pytest.mark.parametrize("values", VALUES_FILES)
OF_LIBRARIES = {
    "HF_HUB_OFFLINE": "huggingface_hub: never look for a newer model than the one in the image",
    "REDISCLI_AUTH": "redis-cli in Redis' probes",
}
OF_ENVIRONMENTS = {alfworld.DATA_VARIABLE, search.DATA_VARIABLE, webshop.DATA_VARIABLE}


def known_variables():
    return {
        field.validation_alias or f"SDAR_{name.upper()}"
        for name, field in Settings.model_fields.items()
    }


@every_values_file
def test_every_variable_is_one_that_settings_a_library_or_an_environment_reads(values):
    users = {
        item["name"] for section in ("podDefaults", "rollout") for item in _own_env(values, section)
    }
    known = known_variables() | OF_LIBRARIES.keys() | OF_ENVIRONMENTS
    for role, container in containers(render(values)):
        for variable in container.get("env", []):
            assert variable["name"] in known | users, f"{role}: {variable['name']}"


def _own_env(values, role):
    path = VALUES_FILES[values]
    return (yaml.safe_load(path.read_text()) if path else {}).get(role, {}).get("env", [])


@every_values_file
def test_every_variable_has_a_value_that_settings_take(values, monkeypatch):
    for _, container in containers(render(values)):
        with monkeypatch.context() as patch:
            for variable in container.get("env", []):
                if "value" in variable:
                    patch.setenv(variable["name"], variable["value"])
            Settings()


@pytest.mark.parametrize("grace_s", [31, 86_400])
def test_every_grace_that_the_chart_takes_is_a_drain_that_services_take(grace_s):
    for role in ("rollout", "envs"):
        environment = {
            variable["name"]: variable.get("value")
            for name, container in containers(
                render("defaults", f"{role}.terminationGracePeriodSeconds={grace_s}")
            )
            for variable in container.get("env", [])
            if name == role
        }
        assert Settings(drain_s=environment["SDAR_DRAIN_S"]).drain_s == grace_s - 30


@every_values_file
def test_every_command_is_one_of_sdars(values):
    for role, container in containers(render(values)):
        command, arguments = container.get("command", []), container.get("args", [])
        if role == "redis":
            assert command == ["redis-server", "/etc/redis/redis.conf"]
        elif role == "check":
            assert command == ["python", "-m", "sdar.cli.release_check"]
            assert build_parser().parse_args(arguments).policy == "sdar-rollout:9090"
        elif command:
            assert (role, command[:2]) == ("learner", ["sh", "-c"])
        else:
            assert arguments == ["serve", Role(role).value]


def test_torchrun_is_started_with_flags_that_it_knows():
    from torch.distributed.run import get_args_parser

    (script,) = [
        container["command"][2]
        for role, container in containers(render("everything"))
        if role == "learner"
    ]
    words = shlex.split(script.replace("${HOSTNAME##*-}", "1"))
    told = get_args_parser().parse_args(words[2:])

    assert words[:2] == ["exec", "torchrun"]
    assert (told.nnodes, told.nproc_per_node, told.node_rank) == ("2", "4", 1)
    assert (told.master_addr, told.master_port, told.no_python) == (
        "sdar-learner-0.sdar-learner",
        29500,
        True,
    )
    assert [told.training_script, *told.training_script_args] == ["sdar", "serve", "learner"]


def test_every_role_has_its_image_and_a_teacher_with_vllm_the_rollouts():
    def images(values):
        return {
            role: container["image"]
            for role, container in containers(render(values))
            if role != "redis"
        }

    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    roles = ("gateway", "rollout", "teacher", "envs", "learner")
    assert images("defaults") == {role: f"sdar-{role}:{version}" for role in roles} | {
        "check": f"sdar-gateway:{version}"
    }
    assert images("everything")["teacher"] == "registry.example.com/team/sdar-rollout:0.2.0-cuda"
    assert images("everything")["learner"] == "registry.example.com/team/sdar-learner:0.2.0-cuda"
    assert images("everything")["envs"] == "registry.example.com/team/sdar-envs:0.2.0"


def test_ports_are_those_that_services_take_by_themselves():
    ports = {
        field: Settings.model_fields[field].default
        for field in ("http_port", "grpc_port", "probe_port")
    }
    named = {
        port["name"]: port["containerPort"]
        for role, one in containers(render())
        if role != "redis"
        for port in one.get("ports", [])
    }

    assert named == {
        "http": ports["http_port"],
        "grpc": ports["grpc_port"],
        "probe": ports["probe_port"],
    }


@every_values_file
def test_every_volume_is_there_and_every_mount_has_one(values):
    things = render(values)
    made = {
        kind: {thing["metadata"]["name"] for thing in of_kind(things, kind)}
        for kind in ("ConfigMap", "Secret")
    }
    elsewhere = {"tokens", "certificates", "redis"} if values == "existing" else set()
    for role, pod in pods(things):
        volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
        mounted = {
            mount["name"]
            for container in pod["spec"]["containers"]
            for mount in container["volumeMounts"]
        }
        assert mounted - {"data"} <= set(volumes) if role == "redis" else mounted == set(volumes)
        for volume in volumes.values():
            if "configMap" in volume:
                assert volume["configMap"]["name"] in made["ConfigMap"]
            for source in volume.get("projected", {}).get("sources", []):
                assert source["secret"]["name"] in made["Secret"] | elsewhere
    for _, container in containers(things):
        for variable in container.get("env", []):
            if reference := variable.get("valueFrom", {}).get("secretKeyRef"):
                assert reference["name"] in made["Secret"] | elsewhere


def test_nothing_that_is_written_lies_on_the_root_file_system():
    for role, container in containers(render()):
        writable = {
            mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")
        }
        expected = {"/tmp", "/var/cache/sdar"} if role not in ("redis", "check") else {"/tmp"}
        assert expected <= writable, role


def test_keda_goes_by_streams_and_groups_that_exist():
    keys, streams = RunKeys("sdar"), set()
    for thing in of_kind(render("keda"), "ScaledObject"):
        for trigger in thing["spec"]["triggers"]:
            streams.add(
                (
                    thing["metadata"]["name"],
                    trigger["metadata"]["stream"],
                    trigger["metadata"]["consumerGroup"],
                )
            )
            assert trigger["metadata"]["enableTLS"] == "true"
        assert {key for one in thing["spec"]["triggers"] for key in one["metadata"]} >= {
            "lagCount",
            "pendingEntriesCount",
        }

    assert streams == {
        ("sdar-rollout", keys.stream(Stream.TASKS), ConsumerGroup.ROLLOUT.value),
        ("sdar-envs", keys.stream(Stream.TASKS), ConsumerGroup.ROLLOUT.value),
        ("sdar-teacher", keys.stream(Stream.TRAJECTORIES), ConsumerGroup.TEACHER.value),
    }
    least = {
        thing["metadata"]["name"]: thing["spec"]["minReplicaCount"]
        for thing in of_kind(render("keda"), "ScaledObject")
    }
    assert least == {
        "sdar-rollout": 0,
        "sdar-teacher": 0,
        "sdar-envs": 2,
    }  # the gateway first asks environments for tasks


def test_keda_finds_the_address_and_the_password_in_the_secret():
    things = render("keda")
    secret = find(things, "Secret", "sdar-redis")["stringData"]
    (authentication,) = of_kind(things, "TriggerAuthentication")
    told = {
        item["parameter"]: secret[item["key"]] for item in authentication["spec"]["secretTargetRef"]
    }

    assert told == {
        "address": "redis.example.com:6380",
        "username": "trainer",
        "password": "secret",
    }
    elsewhere = ("redis.url=redis://redis1/2",)
    assert (
        find(render("keda", *elsewhere), "Secret", "sdar-redis")["stringData"]["redis-address"]
        == "redis1:6379"
    )
    for trigger in (
        one
        for thing in of_kind(render("keda", *elsewhere), "ScaledObject")
        for one in thing["spec"]["triggers"]
    ):
        assert trigger["metadata"]["databaseIndex"] == "2"
        assert "enableTLS" not in trigger["metadata"]
    # A Secret of one's own says it all: nothing of TLS may then be in the trigger.
    (own,) = of_kind(
        render("keda", "redis.url=", "redis.existingSecret=theirs"), "TriggerAuthentication"
    )
    named = {
        (item["parameter"], item["name"], item["key"]) for item in own["spec"]["secretTargetRef"]
    }
    assert named == {
        (key, "theirs", f"redis-{key}") for key in ("address", "username", "password", "tls")
    }
    assert (
        find(render(), "Secret", "sdar-redis")["stringData"]["redis-address"]
        == "sdar-redis.runs.svc:6379"
    )


def test_redis_keeps_what_was_confirmed_and_throws_nothing_away():
    secret = find(render(), "Secret", "sdar-redis")["stringData"]
    settings = dict(
        line.split(maxsplit=1)
        for line in secret["redis.conf"].splitlines()
        if not line.startswith("#")
    )

    assert settings["appendonly"] == "yes"
    assert settings["appendfsync"] == "always"
    assert settings["maxmemory-policy"] == "noeviction"
    assert settings["requirepass"] == secret["redis-password"]
    assert secret["redis-url"] == f"redis://:{secret['redis-password']}@sdar-redis:6379/0"


def test_tokens_are_as_servers_take_them():
    from sdar.wire.tokens import parse_tokens

    text = base64.b64decode(find(render(), "Secret", "sdar-auth")["data"]["tokens"]).decode()

    assert [token.role.name for token in parse_tokens(text, "tokens")] == ["OPERATE", "READ"]


def test_the_certificate_names_every_host_that_is_called():
    things = render("everything")
    data = find(things, "Secret", "sdar-tls")["data"]
    certificate = x509.load_pem_x509_certificate(base64.b64decode(data["tls.crt"]))
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    hosts = set(names.get_values_for_type(x509.DNSName))
    called = {
        variable["value"].rpartition("//")[2].rpartition(":")[0]
        for _, container in containers(things)
        for variable in container.get("env", [])
        if variable["name"] in ("SDAR_ENVS_ADDRESS", "SDAR_TEACHER_ADDRESS", "SDAR_GATEWAY_URL")
    }

    assert (
        called
        | {"sdar-rollout", "localhost", "sdar.example.com", "sdar-gateway.runs.svc.cluster.local"}
        <= hosts
    )
    assert "127.0.0.1" in map(str, names.get_values_for_type(x509.IPAddress))
    authority = x509.load_pem_x509_certificate(base64.b64decode(data["ca.crt"]))
    certificate.verify_directly_issued_by(authority)


def test_openssl_accepts_the_generated_certificate_too(tmp_path):
    """gRPC verifies by BoringSSL, which bears what HTTP clients refuse."""
    data = find(render("everything"), "Secret", "sdar-tls")["data"]
    for name in ("tls.crt", "tls.key", "ca.crt"):
        (tmp_path / name).write_bytes(base64.b64decode(data[name]))
    server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_context.load_cert_chain(tmp_path / "tls.crt", tmp_path / "tls.key")
    client_context = ssl.create_default_context(cafile=str(tmp_path / "ca.crt"))
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = client_context.wrap_bio(to_client, to_server, server_hostname="localhost")
    server = server_context.wrap_bio(to_server, to_client, server_side=True)

    for side in (client, server, client, server):
        with contextlib.suppress(ssl.SSLWantReadError):
            side.do_handshake()

    assert client.version() == "TLSv1.3"
    assert client.getpeercert()["subjectAltName"]


@pytest.mark.parametrize(
    ("setting", "restarted"),
    [
        ("run.teacher.num_skills=2", {"gateway", "teacher"}),
        ("run.training.num_updates=120", {"gateway", "learner"}),
        ("run.training.learning_rate=0.001", {"gateway", "learner"}),
        ("run.evaluation.every_updates=10", {"gateway"}),
        ("run.rollout.max_response_tokens=16", {"gateway", "rollout"}),
        ("run.rollout.temperature=0.9", {"gateway", "learner"}),
        ("run.rollout.num_workers=2", {"gateway"}),
        ("run.environment.capacity=64", {"gateway", "envs"}),
        ("run.environment.max_turns=9", {"gateway"}),
        ("run.model.dtype=bfloat16", {"gateway", "rollout", "teacher", "learner"}),
        ("run.seed=7", {"gateway", "rollout", "learner"}),
        ("run.training.zero_stage=0", set()),  # the default, written down
        ("rollout.replicas.max=4", set()),
        ("autoscaling.idleAfterSeconds=60", set()),
        ("storage.size=20Gi", set()),
        ("networkPolicy.enabled=false", set()),
        ("teacher.resources.requests.cpu=250m", {"teacher"}),
        ("logLevel=debug", {"gateway", "rollout", "teacher", "envs", "learner"}),
    ],
)
def test_an_upgrade_restarts_what_reads_the_changed_value_and_nothing_else(setting, restarted):
    before, after = dict(pods(render())), dict(pods(render("defaults", setting)))

    assert {role for role in before if before[role] != after[role]} - {"check"} == restarted
