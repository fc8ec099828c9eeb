"""What a process's surroundings set (addresses, ports, log level): the environment variables.

Read here and nowhere else. What a run *is* belongs to `sdar.config.RunConfig`; what differs
between a laptop and a cluster belongs here.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from sdar.contracts.errors import ConfigurationError
from sdar.contracts.roles import Role

MAX_CALLS_PER_S = 10_000.0
"""A bound against floods, above what one server process can answer. Set less to share it fairly."""


class Settings(BaseSettings):
    """Environment variables SDAR_*, the same for every service; each reads what concerns it."""

    model_config = SettingsConfigDict(
        env_prefix="SDAR_",
        # A compose file sets a variable to an empty text where it has no value for it.
        env_ignore_empty=True,
        extra="ignore",
        frozen=True,
        use_attribute_docstrings=True,
    )

    config: Path = Path("run.yaml")
    """Run configuration file."""
    redis_url: str = Field(default="redis://127.0.0.1:6379/0", repr=False)
    """Redis that carries the streams; rediss://USER:PASSWORD@HOST:PORT/0 for one with TLS."""
    weights_url: str = "weights"
    """Weight store: a directory or s3://bucket/prefix."""
    checkpoints: Path = Path("checkpoints")
    """Directory of the learner's checkpoints."""
    cache: Path = Path("~/.cache/sdar")
    """Directory of what can be made again at any time, such as the vectors of skills. Processes may
    share it.
    """
    host: str = "127.0.0.1"
    """Address that servers bind to. Beyond loopback they ask for tokens (docs/security.md)."""
    http_port: int = Field(default=8080, ge=0, le=65535)
    """Port of the gateway's HTTP API."""
    scaling: Path | None = None
    """Scaling file of a gateway in Kubernetes (docs/operations.md); without it nothing is scaled.
    """
    gateway_url: str = ""
    """Where the run's gateway answers, for `sdar status` and `sdar dead-letter`: http://HOST:PORT.
    """
    grpc_port: int = Field(default=9090, ge=0, le=65535)
    """Port of this service's gRPC API."""
    probe_port: int = Field(default=9100, ge=0, le=65535)
    """Port of /healthz, /readyz and /metrics."""
    envs_address: str = ""
    """Where the run's own environment service listens, HOST:PORT; the gateway needs it."""
    teacher_address: str = ""
    """Where the teacher's gRPC API listens, HOST:PORT; rollouts need it whose method shows skills
    to the student.
    """
    tls_cert: Path | None = None
    """This process's certificate chain (PEM): what its servers show, and its clients where they are
    asked for one.
    """
    tls_key: Path | None = None
    """The unencrypted key of SDAR_TLS_CERT (PEM)."""
    tls_ca: Path | None = None
    """Certificate of the authority (PEM) that peers are verified against; the system's without it.
    """
    tls_client_auth: Literal["none", "grpc", "all"] = "none"
    """Of whom servers demand a certificate: nobody, callers of gRPC, or HTTP's too (a person's
    browser then needs one).
    """
    tokens_file: Path | None = None
    """Tokens that servers accept: one read:TOKEN or operate:TOKEN a line. `sdar token` prints a
    fresh token.
    """
    token: SecretStr = SecretStr("")
    """Token shown to servers; without it the first operate token of SDAR_TOKENS_FILE."""
    insecure: bool = False
    """Serve beyond loopback without tokens: anyone who reaches the port may do anything."""
    max_calls_per_s: float = Field(default=MAX_CALLS_PER_S, gt=0)
    """Calls a client (a token, or an address without one) may make to one server."""
    max_sessions_per_client: int = Field(default=0, ge=0)
    """Sessions a client may hold on an environment server; 0 for all there are."""
    instance: str = Field(default_factory=lambda: f"{socket.gethostname()}-{os.getpid()}")
    """Unique name of this process: the consumer name in Redis, a label in logs."""
    drain_s: float = Field(default=20.0, ge=0, le=86_400)
    """How long episodes may go on after SIGTERM; then rollouts hand their groups back and
    environment servers end sessions.
    """
    rank: int = Field(default=0, ge=0, validation_alias="RANK")
    """This process's place among the learner's ranks; torchrun sets it, without it the learner
    starts its own ranks.
    """
    world_size: int = Field(default=1, ge=1, validation_alias="WORLD_SIZE")
    """Number of the learner's ranks that are started from outside; torchrun sets it."""
    local_rank: int = Field(default=0, ge=0, validation_alias="LOCAL_RANK")
    """This process's place among the learner's ranks on its machine, hence its GPU; torchrun sets
    it. 0 answers probes.
    """
    trace_endpoint: str = Field(default="", validation_alias="OTEL_EXPORTER_OTLP_ENDPOINT")
    """Where traces go by OTLP over gRPC, http://HOST:4317; empty for none. The exporter's other
    OTEL_ variables count too.
    """
    trace_share: float = Field(default=1.0, ge=0, le=1)
    """Share of the training groups that are traced; the same in every service of a run."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least level that is logged."""
    log_format: Literal["text", "json"] = "text"
    """How log lines look."""

    def find_address(self, role: Role) -> str:
        """Where the gRPC API of a role listens that others call.

        Raises:
            ConfigurationError: its variable is not set.
        """
        address = str(getattr(self, f"{role}_address"))
        if not address:
            raise ConfigurationError(
                f"SDAR_{role.upper()}_ADDRESS is not set. Set it to HOST:PORT of the gRPC API of "
                f"this run's {role} service."
            )
        return address


def load_settings() -> Settings:
    """Read SDAR_* variables.

    Raises:
        ConfigurationError: a variable holds a value out of range.
    """
    try:
        return Settings()
    except ValidationError as error:
        problems = "; ".join(
            f"SDAR_{'_'.join(map(str, p['loc'])).upper()}: {p['msg']}" for p in error.errors()
        )
        raise ConfigurationError(f"Bad environment variable. {problems}.") from error


def read_variable(name: str) -> str:
    """A variable that one environment or library has of its own; "" where it is not set."""
    return os.environ.get(name, "")


def apply_environment(variables: Mapping[str, str]) -> None:
    """Set variables that libraries read at import; a value that the user has set stays."""
    for name, value in variables.items():
        os.environ.setdefault(name, value)


def thread_environment(num_threads: int) -> dict[str, str]:
    """Variables that hold the math libraries to `num_threads`.

    Left alone, each library takes all cores: two pools of threads on one core run three times
    slower than one.
    """
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    # Tokenizers warn, and switch their threads off, in every process that forks after their use.
    return dict.fromkeys(names, str(num_threads)) | {"TOKENIZERS_PARALLELISM": "false"}
