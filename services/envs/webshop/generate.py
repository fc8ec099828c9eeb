"""Generates catalogues: invented products and instructions in the form of the published files.

Products come in families of one kind and maker that differ in attributes, options and price, so
that a search finds several that almost fit. The same arguments give the same bytes.
"""

from __future__ import annotations

import json
import random
import string
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdar.contracts.errors import ConflictError
from services.envs.webshop.catalogue import ATTRIBUTE_FILES, HUMAN_FILE, PRODUCT_FILES, REVIEW_FILE
from services.envs.webshop.goals import count_test_goals
from services.envs.webshop.wares import (
    MAKERS,
    OPTION_VALUES,
    REVIEW_BODIES,
    REVIEW_TITLES,
    WARES,
    Ware,
)

FAMILY_SIZE = 5
NUM_WANTED = 4
"""Products of a family that somebody wants; the others are only in the way."""
NUM_ATTRIBUTES = 4
MAX_REVIEWS = 3
PRICE_SPREAD = 1.3
SHARE_OF_PRICE_RANGES = 0.25
SHARE_WITHOUT_PRICE = 0.02

INSTRUCTIONS = (
    "i am looking for {noun} with {attributes}{options}",
    "i need {noun} with {attributes}{options}",
    "find me {noun} with {attributes}{options}",
    "please show me {noun} that should have {attributes}{options}",
    "i would like to buy {noun} with {attributes}{options}",
    "my friend wants {noun} with {attributes}{options}",
)


@dataclass(frozen=True, slots=True)
class _Draft:
    """A generated product: its published entry, and what the other files say about it."""

    product: dict[str, Any]
    attributes: dict[str, Any]
    human: list[dict[str, Any]]
    review: dict[str, Any]


def generate(
    directory: Path, *, num_tasks: int, seed: int, report: Callable[[int, int], None]
) -> str:
    """Write a catalogue whose goals make `num_tasks` training tasks, and test tasks in proportion.

    Args:
        report: called with (goals done, goals in all).

    Raises:
        ConflictError: the directory holds something.
    """
    if directory.exists() and any(directory.iterdir()):
        raise ConflictError(
            f"{directory} is not empty. Name another directory, or empty it.", directory=directory
        )
    num_goals = _count_goals(num_tasks)
    drafts = _draft_catalogue(random.Random(f"webshop {seed}"), num_goals, report)
    _write_catalogue(directory, drafts)
    num_test = count_test_goals(num_goals)
    return (
        f"{len(drafts)} products, {num_goals - num_test} goals to train on and {num_test} to test."
    )


def _write_catalogue(directory: Path, drafts: Sequence[_Draft]) -> None:
    attributes: dict[str, Any] = {}
    human: dict[str, Any] = {}
    for draft in drafts:
        asin = draft.product["asin"]
        attributes[asin] = draft.attributes
        if draft.human:
            human[asin] = draft.human

    directory.mkdir(parents=True, exist_ok=True)
    _write_list(directory / PRODUCT_FILES[0], [draft.product for draft in drafts])
    _write_object(directory / ATTRIBUTE_FILES[0], attributes)
    _write_object(directory / HUMAN_FILE, human)
    _write_list(directory / REVIEW_FILE, [draft.review for draft in drafts])


def _count_goals(num_tasks: int) -> int:
    """The most goals that leave so many to train on: the others are tested."""
    num_goals = num_tasks
    while num_goals + 1 - count_test_goals(num_goals + 1) <= num_tasks:
        num_goals += 1
    return num_goals


def _draft_catalogue(
    rng: random.Random, num_goals: int, report: Callable[[int, int], None]
) -> list[_Draft]:
    """Families, kind by kind in turn, until there are enough goals; products in shuffled order."""
    drafts: list[_Draft] = []
    asins: set[str] = set()
    makers = MAKERS.split()
    num_done = 0
    while num_done < num_goals:
        family = num_done // NUM_WANTED
        ware = WARES[family % len(WARES)]
        maker = rng.choice(makers)

        for place in range(FAMILY_SIZE):
            is_wanted = place < NUM_WANTED and num_done < num_goals
            asin = _draw_asin(rng, asins)
            drafts.append(_draft_product(rng, ware, maker, asin, is_wanted))
            if is_wanted:
                num_done += 1
                report(num_done, num_goals)

    rng.shuffle(drafts)
    return drafts


def _draw_asin(rng: random.Random, taken: set[str]) -> str:
    while True:
        asin = "B0" + "".join(rng.choices(string.ascii_uppercase + string.digits, k=8))
        if asin not in taken:
            taken.add(asin)
            return asin


def _draft_product(
    rng: random.Random, ware: Ware, maker: str, asin: str, is_wanted: bool
) -> _Draft:
    attributes = rng.sample(ware.attributes, NUM_ATTRIBUTES)
    options = {name: _draw_values(rng, name) for name in ware.options}
    wanted = rng.sample(attributes[:3], rng.choice((1, 2)))
    return _Draft(
        product=_describe_product(rng, ware, maker, asin, attributes, options),
        attributes={
            "attributes": sorted(attributes),
            "instruction": f"find me {', '.join(wanted)} {ware.noun}",
            "instruction_attributes": wanted,
        },
        human=[_draw_instruction(rng, ware, wanted, options)] if is_wanted else [],
        review=_draw_reviews(rng, ware, asin, attributes),
    )


def _draw_values(rng: random.Random, option: str) -> list[str]:
    """Some of an option's values, in the pool's order."""
    pool = OPTION_VALUES[option]
    kept = set(rng.sample(pool, rng.randint(2, min(5, len(pool)))))
    return [value for value in pool if value in kept]


def _describe_product(
    rng: random.Random,
    ware: Ware,
    maker: str,
    asin: str,
    attributes: Sequence[str],
    options: dict[str, list[str]],
) -> dict[str, Any]:
    """The entry of items_shuffle.json.

    Two attributes stand in the title, the third in the bullets, the fourth in the description.
    """
    model = f"{rng.choice(string.ascii_uppercase)}{rng.randint(10, 99)}"
    kind = ware.noun.title()
    choices = {name: list(map(_write_option, values)) for name, values in options.items()}
    return {
        "name": f"{maker} {kind} {model}, {attributes[0].title()}, {attributes[1].title()}",
        "asin": asin,
        "pricing": _draw_pricing(rng, ware),
        "category": ware.category,
        "query": ware.noun,
        "product_category": " \u203a ".join((*ware.path, kind)),
        "small_description": [
            f"{attributes[2].capitalize()}: one of the things people like about this {ware.noun}.",
            f"From the workshop of {maker}, model {model}.",
            "Comes with a leaflet in four languages and a warranty of one year.",
        ],
        "full_description": (
            f"{maker} has made every {ware.noun} of this line with care since the first day. "
            f"{attributes[3].capitalize()} and {attributes[0]} belong together here. "
            f"Choose {' and '.join(options)} to your liking."
        ),
        "images": [f"https://shop.example/{asin.lower()}.jpg"],
        "customization_options": choices,
    }


def _write_option(value: str) -> dict[str, Any]:
    """A value of an option, without a price of its own."""
    return {"value": value, "image": None, "price_string": "", "price": 0}


def _draw_pricing(rng: random.Random, ware: Ware) -> str:
    """No price, a range of two, or one."""
    price = rng.randint(*ware.prices) - 0.01
    kind = rng.random()
    if kind < SHARE_WITHOUT_PRICE:
        return ""
    if kind < SHARE_WITHOUT_PRICE + SHARE_OF_PRICE_RANGES:
        return f"${price:.2f}${price * PRICE_SPREAD:.2f}"
    return f"${price:.2f}"


def _draw_instruction(
    rng: random.Random, ware: Ware, wanted: Sequence[str], options: dict[str, list[str]]
) -> dict[str, Any]:
    """An entry of items_human_ins.json, which asks for one value of every option."""
    chosen = {name: rng.choice(values) for name, values in options.items()}
    wishes = "".join(f", {name} {value}" for name, value in chosen.items())
    wording = rng.choice(INSTRUCTIONS)
    text = wording.format(noun=ware.noun, attributes=" and ".join(wanted), options=wishes)
    return {
        "instruction": text,
        "instruction_attributes": list(wanted),
        "instruction_options": list(chosen.values()),
    }


def _draw_reviews(
    rng: random.Random, ware: Ware, asin: str, attributes: Sequence[str]
) -> dict[str, Any]:
    """An entry of reviews.json."""
    stars = [rng.choice((5, 5, 4, 4, 3, 2, 1)) for _ in range(rng.randint(0, MAX_REVIEWS))]
    reviews = []
    for number in stars:
        attribute = rng.choice(attributes)
        body = REVIEW_BODIES[number].format(noun=ware.noun, attribute=attribute)
        reviews.append({"title": REVIEW_TITLES[number], "stars": number, "review": body})
    return {
        "asin": asin,
        "average_rating": round(sum(stars) / len(stars), 1) if stars else "N.A.",
        "reviews": reviews,
    }


def _write_list(path: Path, entries: Iterable[dict[str, Any]]) -> None:
    lines = ",\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries)
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8", newline="\n")


def _write_object(path: Path, entries: dict[str, Any]) -> None:
    lines = []
    for key, entry in entries.items():
        lines.append(f"{json.dumps(key)}: {json.dumps(entry, ensure_ascii=False)}")
    text = ",\n".join(lines)
    path.write_text(f"{{\n{text}\n}}\n", encoding="utf-8", newline="\n")
