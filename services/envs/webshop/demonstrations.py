"""Shoppers of WebShop to learn from: one sees only what an agent sees, one knows the goal.

Never used while playing: the shop does not know it exists.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from services.envs.webshop.environment import WebShopEnvironment
from services.envs.webshop.goals import Goal
from services.envs.webshop.pages import NEXT, NUM_RESULTS, PAGE_SIZE, PREVIOUS, SEPARATOR
from services.envs.webshop.reward import count_met_options
from services.envs.webshop.search import STOP_WORDS

_BOUND = re.compile(r",? and price lower than ([\d.]+) dollars")
_PRICE = re.compile(r"\$([\d.]+)")
_WORD = re.compile(r"[\w.'-]*\w")
# What instructions say that no product says.
_PHRASES_TEXT = (
    "i am looking need needs find me please show should have has would like buy my friend wants "
    "want you"
)
_PHRASES = frozenset(_PHRASES_TEXT.split())
_ITEM_BUTTONS = frozenset(
    {"back to search", "< prev", "description", "features", "reviews", "buy now"}
)


def write_action(action: str, thought: str) -> str:
    """An action as the agent writes it."""
    return f"<think>{thought}</think><action>{action}</action>"


class Shopper:
    """Searches with the instruction's words, opens the best result, chooses its options and buys.

    It plays one episode.
    """

    def __init__(self) -> None:
        self._clicked: set[str] = set()

    def next_action(
        self, description: str, task_type: str, observation: str, admissible_actions: Sequence[str]
    ) -> str:
        """The next response, from what an agent sees in this turn and earlier clicks."""
        clickables = [action.removeprefix("click[")[:-1] for action in admissible_actions]
        if "buy now" in clickables:
            return self._choose_or_buy(description, clickables)

        results = parse_results(observation)
        if results:
            self._clicked = set()
            asin = pick_result(description, results)
            return write_action(f"click[{asin.lower()}]", "this one fits")

        query = " ".join(list_key_words(description))
        return write_action(f"search[{query}]", "search first")

    def _choose_or_buy(self, description: str, clickables: Sequence[str]) -> str:
        for value in clickables:
            is_open = value not in _ITEM_BUTTONS and value not in self._clicked
            if is_open and _names(description, value):
                self._clicked.add(value)
                return write_action(f"click[{value}]", "choose it")
        return write_action("click[buy now]", "all chosen")


def list_key_words(description: str) -> list[str]:
    """The instruction's words that may occur in a product's text, in order, without the price."""
    words = _WORD.findall(_BOUND.sub("", description).lower())
    return [word for word in words if word not in STOP_WORDS and word not in _PHRASES]


def parse_results(observation: str) -> list[tuple[str, str, float]]:
    """(id, title, lowest price) of each product on a results page; none for any other page."""
    parts = observation.split(SEPARATOR)
    if len(parts) < 2 or not parts[1].startswith("Page "):
        return []
    rest = [part for part in parts[2:] if part not in (PREVIOUS, NEXT)]
    # Three parts a product: id, title and price.
    triples = zip(rest[::3], rest[1::3], rest[2::3], strict=False)
    return [(asin, title, float(_PRICE.findall(price)[0])) for asin, title, price in triples]


def pick_result(description: str, results: Sequence[tuple[str, str, float]]) -> str:
    """The first result whose title has a word of the instruction and whose price fits.

    The first of all where there is none.
    """
    wanted = set(list_key_words(description))
    bound = _BOUND.search(description)
    most = float(bound[1]) if bound else math.inf
    for asin, title, price in results:
        if price <= most and wanted.intersection(list_key_words(title)):
            return asin
    return results[0][0]


def _names(description: str, value: str) -> bool:
    """Whether the instruction names the value as a whole, not as part of a longer word or size."""
    return re.search(rf"(?<![\w-]){re.escape(value)}(?![\w-])", description.lower()) is not None


def list_expert_actions(environment: WebShopEnvironment, task_id: str) -> list[str]:
    """The responses that buy the goal's own product with the goal's options.

    There are none if the search does not show the product.
    """
    goal = environment.get_goal(task_id)
    catalogue = environment.catalogue
    query = f"{goal.name} {' '.join(goal.options)}"
    results = catalogue.index.search(query, NUM_RESULTS)
    asins = [catalogue.get_product(number).asin for number in results]
    if goal.asin not in asins:
        return []

    rank = asins.index(goal.asin)
    options = catalogue.get_product(results[rank]).options
    actions = [f"search[{query}]"]
    actions += ["click[next >]"] * (rank // PAGE_SIZE)
    actions.append(f"click[{goal.asin.lower()}]")
    actions += [f"click[{value}]" for value in _pick_values(list(options.values()), goal)]
    actions.append("click[buy now]")
    return [write_action(action, "as planned") for action in actions]


def _pick_values(options: Sequence[Sequence[str]], goal: Goal) -> list[str]:
    """Of every option the value that the goal asks for.

    Literally where there is such a value, else by the score's own comparison.
    """
    picked = []
    for values in options:
        literal = [value for value in values if value in goal.options]
        similar = [value for value in values if count_met_options([value], goal.options)]
        picked += (literal or similar)[:1]
    return picked
