"""`sdar model create`: makes an environment's tiny model, or copies it from the cache."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import typer
from rich.progress import Progress, TextColumn

from sdar.contracts.errors import ConflictError


def create_tiny_model(directory: Path, environment: str, *, is_json: bool) -> None:
    """Make the model of the environment's default recipe in `directory`.

    Raises:
        ConflictError: the directory exists already.
        ConfigurationError: there is no such model, see `load_recipe`.
    """
    # Torch and transformers take seconds, and a wrong directory is refused without them.
    from sdar.cli.warm_start.making import create_model
    from sdar.cli.warm_start.recipe import load_recipe

    if directory.exists():
        raise ConflictError(f"{directory} exists already. Remove it or choose another directory.")
    recipe = load_recipe(environment)
    cache_dir = Path.home() / ".cache" / "sdar" / "models"
    columns = (*Progress.get_default_columns(), TextColumn("loss {task.fields[loss]:.3f}"))
    with Progress(*columns, disable=is_json) as bar:
        row = bar.add_task("warm start", total=None, loss=float("nan"))

        def report(num_done: int, num_updates: int, loss: float) -> None:
            bar.update(row, completed=num_done, total=num_updates, loss=loss)

        made = create_model(recipe, cache_dir, report)

    # A copy: whoever changes the model leaves the cache as it is.
    directory.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(made, directory)
    if is_json:
        typer.echo(json.dumps({"event": "created", "path": str(directory)}))
    else:
        typer.echo(f"Made {directory}")
