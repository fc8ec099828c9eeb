"""The verbs of `sdar dead-letter`: list the entries that a run set aside, show one, retry one.

The gateway does the work. What draws and what speaks HTTP is imported when a verb is called.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote

import typer

from sdar.cli.places import JsonOption, Place, open_gateway_at, takes_place

if TYPE_CHECKING:
    from rich.table import Table

dead_letter_app = typer.Typer(
    help="Look at entries that a run set aside, and try them again.", no_args_is_help=True
)

LetterArgument = Annotated[
    str,
    typer.Argument(metavar="ID", help="Its id, from `sdar dead-letter list`.", show_default=False),
]

_PATH = "/v1/dead-letters"
_MAX_REASON = 100
_SHOWN_FIELDS = (
    "letter_id",
    "stream",
    "group",
    "entry_id",
    "num_deliveries",
    "reason",
    "age_s",
    "size_bytes",
)


@dead_letter_app.command("list")
@takes_place
def list_letters(
    limit: Annotated[int, typer.Option(help="How many.", min=1, max=1000)] = 50,
    before: Annotated[
        str | None,
        typer.Option(metavar="ID", help="Only older ones than this.", show_default=False),
    ] = None,
    is_json: JsonOption = False,
    *,
    place: Place,
) -> None:
    """List what was set aside, newest first."""
    query: dict[str, str | int] = {"limit": limit}
    if before is not None:
        query["before"] = before
    with open_gateway_at(place) as client:
        letters = client.get(_PATH, **query)
    if is_json:
        print(json.dumps(letters), flush=True)
    elif not letters:
        print("No dead letters.")
    else:
        from rich.console import Console

        Console(highlight=False).print(render_letters(letters))


@dead_letter_app.command("show")
@takes_place
def show_letter(letter_id: LetterArgument, is_json: JsonOption = False, *, place: Place) -> None:
    """Show one with its payload."""
    with open_gateway_at(place) as client:
        letter = client.get(f"{_PATH}/{quote(letter_id, safe='')}")
    print(json.dumps(letter) if is_json else format_letter(letter), flush=True)


@dead_letter_app.command("retry")
@takes_place
def retry_letter(letter_id: LetterArgument, is_json: JsonOption = False, *, place: Place) -> None:
    """Do its work again and remove it.

    A training task is issued as a new group, an evaluation's task as it was.
    """
    with open_gateway_at(place) as client:
        answer = client.post(f"{_PATH}/{quote(letter_id, safe='')}/retry")
    text = f"Issued {answer['group_id']} for dead letter {answer['letter_id']}, which is gone."
    print(json.dumps(answer) if is_json else text, flush=True)


def render_letters(letters: list[dict[str, Any]]) -> Table:
    """A line each; reasons are cut, and shown as text."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from sdar.process.text import escape_controls

    table = Table(
        "id", "stream", "given up by", "attempts", "age", "bytes", "reason", box=box.SIMPLE
    )
    for letter in letters:
        reason = letter["reason"]
        if len(reason) > _MAX_REASON:
            reason = f"{reason[:_MAX_REASON]}..."
        row = (
            letter["letter_id"],
            letter["stream"],
            letter["group"],
            letter["num_deliveries"],
            f"{letter['age_s']:.0f} s",
            letter["size_bytes"],
            reason,
        )
        # Text, not str: a reason may look like markup.
        table.add_row(*(Text(escape_controls(str(cell))) for cell in row))
    return table


def format_letter(letter: dict[str, Any]) -> str:
    """Everything known of one, its payload last; as text without control characters."""
    from sdar.process.text import escape_controls

    lines = [f"{name}: {letter[name]}" for name in _SHOWN_FIELDS]
    if letter["payload"] is None:
        error = letter["payload_error"]
        lines += [f"payload (base64), which cannot be read: {error}", letter["payload_base64"]]
    else:
        lines += ["payload:", json.dumps(letter["payload"], indent=2, ensure_ascii=False)]
    return "\n".join(escape_controls(line, keep="\n") for line in lines)
