"""Owns which environments can be served by name: those shipped, and any class named as `package.module:Class`."""

from __future__ import annotations

import importlib
from collections.abc import Iterable

from sdar.contracts.errors import ConfigurationError
from services.envs.base import Environment

# Paths, not classes: an environment's optional dependencies are imported only where it is served.
BUILT_IN: dict[str, str] = {
    "household": "services.envs.household:HouseholdEnvironment",
}


def load_environments(names: Iterable[str]) -> dict[str, type[Environment]]:
    """The environment classes by the names given: the names they are served under.

    Args:
        names: names of built-in environments, or `package.module:Class` for one's own.

    Raises:
        ConfigurationError: an unknown name, a class that cannot be imported, or one that is no Environment.
    """
    return {name: load_environment(name) for name in names}


def load_environment(name: str) -> type[Environment]:
    module_name, colon, class_name = BUILT_IN.get(name, name).partition(":")
    if not colon:
        raise ConfigurationError(
            f"Unknown environment {name!r}. Use one of {', '.join(BUILT_IN)}, a class as package.module:Class, or set "
            "environment.address to a server that has it."
        )
    try:
        found = getattr(importlib.import_module(module_name), class_name, None)
    except ImportError as error:
        raise ConfigurationError(f"Environment {name!r} cannot be imported: {error}. Install what it needs.") from error
    if not (isinstance(found, type) and issubclass(found, Environment)):
        raise ConfigurationError(f"{module_name}:{class_name} is {found!r}, expected a subclass of services.envs.Environment.")
    return found
