"""The verbs of `sdar env`: serve an environment, check a server, play a task, generate data."""

from __future__ import annotations

import functools
import importlib
import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from sdar.contracts.errors import ConfigurationError

env_app = typer.Typer(
    help="Serve, check and play environments, and generate their data.", no_args_is_help=True
)

AddressArgument = Annotated[
    str, typer.Argument(metavar="HOST:PORT", help="Where the server listens.", show_default=False)
]
EnvironmentOption = Annotated[
    str,
    typer.Option(
        "--environment", help="Which one, where the server has several.", show_default=False
    ),
]
PortOption = Annotated[int, typer.Option(help="gRPC port; 0 takes any free one.", min=0, max=65535)]
OptionOption = Annotated[
    list[str] | None,
    typer.Option(
        "--option",
        metavar="KEY=VALUE",
        help="An option of the environment; the value is read as YAML.",
    ),
]


class GeneratedName(StrEnum):
    ALFWORLD = "alfworld"
    WEBSHOP = "webshop"
    SEARCH = "search"


@env_app.command("serve")
def serve(
    name: Annotated[
        str,
        typer.Argument(
            help="A built-in environment, package.module:Class or file.py:Class.",
            show_default=False,
        ),
    ],
    options: OptionOption = None,
    host: Annotated[str, typer.Option(help="Address to bind to.")] = "127.0.0.1",
    port: PortOption = 50051,
    probe_port: Annotated[
        int, typer.Option(help="Port of /healthz, /readyz and /metrics.", min=0, max=65535)
    ] = 0,
    capacity: Annotated[int, typer.Option(help="Sessions held at once.", min=1, max=100_000)] = 512,
    workers: Annotated[
        int, typer.Option(help="Worker processes; 0 starts one per core.", min=0, max=1024)
    ] = 0,
) -> None:
    """Serve an environment over gRPC until Ctrl-C or SIGTERM.

    docs/environments.md lists the built-in ones. Examples: sdar env serve household; sdar env serve
    gymnasium --option id=CartPole-v1
    """
    from sdar.environments.registry import load_environment
    from sdar.environments.serving import serve_until_stopped
    from sdar.environments.sessions import SessionLimits

    environment = load_environment(name, parse_options(options))
    serve_until_stopped(
        {name: environment},
        SessionLimits(max_sessions=capacity),
        host=host,
        port=port,
        probe_port=probe_port,
        num_workers=workers,
    )


@env_app.command("check")
def check(
    address: AddressArgument,
    environment: EnvironmentOption = "",
    is_json: Annotated[
        bool, typer.Option("--json", help="One JSON object instead of the table.")
    ] = False,
) -> None:
    """Try a server in any language against the environment contract.

    The server must be idle otherwise. Exit code 0 if nothing failed, 1 if something did, 2 if
    nobody answers.
    """
    import asyncio

    from rich.console import Console

    from sdar.cli.conformance import check_server
    from sdar.cli.conformance.report import print_report, to_json
    from sdar.process.settings import load_settings
    from sdar.wire.security import Security

    security = Security.from_settings(load_settings())
    try_all = functools.partial(check_server, parse_address(address), environment, security)
    if is_json:
        report = asyncio.run(try_all())
        typer.echo(json.dumps(to_json(report)))
    else:
        console = Console()
        with console.status("") as status:
            report = asyncio.run(try_all(on_begin=lambda begun: status.update(begun.check_id)))
        print_report(report, console)
    raise typer.Exit(0 if report.is_passed else 1)


@env_app.command("play")
def play(
    address: AddressArgument,
    environment: EnvironmentOption = "",
    split: Annotated[
        str, typer.Option(help="Split whose first task is played.", show_default=False)
    ] = "",
    task: Annotated[str, typer.Option(help="Id of the task to play.", show_default=False)] = "",
    seed: Annotated[
        int, typer.Option(help="Seed of the episode.", min=-(2**63), max=2**63 - 1)
    ] = 0,
) -> None:
    """Play one task by hand.

    A number chooses a listed action; anything else is sent as it is. Ctrl-D ends the game.
    """
    from sdar.cli.play import play_task

    play_task(parse_address(address), environment, split, task, seed)


@env_app.command("generate")
def generate(
    name: Annotated[
        GeneratedName, typer.Argument(help="Which environment's data.", show_default=False)
    ],
    directory: Annotated[
        Path,
        typer.Argument(help="Where it goes; must be empty or not exist yet.", show_default=False),
    ],
    num_tasks: Annotated[
        int,
        typer.Option("--tasks", help="Tasks of the train split; the others in proportion.", min=1),
    ] = 100,
    seed: Annotated[int, typer.Option(help="The same seed makes the same bytes.", min=0)] = 0,
) -> None:
    """Generate an environment's data. Games, a catalogue with goals, or a corpus with questions."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    generator = importlib.import_module(f"services.envs.{name.value}.generate")
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    # On stderr: stdout is for what was generated.
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        row = progress.add_task(name.value, total=None)

        def report(done: int, total: int) -> None:
            progress.update(row, completed=done, total=total)

        summary = generator.generate(directory, num_tasks=num_tasks, seed=seed, report=report)
    typer.echo(summary)


def parse_address(address: str) -> str:
    """The address itself. Raises ConfigurationError unless it is HOST:PORT."""
    host, _, port = address.rpartition(":")
    # isdigit alone takes digits of other scripts as well.
    is_number = port.isascii() and port.isdigit()
    if not host or not is_number or not 0 < int(port) <= 65535:
        raise ConfigurationError(
            f"{address!r} is no address. Write HOST:PORT, for example 127.0.0.1:50051."
        )
    return address


def parse_options(pairs: list[str] | None) -> dict[str, bool | int | float | str]:
    """{"limit": 3} of ["limit=3"]; values are YAML scalars."""
    options: dict[str, bool | int | float | str] = {}
    for pair in pairs or []:
        key, equals, text = pair.partition("=")
        # A key becomes a keyword argument of the environment.
        if not equals or not key.isidentifier():
            raise ConfigurationError(
                f"--option takes KEY=VALUE, got {pair!r}. Write for example --option limit=100."
            )
        options[key] = _parse_scalar(key, text)
    return options


def _parse_scalar(key: str, text: str) -> bool | int | float | str:
    import yaml

    try:
        value: Any = yaml.safe_load(text)
    except yaml.YAMLError:
        # Such as `a: b: c`.
        return text
    if value is None or not text:
        return text
    if isinstance(value, bool | int | float | str):
        return value
    raise ConfigurationError(
        f"--option {key} is {text!r}, expected a number, a text, true or false."
    )
