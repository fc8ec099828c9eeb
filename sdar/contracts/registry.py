"""Registries: the entries of one kind, each in a module of one package, under the module's name.

Whoever adds an entry adds one file. Its name is known without importing it (`list_entries`), so a
configuration may list what is allowed where torch is not loaded::

    # sdar/algorithms/gates/__init__.py           # sdar/algorithms/gates/gap.py
    GATES: Registry[Gate] = Registry(             @GATES.register("gap")
        "gate", __name__                          def gap(inputs, sharpness): ...
    )
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Iterable
from typing import Generic, Protocol, TypeVar

from sdar.contracts.errors import ConfigurationError, ContractError

Entry = TypeVar("Entry")


def list_entries(package: str) -> tuple[str, ...]:
    """Names of the modules of a package, in alphabetical order; none of them is imported.

    Raises:
        ContractError: there is no such package.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.submodule_search_locations is None:
        raise ContractError(f"There is no package {package} to list. Check the installation.")
    # Reads the folder and imports no entry: some need torch.
    modules = pkgutil.iter_modules(spec.submodule_search_locations)
    return tuple(sorted(module.name for module in modules))


class Named(Protocol):
    """A row of a table that is looked up by name."""

    @property
    def name(self) -> str: ...


Row = TypeVar("Row", bound=Named)


def index_by_name(rows: Iterable[Row]) -> dict[str, Row]:
    """The rows by their names, in their order.

    Raises:
        ContractError: two have one name.
    """
    table: dict[str, Row] = {}
    for row in rows:
        if row.name in table:
            raise ContractError(
                f"Two rows of {type(row).__name__} have the name {row.name!r}. Give one of them "
                "another name."
            )
        table[row.name] = row
    return table


class Registry(Generic[Entry]):
    """Entries of one kind by name; the package's modules are imported at the first look-up.

    Args:
        kind: what an entry is, in the words of an error message.
        package: dotted name of the package whose modules register themselves.
    """

    def __init__(self, kind: str, package: str) -> None:
        self._kind = kind
        self._package = package
        self._entries: dict[str, Entry] = {}
        self._is_loaded = False

    def register(self, name: str) -> Callable[[Entry], Entry]:
        """Decorator: the entry is found under `name` from now on.

        Raises:
            ContractError: another entry has that name.
        """

        def add(entry: Entry) -> Entry:
            if name in self._entries:
                raise ContractError(
                    f"Two entries of {self._package} register the {self._kind} {name!r}. "
                    "Give one of them another name."
                )
            self._entries[name] = entry
            return entry

        return add

    def names(self) -> tuple[str, ...]:
        """All names, in alphabetical order."""
        self._load()
        return tuple(sorted(self._entries))

    def __getitem__(self, name: str) -> Entry:
        """The entry under `name`. Raises ConfigurationError that names the known ones."""
        self._load()
        if name not in self._entries:
            known = ", ".join(self.names())
            raise ConfigurationError(f"Unknown {self._kind} {name!r}. Known: {known}.")
        return self._entries[name]

    def _load(self) -> None:
        if self._is_loaded:
            return
        for name in list_entries(self._package):
            importlib.import_module(f"{self._package}.{name}")
            # The configuration allows what the folder lists: each name needs its entry.
            if name not in self._entries:
                raise ContractError(
                    f"{self._package}.{name} registers no {self._kind} named {name!r}. "
                    "Register it there under the module's own name."
                )
        # Last: after a module that could not be imported, the next look-up fails in the same way.
        self._is_loaded = True
