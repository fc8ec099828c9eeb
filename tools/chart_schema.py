"""Writes what the chart takes from the code; `make docs` runs it, and a test compares.

- helm/values.schema.json: RunConfig's own schema under `run`, and `Values` for the rest, each key
  with the words that stand over it in helm/values.yaml.
- helm/files/run-defaults.yaml: the defaults of RunConfig, which the chart's checks across sections
  look at.
- helm/files/methods.yaml: what of each method decides which objects the chart makes.
- helm/files/rules.yaml: the rules between sections, which the chart judges as RunConfig does.
- helm/files/household.yaml: examples/household.yaml, its model where the images have it.
- helm/files/roles.yaml: what templates look up of each role in the table of services.
- the table of helm/README.md.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints
from pydantic_core import PydanticUndefined

from sdar.config import RunConfig
from sdar.contracts import roles
from sdar.contracts.methods import METHODS
from sdar.contracts.rules import RULES
from sdar.process.settings import Settings

CHART = Path(__file__).resolve().parents[1] / "helm"
DEMO = CHART.parent / "examples" / "household.yaml"
_ROLES_HEAD = """# Written by `make docs` from sdar/contracts/roles.py. Of each role:
# presence: which runs have it, by a name that the template sdar.has judges.
# ports: by name, with the number it listens on; probePort: the one that is probed and scraped.
# usesRedis: it reads and writes streams, and is traced.
# calls: roles whose gRPC it calls, in which runs; isTold: the address comes with its entries.
# readsWeights: it mounts the weight store and may hold GPUs. sleeps: the idle guard takes it to 0.
# isScalable: the gateway may set its size. drains: it takes SDAR_DRAIN_S.
# configKeys: keys of the run that it reads; a change of one restarts its pods.
"""
_BEGIN = "<!-- values: written by `make docs` -->"
_END = "<!-- end of values -->"
_OPENING = re.compile(r"\s*# -- (.*)")
_CONTINUATION = re.compile(r"\s*# (.*)")
_KEY = re.compile(r"( *)([A-Za-z_]+):")
"""Lines of helm/values.yaml: the first line of a key's words, a further one, and the key."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


Quantity = (
    Annotated[str, StringConstraints(pattern=r"^[0-9.]+(m|k|Ki|M|Mi|G|Gi|T|Ti)?$")]
    | Annotated[float, Field(ge=0)]
)
Labels = dict[str, str]
Object = dict[str, Any]
"""Kubernetes' own, passed on as it is; the API server checks it."""
Objects = list[Object]
Count = Annotated[int, Field(ge=1, le=1000)]
Seconds = Annotated[int, Field(ge=1, le=86_400)]
Grace = Annotated[int, Field(ge=31, le=86_400)]
"""Seconds of which the last 30 are for handing back what is left."""
Port = Annotated[int, Field(ge=1, le=65_535)]
BucketUrl = Annotated[str, StringConstraints(pattern=r"^(s3://.+)?$")]
RedisUrl = Annotated[str, StringConstraints(pattern=r"^(rediss?://.+)?$")]
HttpUrl = Annotated[str, StringConstraints(pattern=r"^(https?://.+)?$")]
Size = Annotated[str, StringConstraints(pattern=r"^[0-9.]+(k|Ki|M|Mi|G|Gi|T|Ti)$")]
Tag = Annotated[
    str, StringConstraints(pattern=r"^([A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?)?$")
]
"""Also a label's value."""
Environment = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


class Named(_Part):
    name: str


class Image(_Part):
    registry: str
    tag: Tag
    gpuTag: Tag
    pullPolicy: Literal["Always", "IfNotPresent", "Never"]
    pullSecrets: list[Named]


class Resources(_Part):
    requests: dict[str, Quantity] = {}
    limits: dict[str, Quantity] = {}


class Variable(_Part):
    name: Environment
    value: str = ""
    valueFrom: Object = {}


class ServiceAccount(_Part):
    annotations: Labels


class Placement(_Part):
    """Where a pod runs, which can be said of every pod."""

    nodeSelector: Labels
    tolerations: Objects
    affinity: Object
    topologySpread: list[str]
    priorityClassName: str


class Identity(_Part):
    """What a pod is to others in the cluster: all but the check's, which lives for a minute."""

    podAnnotations: Labels
    serviceAccount: ServiceAccount


class PodDefaults(Placement, Identity):
    """What `podDefaults` says for all pods and a role's own section may say for its own."""

    env: list[Variable]
    startupSeconds: Annotated[int, Field(ge=30, le=86_400)]


class Check(Placement):
    resources: Resources
    timeoutSeconds: Seconds


class Role(PodDefaults):
    resources: Resources
    terminationGracePeriodSeconds: Grace


class Gateway(Role):
    terminationGracePeriodSeconds: Seconds


class Replicas(_Part):
    min: Count
    max: Count


class Envs(Role):
    replicas: Replicas


class Engine(Envs):
    gpus: Annotated[int, Field(ge=0, le=64)]
    shmSize: Size


class Learner(Role):
    replicas: Count
    gpus: Annotated[int, Field(ge=0, le=64)]
    shmSize: Size


class Autoscaling(_Part):
    mode: Literal["gateway", "keda", "none"]
    dryRun: bool
    idleAfterSeconds: Annotated[int, Field(ge=0, le=31_536_000)]


class RedisStorage(_Part):
    storageClass: str
    size: Size


class Redis(Placement, Identity):
    resources: Resources
    terminationGracePeriodSeconds: Grace
    enabled: bool
    url: RedisUrl
    existingSecret: str
    port: Port
    image: str
    maxMemory: Annotated[str, StringConstraints(pattern=r"^[0-9]+(mb|gb)$")]
    storage: RedisStorage


class Storage(_Part):
    weightsUrl: BucketUrl
    existingClaim: str
    storageClass: str
    size: Size
    accessModes: Annotated[
        list[Literal["ReadWriteOnce", "ReadWriteMany", "ReadWriteOncePod"]], Field(min_length=1)
    ]


class Auth(_Part):
    existingSecret: str


class Tls(_Part):
    enabled: bool
    existingSecret: str
    clientAuth: Literal["none", "grpc"]
    extraHosts: list[str]


class NetworkPolicy(_Part):
    enabled: bool
    clients: Objects
    policyClients: Objects
    prometheus: Objects
    ingressController: Objects
    keda: Objects
    extraEgress: Objects


class Ingress(_Part):
    enabled: bool
    className: str
    host: str
    tlsSecret: str
    annotations: Labels


class Monitoring(_Part):
    serviceMonitors: bool
    rules: bool
    dashboards: bool
    labels: Labels


class Tracing(_Part):
    endpoint: HttpUrl
    share: Annotated[float, Field(ge=0, le=1)]


class Values(_Part):
    """The chart's own part of its values; defaults and words are in helm/values.yaml."""

    fullnameOverride: Annotated[str, StringConstraints(pattern=r"^([a-z][a-z0-9-]{0,43})?$")]
    image: Image
    logLevel: Literal["debug", "info", "warning", "error"]
    podDefaults: PodDefaults
    gateway: Gateway
    rollout: Engine
    teacher: Engine
    envs: Envs
    learner: Learner
    autoscaling: Autoscaling
    redis: Redis
    storage: Storage
    auth: Auth
    tls: Tls
    networkPolicy: NetworkPolicy
    ingress: Ingress
    monitoring: Monitoring
    tracing: Tracing
    check: Check
    envFrom: Objects
    extraVolumes: Objects
    extraVolumeMounts: Objects


def build_schema() -> dict[str, Any]:
    """The JSON schema of the chart's values, in the dialect that every Helm reads (draft 7, nothing
    by reference).
    """
    run = _inline(RunConfig.model_json_schema())
    # Empty as well: then the run has the release's name.
    name = run["properties"]["name"]
    name["pattern"] = f"^({name['pattern'].removeprefix('^').removesuffix('$')})?$"
    schema = _inline(Values.model_json_schema())
    # First, as in helm/values.yaml.
    schema["properties"] = {"run": run} | schema["properties"]
    _describe(schema, read_words((CHART / "values.yaml").read_text()), "")

    head = {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "Values of the chart sdar",
    }
    return head | schema


def build_run_defaults() -> dict[str, Any]:
    """What RunConfig fills in, section by section; keys without a default are left out."""
    defaults: dict[str, Any] = {}
    for name, field in RunConfig.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            # A section that is built without its required keys dumps the others.
            defaults[name] = section.model_construct().model_dump(mode="json")
        elif field.default is not PydanticUndefined:
            defaults[name] = field.default
    return defaults


def build_methods() -> dict[str, dict[str, bool]]:
    """What of each method decides which pods there are and who may call whom."""
    methods = {}
    for name, method in METHODS.items():
        methods[name] = {
            "needs_teacher": method.needs_teacher,
            "student_sees_skills": method.student_sees_skills,
            "runs_teacher": method.runs_teacher,
        }
    return methods


def build_roles() -> dict[str, Any]:
    """The table of services as templates read it, by role."""
    return {str(role): describe_role(row) for role, row in roles.ROLES.items()}


def describe_role(row: roles.RoleSpec) -> dict[str, Any]:
    """One row as templates read it; the head of the file says what each key means."""
    return {
        "presence": str(row.presence),
        "ports": {str(port): find_port_number(port) for port in row.listens},
        "probePort": str(row.probe_port),
        "usesRedis": row.uses_bus,
        "calls": [
            {"role": str(call.role), "presence": str(call.presence), "isTold": call.is_told}
            for call in row.calls
        ],
        "readsWeights": row.may_hold_gpus,
        "sleeps": row.sleeps,
        "isScalable": row.is_scalable,
        "drains": row.drains,
        "configKeys": list(row.config_keys),
    }


def find_port_number(port: roles.Port) -> int:
    """The number that containers listen on: the setting's default."""
    return int(Settings.model_fields[port.setting].default)


def render_roles() -> str:
    """The text of helm/files/roles.yaml."""
    return _ROLES_HEAD + yaml.safe_dump(build_roles(), sort_keys=False)


def build_rules() -> list[dict[str, Any]]:
    """The rules between sections as plain data."""
    return [dataclasses.asdict(rule) for rule in RULES]


def build_demo() -> str:
    """examples/household.yaml as part of a chart: without its name, its model where the images have
    it.
    """
    lines = DEMO.read_text().splitlines()
    kept = [line for line in lines if not line.startswith(("#", "name:"))]
    text = "\n".join(kept).replace("path: models/", "path: /opt/sdar/examples/models/", 1)
    return f"# Written by `make docs` from examples/household.yaml.\n{text}\n"


def build_table() -> str:
    """Markdown: every described key of the chart's own part, its default and its words."""
    text = (CHART / "values.yaml").read_text()
    values = yaml.safe_load(text)
    rows = ["| key | default | |", "|---|---|---|"]
    for key, words in read_words(text).items():
        value = values
        for part in key.split("."):
            value = value[part]
        row = f"| `{key}` | `{json.dumps(value)}` | {words} |"
        # An empty text is shown as an empty cell.
        rows.append(row.replace('`""`', ""))
    return "\n".join(rows)


def read_words(text: str) -> dict[str, str]:
    """What stands over each key of a values file after `# --`, by the key's dotted path."""
    words: dict[str, str] = {}
    # The key of this line and those that it is in, each with its indentation.
    path: list[tuple[int, str]] = []
    comment: list[str] = []
    for line in text.splitlines():
        opening = _OPENING.match(line)
        continuation = _CONTINUATION.match(line)
        key = _KEY.match(line)
        if opening is not None:
            comment = [opening[1]]
            continue
        if comment and continuation is not None:
            comment.append(continuation[1])
            continue

        if key is not None:
            indentation = len(key[1])
            path = [part for part in path if part[0] < indentation]
            path.append((indentation, key[2]))
        if key is not None and comment:
            dotted = ".".join(name for _, name in path)
            words[dotted] = " ".join(comment)
        comment = []
    return words


def write() -> None:
    """Write everything anew."""
    (CHART / "values.schema.json").write_text(json.dumps(build_schema(), indent=2) + "\n")
    _write_data(
        "run-defaults", "RunConfig: what a key has that `run` leaves out", build_run_defaults()
    )
    _write_data("methods", "sdar/contracts/methods.py", build_methods())
    _write_data("rules", "sdar/contracts/rules.py", build_rules())
    (CHART / "files/household.yaml").write_text(build_demo())
    (CHART / "files/roles.yaml").write_text(render_roles())
    _write_table()


def _write_table() -> None:
    """Put the table between its two marks in helm/README.md."""
    page = CHART / "README.md"
    before, rest = page.read_text().split(_BEGIN)
    _, after = rest.split(_END)
    page.write_text(f"{before}{_BEGIN}\n{build_table()}\n{_END}{after}")


def _write_data(name: str, source: str, data: object) -> None:
    head = f"# Written by `make docs` from {source}.\n"
    text = yaml.safe_dump(data, sort_keys=False, width=96)
    (CHART / f"files/{name}.yaml").write_text(head + text)


def _inline(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema without references, titles and what only newer dialects know."""
    definitions = schema.pop("$defs", {})

    def visit(node: Any, *, is_named: bool = False) -> Any:
        if isinstance(node, list):
            return [visit(item) for item in node]
        if not isinstance(node, dict):
            return node
        # The keys of `properties` are names, not keywords.
        if is_named:
            return {name: visit(value) for name, value in node.items()}

        if "$ref" in node:
            rest = dict(node)
            name = rest.pop("$ref").rpartition("/")[2]
            # What stands beside a reference, such as a default, wins over the definition.
            return visit(definitions[name] | rest)

        kept = {key: value for key, value in node.items() if key not in ("title", "format")}
        if isinstance(kept.get("description"), str):
            kept["description"] = " ".join(kept["description"].split())
        # Draft 7 has no types by position; those of a pair are the same.
        if "prefixItems" in kept:
            kept["items"] = kept.pop("prefixItems")[0]
        return {key: visit(value, is_named=key == "properties") for key, value in kept.items()}

    inlined: dict[str, Any] = visit(schema)
    return inlined


def _describe(schema: dict[str, Any], words: dict[str, str], path: str) -> None:
    """Give each key of the chart's own part its words, in place. A key of a role's section that has
    none of its own gets those of `podDefaults`.
    """
    # A key that is left out has the file's default, or the demo's.
    schema.pop("required", None)
    # Outside the run, descriptions are docstrings of the classes above.
    if not path.startswith("run."):
        schema.pop("description", None)

    for name, child in schema.get("properties", {}).items():
        key = f"{path}{name}"
        _describe(child, words, f"{key}.")
        common = f"podDefaults.{key.partition('.')[2]}"
        found = words.get(key, words.get(common))
        if found:
            schema["properties"][name] = {"description": found} | child


if __name__ == "__main__":
    write()
