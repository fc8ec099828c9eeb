"""Which keys of the run a piece of code reads, found in its syntax.

It follows a configuration by its names (`config`, `self._config`, `scheduler.config`), the sections
of it that are given a name or handed to a parameter, and the properties that RunConfig works out.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from functools import cache
from typing import Any

from sdar.config import RunConfig

_SECTIONS = {
    field.annotation.__name__: name
    for name, field in RunConfig.model_fields.items()
    if hasattr(field.annotation, "model_fields")
}


def read_keys(code: str) -> set[str]:
    """Keys such as `training.num_updates`, and a section's name where it is read as a whole."""
    tree = ast.parse(code)
    aliases = dict(_find_aliases(tree))
    # A part of a longer chain says nothing: `config.training` of `config.training.seed`.
    parts = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    named = {id(value) for _, _, value in _find_assigned(tree)}
    keys: set[str] = set()
    for node in ast.walk(tree):
        is_read = isinstance(getattr(node, "ctx", None), ast.Load) and id(node) not in parts | named
        if is_read and isinstance(node, ast.Attribute | ast.Name):
            path = _resolve(node, aliases)
            if path:
                keys |= _find_keys(path)
    return keys


def _find_aliases(tree: ast.AST) -> Iterator[tuple[str, tuple[str, ...]]]:
    """What stands for a section: parameters by their types, and names that one was assigned to."""
    for node in ast.walk(tree):
        annotation = getattr(node, "annotation", None)
        section = _SECTIONS.get(getattr(annotation, "id", ""))
        if isinstance(node, ast.arg) and section:
            yield node.arg, (section,)
    for name, path, _ in _find_assigned(tree):
        yield name, path


def _find_assigned(tree: ast.AST) -> Iterator[tuple[str, tuple[str, ...], ast.AST]]:
    """Names that stand for a section from their assignment on: name, section, assigned value."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            path = _resolve(node.value, {})
            if path and _is_section(path):
                yield ast.unparse(node.targets[0]), path, node.value


def _resolve(node: ast.AST, aliases: dict[str, tuple[str, ...]]) -> tuple[str, ...] | None:
    """The path from the configuration to what an expression stands for; None if it is none."""
    if not isinstance(node, ast.Attribute | ast.Name):
        return None
    text = ast.unparse(node)
    if text in aliases:
        return aliases[text]
    name = node.attr if isinstance(node, ast.Attribute) else node.id
    if name in ("config", "_config"):
        return ()
    if isinstance(node, ast.Attribute):
        before = _resolve(node.value, aliases)
        return None if before is None else (*before, name)
    return None


def _is_section(path: tuple[str, ...]) -> bool:
    return len(path) == 1 and path[0] in _SECTIONS.values()


def _find_keys(path: tuple[str, ...]) -> set[str]:
    """The keys that a path reads: its own, or those that a property on the way is worked out of."""
    model: Any = RunConfig
    for depth, name in enumerate(path):
        fields = getattr(model, "model_fields", {})
        if name not in fields:
            prefix = ".".join(path[:depth])
            return {f"{prefix}.{key}" if prefix else key for key in _read_property(model, name)}
        model = fields[name].annotation
    return {".".join(path)}


@cache
def _read_property(model: Any, name: str) -> frozenset[str]:
    found = inspect.getattr_static(model, name, None)
    function = getattr(found, "fget", None) or getattr(found, "func", None) or found
    if not inspect.isfunction(function) or function.__module__ != RunConfig.__module__:
        return frozenset()
    code = textwrap.dedent(inspect.getsource(function)).replace("self.", "config.")
    return frozenset(_relative(model, key) for key in _read_of(model, code))


def _read_of(model: Any, code: str) -> set[str]:
    if model is RunConfig:
        return read_keys(code)
    section = _SECTIONS[model.__name__]
    return read_keys(code.replace("config.", f"config.{section}."))


def _relative(model: Any, key: str) -> str:
    return key if model is RunConfig else key.partition(".")[2]
