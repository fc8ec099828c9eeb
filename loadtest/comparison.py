"""Parts of a measurement: pairs of figures taken in turn, their ratios, targets, plain tables.

A ratio of two figures taken one right after the other survives a machine whose speed drifts; a
ratio of two medians does not. Hence pairs: ours, peer, ours, peer, ..., one ratio a pair, and the
median of the ratios with their range.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Self

Say = Callable[[str], None]
"""Reports to the user how far a measurement is."""


@dataclass(frozen=True, slots=True)
class Target:
    """A bound on a ratio."""

    kind: Literal["at_least", "at_most"]
    bound: float

    def is_met_by(self, ratio: float) -> bool:
        if self.kind == "at_least":
            return ratio >= self.bound
        return ratio <= self.bound

    def __str__(self) -> str:
        return f"{self.kind.replace('_', ' ')} {self.bound:g}"


@dataclass(frozen=True, slots=True)
class Comparison:
    """One row: ours against a named peer.

    Attributes:
        what: what is compared, with its workload.
        unit: of the figures in `pairs`, each (ours, peer), in the order they were taken.
        target: None where no bound was set.
    """

    what: str
    peer: str
    unit: str
    pairs: tuple[tuple[float, float], ...]
    target: Target | None = None

    def __post_init__(self) -> None:
        if not self.pairs:
            raise ValueError(f"{self.what}: no pair was measured.")
        if any(peer <= 0 for _, peer in self.pairs):
            raise ValueError(
                f"{self.what}: a figure of the peer is not positive, "
                f"so there is no ratio: {self.pairs}."
            )

    @property
    def ratios(self) -> list[float]:
        """Ours over peer, one per pair."""
        return [ours / peer for ours, peer in self.pairs]

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)

    @property
    def ours(self) -> float:
        return statistics.median(ours for ours, _ in self.pairs)

    @property
    def theirs(self) -> float:
        return statistics.median(peer for _, peer in self.pairs)

    @property
    def is_met(self) -> bool | None:
        return None if self.target is None else self.target.is_met_by(self.ratio)


@dataclass(frozen=True, slots=True)
class Table:
    """Figures that have no peer."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class Measurement:
    """Everything that one measurement has to say.

    `notes` say what a reader must know to judge the figures.
    """

    comparisons: tuple[Comparison, ...] = ()
    tables: tuple[Table, ...] = ()
    notes: tuple[str, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        comparisons = tuple(map(_read_comparison, value["comparisons"]))
        tables = tuple(map(_read_table, value["tables"]))
        return cls(comparisons, tables, tuple(value["notes"]))


# JSON knows no tuples: what was one is read as a list.


def _read_comparison(fields: dict[str, Any]) -> Comparison:
    pairs = tuple((ours, peer) for ours, peer in fields["pairs"])
    target = None if fields["target"] is None else Target(**fields["target"])
    return Comparison(fields["what"], fields["peer"], fields["unit"], pairs, target)


def _read_table(fields: dict[str, Any]) -> Table:
    rows = tuple(map(tuple, fields["rows"]))
    return Table(fields["title"], tuple(fields["columns"]), rows)


def take_turns(
    ours: Callable[[], float],
    peer: Callable[[], float],
    num_pairs: int,
    say: Say,
    num_warmups: int = 1,
) -> tuple[tuple[float, float], ...]:
    """Call both in turn; the first `num_warmups` pairs are thrown away."""
    pairs = []
    for index in range(num_warmups + num_pairs):
        pair = ours(), peer()
        if index < num_warmups:
            continue
        pairs.append(pair)
        say(describe_pair(len(pairs), num_pairs, pair))
    return tuple(pairs)


def describe_pair(number: int, total: int, pair: tuple[float, float]) -> str:
    ours, peer = pair
    figures = f"{format_figure(ours)} against {format_figure(peer)}, ratio {ours / peer:.3g}"
    return f"pair {number} of {total}: {figures}"


def format_figure(value: float) -> str:
    """Three significant digits, thousands separated."""
    if value == 0:
        return "0"
    # From here on three digits would round to 1e+03.
    if abs(value) >= 999.5:
        return f"{value:,.0f}"
    return f"{value:.3g}"
