"""Writes a game's sentences: TextWorld's context-sensitive grammar, parsed once and cached.

It writes exactly what `ContextSensitiveGrammar.derive` writes. The stock one parses every template
and every query again on every derivation and deep-copies the context for every symbol. Here a parse
is remembered for the process, and a derived sentence for the state, until a fact changes that it
was derived from. It knows neither files nor environments.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import CodeType
from typing import Any

from textworld.envs.pddl.textgen import (
    ConditionalSymbol,
    ContextSensitiveGrammar,
    EvalSymbol,
    ListSymbol,
    NonterminalSymbol,
    Symbol,
    TerminalSymbol,
)
from textworld.envs.pddl.textgen import _parse_and_convert as parse_symbols_with_tatsu
from textworld.generator.game import EntityInfo
from textworld.logic import Placeholder, Rule, Variable

# A grammar holds about 40 templates and 20 queries; the task's sentence is the only template that
# differs between games.
_MAX_TEMPLATES = 4096
_MAX_QUERIES = 512
# What templates of shipped grammars are made of. A game file is data from elsewhere: it must not
# run code of its own.
_EXPRESSION_NODES = (
    ast.Expression,
    ast.Name,
    ast.Load,
    ast.Attribute,
    ast.BinOp,
    ast.Add,
    ast.BoolOp,
    ast.Or,
    ast.And,
    ast.Constant,
)


class GrammarError(Exception):
    """A game's grammar cannot be used.

    It is no ValueError, which TextWorld takes for a command that does not apply.
    """


@lru_cache(maxsize=_MAX_TEMPLATES)
def parse_template(text: str) -> tuple[Symbol, ...]:
    """The symbols of a template. They are shared: nobody may write into them."""
    return tuple(parse_symbols_with_tatsu(text, rule_name="symbols"))


@lru_cache(maxsize=_MAX_QUERIES)
def parse_query(expression: str) -> Rule:
    return Rule.parse_conjunctive_query(expression)


@lru_cache(maxsize=_MAX_QUERIES)
def compile_expression(expression: str) -> CodeType:
    """The code of a template's `{expression}`: names, attributes, `+`, `or` and `and` over texts.

    Raises:
        GrammarError: anything else, which could reach the process that plays.
    """
    tree = ast.parse(expression.strip(), mode="eval")
    for node in ast.walk(tree):
        is_private = isinstance(node, ast.Attribute) and node.attr.startswith("_")
        if not isinstance(node, _EXPRESSION_NODES) or is_private:
            raise GrammarError(
                f"template expression {expression!r} is more than names, attributes and +"
            )
    return compile(tree, "<template>", "eval")


@dataclass(frozen=True, slots=True)
class Production:
    """One way to write a symbol: the first of a symbol whose condition holds is taken.

    An empty condition always holds.
    """

    condition: str
    symbols: tuple[Symbol, ...]


@dataclass(frozen=True, slots=True)
class Scene:
    """What a template is written about: a state, and what its placeholders stand for."""

    state: Any
    entities: Mapping[str, EntityInfo]
    mapping: Mapping[Placeholder, Variable]
    variables: Mapping[str, EntityInfo]

    def find_matches(self, query: str) -> list[Scene]:
        """This scene once for every way in which the facts satisfy the query."""
        if not query:
            return [self]
        rule = parse_query(query)
        self.state.note_reading(predicate.name for predicate in rule.preconditions)
        return [self._extend(found) for found in self.state.all_assignments(rule, self.mapping)]

    def _extend(self, found: Mapping[Placeholder, Variable]) -> Scene:
        """This scene with more placeholders that stand for something."""
        variables = dict(self.variables)
        for placeholder, variable in found.items():
            variables[placeholder.name] = self.entities[variable.name]
        return Scene(self.state, self.entities, {**self.mapping, **found}, variables)


class SentenceGrammar:
    """The productions of one game, by the symbol they write."""

    def __init__(self, productions: Mapping[str, Sequence[Production]]) -> None:
        self._productions = productions

    @classmethod
    def from_parsed(cls, grammar: ContextSensitiveGrammar) -> SentenceGrammar:
        productions: dict[str, list[Production]] = {}
        for name, rules in grammar._rules.items():
            own = [Production(rule.condition or "", tuple(rule.rhs)) for rule in rules]
            productions[name] = own
        return cls(productions)

    def replace_production(self, name: str, template: str) -> SentenceGrammar:
        """This grammar with one symbol written in one way only."""
        only = Production("", parse_template(template))
        return SentenceGrammar({**self._productions, name: (only,)})

    def derive(self, start: str, context: Mapping[str, Any]) -> str:
        """The sentence of a template in a context.

        The context is a dictionary because TextWorld's environment calls this.
        """
        scene = Scene(
            context["state"], context["entity_infos"], context["mapping"], context["variables"]
        )
        key = (start, *scene.mapping.items())
        sentence: str = scene.state.remember_sentence(
            key, lambda: self._write(parse_template(start), scene)
        )
        return sentence

    def _write(self, symbols: Sequence[Symbol], scene: Scene) -> str:
        return "".join([self._write_symbol(symbol, scene) for symbol in symbols])

    def _write_symbol(self, symbol: Symbol, scene: Scene) -> str:
        match symbol:
            case TerminalSymbol():
                return str(symbol.symbol)
            case NonterminalSymbol():
                return self._write(self._choose(symbol.symbol, scene), scene)
            case ConditionalSymbol():
                return "".join(self._write_each(symbol, scene))
            case ListSymbol():
                return self._enumerate(self._write_each(symbol.symbol, scene), scene)
            case EvalSymbol():
                # Checked when it was compiled, and without builtins: it can only read texts.
                code = compile_expression(symbol.expression)
                return str(eval(code, {"__builtins__": {}}, dict(scene.variables)))
        raise GrammarError(f"grammar symbol {symbol!r} is of no known kind")

    def _choose(self, name: str, scene: Scene) -> tuple[Symbol, ...]:
        for production in self._productions.get(name, ()):
            if not production.condition or scene.find_matches(production.condition):
                return production.symbols
        raise GrammarError(f"grammar symbol #{name}# has no production that applies")

    def _write_each(self, symbol: ConditionalSymbol, scene: Scene) -> list[str]:
        matches = scene.find_matches(symbol.given or "")
        return [self._write_symbol(symbol.expression, found) for found in matches]

    def _enumerate(self, items: list[str], scene: Scene) -> str:
        """`a, b, and c`, in the grammar's own words for the commas."""
        if not items:
            return self._write(self._choose("list_empty", scene), scene)
        if len(items) == 1:
            return items[0]
        separator = self._write(self._choose("list_separator", scene), scene)
        last_separator = self._write(self._choose("list_last_separator", scene), scene)
        return separator.join(items[:-1]) + last_separator + items[-1]
