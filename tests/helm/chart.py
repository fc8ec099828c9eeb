"""Owns how these tests render the chart: by the real Helm, as objects. Answers are kept, since a
rendering takes 0.2 s.
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm"
HELM = os.environ.get("HELM", "helm")
VALUES_DIR = Path(__file__).parent / "values"
OPTIONAL_APIS = ("keda.sh/v1alpha1", "monitoring.coreos.com/v1")
VALUES_FILES = {
    "defaults": None,
    "eks": CHART / "values-eks.yaml",
    **{path.stem: path for path in VALUES_DIR.glob("*.yaml")},
}
Object = dict[str, Any]


def helm(*arguments: str) -> subprocess.CompletedProcess[str]:
    # Without the variables of a cluster: a rendering must not depend on one.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("KUBE")}
    return subprocess.run(
        [HELM, *arguments], capture_output=True, text=True, env=environment, check=False, timeout=60
    )


@functools.cache
def render_text(
    values: str = "defaults",
    *settings: str,
    release: str = "sdar",
    apis: tuple[str, ...] = OPTIONAL_APIS,
) -> str:
    """The manifest of a release. `values` names one of VALUES_FILES; each setting is KEY=VALUE of
    --set.
    """
    arguments = ["template", release, str(CHART), "--namespace", "runs"]
    if (path := VALUES_FILES[values]) is not None:
        arguments += ["--values", str(path)]
    for setting in settings:
        # Helm takes a number with a point for a text, unless it is told that it is JSON.
        arguments += [
            "--set-json" if re.search(r"=[0-9.]+(e-?[0-9]+)?$", setting) else "--set",
            setting,
        ]
    for api in apis:
        arguments += ["--api-versions", api]
    done = helm(*arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


@functools.cache
def render(values: str = "defaults", *settings: str, **options: Any) -> list[Object]:
    """The same as objects, not to be changed."""
    # The C loader takes a tenth of the time.
    return [
        thing
        for thing in yaml.load_all(render_text(values, *settings, **options), yaml.CSafeLoader)
        if thing
    ]


def refuse(*arguments: str) -> str:
    """What Helm says to an installation that must not come about."""
    done = helm("install", "sdar", str(CHART), "--dry-run=client", *arguments)
    assert done.returncode != 0, "this was installed"
    return done.stderr


def of_kind(things: list[Object], *kinds: str) -> list[Object]:
    return [thing for thing in things if thing["kind"] in kinds]


def find(things: list[Object], kind: str, name: str) -> Object:
    return next(thing for thing in of_kind(things, kind) if thing["metadata"]["name"] == name)


def component(thing: Object) -> str:
    return str(thing["metadata"]["labels"]["app.kubernetes.io/component"])


def pods(things: list[Object]) -> Iterator[tuple[str, Object]]:
    """Each pod or pod template: its component and itself."""
    for thing in of_kind(things, "Deployment", "StatefulSet", "Pod"):
        yield component(thing), thing if thing["kind"] == "Pod" else thing["spec"]["template"]


def containers(things: list[Object]) -> Iterator[tuple[str, Object]]:
    for role, pod in pods(things):
        for container in [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]:
            yield role, container
