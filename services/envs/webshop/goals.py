"""What shoppers are asked to buy: goals with price bounds, in a fixed order and split.

The same files give the same goals in the same order in every process and every run: nothing is
drawn from a process's state.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from services.envs.webshop.catalogue import Entry, Product, SourceFiles, read_object

TRAIN = "train"
TEST = "test"
NUM_TEST_GOALS = 500
"""The first goals of the shuffled list are tested, the others trained on, as in the paper; of a
catalogue with fewer than 2,000 goals, the first quarter is tested."""
MAX_TEST_SHARE = 4
SHUFFLE_SEED = 233

NO_BOUND = 1_000_000.0
"""Bound of a goal whose product costs too much to draw one, as published."""
PRICE_STEPS = tuple(10.0 * step for step in range(1, 100))
NUM_STEPS_ABOVE = 4
"""A bound is the larger of two draws from so many multiples of ten dollars above the price."""


@dataclass(frozen=True, slots=True)
class Goal:
    """What an instruction asks for.

    All but `instruction` is hidden from the shopper. `options` are values, without names.
    """

    asin: str
    name: str
    category: str
    query: str
    product_category: str
    instruction: str
    attributes: tuple[str, ...]
    options: tuple[str, ...]
    price_bound: float


class GoalReader:
    """Turns products into goals: what people asked for, or what the attribute file makes up."""

    def __init__(self, files: SourceFiles, is_human: bool) -> None:
        self._path = files.human if is_human and files.human else files.attributes
        self._instructions = read_object(self._path)
        self._read = self._read_human if is_human else self._read_synthetic

    def iterate_goals(self, product: Product) -> Iterator[Goal]:
        if product.asin in self._instructions:
            yield from self._read(product, self._instructions[product.asin])

    def _read_human(self, product: Product, instructions: Any) -> Iterator[Goal]:
        """One goal for every instruction that asks for an attribute, as published."""
        if not isinstance(instructions, list):
            instructions = [instructions]
        for number, value in enumerate(instructions):
            entry = Entry(self._path, f"{product.asin}[{number}]", value)
            attributes = entry.texts("instruction_attributes")
            if attributes:
                text = entry.text("instruction").strip(".")
                yield _build_goal(product, text, attributes, _read_goal_options(entry))

    def _read_synthetic(self, product: Product, instruction: Any) -> Iterator[Goal]:
        """One goal for every combination of the product's options."""
        entry = Entry(self._path, product.asin, instruction)
        text = entry.optional_text("instruction")
        if not text:
            return
        attributes = entry.texts("instruction_attributes")
        if not attributes:
            raise entry.wrong("instruction_attributes", "the texts that the instruction asks for")

        names = sorted(product.options)
        pools = [product.options[name] for name in names]
        for values in itertools.product(*pools):
            wishes = [f"{name}: {value}" for name, value in zip(names, values, strict=True)]
            # A product without options has one combination, the empty one.
            whole = f"{text} with {', and '.join(wishes)}" if wishes else text
            yield _build_goal(product, whole, attributes, values)


def _read_goal_options(entry: Entry) -> tuple[str, ...]:
    options = entry.get("instruction_options")
    if isinstance(options, dict) and all(isinstance(value, str) for value in options.values()):
        return tuple(options.values())
    return entry.texts("instruction_options")


def _build_goal(
    product: Product, text: str, attributes: tuple[str, ...], options: tuple[str, ...]
) -> Goal:
    bound = draw_price_bound(product.price, f"bound {product.asin} {text}")
    instruction = text
    if bound != NO_BOUND:
        instruction += f", and price lower than {bound:.2f} dollars"
    return Goal(
        asin=product.asin,
        name=product.name,
        category=product.category,
        query=product.query,
        product_category=product.product_category,
        instruction=instruction,
        attributes=attributes,
        options=options,
        price_bound=bound,
    )


def draw_price_bound(price: float, seed: str) -> float:
    steps = [step for step in PRICE_STEPS if step > price][:NUM_STEPS_ABOVE]
    if len(steps) < 2:
        return NO_BOUND
    # A generator of the goal's own: its bound depends on no other goal, and on no process.
    return max(random.Random(seed).sample(steps, 2))


def shuffle_goals(goals: Sequence[Goal]) -> list[Goal]:
    """The one order of the catalogue's goals."""
    shuffled = list(goals)
    random.Random(SHUFFLE_SEED).shuffle(shuffled)
    return shuffled


def count_test_goals(num_goals: int) -> int:
    return min(NUM_TEST_GOALS, num_goals // MAX_TEST_SHARE)
