"""The shop's pages as a state machine: what is shown, what can be clicked, where a click leads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from services.envs.webshop.catalogue import Product
from services.envs.webshop.store import PreparedCatalogue

SEPARATOR = " [SEP] "
NUM_RESULTS = 50
PAGE_SIZE = 10
BACK_TO_SEARCH = "Back to Search"
NEXT = "Next >"
PREVIOUS = "< Prev"
BUY_NOW = "Buy Now"
DESCRIPTION = "Description"
FEATURES = "Features"
REVIEWS = "Reviews"

Links = dict[str, Callable[[], None]]


class PageMachine:
    """One shopper's way through the shop, from the start page to the purchase.

    Attributes:
        text: the page shown, its parts joined by SEPARATOR.
        product: the one whose page, or page below it, is shown; after the purchase the one bought.
        chosen: the values clicked on its page, by option name.
    """

    def __init__(self, catalogue: PreparedCatalogue) -> None:
        self._catalogue = catalogue
        self.product: Product | None = None
        self.chosen: dict[str, str] = {}
        self.is_bought = False
        self._results: tuple[int, ...] = ()
        self._page = 0
        self._show_start()

    @property
    def clickables(self) -> tuple[str, ...]:
        """What can be clicked on this page, in lower case."""
        return tuple(self._links)

    def search(self, query: str) -> None:
        self._results = self._catalogue.index.search(query, NUM_RESULTS)
        self._show_results(0)

    def click(self, name: str) -> bool:
        """Use a link; False, and nothing changes, where the page has no such link."""
        link = self._links.get(name)
        if link is not None:
            link()
        return link is not None

    def _show(self, parts: Sequence[str], links: Links) -> None:
        self.text = SEPARATOR.join(parts)
        self._links = links

    def _show_start(self) -> None:
        self.product = None
        self.chosen = {}
        self._show(["WebShop", "Search"], {})

    def _show_results(self, page: int) -> None:
        self.product = None
        self.chosen = {}
        self._page = page

        total = len(self._results)
        buttons: Links = {BACK_TO_SEARCH: self._show_start}
        if page > 0:
            buttons[PREVIOUS] = partial(self._show_results, page - 1)
        if (page + 1) * PAGE_SIZE < total:
            buttons[NEXT] = partial(self._show_results, page + 1)
        # The page's number stands between the first button and the others, as published.
        first, *others = buttons
        parts = [first, f"Page {page + 1} (Total results: {total})", *others]
        links = _in_lower_case(buttons)
        for number in self._results[page * PAGE_SIZE : (page + 1) * PAGE_SIZE]:
            product = self._catalogue.get_product(number)
            parts += [product.asin, product.name, product.price_tag]
            links[product.asin.lower()] = partial(self._show_item, product)
        self._show(parts, links)

    def _show_item(self, product: Product) -> None:
        self.product = product
        description = product.description or "No Description"
        features = product.bullets or ("No Features",)
        reviews = _list_reviews(product) or ("No Reviews",)
        pages: Links = {
            DESCRIPTION: partial(self._show_below, product, (description,)),
            FEATURES: partial(self._show_below, product, features),
            REVIEWS: partial(self._show_below, product, reviews),
            BUY_NOW: self._buy,
        }
        navigation: Links = {
            BACK_TO_SEARCH: self._show_start,
            PREVIOUS: partial(self._show_results, self._page),
        }

        options: list[str] = []
        for name, values in product.options.items():
            options += [name, *values]
        facts = [product.name, f"Price: {product.price_tag}", f"Rating: {product.rating}"]

        # The order of the links is that in which they are listed as actions.
        links = _in_lower_case(navigation | pages)
        for value, link in self._list_choices(product).items():
            # A button keeps its own name where an option has a value of that name. As published.
            links.setdefault(value, link)
        self._show([*navigation, *options, *facts, *pages], links)

    def _list_choices(self, product: Product) -> Links:
        # Of two options with a value in common, the value belongs to the later one. As published.
        choices: Links = {}
        for name, values in product.options.items():
            for value in values:
                choices[value] = partial(self._choose, name, value)
        return choices

    def _choose(self, name: str, value: str) -> None:
        """Choose a value. The page stays as it is: a text page shows no choice, as published."""
        self.chosen = {**self.chosen, name: value}

    def _show_below(self, product: Product, texts: Sequence[str]) -> None:
        """Description, features or reviews.

        The way back leads to the product's page and keeps what was chosen.
        """
        navigation: Links = {
            BACK_TO_SEARCH: self._show_start,
            PREVIOUS: partial(self._show_item, product),
        }
        self._show([*navigation, *texts], _in_lower_case(navigation))

    def _buy(self) -> None:
        self.is_bought = True
        self._show(["Thank you for shopping with us!"], {})


def _in_lower_case(links: Links) -> Links:
    return {name.lower(): link for name, link in links.items()}


def _list_reviews(product: Product) -> list[str]:
    parts: list[str] = []
    for review in product.reviews:
        parts += [f'"{review.title}"', review.stars, review.body]
    return [part for part in parts if part]
