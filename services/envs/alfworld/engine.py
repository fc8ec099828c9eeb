"""The engine that plays ALFWorld: TextWorld's own, with what never changes cached.

The stack is the public one (PddlEnv, AlfredDemangler without shuffling, AlfredInfos) and the
transitions are Fast Downward's. Stock, nearly all time goes into parsing the same grammar and
translating the same PDDL again. Kept here, each with a bound:

    parsed grammars, by their text less the task's sentence    (a load)
    translated problems with their first state, by their text  (a load and every reset)
    derived sentences, until a fact they depend on changes     (a step)

The classes of TextWorld are extended, never patched: stock environments in the same process stay
stock. Importing this module imports TextWorld (a second); only the process that plays does. Not
thread-safe: Fast Downward's parser is not.
"""

from __future__ import annotations

import copy
import struct
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import fast_downward
import mementos.core
import textworld
from fast_downward.translate.pddl.conditions import Atom as InitialAtom
from textworld.core import GameState
from textworld.envs.pddl.logic import Atom, GameLogic, PddlState
from textworld.envs.pddl.pddl import PddlEnv
from textworld.logic import Action, Placeholder, Proposition, Type, Variable

from sdar.contracts.errors import EnvironmentFailedError
from services.envs.alfworld.games import find_goal_template, replace_goal_template
from services.envs.alfworld.grammar import SentenceGrammar
from services.envs.alfworld.upstream import AlfredDemangler, AlfredInfos

# The games of one release of ALFWorld share one logic.
_MAX_LOGICS = 8
# A translation takes 2 MB in a large room.
_MAX_TRANSLATIONS = 64
# TextWorld interns every fact of every game for ever; dropping them costs their making anew.
_MAX_INTERNED = 200_000
_MAX_NAME_BYTES = 1024
_MAX_REASON_CHARACTERS = 300
_NO_GOAL = "Your task is to: UNKNOWN GOAL."


@dataclass(frozen=True, slots=True)
class View:
    """What the engine shows after a reset or a command."""

    feedback: str
    commands: tuple[str, ...]
    is_won: bool


@dataclass(slots=True)
class Translation:
    """A problem as Fast Downward plays it.

    All games of the problem share it, and nothing of it changes once it is known.
    """

    sas: bytes
    parameters: Mapping[str, tuple[Placeholder, ...]]
    types: tuple[tuple[str, tuple[str, ...]], ...]
    types_by_name: Mapping[str, str]
    propositions: tuple[Proposition, ...]
    first_facts: dict[str, Any] | None = None
    """The first state's facts as TextWorld keeps them, once the library has added its own."""
    mappings: dict[str, dict[Placeholder, Variable]] = field(default_factory=dict)
    """What an operator's parameters stand for, by its name. There are as many as operators."""

    def find_mapping(self, operator: str) -> dict[Placeholder, Variable]:
        known = self.mappings.get(operator)
        if known is not None:
            return known

        name, *arguments = operator.split()
        mapping: dict[Placeholder, Variable] = {}
        # Not strict: the translator turns quantifiers into further parameters of some of an
        # action's operators.
        for placeholder, argument in zip(self.parameters[name], arguments, strict=False):
            mapping[placeholder] = Variable(argument, placeholder.type)
        self.mappings[operator] = mapping
        return mapping


@lru_cache(maxsize=_MAX_TRANSLATIONS)
def translate(domain: str, problem: str) -> Translation:
    """A problem in Fast Downward's form.

    Raises:
        ValueError: a name in it is too long for the library.
    """
    with _restore_arguments():
        task, sas = fast_downward.pddl2sas(domain, problem)
    _check_names(sas)

    types_by_name = {thing.name: thing.type_name for thing in task.objects}
    # The others set the cost of a plan and equate each thing with itself.
    atoms = [atom for atom in task.init if isinstance(atom, InitialAtom) and atom.predicate != "="]
    propositions = tuple(_to_proposition(atom, types_by_name) for atom in atoms)
    parameters = {action.name: _list_placeholders(action) for action in task.actions}
    types = tuple((type_.name, tuple(type_.supertype_names)) for type_ in task.types)
    return Translation(
        sas=sas.encode(),
        parameters=parameters,
        types=types,
        types_by_name=types_by_name,
        propositions=propositions,
    )


def _check_names(sas: str) -> None:
    longest = max(map(len, sas.splitlines()))
    # The library copies names into buffers of this size without looking.
    if longest >= _MAX_NAME_BYTES:
        raise ValueError(
            f"a fact or an operator has a name of {longest} bytes, at most {_MAX_NAME_BYTES - 1} "
            "fit"
        )


def _list_placeholders(action: Any) -> tuple[Placeholder, ...]:
    """The parameters of one of Fast Downward's actions, in TextWorld's type."""
    return tuple(
        Placeholder(parameter.name.strip("?"), parameter.type_name)
        for parameter in action.parameters
    )


def _to_proposition(atom: InitialAtom, types_by_name: Mapping[str, str]) -> Proposition:
    """One of Fast Downward's facts, in TextWorld's type."""
    variables = [Variable(argument, types_by_name[argument]) for argument in atom.args]
    return Proposition(atom.predicate, variables)


@contextmanager
def _restore_arguments() -> Iterator[None]:
    """Fast Downward's translator reads its options from sys.argv, and sets them there first."""
    arguments = sys.argv
    try:
        yield
    finally:
        sys.argv = arguments


@lru_cache(maxsize=_MAX_LOGICS)
def _parse_logic(domain: str, grammar: str) -> tuple[GameLogic, SentenceGrammar]:
    logic = GameLogic(domain=domain, grammar=grammar)
    return logic, SentenceGrammar.from_parsed(logic.grammar)


def build_logic(domain: str, grammar: str) -> GameLogic:
    """A game's actions and grammar.

    Games differ in their task's sentence alone, so the rest is parsed once.
    """
    template = find_goal_template(grammar)
    parsed, sentences = _parse_logic(domain, replace_goal_template(grammar, _NO_GOAL))
    # Shallow: all games share the parsed parts, and each has a grammar of its own.
    logic = copy.copy(parsed)
    logic.grammar = sentences.replace_production("task", template)
    return logic


class KeptState(PddlState):  # type: ignore[misc]  # TextWorld has no types
    """TextWorld's state of a game, made from a translation.

    It remembers each derived sentence until a fact changes that the sentence was derived from. A
    predicate's revision counts the changes of its facts; a sentence keeps the revisions it read.
    """

    def __init__(self, downward_lib: Any, pddl_problem: str, logic: GameLogic) -> None:
        # Not super().__init__: it translates twice, the second time for a planner that we never
        # use.
        self.pddl_problem = pddl_problem
        self.downward_lib = downward_lib
        self._logic = logic
        self._translation = translate(logic.domain, pddl_problem)
        self._revisions: Counter[str] = Counter()
        self._readings: dict[str, int] = {}
        self._sentences: dict[Hashable, tuple[str, dict[str, int]]] = {}
        self._fact_list: tuple[Proposition, ...] | None = None
        self.name2type = self._translation.types_by_name
        _add_types(logic, self._translation.types)
        downward_lib.load_sas(self._translation.sas)

        # The first state of a problem derives its facts; later ones begin with a copy of them.
        if self._translation.first_facts is None:
            self._derive_first_facts()
            self._translation.first_facts = _copy_facts(vars(self))
        else:
            self.__dict__.update(_copy_facts(self._translation.first_facts))

    def _derive_first_facts(self) -> None:
        self._facts: defaultdict[Any, set[Proposition]] = defaultdict(set)
        self._vars_by_type: defaultdict[str, set[Any]] = defaultdict(set)
        self._vars_by_name: dict[str, Any] = {}
        self._var_counts: Counter[str] = Counter()
        self.add_facts(self._translation.propositions)

        # An array of C's, which the library fills.
        atoms = (Atom * self.downward_lib.get_state_size())()
        self.downward_lib.get_state(atoms)
        facts = [atom.get_fact(self.name2type) for atom in atoms]
        self.add_facts(fact for fact in facts if not fact.is_negation)

    @property
    def facts(self) -> tuple[Proposition, ...]:
        if self._fact_list is None:
            self._fact_list = tuple(super().facts)
        return self._fact_list

    def add_fact(self, prop: Proposition) -> None:
        if not self.is_fact(prop):
            self._note_change(prop)
        super().add_fact(prop)

    def remove_fact(self, prop: Proposition) -> None:
        if self.is_fact(prop):
            self._note_change(prop)
        super().remove_fact(prop)

    def _note_change(self, prop: Proposition) -> None:
        self._revisions[prop.name] += 1
        self._fact_list = None

    def note_reading(self, predicates: Iterable[str]) -> None:
        """The sentence being written depends on the facts of these predicates."""
        for name in predicates:
            self._readings[name] = self._revisions[name]

    def remember_sentence(self, key: Hashable, write: Callable[[], str]) -> str:
        """The sentence of a key, written anew only if a fact that it read of has changed since."""
        kept = self._sentences.get(key)
        if kept is not None:
            sentence, readings = kept
            if all(self._revisions[name] == revision for name, revision in readings.items()):
                return sentence

        # Filled by `note_reading` while the sentence is written.
        self._readings = {}
        sentence = write()
        self._sentences[key] = (sentence, self._readings)
        return sentence

    def all_applicable_actions(self) -> list[Action]:
        """One action for each operator name that applies now, in the library's order."""
        operators = (fast_downward.Operator * self.downward_lib.get_applicable_operators_count())()
        self.downward_lib.get_applicable_operators(operators)
        self._operators = {operator.id: operator for operator in operators}

        first_by_name: dict[str, int] = {}
        for operator in operators:
            first_by_name.setdefault(operator.name, operator.id)
        return list(map(self._build_action, first_by_name.keys(), first_by_name.values()))

    def _build_action(self, operator: str, operator_id: int) -> Action:
        name = operator.split(maxsplit=1)[0]
        action = Action(name, (), ())
        action.id = operator_id
        action.mapping = self._translation.find_mapping(operator)
        action.command_template = self._logic.actions[name].template
        action.feedback_rule = self._logic.actions[name].feedback_rule
        return action


def _copy_sets(sets: Mapping[Any, set[Any]]) -> defaultdict[Any, set[Any]]:
    """A copy whose sets are copies, too."""
    return defaultdict(set, {key: set(members) for key, members in sets.items()})


def _copy_facts(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The four fields in which TextWorld keeps a state's facts."""
    return {
        "_facts": _copy_sets(fields["_facts"]),
        "_vars_by_type": _copy_sets(fields["_vars_by_type"]),
        "_vars_by_name": dict(fields["_vars_by_name"]),
        "_var_counts": Counter(fields["_var_counts"]),
    }


def _add_types(logic: GameLogic, types: Iterable[tuple[str, tuple[str, ...]]]) -> None:
    """Give a logic the problem's types, the first of each name; logics of one domain share them."""
    known = {type_.name for type_ in logic.types}
    for name, supertypes in types:
        if name not in known:
            logic.types.add(Type(name, supertypes))
            known.add(name)


@lru_cache(maxsize=1)
def _read_loadable_part(path: str) -> bytes:
    """A library's bytes up to the end of what the loader maps; 32 MB of debugging follow it.

    The end is read from the program headers of a 64-bit little-endian ELF file; another kind of
    library is returned whole.
    """
    content = Path(path).read_bytes()
    if not content.startswith(b"\x7fELF\x02\x01"):
        return content

    # Of the header: where the table of segments begins, the size of a row, the number of rows.
    (table,) = struct.unpack_from("<Q", content, 32)
    row_bytes, num_rows = struct.unpack_from("<HH", content, 54)

    end = 0
    for number in range(num_rows):
        # Of a row: type, flags, offset, two addresses, size in the file.
        row = struct.unpack_from("<IIQQQQ", content, table + number * row_bytes)
        _, _, offset, _, _, size = row
        end = max(end, offset + size)
    return content[:end]


@contextmanager
def _smaller_library() -> Iterator[None]:
    """Fast Downward copies its library for every instance: let it copy only what is loaded."""
    interface = fast_downward.interface
    whole = interface.DOWNWARD_LIB_PATH
    with tempfile.NamedTemporaryFile(suffix=".so") as file:
        file.write(_read_loadable_part(str(whole)))
        file.flush()
        interface.DOWNWARD_LIB_PATH = file.name
        try:
            yield
        finally:
            interface.DOWNWARD_LIB_PATH = whole


class KeptPddlEnv(PddlEnv):  # type: ignore[misc]
    """PddlEnv with the kept logic and state.

    It takes a game's content and no path, since the file is read and checked before.
    """

    def __init__(self, infos: textworld.EnvInfos) -> None:
        with _smaller_library():
            super().__init__(infos)

    def load(self, filename_or_data: Mapping[str, Any]) -> None:
        if len(mementos.core._memento_cache) > _MAX_INTERNED:
            mementos.core._memento_cache.clear()
        self._game_file = None
        self._game_data = filename_or_data
        self.walkthrough = filename_or_data.get("walkthrough")
        self._logic = build_logic(filename_or_data["pddl_domain"], filename_or_data["grammar"])
        self._pddl_state = KeptState(
            self.downward_lib, filename_or_data["pddl_problem"], self._logic
        )
        self._entity_infos = self._get_entity_infos()

    def reset(self) -> GameState:
        self._pddl_state = KeptState(
            self.downward_lib, self._game_data["pddl_problem"], self._logic
        )
        self.prev_state = None
        self.state = GameState()
        self._last_action = None
        self._moves = 0

        context = {
            "state": self._pddl_state,
            "variables": {},
            "mapping": {},
            "entity_infos": self._entity_infos,
        }
        self.state.feedback = self.state.raw = self._logic.grammar.derive("#intro#", context)
        self._gather_infos()
        return self.state


def build_stack(engine: type[PddlEnv] = KeptPddlEnv) -> AlfredInfos:
    """ALFWorld's own wrappers around an engine, as `AlfredTWEnv` stacks them.

    With PddlEnv it is the stock engine.
    """
    infos = textworld.EnvInfos(won=True, admissible_commands=True, extras=["gamefile"])
    return AlfredInfos(AlfredDemangler(engine(infos), shuffle=False))


# No PddlEnv is ever dropped: its copy of Fast Downward's library stays until the process ends, as
# unloading one makes loading the next crash. They are as many as games were ever in play at once.
_idle_stacks: list[AlfredInfos] = []


class AlfredGame:
    """One game in play. Closing it gives its engine back for the next."""

    def __init__(self, content: Mapping[str, Any], path: Path) -> None:
        """Load a game.

        Args:
            content: the game, as `read_game` reads it from `path`, which names it in errors.

        Raises:
            EnvironmentFailedError: the engine cannot make a game of it.
        """
        self._path = path
        self._stack = _idle_stacks.pop() if _idle_stacks else build_stack()
        try:
            with _explain(path):
                self._stack.load(content)
        except EnvironmentFailedError:
            self.close()
            raise

    @property
    def names(self) -> dict[str, str]:
        """What the player calls each thing, by its id in the problem."""
        return {key: info.name.strip() for key, info in self._stack._entity_infos.items()}

    def reset(self) -> View:
        """Start over."""
        with _explain(self._path):
            return _to_view(self._stack.reset())

    def step(self, command: str) -> View:
        """Play a command, matched exactly; the answer to an unfit one is `Nothing happens.`"""
        with _explain(self._path):
            return _to_view(self._stack.step(command)[0])

    def close(self) -> None:
        """Give the engine back. Nothing else may be called afterwards."""
        _idle_stacks.append(self._stack)
        del self._stack


def _to_view(state: GameState) -> View:
    return View(state.feedback, tuple(state["admissible_commands"]), bool(state["won"]))


@contextmanager
def _explain(path: Path) -> Iterator[None]:
    """Raise what TextWorld or Fast Downward raises as an error that names the game's file."""
    try:
        yield
    except (Exception, SystemExit) as error:
        # One line of bounded length: some of their errors quote the whole problem.
        reason = " ".join(f"{type(error).__name__}: {error}".split()).rstrip(":")
        reason = reason[:_MAX_REASON_CHARACTERS]
        raise EnvironmentFailedError(
            f"Game {path} cannot be played: {reason}. Replace the file by a sound one, or generate "
            "games anew.",
            path=path,
        ) from error
