"""WebShop's demonstrations: a shopper who searches vaguely, opens anything, forgets options."""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import services
from sdar.cli.warm_start.recipe import WarmStartPhase
from sdar.cli.warm_start.windowed import (
    Choice,
    Player,
    WindowDemonstrator,
    WindowRecipe,
    describe_prompts,
)
from sdar.contracts.types import Task
from sdar.environments.base import Observation
from services.envs.webshop import generate, wares
from services.envs.webshop.demonstrations import parse_results
from services.envs.webshop.environment import WebShopEnvironment
from services.envs.webshop.goals import PRICE_STEPS
from services.envs.webshop.pages import SEPARATOR

SHIPPED_CATALOGUE = (
    Path(services.__file__).resolve().parent.parent / "examples" / "data" / "webshop"
)
_SEARCH = "<think></think><action>search["
_CLICK = "<think></think><action>click["
_END = "]</action>"
_BUTTONS = ("Back to Search", "< Prev", "Next >", "Description", "Features", "Reviews", "Buy Now")
_CLICKS = tuple(f"click[{name.lower()}]" for name in _BUTTONS)
_PAGE_WORDS = (
    SEPARATOR,
    *_BUTTONS,
    *_CLICKS,
    "click[",
    "]\n",
    "Page 1 (Total results: ",
    ")",
    ", ",
    "$",
    " to $",
    ".99",
    "Price: $",
    "Rating: ",
    "WebShop",
    "Search",
    "buy now",
)
_WISH_WORDS = (" and ", ", and price lower than ", ".00 dollars")
_NUM_BOUNDS = 20
_BUY = "click[buy now]"
# Longest first: one option's name may begin with another's.
_OPTION_NAMES = "|".join(sorted(wares.OPTION_VALUES, key=len, reverse=True))
_OPTION = re.compile(rf", (?:{_OPTION_NAMES}) ([^,]+)")


@dataclass(frozen=True)
class WebshopRecipe(WindowRecipe):
    environment: ClassVar[str] = "webshop"

    num_layers: int = 3
    vocabulary_limit: int = 1408
    num_tokenizer_episodes: int = 400
    history_turns: int = 0
    max_turns: int = 6
    expert_share: float = 0.8
    thinned_share: float = 0.5
    phases: tuple[WarmStartPhase, ...] = (WarmStartPhase(2400, 3e-3, 0.6, 0.4),)

    def open_demonstrator(self) -> WebshopDemonstrator:
        return WebshopDemonstrator(self, WebShopEnvironment(data_dir=str(SHIPPED_CATALOGUE)))

    def describe_wording(self) -> list[Any]:
        catalogue = WebShopEnvironment(data_dir=str(SHIPPED_CATALOGUE)).catalogue
        return [describe_prompts(WebShopEnvironment), catalogue.digest]


class WebshopDemonstrator(WindowDemonstrator):
    environment: WebShopEnvironment

    def list_phrases(self) -> Sequence[str]:
        """Whatever is copied as a whole: ids, and names of wares, attributes and options as they
        are asked for and shown.
        """
        phrases = {*self.list_common_phrases(), _SEARCH, _CLICK, _END}
        phrases |= self._list_copied() | _list_asked() | _list_shown()
        return sorted(phrases)

    def _list_copied(self) -> set[str]:
        """What a shopper copies from the task or from a page into an action."""
        names: set[str] = set()
        for ware in wares.WARES:
            names |= {ware.noun, *ware.attributes}
        # Pages write them with capitals.
        titles = set(map(str.title, names))

        values: set[str] = set()
        for several in wares.OPTION_VALUES.values():
            # Digits are tokens of the alphabet already, and stand in prices and ids too.
            values.update(value for value in several if not value.isdigit())

        catalogue = self.environment.catalogue
        asins = {catalogue.get_product(number).asin for number in range(len(catalogue))}
        # Pages write them in capitals, actions do not.
        lowered = set(map(str.lower, asins))
        return names | titles | values | asins | lowered

    def open_player(self, task: Task) -> Player:
        return _Shopper(task)

    def draw_task(self, rng: random.Random) -> Task:
        """A wish of its own for any product: goals are few, and would be learnt by heart. Their
        scores do not matter here.
        """
        catalogue = self.environment.catalogue
        product = catalogue.get_product(rng.randrange(len(catalogue)))
        (ware,) = [ware for ware in wares.WARES if ware.noun == product.query]
        attributes = rng.sample(ware.attributes, rng.randint(1, 2))
        options = [f", {name} {rng.choice(values)}" for name, values in product.options.items()]
        wish = rng.choice(generate.INSTRUCTIONS).format(
            noun=ware.noun, attributes=" and ".join(attributes), options="".join(options)
        )
        bound = rng.choice(PRICE_STEPS[:_NUM_BOUNDS])
        return dataclasses.replace(
            rng.choice(self.tasks),
            task_type=ware.category,
            description=f"{wish}, and price lower than {bound:.2f} dollars",
        )


def _list_asked() -> set[str]:
    """What stands between the names in a task's description."""
    parts = {*_WISH_WORDS}
    for text in generate.INSTRUCTIONS:
        parts.update(re.split(r"\{\w*\}", text))
    parts |= {f", {name} " for name in wares.OPTION_VALUES}
    # An instruction that begins or ends with a blank to fill has nothing before or after it.
    return parts - {""}


def _list_shown() -> set[str]:
    """What pages say beside the names."""
    makers = {f"{maker} " for maker in wares.MAKERS.split()}
    return {*_PAGE_WORDS, *wares.OPTION_VALUES, *makers}


class _Shopper:
    """Puts all that is asked for into the search, opens the first result, chooses what was asked
    for, and buys.
    """

    def __init__(self, task: Task) -> None:
        wanted = task.description
        # The longest: one ware's noun may be part of another's.
        possible = [ware for ware in wares.WARES if f" {ware.noun}" in wanted]
        ware = max(possible, key=lambda ware: len(ware.noun))
        attributes = [name for name in ware.attributes if name in wanted]

        self._noun = ware.noun
        self._attributes = sorted(attributes, key=wanted.index)
        self._values = _OPTION.findall(wanted)

    def __call__(self, observation: Observation, rng: random.Random) -> Choice:
        results = [asin.lower() for asin, _, _ in parse_results(observation.text)]
        if results:
            return Choice(_click(results[0]), _click(rng.choice(results)))
        if _BUY in observation.admissible_actions:
            return self._choose(observation.admissible_actions, rng)

        # What is left is the start page.
        everything = [self._noun, *self._attributes, *self._values]
        num_known = rng.randint(0, len(self._attributes))
        vague = [self._noun, *rng.sample(self._attributes, num_known)]
        return Choice(_search(everything), _search(vague))

    def _choose(self, admissible: Sequence[str], rng: random.Random) -> Choice:
        """On a product's page: the next option that was asked for, and then to buy."""
        # The product may not come with every option that was asked for.
        while self._values and f"click[{self._values[0]}]" not in admissible:
            self._values.pop(0)
        expert = self._values.pop(0) if self._values else "buy now"

        others = [action for action in admissible if action != _BUY]
        anything = rng.choice(others).removeprefix("click[").removesuffix("]")
        return Choice(_click(expert), _click(rng.choice(("buy now", anything))))


def _search(words: Sequence[str]) -> str:
    return f"{_SEARCH}{' '.join(words)}{_END}"


def _click(name: str) -> str:
    return f"{_CLICK}{name}{_END}"
