"""Finds an environment's class by name: a built-in one, `package.module:Class` or `file.py:Class`.

An environment is known here by where its class is and by its options, so that a worker process can
build it; the server's own process never imports it.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

from sdar.contracts.errors import ConfigurationError, SdarError
from sdar.environments.base import Environment

Option = bool | int | float | str
MAX_TURNS = 1_000_000
"""Of an episode: far beyond any use, and well within what the wire and its clients count."""

# Paths, not classes: an environment's optional dependencies are imported only where it is served.
BUILT_IN: dict[str, str] = {
    "household": "services.envs.household:HouseholdEnvironment",
    "alfworld": "services.envs.alfworld:AlfworldEnvironment",
    "webshop": "services.envs.webshop:WebShopEnvironment",
    "search": "services.envs.search.environment:SearchEnvironment",
    "gymnasium": "services.envs.adapters.gymnasium_adapter:GymnasiumEnvironment",
    "openenv": "services.envs.adapters.openenv_adapter:OpenEnvEnvironment",
}

# By the name of the annotation, which is a text where a module postpones annotations.
_KINDS: dict[object, tuple[tuple[type, ...], str]] = {
    "str": ((str,), "a text (in YAML, quote it)"),
    "int": ((int,), "a whole number"),
    "float": ((int, float), "a number"),
    "bool": ((bool,), "true or false"),
}
_FILE_MODULE_PREFIX = "environment_file_"
# A stack: the module of one environment may load another.
_loading: list[str] = []


@dataclass(frozen=True, slots=True)
class EnvironmentSource:
    """Where an environment's class is, and the options it is built with.

    `path` is `package.module:Class` or `file.py:Class`.
    """

    path: str
    options: Mapping[str, Option] = field(default_factory=dict)

    def build(self) -> Environment:
        """A new instance.

        Raises:
            ConfigurationError: the class cannot be imported, is no Environment, leaves out what it
                must declare, has no such option, or refuses its value.
        """
        environment_class = self.load_class()
        self._check_options(environment_class)
        try:
            environment = environment_class(**self.options)
        except SdarError as error:
            # Its message says what to do.
            raise ConfigurationError(error.message) from error
        except Exception as error:
            # A user's constructor may raise anything; one sentence helps more than a traceback.
            raise ConfigurationError(
                f"{self.path} cannot be built with options {dict(self.options)}: "
                f"{type(error).__name__}: {error}. Correct the options, or what they point to."
            ) from error
        _check_declaration(self.path, environment)
        return environment

    def load_class(self) -> type[Environment]:
        """The class. Raises ConfigurationError: it cannot be imported, or is no Environment."""
        _loading.append(self.path)
        try:
            found = self._import()
        finally:
            _loading.pop()
        if not (isinstance(found, type) and issubclass(found, Environment)):
            raise ConfigurationError(
                f"{self.path} is {found!r}, expected a subclass of sdar.environments.Environment."
            )
        return found

    def _import(self) -> object:
        """What stands under the class's name, None for nothing."""
        module_name, _, class_name = self.path.rpartition(":")
        try:
            return getattr(_import_module(module_name), class_name, None)
        except ImportError as error:
            raise ConfigurationError(
                f"{self.path} cannot be imported: {error}. Install what it needs."
            ) from error
        except ConfigurationError:
            raise
        except Exception as error:
            # A user's module may raise anything; one sentence helps more than a traceback.
            raise ConfigurationError(
                f"{self.path} cannot be imported: {type(error).__name__}: {error}. Correct its "
                "module."
            ) from error

    def _check_options(self, environment_class: type[Environment]) -> None:
        parameters = inspect.signature(environment_class).parameters.values()
        # A class that takes any keyword checks its options itself.
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            return

        known = [parameter.name for parameter in parameters]
        required = [one.name for one in parameters if one.default is one.empty]
        problems = [f"no option {name!r}" for name in self.options if name not in known]
        problems += [
            f"option {name!r} is required" for name in required if name not in self.options
        ]
        for parameter in parameters:
            problem = self._find_type_error(parameter)
            if problem is not None:
                problems.append(problem)

        if problems:
            raise ConfigurationError(
                f"{self.path}: {', '.join(problems)}. Its options: {', '.join(known) or 'none'}."
            )

    def _find_type_error(self, parameter: inspect.Parameter) -> str | None:
        """What is wrong with an option's type, where its parameter declares a plain one."""
        declared = getattr(parameter.annotation, "__name__", parameter.annotation)
        if parameter.name not in self.options or declared not in _KINDS:
            return None
        kinds, what = _KINDS[declared]
        value = self.options[parameter.name]
        # By its type, since True is an int to `isinstance`.
        if type(value) in kinds:
            return None
        return f"option {parameter.name!r} is {value!r}, not {what}"


def load_environment(name: str, options: Mapping[str, Option] | None = None) -> EnvironmentSource:
    """The environment of that name.

    Args:
        name: of a built-in environment, or for one's own `package.module:Class` or
            `path/to/file.py:Class`.
        options: keyword arguments of its class; they are checked when it is built.

    Raises:
        ConfigurationError: an unknown name.
    """
    path = BUILT_IN.get(name, name)
    if ":" not in path:
        raise ConfigurationError(
            f"Unknown environment {name!r}. Use one of {', '.join(BUILT_IN)}, a class as "
            "package.module:Class, or set environment.address to a server that has it."
        )
    return EnvironmentSource(path, dict(options or {}))


def locate_class(
    environment_class: type[Environment], options: Mapping[str, Option] | None = None
) -> EnvironmentSource:
    """The source of a class at hand, also of one in the script that is being run.

    Raises:
        ConfigurationError: a class that another process cannot import.
    """
    module_name = environment_class.__module__
    class_name = environment_class.__qualname__
    # Another process has another __main__.
    if module_name == "__main__":
        module_name = _name_main()
    # A dot: a class within a class or a function.
    if not module_name or "." in class_name:
        raise ConfigurationError(
            f"Worker processes cannot import {environment_class!r}. Define it at the top level of "
            "a module or of a script file."
        )
    return EnvironmentSource(f"{module_name}:{class_name}", dict(options or {}))


def _name_main() -> str:
    """What another process imports in place of __main__; empty for what none can import."""
    main = sys.modules["__main__"]
    # `python -m` runs a module, which has its name; a script has its file.
    spec = getattr(main, "__spec__", None)
    if spec is not None:
        return str(spec.name)
    file = getattr(main, "__file__", None)
    return str(Path(file).resolve()) if file else ""


def is_loading() -> bool:
    """Whether a class is being imported for a worker right now.

    Its module's top-level code must not serve then.
    """
    return bool(_loading)


def _import_module(name: str) -> ModuleType:
    if not name.endswith(".py"):
        return importlib.import_module(name)
    path = Path(name).resolve()
    # Not under its own stem: a script called json.py must not hide the library of that name.
    module_name = _FILE_MODULE_PREFIX + path.stem
    if module_name in sys.modules:
        return sys.modules[module_name]
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ImportError(f"there is no Python file {path}")
    module = importlib.util.module_from_spec(spec)
    # Before its code runs, as `import` does: a dataclass looks its module up by name.
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[module_name]
        raise
    return module


def _check_declaration(path: str, environment: Environment) -> None:
    """Refuse an environment that leaves out a declaration, before its first episode."""
    _check_text(path, environment, "name", "a name")
    _check_text(path, environment, "version", "a version such as '1'")
    max_turns = getattr(environment, "max_turns", None)
    if type(max_turns) is not int or not 1 <= max_turns <= MAX_TURNS:
        raise ConfigurationError(
            f"{path}: max_turns is {max_turns!r}, expected a number of 1 to {MAX_TURNS:,}. Correct "
            "it."
        )
    if isinstance(environment.splits, str) or not environment.splits:
        raise ConfigurationError(
            f"{path}: splits is {environment.splits!r}, expected a tuple of names such as "
            "('train',)."
        )


def _check_text(path: str, environment: Environment, attribute: str, what: str) -> None:
    value = getattr(environment, attribute, None)
    if not isinstance(value, str) or not value:
        raise ConfigurationError(
            f"{path}: {attribute} is {value!r}, expected {what}. Set it on the class."
        )
