"""Owns `sdar model create`: makes the tiny household model, or takes it from the cache, and puts it where it was asked for."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

import typer

from sdar.contracts.errors import ConflictError


def create_household_model(directory: Path, *, is_json: bool) -> None:
    """Make the model of the default recipe in `directory`.

    Raises:
        ConflictError: the directory exists already.
    """
    from sdar.cli.warm_start import WarmStartRecipe, create_model, show_progress

    if directory.exists():
        raise ConflictError(f"{directory} exists already. Remove it or choose another directory.")
    cache_dir = Path.home() / ".cache" / "sdar" / "models"
    with contextlib.nullcontext() if is_json else show_progress() as progress:
        made = create_model(WarmStartRecipe(), cache_dir, progress)
    directory.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(made, directory)
    typer.echo(json.dumps({"event": "created", "path": str(directory)}) if is_json else f"Made {directory}")
