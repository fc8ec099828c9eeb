"""Reads the published product files: which files, which fields, options, prices.

The files are read as published: items_shuffle*.json (a list of products), items_ins_v2*.json
(attributes by product), and where they exist items_human_ins.json (instructions people wrote) and
reviews.json. A file that breaks its shape is refused by name, entry and field.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from sdar.contracts.errors import ConfigurationError

PRODUCT_FILES = ("items_shuffle.json", "items_shuffle_1000.json")
ATTRIBUTE_FILES = ("items_ins_v2.json", "items_ins_v2_1000.json")
HUMAN_FILE = "items_human_ins.json"
REVIEW_FILE = "reviews.json"

NO_PRICE = 100.0
"""Price of a product whose `pricing` is empty, as published."""
NO_RATING = "N.A."
PLACEHOLDER_ATTRIBUTE = "DUMMY_ATTR"
"""The attribute of a product that the attribute file lacks; it is matched fuzzily, as published."""
MAX_ASIN_LENGTH = 10
"""Longer product ids, and the id "nan", mark entries that the published code leaves out."""

_CHUNK_CHARACTERS = 2**24
"""Read at once, and more than any entry of the published files has.

The largest file has 5 GB and is never held whole.
"""
_NEXT_ENTRY = re.compile(r"[^\s,]")
_SHOWN_CHARACTERS = 60


class Review(NamedTuple):
    title: str
    stars: str
    body: str


@dataclass(frozen=True, slots=True)
class Product:
    """One product.

    Attributes:
        price: what a goal's bound is compared with; `price_tag` is what the shop shows, for example
            "$12.99 to $15.49".
        options: option name to its values, both in lower case.
        attributes: hidden from the shopper; only the score reads them.
    """

    asin: str
    name: str
    category: str
    query: str
    product_category: str
    description: str
    bullets: tuple[str, ...]
    price: float
    price_tag: str
    options: dict[str, tuple[str, ...]]
    attributes: tuple[str, ...]
    rating: str
    reviews: tuple[Review, ...]


@dataclass(frozen=True, slots=True)
class SourceFiles:
    """The files of one catalogue. `human` and `reviews` are None where there are none."""

    products: Path
    attributes: Path
    human: Path | None
    reviews: Path | None

    @property
    def present(self) -> list[Path]:
        paths = (self.products, self.attributes, self.human, self.reviews)
        return [path for path in paths if path is not None]


def find_source_files(directory: Path, is_small: bool) -> SourceFiles:
    """The full catalogue where it is there, otherwise the published one of 1,000 products.

    With `is_small` it is the other way round.

    Raises:
        ConfigurationError: neither is there.
    """
    pairs = list(zip(PRODUCT_FILES, ATTRIBUTE_FILES, strict=True))
    if is_small:
        pairs.reverse()
    for product_file, attribute_file in pairs:
        products = directory / product_file
        attributes = directory / attribute_file
        if products.is_file() and attributes.is_file():
            human = _find_file(directory / HUMAN_FILE)
            reviews = _find_file(directory / REVIEW_FILE)
            return SourceFiles(products, attributes, human, reviews)
    raise ConfigurationError(
        f"{directory} holds no WebShop catalogue: expected {PRODUCT_FILES[0]} and "
        f"{ATTRIBUTE_FILES[0]}, or those of 1,000. Download the published files (README of "
        "princeton-nlp/WebShop), or run: sdar env generate webshop DIRECTORY"
    )


def _find_file(path: Path) -> Path | None:
    return path if path.is_file() else None


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds one object. Raises ConfigurationError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigurationError(
            f"{path} is not JSON: {error}. Download or generate it again."
        ) from error
    if not isinstance(content, dict):
        raise ConfigurationError(
            f"{path} holds a {type(content).__name__}, expected an object by product id."
        )
    return content


def iterate_entries(path: Path, chunk_characters: int = _CHUNK_CHARACTERS) -> Iterator[Entry]:
    """The objects of a JSON list, one after the other: the file is never held whole.

    Raises:
        ConfigurationError: the file is no list of JSON objects.
    """
    decoder = json.JSONDecoder()
    with path.open(encoding="utf-8") as file:
        text = _read_characters(file, chunk_characters).lstrip()
        if not text.startswith("["):
            raise ConfigurationError(
                f"{path} holds no list, expected one of objects. Download or generate it again."
            )

        index = 0
        position = 1
        while True:
            found = _NEXT_ENTRY.search(text, position)
            position = found.start() if found else len(text)
            if text[position : position + 1] == "]":
                return
            try:
                value, end = decoder.raw_decode(text, position)
            except ValueError as error:
                # Cut by the chunk's end, if it is a good one: read on and try again, but never hold
                # more than two chunks for an entry that has no end.
                is_short = len(text) - position < chunk_characters
                more = _read_characters(file, chunk_characters) if is_short else ""
                if not more:
                    raise ConfigurationError(
                        f"{path} entry {index} is not JSON: {error}. Download or generate it again."
                    ) from error
                text = text[position:] + more
                position = 0
                continue

            yield Entry(path, index, value)
            index += 1
            position = end


def _read_characters(file: TextIO, count: int) -> str:
    try:
        return file.read(count)
    except UnicodeDecodeError as error:
        raise ConfigurationError(
            f"{file.name} is not UTF-8: {error}. Download or generate it again."
        ) from error


class Entry:
    """One object of a file.

    Its accessors raise a ConfigurationError that names file, entry and field.
    """

    def __init__(self, path: Path, key: int | str, value: Any) -> None:
        self._where = f"{path} entry {key}"
        if not isinstance(value, dict):
            raise ConfigurationError(
                f"{self._where} is {_show(value)}, expected an object. Correct it."
            )
        self._value = value

    def text(self, name: str) -> str:
        value = self._value.get(name)
        if not isinstance(value, str):
            raise self.wrong(name, "a text")
        return value

    def optional_text(self, name: str) -> str:
        return "" if self._value.get(name) is None else self.text(name)

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of texts: none where it is missing, one where the published file has one text."""
        value = self._value.get(name)
        if value is None:
            return ()
        if isinstance(value, str):
            return (value,)
        if not (isinstance(value, list) and all(isinstance(item, str) for item in value)):
            raise self.wrong(name, "a list of texts")
        return tuple(value)

    def get(self, name: str) -> Any:
        return self._value.get(name)

    def wrong(self, name: str, expected: str) -> ConfigurationError:
        return ConfigurationError(
            f"{self._where}: {name} is {_show(self._value.get(name))}, expected {expected}. "
            "Correct it."
        )


def _show(value: Any) -> str:
    shown = repr(value)
    if len(shown) <= _SHOWN_CHARACTERS:
        return shown
    return f"{shown[:_SHOWN_CHARACTERS]}..."


def iterate_products(files: SourceFiles) -> Iterator[Product]:
    """Products in the file's order, less the entries that the published code leaves out.

    Those have no id, or one that was seen before.
    """
    attributes = read_object(files.attributes)
    reviews: dict[str, Entry] = {}
    if files.reviews:
        reviews = {entry.text("asin"): entry for entry in iterate_entries(files.reviews)}

    seen: set[str] = set()
    for entry in iterate_entries(files.products):
        asin = entry.text("asin")
        has_id = asin not in ("", "nan") and len(asin) <= MAX_ASIN_LENGTH
        if not has_id or asin in seen:
            continue
        seen.add(asin)
        own = Entry(files.attributes, asin, attributes.get(asin, {}))
        yield _read_product(entry, asin, own, reviews.get(asin))


def _read_product(entry: Entry, asin: str, attributes: Entry, reviews: Entry | None) -> Product:
    prices = _read_prices(entry)
    return Product(
        asin=asin,
        name=entry.text("name"),
        category=entry.text("category"),
        query=entry.text("query").lower().strip(),
        product_category=entry.text("product_category"),
        description=entry.optional_text("full_description"),
        bullets=entry.texts("small_description"),
        price=_draw_price(asin, prices),
        price_tag=" to ".join(f"${price}" for price in prices),
        options=_read_options(entry),
        attributes=attributes.texts("attributes") or (PLACEHOLDER_ATTRIBUTE,),
        rating=NO_RATING if reviews is None else str(reviews.get("average_rating")),
        reviews=() if reviews is None else _read_reviews(reviews),
    )


def _read_prices(entry: Entry) -> tuple[float, ...]:
    """The lowest and the highest price of a product's variants, or its one price.

    They are written as in "$12.99$1,015.49".
    """
    if not entry.get("pricing"):
        return (NO_PRICE,)
    parts = [re.sub(r"[^\d.]", "", part) for part in entry.text("pricing").split("$")[1:]]
    try:
        prices = tuple(float(part) for part in parts[:2])
    except ValueError:
        prices = ()
    if not prices:
        raise entry.wrong("pricing", 'prices such as "$12.99" or "$12.99$15.49"')
    return prices


def _draw_price(asin: str, prices: tuple[float, ...]) -> float:
    """One price between a product's lowest and highest, as published.

    It is drawn from the product's id, so it is the same in every process.
    """
    if len(prices) == 1:
        return prices[0]
    return random.Random(f"price {asin}").uniform(*prices)


def _read_options(entry: Entry) -> dict[str, tuple[str, ...]]:
    options = entry.get("customization_options") or {}
    if not isinstance(options, dict):
        raise entry.wrong("customization_options", "an object of option lists")
    read = {}
    for name, choices in options.items():
        if choices is None:
            continue
        if not (isinstance(choices, list) and all(map(_is_choice, choices))):
            raise entry.wrong(
                "customization_options", f'a list of objects with a text "value" for {name!r}'
            )
        # A slash would read as a path in the original's addresses; as published.
        values = [choice["value"].strip().replace("/", " | ").lower() for choice in choices]
        read[name.lower()] = tuple(value for value in values if value)
    return read


def _is_choice(choice: Any) -> bool:
    return isinstance(choice, dict) and isinstance(choice.get("value"), str)


def _read_reviews(entry: Entry) -> tuple[Review, ...]:
    reviews = entry.get("reviews") or []
    if not (isinstance(reviews, list) and all(isinstance(review, dict) for review in reviews)):
        raise entry.wrong("reviews", "a list of objects")
    read = []
    for review in reviews:
        title = str(review.get("title") or "")
        stars = str(review.get("stars", review.get("score")) or "")
        body = str(review.get("review") or "")
        read.append(Review(title, stars, body))
    return tuple(read)
