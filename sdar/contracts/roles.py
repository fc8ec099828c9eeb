"""The table of services: what each reads, where it listens, how it is sized, what of a run it uses.

A service is one row here and one folder in services/. Code derives what it must know of a role from
its row; what cannot import Python (images, compose file, chart, dashboards) is checked against the
rows by tests/unit/test_roles.py, which names each part that a role lacks.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from sdar.contracts.registry import index_by_name
from sdar.contracts.streams import Stream


class Role(StrEnum):
    """Names of the services. `sdar serve` takes one of them."""

    GATEWAY = "gateway"
    ROLLOUT = "rollout"
    TEACHER = "teacher"
    ENVS = "envs"
    LEARNER = "learner"


class Port(StrEnum):
    """What a server speaks; the number is the setting `<name>_port` of sdar.process.settings."""

    HTTP = "http"
    """A page and an API, with /healthz, /readyz and /metrics among them."""
    PROBE = "probe"
    """/healthz, /readyz and /metrics alone."""
    GRPC = "grpc"

    @property
    def setting(self) -> str:
        return f"{self}_port"


class Presence(StrEnum):
    """Which runs have a role."""

    ALWAYS = "always"
    WITH_TEACHER = "with_teacher"
    """Where the method asks a teacher, for scores or for skills."""
    WITH_OWN_ENVIRONMENT = "with_own_environment"
    """Where environment.address names no server elsewhere."""


class ModelUse(StrEnum):
    """What of the model a role reads."""

    NOTHING = "nothing"
    TOKENIZER = "tokenizer"
    WEIGHTS = "weights"


class Libraries(StrEnum):
    """Whose switches are set before a service is imported."""

    MATH = "math"
    """The math libraries' number of threads."""
    VLLM = "vllm"
    """Those and vLLM's."""
    AS_SCORER = "as_scorer"
    """VLLM or MATH, as teacher.scorer says."""


class Signal(StrEnum):
    """What the number of a role's replicas is derived from."""

    NONE = "none"
    """Nothing: the number is fixed."""
    LEARNER_WAITS = "learner_waits"
    """The share of its time that the learner waits for data."""
    SCORES_WAIT = "scores_wait"
    """Trajectories that wait for a score."""
    SESSIONS_WAIT = "sessions_wait"
    """Episodes that wait for an environment session."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleSpec:
    """One row: a service of a run.

    Attributes:
        name: of its folder in services/, its image, its workload and its consumer group; no dash.
        presence: which runs have it.
        reads: streams from which it takes entries, as the consumer group of its name.
        reads_unscored: the same in runs whose method scores no trajectories; None for no
            difference.
        reports: its processes publish MetricRecords, so the gateway knows which of them live.
        listens: servers it has; the first of HTTP and PROBE is where it is probed and scraped.
        calls: roles whose gRPC it calls; their address is the setting `<role>_address`.
        is_sole: only one process at a time may hold the role.
        drains: it lets episodes end after SIGTERM, for the setting drain_s.
        signal: what its number of replicas is derived from.
        copies: key of the run that says how many processes `sdar run` starts; empty for one.
        model: what of the model it reads.
        libraries: whose switches its process needs.
        threads: key of the run with its number of threads; empty for one thread.
        config_keys: sections and keys of the run it reads. A change of one restarts its pods.
    """

    name: str
    presence: Presence = Presence.ALWAYS
    reads: tuple[Stream, ...] = ()
    reads_unscored: tuple[Stream, ...] | None = None
    reports: bool = False
    listens: tuple[Port, ...] = (Port.PROBE, Port.GRPC)
    calls: tuple[Role, ...] = ()
    is_sole: bool = False
    drains: bool = False
    signal: Signal = Signal.NONE
    copies: str = ""
    model: ModelUse = ModelUse.NOTHING
    libraries: Libraries = Libraries.MATH
    threads: str = ""
    config_keys: tuple[str, ...]

    @property
    def probe_port(self) -> Port:
        """Where it answers /healthz, /readyz and /metrics."""
        return Port.HTTP if Port.HTTP in self.listens else Port.PROBE

    @property
    def uses_bus(self) -> bool:
        """Whether it connects to Redis. A role without Redis sees no task group and traces none."""
        return bool(self.reads)

    def list_inputs(self, *, is_scored: bool) -> tuple[Stream, ...]:
        """Streams that it takes entries from in a run whose trajectories are scored, or not."""
        if is_scored or self.reads_unscored is None:
            return self.reads
        return self.reads_unscored

    @property
    def may_hold_gpus(self) -> bool:
        """Whether it computes with the model, and reads the weight store for that."""
        return self.model is ModelUse.WEIGHTS

    @property
    def sleeps(self) -> bool:
        """Whether the idle guard takes its replicas to zero, since an idle GPU costs the most."""
        return self.may_hold_gpus

    @property
    def is_scalable(self) -> bool:
        """Whether the gateway may be asked to set its size, if only to zero."""
        return self.sleeps or self.signal is not Signal.NONE


# What the bounds of the streams are computed from (sdar.connect.build_bus).
_BOUNDS = (
    "training.max_staleness",
    "training.checkpoint_every",
    "training.groups_per_update",
    "training.group_size",
)

# `config_keys` decide which pods an upgrade restarts: a service that reads a key which its row
# lacks goes on with the old value.
_ROWS = (
    RoleSpec(
        name=Role.GATEWAY,
        reads=(Stream.LEDGER, Stream.EVALUATIONS),
        listens=(Port.HTTP, Port.GRPC),
        calls=(Role.ENVS,),
        is_sole=True,
        model=ModelUse.TOKENIZER,
        config_keys=(
            "name",
            "seed",
            "model",
            "environment",
            "method",
            "training",
            "evaluation",
            # It issues no more groups than workers can play, each stamped with its sampling.
            "rollout.max_concurrent_episodes",
            "rollout.max_response_tokens",
            "rollout.temperature",
            "rollout.num_workers",
        ),
    ),
    RoleSpec(
        name=Role.ROLLOUT,
        reads=(Stream.TASKS,),
        reports=True,
        calls=(Role.ENVS, Role.TEACHER),
        drains=True,
        signal=Signal.LEARNER_WAITS,
        copies="rollout.num_workers",
        model=ModelUse.WEIGHTS,
        libraries=Libraries.VLLM,
        threads="rollout.num_threads",
        config_keys=(
            "name",
            "seed",
            "model",
            "environment.invalid_action_penalty",
            "environment.step_timeout_s",
            "method.name",
            "method.advantage_level",
            "rollout",
            *_BOUNDS,
        ),
    ),
    RoleSpec(
        name=Role.TEACHER,
        presence=Presence.WITH_TEACHER,
        reads=(Stream.TRAJECTORIES,),
        reads_unscored=(),
        reports=True,
        signal=Signal.SCORES_WAIT,
        model=ModelUse.WEIGHTS,
        libraries=Libraries.AS_SCORER,
        threads="teacher.num_threads",
        config_keys=(
            "name",
            "model",
            "environment.name",
            "method.name",
            "teacher",
            # A teacher that scores by vLLM sizes its engine as a rollout does.
            "rollout.kv_cache_gib",
            "rollout.gpu_memory_utilization",
            "training.logprob_chunk_tokens",
            *_BOUNDS,
        ),
    ),
    RoleSpec(
        name=Role.ENVS,
        presence=Presence.WITH_OWN_ENVIRONMENT,
        drains=True,
        signal=Signal.SESSIONS_WAIT,
        config_keys=("environment",),
    ),
    RoleSpec(
        name=Role.LEARNER,
        reads=(Stream.SCORED,),
        # Nobody stands between it and the rollout then.
        reads_unscored=(Stream.TRAJECTORIES,),
        reports=True,
        listens=(Port.PROBE,),
        is_sole=True,
        model=ModelUse.WEIGHTS,
        threads="training.num_threads",
        config_keys=(
            "name",
            "seed",
            "model",
            "environment.invalid_action_penalty",
            "method",
            "rollout.temperature",
            "teacher.max_lag",
            "training",
        ),
    ),
)

ROLES: Mapping[Role, RoleSpec] = {Role(name): row for name, row in index_by_name(_ROWS).items()}
"""Every role; those that report stand in the order in which data flow through them."""

REPORTING = tuple(role for role, row in ROLES.items() if row.reports)
"""Roles whose silence is noticed, in the order of the data's flow."""

WORKERS = tuple(role for role in REPORTING if not ROLES[role].is_sole)
"""Those of them that any number of processes may hold; each takes entries from one stream."""

SLEEPING = tuple(role for role, row in ROLES.items() if row.sleeps)
"""What the idle guard scales to zero, in the order of the data's flow."""

SCALABLE = tuple(role for role, row in ROLES.items() if row.is_scalable)
"""What a scaling file may name."""

_CALLED = frozenset(itertools.chain.from_iterable(row.calls for row in _ROWS))

CALLED = tuple(role for role in ROLES if role in _CALLED)
"""Roles whose gRPC others call, so that their address has to be known before they start."""


def find_role_name(instance: str) -> str:
    """The role of a process of `sdar run` by the name of its instance: rollout of rollout-0."""
    return instance.partition("-")[0]
