"""The table of services and all that cannot import it: a role that lacks a part is told which.

Code reads sdar/contracts/roles.py. Images, the compose file, the chart, dashboards and alerts are
text, so each is held against the rows here.
"""

from __future__ import annotations

import ast
import re
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from sdar.bus.protocol import BusMemory, StreamLag
from sdar.cli.run import list_services
from sdar.cli.serve import check_addresses, find_library_environment, serve_service
from sdar.config import RunConfig, load_config, save_config
from sdar.contracts.errors import ConfigurationError
from sdar.contracts.roles import (
    CALLED,
    REPORTING,
    ROLES,
    SCALABLE,
    SLEEPING,
    WORKERS,
    Call,
    Libraries,
    ModelUse,
    Port,
    Presence,
    Role,
    RoleSpec,
    Signal,
    find_role_name,
)
from sdar.contracts.streams import ConsumerGroup, Stream
from sdar.process.settings import Settings
from services.gateway.alarms import (
    JUDGES,
    SILENCE_S,
    BusCondition,
    BusState,
    Situation,
    find_worker_silent,
)
from services.gateway.describe import PAYLOADS
from services.gateway.state import RunPhase
from tests.support import EXAMPLES
from tests.unit.config_reads import expand, find_keys
from tools import chart_schema, image_requirements

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm"

TOY = RoleSpec(
    name="critic",
    reads=(Stream.SCORED,),
    reports=True,
    listens=(Port.PROBE, Port.GRPC),
    calls=(Call(Role.TEACHER, Presence.WITH_TEACHER),),
    signal=Signal.SCORES_WAIT,
    model=ModelUse.WEIGHTS,
    threads="critic.num_threads",
    config_keys=("name", "critic"),
)
"""A service that somebody has only just written down."""


def read(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def read_code(name: str) -> str:
    return "\n".join(path.read_text() for path in (ROOT / "services" / name).rglob("*.py"))


# ---- parts: each function says whether a row has one


def has_a_main(row: RoleSpec) -> bool:
    path = ROOT / "services" / row.name / "service.py"
    if not path.exists():
        return False
    found = ast.parse(path.read_text()).body
    return any(isinstance(one, ast.AsyncFunctionDef) and one.name == "serve" for one in found)


def has_keys_that_a_run_has(row: RoleSpec) -> bool:
    named = [*row.config_keys, row.threads, row.copies]
    return all(is_key(key) for key in named if key)


def is_key(key: str) -> bool:
    model: Any = RunConfig
    for part in key.split("."):
        if part not in getattr(model, "model_fields", {}):
            return False
        model = model.model_fields[part].annotation
    return True


def has_an_image(row: RoleSpec) -> bool:
    stage = re.search(
        rf"^FROM \S+ AS {row.name}$(.*?)(?=^FROM |\Z)", read("Dockerfile"), re.M | re.S
    )
    return stage is not None and f'CMD ["serve", "{row.name}"]' in stage[1]


def has_a_list_of_packages(row: RoleSpec) -> bool:
    listed = (ROOT / "deploy" / "requirements" / f"{row.name}.txt").exists()
    return listed and row.name in image_requirements.ROLES


def has_a_container(row: RoleSpec) -> bool:
    service = yaml.safe_load(read("docker-compose.yml"))["services"].get(row.name)
    if service is None:
        return False
    addresses = {f"SDAR_{call.role.upper()}_ADDRESS" for call in row.calls if not call.is_told}
    is_beside_redis = "redis" in service.get("networks", ())
    return (
        service["build"]["target"] == row.name
        and service["image"].startswith(f"sdar-{row.name}:")
        and is_beside_redis == row.uses_bus
        and addresses <= service["environment"].keys()
    )


def has_a_folder_of_the_chart(row: RoleSpec) -> bool:
    kinds = {path.stem for path in (CHART / "templates" / row.name).glob("*.yaml")}
    return bool(kinds & {"deployment", "statefulset"}) and {"networkpolicy"} <= kinds


def has_values_of_the_chart(row: RoleSpec) -> bool:
    values = yaml.safe_load(read("helm/values.yaml")).get(row.name)
    if values is None:
        return False
    is_sized = isinstance(values.get("replicas"), dict)
    return is_sized == (row.signal is not Signal.NONE) and ("gpus" in values) == row.may_hold_gpus


def has_a_schema_of_its_values(row: RoleSpec) -> bool:
    return row.name in chart_schema.Values.model_fields


def has_its_row_in_the_chart(row: RoleSpec) -> bool:
    rows = yaml.safe_load(read("helm/files/roles.yaml"))
    return bool(rows.get(row.name) == chart_schema.describe_role(row))


def is_scraped_beside_compose(row: RoleSpec) -> bool:
    jobs = yaml.safe_load(read("deploy/prometheus/compose.yml"))["scrape_configs"]
    targets = [target for job in jobs for target in job["dns_sd_configs"]]
    ports = {target["port"] for target in targets if row.name in target["names"]}
    return ports == {chart_schema.find_port_number(row.probe_port)}


def is_scraped_in_a_cluster(row: RoleSpec) -> bool:
    (job,) = yaml.safe_load(read("deploy/prometheus/kubernetes.yml"))["scrape_configs"]
    (rule,) = (rule for rule in job["relabel_configs"] if rule.get("action") == "keep")
    named = (port for port in Port if re.fullmatch(rule["regex"], f"sdar;{row.name};{port}"))
    return set(named) == {row.probe_port}


def is_on_the_metrics_page(row: RoleSpec) -> bool:
    return bool(list_metrics(row))


def is_on_a_dashboard(row: RoleSpec) -> bool:
    shown = "".join(path.read_text() for path in (CHART / "dashboards").glob("*.json"))
    return any(re.search(rf"\b{metric}", shown) for metric in list_metrics(row))


def list_metrics(row: RoleSpec) -> list[str]:
    """Names of the role's own metrics, as docs/metrics.md lists them."""
    section = read("docs/metrics.md").partition(f"\n## `{row.name}`\n")[2].partition("\n## ")[0]
    return re.findall(r"^\| `(sdar_\w+)", section, re.M)


def is_missed_by_an_alert(row: RoleSpec) -> bool:
    return not row.reports or f"{row.name}_silent" in read("helm/alerts/sdar.yaml")


def is_in_the_architecture(row: RoleSpec) -> bool:
    lines = (f"| {row.name} | `", f"| `services/{row.name}` |")
    return all(f"\n{line}" in read("docs/architecture.md") for line in lines)


# "file: what is in it", with the role's name for {}: docs/architecture.md lists the files.
PARTS: dict[str, Callable[[RoleSpec], bool]] = {
    "services/{}/service.py: serve(config, settings)": has_a_main,
    "sdar/config.py: the keys that its row names": has_keys_that_a_run_has,
    "Dockerfile: a stage {} that serves it": has_an_image,
    "tools/image_requirements.py: packages of {}, then make lock": has_a_list_of_packages,
    "docker-compose.yml: a service {}, beside Redis if it reads streams": has_a_container,
    "helm/templates/{}/: its workload and network policy": has_a_folder_of_the_chart,
    "helm/values.yaml: {}, with replicas and GPUs as its row says": has_values_of_the_chart,
    "tools/chart_schema.py: Values.{}": has_a_schema_of_its_values,
    "sdar/contracts/roles.py: its row, then make docs": has_its_row_in_the_chart,
    "deploy/prometheus/compose.yml: {} at its port": is_scraped_beside_compose,
    "deploy/prometheus/kubernetes.yml: {} at its port": is_scraped_in_a_cluster,
    "services/{}/metrics.py: what it measures, then make docs": is_on_the_metrics_page,
    "tools/make_dashboards.py: a panel of {}, then make docs": is_on_a_dashboard,
    "helm/alerts/sdar.yaml: {}_silent": is_missed_by_an_alert,
    "docs/architecture.md: its lines in the tables of services and rooms": is_in_the_architecture,
}


def find_missing(row: RoleSpec) -> list[str]:
    return [part.format(row.name) for part, has in PARTS.items() if not has(row)]


@pytest.mark.parametrize("role", ROLES)
def test_a_role_has_all_its_parts(role: Role) -> None:
    assert find_missing(ROLES[role]) == []


def test_a_row_without_its_parts_is_told_each_of_them() -> None:
    assert find_missing(TOY) == [part.format("critic") for part in PARTS]


def test_every_folder_of_services_is_kept_apart_and_built() -> None:
    contracts = tomllib.loads(read("pyproject.toml"))["tool"]["importlinter"]["contracts"]
    (independent,) = (one for one in contracts if one["type"] == "independence")
    assert independent["modules"] == ["services.*"]
    command = ["make", "-s", "--eval", "print-roles: ; @echo $(ROLES)", "print-roles"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == set(Role)


def test_nothing_stands_for_a_role_that_the_table_does_not_have() -> None:
    services = {path.parent.name for path in (ROOT / "services").glob("*/service.py")}
    assert services == set(image_requirements.ROLES) == set(Role) == set(ROLES)
    assert set(yaml.safe_load(read("helm/files/roles.yaml"))) == set(ROLES)


def test_the_chart_has_the_table_as_it_is() -> None:
    assert read("helm/files/roles.yaml") == chart_schema.render_roles(), "run make docs"


# ---- a row says what the code does

# Who answers each gRPC service of proto/sdar/v1.
SERVED_BY = {
    "Environment": Role.ENVS,
    "Gateway": Role.GATEWAY,
    "Policy": Role.ROLLOUT,
    "Teacher": Role.TEACHER,
}


@pytest.mark.parametrize("role", ROLES)
def test_a_row_says_what_its_service_does(role: Role) -> None:
    row = ROLES[role]
    code = read_code(role)
    listens = set(re.findall(r"settings\.((?:http|grpc|probe)_port)\b", code))
    assert listens == {port.setting for port in row.listens}
    assert ("settings.drain_s" in code) == row.drains
    assert ("claim_role(" in code) == row.is_sole
    assert ("build_bus(" in code) == row.uses_bus
    called = {Role(role) for role in re.findall(r"settings\.([a-z]+)_address\b", code)}
    assert called == {call.role for call in row.calls if not call.is_told}
    stubs = set(re.findall(r"\.(\w+)ServiceStub\(", code))
    assert {SERVED_BY[stub] for stub in stubs} == {call.role for call in row.calls}
    assert ("weights_url" in code or "build_weight_store(" in code) == row.may_hold_gpus


@pytest.mark.parametrize("role", ROLES)
def test_a_row_names_the_keys_of_the_run_that_its_service_reads_and_no_others(role: Role) -> None:
    row = ROLES[role]
    named, read_keys = expand(row.config_keys), find_keys(row.name) | list_keys_of_start(row)
    assert read_keys - named == set(), "an upgrade that changes them leaves old values in its pods"
    assert named - read_keys == set(), "an upgrade that changes them restarts its pods for nothing"


def list_keys_of_start(row: RoleSpec) -> set[str]:
    """What `sdar serve` reads for a role, before the service's own code."""
    reads = {
        row.threads: True,
        "name": row.uses_bus,
        "model.path": row.model is not ModelUse.NOTHING,
        "teacher.scorer": row.libraries is Libraries.AS_SCORER,
    }
    return {key for key, is_read in reads.items() if key and is_read}


@pytest.mark.parametrize(
    ("method", "taken"),
    [
        ("sdar", {Stream.TRAJECTORIES: ("teacher",), Stream.SCORED: ("learner",)}),
        ("grpo", {Stream.TRAJECTORIES: ("learner",)}),
        # Its teacher hands out skills and scores nothing.
        ("skill_grpo", {Stream.TRAJECTORIES: ("learner",)}),
    ],
)
def test_whoever_takes_entries_of_a_stream_has_it_in_its_row(
    method: str, taken: dict[Stream, tuple[str, ...]]
) -> None:
    config = load_config(EXAMPLES / "household.yaml", {"method.name": method})
    always = {
        Stream.TASKS: ("rollout",),
        Stream.LEDGER: ("gateway",),
        Stream.EVALUATIONS: ("gateway",),
    }
    consumers = config.stream_consumers
    assert consumers.items() >= (always | taken).items()
    assert (Stream.SCORED in consumers) == (Stream.SCORED in taken)
    assert {str(group) for group in ConsumerGroup} == {
        row.name for row in ROLES.values() if row.uses_bus
    }


@pytest.mark.parametrize("stream", Stream)
def test_a_stream_has_its_line_on_the_page_and_a_reader_of_its_dead_letters(
    stream: Stream,
) -> None:
    assert re.search(rf"^\| `{stream}` \|", read("docs/architecture.md"), re.M)
    is_taken = any(stream in row.reads for row in ROLES.values())
    assert (stream in PAYLOADS) == is_taken


def test_ports_and_addresses_are_settings() -> None:
    names = [port.setting for port in Port]
    assert set(names) <= Settings.model_fields.keys()
    addresses = {name for name in Settings.model_fields if name.endswith("_address")}
    assert addresses == {f"{role}_address" for role in CALLED}


# ---- what is derived from the rows


def test_the_roles_of_each_kind() -> None:
    assert REPORTING == (Role.ROLLOUT, Role.TEACHER, Role.LEARNER)
    assert WORKERS == (Role.ROLLOUT, Role.TEACHER)
    assert SLEEPING == (Role.ROLLOUT, Role.TEACHER, Role.LEARNER)
    assert set(SCALABLE) == set(ROLES) - {Role.GATEWAY}
    assert CALLED == (Role.TEACHER, Role.ENVS)


def test_every_role_that_reports_is_missed_when_it_is_silent() -> None:
    assert {f"{role}_silent" for role in REPORTING} <= JUDGES.keys()


def test_a_further_worker_is_missed_without_a_line_of_its_own() -> None:
    situation = Situation(
        now_s=1000.0,
        phase=RunPhase.RUNNING,
        bus=BusCondition(BusState.OK, 0.0),
        memory=BusMemory(used_bytes=1, max_bytes=100),
        lags={Stream.SCORED: StreamLag(3, 0, 1.0)},
        heard_at_s={"critic": 1000.0 - SILENCE_S - 1},
        learner_busy_s=1.0,
        learner_input=Stream.TRAJECTORIES,
        num_dead_letters=0,
        ledger_gap=0,
        length_drift=0.0,
        progress_at_s=1000.0,
    )
    assert "No critic process was heard from for 61 s" in find_worker_silent(TOY, situation)


@pytest.mark.parametrize(
    ("changes", "absent"),
    [
        ({}, set()),
        ({"method.name": "grpo"}, {Role.TEACHER}),
        ({"method.name": "skill_grpo"}, set()),
        ({"environment.address": "127.0.0.1:50051"}, {Role.ENVS}),
    ],
)
def test_a_run_starts_the_roles_that_it_has(changes: dict[str, str], absent: set[Role]) -> None:
    config = load_config(EXAMPLES / "household.yaml", {"rollout.num_workers": 2, **changes})
    services = list_services(config)
    assert services.keys() == set(ROLES) - absent
    assert services[Role.ROLLOUT] == ["rollout-0", "rollout-1"]
    for role, names in services.items():
        assert {find_role_name(name) for name in names} == {role}


@pytest.mark.parametrize(
    ("role", "scorer", "has_vllm"),
    [
        (Role.ROLLOUT, "transformers", True),
        (Role.TEACHER, "transformers", False),
        (Role.TEACHER, "vllm", True),
        (Role.LEARNER, "vllm", False),
        (Role.GATEWAY, "vllm", False),
    ],
)
def test_vllms_switches_are_set_where_vllm_runs(role: Role, scorer: str, has_vllm: bool) -> None:
    config = load_config(EXAMPLES / "household.yaml", {"teacher.scorer": scorer})
    variables = find_library_environment(ROLES[role], config)
    assert ("VLLM_LOGGING_LEVEL" in variables) == has_vllm


@pytest.mark.parametrize(
    ("role", "changes", "missing"),
    [
        (Role.GATEWAY, {}, "SDAR_ENVS_ADDRESS"),
        (Role.GATEWAY, {"environment.address": "127.0.0.1:50051"}, None),
        (Role.ROLLOUT, {"method.name": "skill_grpo"}, "SDAR_TEACHER_ADDRESS"),
        # Its teacher reads streams, and tasks name their environment servers.
        (Role.ROLLOUT, {}, None),
        (Role.TEACHER, {}, None),
        (Role.ENVS, {}, None),
        (Role.LEARNER, {}, None),
    ],
)
def test_a_service_that_does_not_know_whom_to_call_is_refused_before_its_model_is_looked_for(
    role: Role,
    changes: dict[str, str],
    missing: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for variable in ("SDAR_ENVS_ADDRESS", "SDAR_TEACHER_ADDRESS"):
        monkeypatch.delenv(variable, raising=False)
    config = load_config(EXAMPLES / "household.yaml", changes)
    if missing is None:
        check_addresses(ROLES[role], config, Settings())
        return
    no_model = config.model.model_copy(update={"path": tmp_path / "none"})
    save_config(config.model_copy(update={"model": no_model}), tmp_path / "run.yaml")
    with pytest.raises(ConfigurationError, match=f"^{missing} is not set"):
        serve_service(role, tmp_path / "run.yaml")
    monkeypatch.setenv(missing, "127.0.0.1:9090")
    with pytest.raises(ConfigurationError, match=r"^model\.path"):
        serve_service(role, tmp_path / "run.yaml")


@pytest.mark.parametrize("role", ROLES)
def test_a_service_has_the_threads_that_its_row_names(role: Role) -> None:
    wanted = {"rollout.num_threads": 3, "teacher.num_threads": 5, "training.num_threads": 7}
    config = load_config(EXAMPLES / "household.yaml", wanted)
    row = ROLES[role]
    threads = find_library_environment(row, config)["OMP_NUM_THREADS"]
    assert int(threads) == wanted.get(row.threads, 1)
