"""Where the run of a verb is: on this machine, in a compose project or in a cluster.

Only a gateway on this machine or at an address is called over HTTP. One in a container is asked by
its own container (kubectl exec, docker-compose exec): there are the address, the token and the
certificates, and nothing has to be opened to the outside.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Iterator, Sequence
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
        given = {"--gateway": self.gateway, "--release": self.release, "--compose": self.is_compose}
        told = [name for name, value in given.items() if value]
        if len(told) > 1:
            raise ConfigurationError(f"{' and '.join(told)} are two places. Give one of them.")
        if (self.namespace or self.context) and not self.release:
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
        options = {"--context": self.context, "--namespace": self.namespace}
        return ["kubectl", *(f"{name}={value}" for name, value in options.items() if value)]


_OPTIONS: dict[str, tuple[Any, Any]] = {
    "gateway": (GatewayOption, None),
    "release": (ReleaseOption, None),
    "namespace": (NamespaceOption, None),
    "context": (ContextOption, None),
    "is_compose": (ComposeOption, False),
    "runs_dir": (RunsOption, Path("runs")),
}


def takes_place(verb: Callable[..., None]) -> Callable[..., None]:
    """Give a verb the options that say where its run is; it gets them as `place`."""

    @functools.wraps(verb)
    def call(**values: Any) -> None:
        place = Place(**{name: values.pop(name) for name in _OPTIONS})
        verb(place=place, **values)

    signature = inspect.signature(verb, eval_str=True)
    own = [parameter for name, parameter in signature.parameters.items() if name != "place"]
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
        for name, (kind, default) in _OPTIONS.items()
    ]
    keyword_only = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]
    shown = signature.replace(parameters=[*keyword_only, *added])
    call.__signature__ = shown  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in [*own, *added]}
    return call


def open_gateway_at(place: Place) -> Gateway:
    """The gateway of the run that is meant.

    Raises:
        ConfigurationError: no or several runs are meant, or a tool is missing.
            UnknownResourceError: no such release.
        UnavailableError: its gateway is not there.
    """
    from sdar.cli.gateway import (  # what speaks HTTP: `sdar --help` should not wait for it
        ContainerGateway,
        open_gateway,
    )

    if not (place.release or place.is_compose):
        return open_gateway(place.gateway, place.runs_dir)

    if place.is_compose:
        return ContainerGateway(
            "the gateway's container", [*find_compose(), "exec", "-T", Role.GATEWAY]
        )
    pod = _find_gateway_pod(place)
    return ContainerGateway(
        f"pod {pod}", [*place.kubectl, "exec", pod, f"--container={Role.GATEWAY}", "--"]
    )


def list_pods(place: Place, role: str | None = None) -> list[dict[str, Any]]:
    """The release's pods as Kubernetes describes them.

    Raises:
        UnknownResourceError: the release has none, and which releases there are.
    """
    assert place.release
    pods = list(_get_pods(place.kubectl, f"{_APPLICATION},{_RELEASE}={place.release}"))
    if not pods:
        here = sorted(
            {
                pod["metadata"]["labels"].get(_RELEASE, "")
                for pod in _get_pods(place.kubectl, _APPLICATION)
            }
        )
        where = f"in namespace {place.namespace}" if place.namespace else "in the current namespace"
        known = (
            f"There {'is' if len(here) == 1 else 'are'} {', '.join(here)}."
            if here
            else "There is none of sdar."
        )
        raise UnknownResourceError(
            f"No release {place.release} {where}. {known} Give another with --release or "
            "--namespace."
        )
    return [pod for pod in pods if role in (None, pod["metadata"]["labels"].get(ROLE))]


def _get_pods(kubectl: Sequence[str], selector: str) -> Iterator[dict[str, Any]]:
    yield from json.loads(
        run_tool([*kubectl, "get", "pods", f"--selector={selector}", "--output=json"])
    )["items"]


def _find_gateway_pod(place: Place) -> str:
    pods = list_pods(place, Role.GATEWAY)
    running = [
        pod
        for pod in pods
        if pod["status"].get("phase") == "Running" and "deletionTimestamp" not in pod["metadata"]
    ]
    if running:
        return str(running[0]["metadata"]["name"])
    told = ", ".join(
        f"{pod['metadata']['name']} is {pod['status'].get('phase', 'unknown')}" for pod in pods
    )
    raise UnavailableError(
        f"No gateway of release {place.release} is running{f': {told}' if told else ''}. See "
        "`kubectl describe pods -l "
        f"{_RELEASE}={place.release},{ROLE}=gateway` and `sdar logs gateway --release "
        f"{place.release}`."
    )
