"""Where the run of a verb is: on this machine, in a compose project or in a cluster.

Only a gateway on this machine or at an address is called over HTTP. One in a container is asked by
its own container (kubectl exec, docker-compose exec): there are the address, the token and the
certificates, and nothing has to be opened to the outside.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sdar.cli.tools import find_compose, run_tool
from sdar.contracts.errors import ConfigurationError, UnavailableError, UnknownResourceError
from sdar.contracts.roles import Role

if TYPE_CHECKING:
    from sdar.cli.gateway import Gateway

GatewayOption = Annotated[
    str | None,
    typer.Option(
        "--gateway",
        metavar="URL",
        help="The run's gateway; SDAR_GATEWAY_URL, or the run of RUNS_DIR that is running.",
    ),
]
RunsOption = Annotated[Path, typer.Option("--runs-dir", help="Where run directories are kept.")]
ReleaseOption = Annotated[
    str | None,
    typer.Option(
        "--release", metavar="NAME", help="A run in Kubernetes: its Helm release, by kubectl."
    ),
]
NamespaceOption = Annotated[
    str | None, typer.Option("--namespace", "-n", metavar="NAME", help="Of the release.")
]
ContextOption = Annotated[
    str | None,
    typer.Option("--context", metavar="NAME", help="Of kubectl, for the release's cluster."),
]
ComposeOption = Annotated[
    bool,
    typer.Option(
        "--compose",
        help="The run of docker-compose.yml here, or as COMPOSE_FILE and COMPOSE_PROJECT_NAME say.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="JSON for programs.")]

_APPLICATION = "app.kubernetes.io/name=sdar"
_RELEASE = "app.kubernetes.io/instance"
ROLE = "app.kubernetes.io/component"


@dataclass(frozen=True, slots=True)
class Place:
    """What the options of a verb say; at most one of gateway, release and compose.

    Raises:
        ConfigurationError: they contradict each other.
    """

    gateway: str | None = None
    runs_dir: Path = Path("runs")
    release: str | None = None
    namespace: str | None = None
    context: str | None = None
    is_compose: bool = False

    def __post_init__(self) -> None:
        places = {
            "--gateway": self.gateway,
            "--release": self.release,
            "--compose": self.is_compose,
        }
        given = [name for name, value in places.items() if value]
        if len(given) > 1:
            raise ConfigurationError(f"{' and '.join(given)} are two places. Give one of them.")

        is_cluster_named = bool(self.namespace or self.context)
        if is_cluster_named and not self.release:
            raise ConfigurationError(
                "--namespace and --context are of a Helm release. Give it with --release NAME."
            )

    @property
    def is_named(self) -> bool:
        """Whether a place is named; otherwise it is this machine."""
        return bool(self.gateway or self.release or self.is_compose)

    @property
    def kubectl(self) -> list[str]:
        """The command with the options that say which cluster and namespace."""
        command = ["kubectl"]
        if self.context:
            command.append(f"--context={self.context}")
        if self.namespace:
            command.append(f"--namespace={self.namespace}")
        return command


_OPTIONS: dict[str, tuple[Any, Any]] = {
    "gateway": (GatewayOption, None),
    "release": (ReleaseOption, None),
    "namespace": (NamespaceOption, None),
    "context": (ContextOption, None),
    "is_compose": (ComposeOption, False),
    "runs_dir": (RunsOption, Path("runs")),
}
"""Annotation and default of each option that makes up a Place, in the order of `--help`."""


def takes_place(verb: Callable[..., None]) -> Callable[..., None]:
    """Give a verb the options that say where its run is; it gets them as `place`."""

    @functools.wraps(verb)
    def call(**values: Any) -> None:
        place = Place(**{name: values.pop(name) for name in _OPTIONS})
        verb(place=place, **values)

    # Typer reads a verb's options from its signature and its annotations, so both have to show the
    # options in place of `place`.
    signature = inspect.signature(verb, eval_str=True)
    parameters = []
    for name, parameter in signature.parameters.items():
        if name != "place":
            # A signature may not have an option without a default after one with a default, unless
            # all of them are keywords.
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
    for name, (kind, default) in _OPTIONS.items():
        parameters.append(
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind
            )
        )

    shown = signature.replace(parameters=parameters)
    call.__signature__ = shown  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return call


def open_gateway_at(place: Place) -> Gateway:
    """The gateway of the run that is meant.

    Raises:
        ConfigurationError: no or several runs are meant, or a tool is missing.
        UnknownResourceError: there is no such release.
        UnavailableError: its gateway is not there.
    """
    # What speaks HTTP: `sdar --help` should not wait for it.
    from sdar.cli.gateway import ContainerGateway, open_gateway

    if place.is_compose:
        # -T, for there is no terminal to give the container.
        command = [*find_compose(), "exec", "-T", Role.GATEWAY]
        return ContainerGateway("the gateway's container", command)

    if place.release:
        pod = _find_gateway_pod(place)
        command = [*place.kubectl, "exec", pod, f"--container={Role.GATEWAY}", "--"]
        return ContainerGateway(f"pod {pod}", command)

    return open_gateway(place.gateway, place.runs_dir)


def list_pods(place: Place, role: str | None = None) -> list[dict[str, Any]]:
    """The release's pods, or those of one role, as Kubernetes describes them.

    Raises:
        UnknownResourceError: the release has none; the message names the releases that there are.
    """
    assert place.release
    pods = _get_pods(place.kubectl, f"{_APPLICATION},{_RELEASE}={place.release}")
    if not pods:
        where = f"in namespace {place.namespace}" if place.namespace else "in the current namespace"
        raise UnknownResourceError(
            f"No release {place.release} {where}. {_describe_releases(place)} Give another with "
            "--release or --namespace."
        )
    if role is None:
        return pods
    return [pod for pod in pods if pod["metadata"]["labels"].get(ROLE) == role]


def _describe_releases(place: Place) -> str:
    pods = _get_pods(place.kubectl, _APPLICATION)
    names = sorted({pod["metadata"]["labels"].get(_RELEASE, "") for pod in pods})
    if not names:
        return "There is none of sdar."
    verb = "is" if len(names) == 1 else "are"
    return f"There {verb} {', '.join(names)}."


def _get_pods(kubectl: Sequence[str], selector: str) -> list[dict[str, Any]]:
    text = run_tool([*kubectl, "get", "pods", f"--selector={selector}", "--output=json"])
    return list(json.loads(text)["items"])


def _find_gateway_pod(place: Place) -> str:
    states = []
    for pod in list_pods(place, Role.GATEWAY):
        name = pod["metadata"]["name"]
        phase = pod["status"].get("phase", "unknown")
        # One that is being deleted still counts as running.
        if phase == "Running" and "deletionTimestamp" not in pod["metadata"]:
            return str(name)
        states.append(f"{name} is {phase}")

    details = f": {', '.join(states)}" if states else ""
    raise UnavailableError(
        f"No gateway of release {place.release} is running{details}. See "
        "`kubectl describe pods -l "
        f"{_RELEASE}={place.release},{ROLE}=gateway` and `sdar logs gateway --release "
        f"{place.release}`."
    )
