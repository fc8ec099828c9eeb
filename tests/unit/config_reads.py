"""Which keys of a run a service reads, found in its code.

A key is read where code takes an attribute of a section. What holds a section is followed: names
and attributes of objects that are assigned one, arguments and results that are annotated with one,
properties of the configuration, and functions of sdar/ that are called with one. A section that
goes where it cannot be followed, or is dumped, counts as read whole.
"""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from sdar import config as config_module
from sdar.config import RunConfig, Section

ROOT = Path(__file__).parents[2]
SECTIONS = {
    name: one
    for name, one in vars(config_module).items()
    if inspect.isclass(one) and issubclass(one, Section) and one is not Section
}
Function = ast.FunctionDef | ast.AsyncFunctionDef
Types = dict[str, str]
"""Names of classes, sections among them, by the name of what holds one."""


def list_leaves(section: type[Section] = RunConfig, prefix: str = "") -> Iterator[str]:
    """Every key below a section, dotted."""
    for name, info in section.model_fields.items():
        below = info.annotation
        if inspect.isclass(below) and issubclass(below, Section):
            yield from list_leaves(below, f"{prefix}{name}.")
        else:
            yield prefix + name


def list_prefixes(
    section: type[Section] = RunConfig, prefix: str = ""
) -> Iterator[tuple[str, str]]:
    """Each section's class and the dotted place that it has in a run, with a dot at its end."""
    yield section.__name__, prefix
    for name, info in section.model_fields.items():
        below = info.annotation
        if inspect.isclass(below) and issubclass(below, Section):
            yield from list_prefixes(below, f"{prefix}{name}.")


PREFIXES = dict(list_prefixes())
LEAVES = tuple(list_leaves())


def expand(keys: Iterable[str]) -> set[str]:
    """The leaves that keys and sections stand for."""
    starts = tuple(f"{key}." for key in keys)
    return {leaf for leaf in LEAVES if f"{leaf}.".startswith(starts)}


@dataclass
class Module:
    """A parsed file: its functions and classes, and what it imports from the project."""

    tree: ast.Module
    package: str
    functions: dict[str, Function] = field(default_factory=dict)
    classes: dict[str, ast.ClassDef] = field(default_factory=dict)
    imports: dict[str, tuple[str, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for node in self.tree.body:
            if isinstance(node, Function):
                self.functions[node.name] = node
            elif isinstance(node, ast.ClassDef):
                self.classes[node.name] = node
        for found in ast.walk(self.tree):
            if isinstance(found, ast.ImportFrom):
                start = self.package.split(".")[: 1 - found.level or None] if found.level else []
                source = ".".join([*start, *filter(None, [found.module])])
                names = {one.asname or one.name: (source, one.name) for one in found.names}
                self.imports.update(names)


@functools.cache
def parse(name: str) -> Module | None:
    """A module of the project by its dotted name."""
    path = ROOT / name.replace(".", "/")
    for file, package in ((path / "__init__.py", name), (path.with_suffix(".py"), None)):
        if file.is_file():
            tree = ast.parse(file.read_text(encoding="utf-8"))
            return Module(tree, package or name.rpartition(".")[0])
    return None


@functools.cache
def find_definition(module: str, name: str) -> tuple[str, Function | ast.ClassDef] | None:
    """A function or class, and the module in which it stands, by a name that a module knows."""
    parsed = parse(module) if module.startswith(("sdar", "services")) else None
    if parsed is None:
        return None
    found = parsed.functions.get(name) or parsed.classes.get(name)
    if found is not None:
        return module, found
    return find_definition(*parsed.imports[name]) if name in parsed.imports else None


def name_class(annotation: ast.expr | None) -> str:
    """The class that an annotation names; of a union its first that is not None."""
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        annotation = ast.parse(annotation.value, mode="eval").body
    if isinstance(annotation, ast.BinOp):
        annotation = annotation.left
    return annotation.id if isinstance(annotation, ast.Name) else ""


def list_parameters(function: Function) -> list[ast.arg]:
    arguments = function.args
    return [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]


class Reader:
    """Collects the keys that the code of some modules reads, and of what it calls.

    Attributes:
        keys: dotted keys without sections below them.
    """

    def __init__(self, modules: list[str]) -> None:
        self.keys: set[str] = set()
        self._roots = tuple(modules)
        self._queue: list[tuple[str, Function, str]] = []
        self._seen: set[int] = set()
        for name in modules:
            parsed = parse(name)
            assert parsed is not None
            for function in parsed.functions.values():
                self._follow(name, function, "")
            for one in parsed.classes.values():
                self._follow_class(name, one)
        while self._queue:
            self._read_function(*self._queue.pop())

    def _follow(self, module: str, function: Function, owner: str) -> None:
        if id(function) not in self._seen:
            self._seen.add(id(function))
            self._queue.append((module, function, owner))

    def _follow_class(self, module: str, one: ast.ClassDef) -> None:
        for node in one.body:
            if isinstance(node, Function):
                self._follow(module, node, one.name)

    def _read_function(self, module: str, function: Function, owner: str) -> None:
        types = find_types(module, function, owner)
        parents = {
            id(child): parent
            for parent in ast.walk(function)
            for child in ast.iter_child_nodes(parent)
        }
        for node in ast.walk(function):
            if isinstance(node, ast.expr) and (held := infer(node, module, types)) in SECTIONS:
                self._read_expression(node, held, parents, module, types)

    def _read_expression(
        self,
        node: ast.expr,
        held: str,
        parents: dict[int, ast.AST],
        module: str,
        types: Types,
    ) -> None:
        parent = parents[id(node)]
        if isinstance(parent, ast.keyword):
            parent = parents[id(parent)]
        if isinstance(parent, ast.Attribute):
            self._read_attribute(parent.attr, held, module)
        elif isinstance(parent, ast.Call) and node is not parent.func:
            if not self._follow_call(parent, held, module, types):
                self._read_whole(held)
        elif not isinstance(parent, (ast.Assign, ast.AnnAssign, ast.Return, ast.arg)):
            self._read_whole(held)

    def _read_whole(self, held: str) -> None:
        self.keys |= {leaf for leaf in LEAVES if leaf.startswith(PREFIXES[held])}

    def _read_attribute(self, name: str, held: str, module: str) -> None:
        section = SECTIONS[held]
        if name in section.model_fields:
            key = PREFIXES[held] + name
            self.keys |= {key} & set(LEAVES)
        elif (method := find_method("sdar.config", held, name)) is not None:
            self._follow(*method, held)
        elif name.startswith("model_dump") and not reads_back(module, held):
            self._read_whole(held)

    def _follow_call(self, call: ast.Call, held: str, module: str, types: Types) -> bool:
        """Whether a section that is an argument arrives where it is told by its annotation."""
        called = [call.func, *call.args]
        # Who gets a function and its arguments calls it: loop.run_in_executor(executor, f, config).
        for callee in called:
            name = callee.attr if isinstance(callee, ast.Attribute) else ""
            name = callee.id if isinstance(callee, ast.Name) else name
            owner = infer(callee.value, module, types) if isinstance(callee, ast.Attribute) else ""
            for where, function, of_class in self._find_called(module, owner, name):
                told = {name_class(one.annotation) for one in list_parameters(function)}
                if held in told:
                    self._follow(where, function, of_class)
                    return True
        return False

    def _find_called(
        self, module: str, owner: str, name: str
    ) -> Iterator[tuple[str, Function, str]]:
        if owner and (method := find_method(module, owner, name)) is not None:
            yield *method, owner
        if (found := find_definition(module, name)) is None:
            return
        where, definition = found
        if isinstance(definition, Function):
            yield where, definition, ""
            return
        if where not in self._roots:
            self._follow_class(where, definition)
        if (made := find_method(where, name, "__init__")) is not None:
            yield *made, name


def reads_back(module: str, held: str) -> bool:
    """Whether a module that dumps a section is the one that loads it: it passes it to itself."""
    parsed = parse(module)
    assert parsed is not None
    return f"{held}.model_validate_json" in ast.unparse(parsed.tree)


@functools.cache
def find_method(module: str, owner: str, name: str) -> tuple[str, Function] | None:
    found = find_definition(module, owner)
    if found is None or not isinstance(found[1], ast.ClassDef):
        return None
    where, definition = found
    for node in definition.body:
        if isinstance(node, Function) and node.name == name:
            return where, node
    return None


@functools.cache
def find_attributes(module: str, owner: str) -> Types:
    """The classes of what the objects of a class hold."""
    found = find_definition(module, owner)
    if found is None or not isinstance(found[1], ast.ClassDef):
        return {}
    where, definition = found
    held: Types = {}
    for node in definition.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            held[node.target.id] = name_class(node.annotation)
        elif isinstance(node, Function):
            if "property" in map(ast.unparse, node.decorator_list):
                held[node.name] = name_class(node.returns)
            types = {one.arg: name_class(one.annotation) for one in list_parameters(node)}
            held.update(find_assigned(where, node, types))
    return held


def find_assigned(module: str, method: Function, types: Types) -> Types:
    """The classes of what a method assigns to attributes of its object."""
    held: Types = {}
    for node in ast.walk(method):
        if isinstance(node, ast.Assign) and isinstance(target := node.targets[0], ast.Attribute):
            kind = infer(node.value, module, types)
            if kind and ast.unparse(target.value) == "self":
                held[target.attr] = kind
    return held


def find_types(module: str, function: Function, owner: str) -> Types:
    """The classes of a function's parameters and names, those of functions inside it among them."""
    types: Types = {"self": owner} if owner else {}
    for node in ast.walk(function):
        if isinstance(node, Function):
            told = [one for one in list_parameters(node) if one.annotation]
            types.update({one.arg: name_class(one.annotation) for one in told})
    assigned = [node for node in ast.walk(function) if isinstance(node, ast.Assign)]
    for _ in range(3):  # a name that is assigned another one, which is assigned a third
        for node in assigned:
            target = node.targets[0]
            if isinstance(target, ast.Name) and (kind := infer(node.value, module, types)):
                types[target.id] = kind
    return types


def infer(node: ast.expr, module: str, types: Types) -> str:
    """The class of an expression's value, or "" where it is not known."""
    match node:
        case ast.Name(name):
            return types.get(name, "")
        case ast.Attribute(value, name):
            owner = infer(value, module, types)
            if owner in SECTIONS:
                info = SECTIONS[owner].model_fields.get(name)
                below = info.annotation if info else None
                return below.__name__ if inspect.isclass(below) else ""
            return find_attributes(module, owner).get(name, "") if owner else ""
        case ast.Call(ast.Attribute(value, "model_copy")):
            return infer(value, module, types)
        case ast.Call(ast.Name("RunConfig" as name)) | ast.Call(
            ast.Attribute(ast.Name("RunConfig" as name), _)
        ):
            return name
        case ast.Call(ast.Name(name)):
            found = find_definition(module, name)
            if found is None:
                return ""
            return name_class(found[1].returns) if isinstance(found[1], Function) else name
        case ast.Await(value) | ast.NamedExpr(_, value):
            return infer(value, module, types)
        case ast.IfExp(_, value, other):
            return infer(value, module, types) or infer(other, module, types)
        case ast.BoolOp(_, [*values]):
            return next(filter(None, (infer(one, module, types) for one in values)), "")
    return ""


def find_keys(role: str) -> set[str]:
    """The keys that a service's own code reads, and what it calls with sections."""
    folder = ROOT / "services" / role
    paths = [path.relative_to(ROOT).with_suffix("") for path in sorted(folder.rglob("*.py"))]
    modules = [".".join(path.parts).removesuffix(".__init__") for path in paths]
    return Reader(modules).keys
