"""The `sdar` command: its verbs, their options, and how errors are reported.

What a verb does is imported when it is called, so that `sdar --help` answers at once.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from sdar.cli.dead_letters import dead_letter_app
from sdar.cli.environments import env_app
from sdar.cli.places import (
    ComposeOption,
    ContextOption,
    JsonOption,
    NamespaceOption,
    Place,
    ReleaseOption,
    RunsOption,
    takes_place,
)
from sdar.contracts.errors import ConfigurationError, InvalidInputError, RefusedError, SdarError
from sdar.contracts.roles import Role
from services.envs.search.retriever_cli import retriever

app = typer.Typer(
    help=(
        "Train LLM agents with SDAR: GRPO plus gated self-distillation from a privileged teacher, "
        "as services."
    ),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    # Plain help: rich alone would double the time that `sdar --help` takes.
    rich_markup_mode=None,
)
model_app = typer.Typer(help="Make tiny models to try things with.", no_args_is_help=True)
app.add_typer(model_app, name="model")
app.add_typer(env_app, name="env")
app.add_typer(dead_letter_app, name="dead-letter")
app.command()(retriever)

_TOKEN_BYTES = 32
# What shells report for a command that SIGINT ended: 128 + 2.
_INTERRUPTED_EXIT_CODE = 130

ConfigArgument = Annotated[
    Path, typer.Argument(help="Run configuration (YAML).", show_default=False)
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Replace a value, such as training.num_updates=20."
    ),
]


class Output(StrEnum):
    TEXT = "text"
    JSON = "json"


OutputOption = Annotated[
    Output, typer.Option("--output", help="text for people, json (one object a line) for programs.")
]


class LogLevel(StrEnum):
    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class TinyModel(StrEnum):
    HOUSEHOLD = "household"
    ALFWORLD = "alfworld"
    WEBSHOP = "webshop"
    SEARCH = "search"


@app.command()
def run(
    config: ConfigArgument,
    set_values: SetOption = None,
    runs_dir: RunsOption = Path("runs"),
    port: Annotated[
        int,
        typer.Option(
            help="Port of the gateway's page and API; 0 takes any free one.", min=0, max=65535
        ),
    ] = 0,
    redis: Annotated[
        str | None,
        typer.Option(
            help="URL of a running Redis; without it the run starts its own.", show_default=False
        ),
    ] = None,
    output: OutputOption = Output.TEXT,
) -> None:
    """Train on this machine. Redis and all services are processes, shown in a live view.

    Ctrl-C drains and stops; the same command again resumes. Everything lands in RUNS_DIR/NAME/:
    configuration, metrics, checkpoints, logs, plots, report.html and summary.json.
    """
    from sdar.cli.run import run_locally
    from sdar.config import load_config

    loaded = load_config(config, parse_overrides(set_values))
    is_json = output is Output.JSON
    code = run_locally(loaded, runs_dir, port=port, redis_url=redis, is_json=is_json)
    raise typer.Exit(code)


@app.command()
def serve(
    service: Annotated[Role, typer.Argument(help="Which service.")],
    config: Annotated[
        Path | None,
        typer.Option(help="Run configuration; SDAR_CONFIG by default.", show_default=False),
    ] = None,
) -> None:
    """Run one service until SIGTERM.

    This is what containers run; SDAR_* variables say where things are.
    """
    from sdar.cli.serve import serve_service

    serve_service(service, config)


@app.command()
@takes_place
def status(is_json: JsonOption = False, *, place: Place) -> None:
    """Show where a run stands.

    Phase, progress, the account of its groups, streams, sizes, evaluations, alarms.
    """
    from sdar.cli.status import show_status

    show_status(place, is_json=is_json)


@app.command()
@takes_place
def pause(is_json: JsonOption = False, *, place: Place) -> None:
    """Let a run issue no more groups until it is resumed. What is in flight is trained."""
    from sdar.cli.status import control_run

    control_run(place, "pause", is_json=is_json)


@app.command()
@takes_place
def resume(is_json: JsonOption = False, *, place: Place) -> None:
    """Let a paused run go on, and wake one that was put to sleep."""
    from sdar.cli.status import control_run

    control_run(place, "resume", is_json=is_json)


@app.command()
@takes_place
def stop(is_json: JsonOption = False, *, place: Place) -> None:
    """End a run early. No more groups, one last evaluation, then it is finished."""
    from sdar.cli.status import control_run

    control_run(place, "stop", is_json=is_json)


@app.command()
def logs(
    service: Annotated[
        str | None,
        typer.Argument(help="A service, or one of its instances; all of them without it."),
    ] = None,
    is_following: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on with what is logged from now on.")
    ] = False,
    since: Annotated[
        str | None,
        typer.Option(
            metavar="AGE",
            help="Only lines younger than this: 30s, 10m, 2h, 1d.",
            show_default=False,
        ),
    ] = None,
    level: Annotated[LogLevel, typer.Option(help="Least level that is shown.")] = LogLevel.DEBUG,
    is_json: JsonOption = False,
    name: Annotated[
        str | None,
        typer.Option(
            "--run", metavar="NAME", help="Which run of RUNS_DIR; the one that logged last."
        ),
    ] = None,
    release: ReleaseOption = None,
    namespace: NamespaceOption = None,
    context: ContextOption = None,
    is_compose: ComposeOption = False,
    runs_dir: RunsOption = Path("runs"),
) -> None:
    """Show what the services of a run log, in the order of time."""
    from sdar.cli.logs import show_logs

    # No --gateway: a gateway does not have the logs of the others.
    place = Place(None, runs_dir, release, namespace, context, is_compose)
    show_logs(
        place,
        name,
        service,
        since=since,
        level=level.value,
        is_following=is_following,
        is_json=is_json,
    )


@app.command()
def compare(
    spec: Annotated[
        Path,
        typer.Argument(
            help="Experiment: a run configuration, variants and seeds (YAML).", show_default=False
        ),
    ],
    jobs: Annotated[int, typer.Option(help="Runs at a time, one core each.", min=1)] = 2,
    runs_dir: RunsOption = Path("runs"),
    output: OutputOption = Output.TEXT,
) -> None:
    """Compare methods over seeds.

    Every service's own code in one process a run; results as a table with intervals. Finished runs
    are kept: the same command again runs only what is missing.
    """
    from sdar.cli.compare import run_comparison

    run_comparison(spec, runs_dir, jobs=jobs, is_json=output is Output.JSON)


@app.command()
def token() -> None:
    """Print a fresh token for SDAR_TOKENS_FILE. That holds operate:TOKEN or read:TOKEN a line."""
    import secrets

    typer.echo(secrets.token_urlsafe(_TOKEN_BYTES))


@app.command()
@takes_place
def report(
    directory: Annotated[
        Path,
        typer.Argument(
            help="runs/NAME; for a run elsewhere any directory of its own.", show_default=False
        ),
    ],
    *,
    place: Place,
) -> None:
    """Draw a run's plots and report.html again. Those of a run elsewhere are fetched first."""
    from sdar.cli.report import fetch_run, write_report

    if place.is_named:
        fetch_run(place, directory)
    typer.echo(f"Wrote {write_report(directory)}")


@model_app.command("create")
def create(
    directory: Annotated[
        Path, typer.Argument(help="Where the model goes; must not exist yet.", show_default=False)
    ],
    environment: Annotated[
        TinyModel, typer.Option(help="Whose player it is.")
    ] = TinyModel.HOUSEHOLD,
    output: OutputOption = Output.TEXT,
) -> None:
    """Make an environment's tiny model.

    Qwen2 architecture, a short supervised warm start (minutes on one core). The result is cached by
    a hash of its recipe.
    """
    from sdar.cli.model import create_tiny_model

    create_tiny_model(directory, environment.value, is_json=output is Output.JSON)


def parse_overrides(pairs: list[str] | None) -> dict[str, Any]:
    """{"training.num_updates": 20} of ["training.num_updates=20"]; values are YAML."""
    import yaml

    overrides = {}
    for pair in pairs or []:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise ConfigurationError(
                f"--set takes KEY=VALUE, got {pair!r}. Write for example training.num_updates=20."
            )
        overrides[key] = yaml.safe_load(value)
    return overrides


def fail(error: SdarError, arguments: Sequence[str]) -> NoReturn:
    """Report what went wrong and end the process: with code 2 if the caller has to change
    something, with 1 otherwise. Where JSON was asked for, the error is printed as JSON too.
    """
    from sdar.process.text import escape_controls

    if _asks_for_json(arguments):
        event = {
            "event": "error",
            "reason": error.reason,
            "message": error.message,
            "fields": error.fields,
        }
        print(json.dumps(event), flush=True)

    # The message may quote a server or a file.
    message = escape_controls(error.message, keep="\n")
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2 if isinstance(error, InvalidInputError | RefusedError) else 1)


def _asks_for_json(arguments: Sequence[str]) -> bool:
    # The error may come from any verb, whose parsed options are gone by now.
    line = " ".join(arguments).replace("--output=json", "--output json")
    return "--json" in arguments or "--output json" in line


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the `sdar` command. Errors raised on purpose become one sentence, all others
    keep their traceback.
    """
    if arguments is None:
        arguments = sys.argv[1:]
    try:
        app(list(arguments))
    except SdarError as error:
        fail(error, arguments)
    except KeyboardInterrupt:
        sys.exit(_INTERRUPTED_EXIT_CODE)
    except BrokenPipeError:
        # Such as `sdar logs | head`. Python flushes stdout once more at exit and would print a
        # traceback about it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


if __name__ == "__main__":
    main()
