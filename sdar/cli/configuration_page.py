"""Writes docs/configuration.md: every key of a run with its type, default, bounds and meaning.

RunConfig and Settings are the source: a field's docstring is its meaning on the page.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from sdar.config import OneOf, RunConfig
from sdar.process.settings import Settings

PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "configuration.md"

_HEADER = """# Configuration

Written by `make docs` from `sdar/config.py` and `sdar/process/settings.py`; change it there.
A run is one YAML file: [an example](../examples/household.yaml). Unknown keys and values out of
range are errors that name the key. Paths are relative to the file.
`sdar run FILE --set training.num_updates=20` replaces a value.
"""
_SETTINGS_HEADER = """
## Environment variables

Where a process listens and what it connects to is not part of a run. `sdar run` sets these
variables for the processes it starts; containers set them for `sdar serve`. An environment may have
a variable of its own, such as the directory of its data ([environments.md](environments.md)).

| variable | default | meaning |
|---|---|---|
"""


_TYPE_NAMES = {
    "str": "text",
    "int": "integer",
    "float": "number",
    "bool": "true or false",
    "Path": "path",
    "date": "date",
}
_BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
"""Words for the constraints of annotated-types, by their field's name."""


def render_page() -> str:
    """The whole page as Markdown."""
    parts = [_HEADER, _render_section("The run", RunConfig, prefix="")]
    for name, field in RunConfig.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            parts.append(_render_section(f"`{name}`", section, prefix=f"{name}."))
    rows = [_render_setting(name, field) for name, field in Settings.model_fields.items()]
    return "\n".join(parts) + _SETTINGS_HEADER + "\n".join(rows) + "\n"


def _render_setting(name: str, field: FieldInfo) -> str:
    # Variables that other tools know too keep the name that they have there.
    variable = field.validation_alias or f"SDAR_{name.upper()}"
    return f"| `{variable}` | {_format_default(field)} | {_describe(field)} |"


def _render_section(title: str, section: type[BaseModel], prefix: str) -> str:
    head = f"\n## {title}\n\n| key | type | default | meaning |\n|---|---|---|---|\n"
    # The sections of a run have tables of their own; a group within a section stands in its table.
    return head + "\n".join(_render_rows(section, prefix, has_groups=prefix != ""))


def _render_rows(section: type[BaseModel], prefix: str, *, has_groups: bool) -> list[str]:
    rows = []
    for name, field in section.model_fields.items():
        group = field.annotation
        if isinstance(group, type) and issubclass(group, BaseModel):
            if has_groups:
                rows += _render_rows(group, f"{prefix}{name}.", has_groups=True)
            continue
        kind = _format_kind(field)
        bounds = _format_bounds(field)
        rows.append(
            f"| `{prefix}{name}` | {kind}{bounds} | {_format_default(field)} | {_describe(field)} |"
        )
    return rows


def _describe(field: FieldInfo) -> str:
    """The docstring in one line."""
    return " ".join((field.description or "").split())


def _format_kind(field: FieldInfo) -> str:
    for constraint in field.metadata:
        if isinstance(constraint, OneOf):
            return _format_names(constraint.names)
    return _format_type(field.annotation)


def _format_names(names: Iterable[str]) -> str:
    return " or ".join(f"`{name}`" for name in names)


def _format_type(annotation: Any) -> str:
    origin = typing.get_origin(annotation)
    parts = typing.get_args(annotation)
    if origin is Literal:
        return _format_names(parts)
    if origin in (types.UnionType, typing.Union):
        # That a value may be left out is in the column of defaults.
        kinds = [_format_type(part) for part in parts if part is not type(None)]
        return " or ".join(kinds)
    if origin is typing.Annotated:
        return _format_type(parts[0])
    if origin is tuple:
        return f"[{', '.join(map(_format_type, parts))}]"
    if origin is dict:
        return f"mapping to {_format_type(parts[1])}"
    return _TYPE_NAMES.get(getattr(annotation, "__name__", ""), str(annotation))


def _format_bounds(field: FieldInfo) -> str:
    """The bounds of a number, each with a comma before it."""
    text = ""
    for constraint in field.metadata:
        for name, words in _BOUNDS.items():
            bound = getattr(constraint, name, None)
            if bound is not None:
                text += f", {words} {bound:g}"
    return text


def _format_default(field: FieldInfo) -> str:
    # One setting has a factory: the name of an instance.
    if field.default_factory is not None:
        return "host name and process id"
    if field.default is PydanticUndefined:
        return "required"
    if field.default is None:
        return "none"
    if isinstance(field.default, tuple):
        return f"`{list(field.default)}`"
    if isinstance(field.default, bool):
        return f"`{str(field.default).lower()}`"
    return f"`{field.default}`"


if __name__ == "__main__":
    PAGE.write_text(render_page(), encoding="utf-8")
    print(f"Wrote {PAGE}")
