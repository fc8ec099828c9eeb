"""Scores a purchase by WebShop's formula (arXiv:2207.01206, section 3), as its code computes it.

score = r_type * (matched attributes + matched options + price within bound) / (attributes + options
+ 1)
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from rapidfuzz import fuzz

from services.envs.webshop.catalogue import Product
from services.envs.webshop.goals import Goal
from services.envs.webshop.nouns import NounFinder

FUZZY_THRESHOLD = 85
"""Two texts match above this token_set_ratio."""
SIMILAR_TITLES = 0.2
DISSIMILAR_TITLES = 0.1
SIMILARITY_WITHOUT_NOUNS = 0.2
"""Taken where the goal's title holds no noun to compare."""
CATEGORY_SEPARATOR = "\u203a"
"""As in "Clothing \u203a Shoes"."""
NUM_SHARED_CATEGORIES = 2
"""Two products are of one kind if so many of their categories are the same."""

# The first of these that occurs anywhere in an option's value stands for it: "navy blue" and "light
# blue" are both "blue", and so is "bluetooth". Part of the score's definition: another list, or
# another order, is another score.
_COLOURS_TEXT = """
alabaster apricot aqua ash asphalt azure banana beige black blue blush bordeaux bronze brown
burgundy camel camo caramel champagne charcoal cheetah chestnut chocolate christmas coffee cognac
copper coral cranberry cream crystal dark denim eggplant elephant espresso fuchsia gold granite
grape graphite grass gray green grey heather indigo ivory ivy khaki lavender lemon leopard light
lilac lime magenta maroon mauve merlot midnight mint mocha multicolor mushroom mustard natural navy
nude olive orange peach pewter pink plum purple rainbow red rose royal rust sand sapphire seashell
silver skull slate steel stone stonewash sunflower tan taupe teal tiger turquoise violet walnut
wheat white wine yellow
"""
COLOURS = tuple(_COLOURS_TEXT.split())

_NOT_A_WORD = re.compile(r"\W")
_LATIN_1 = re.compile(r"[\x80-\xff]")
"""What thefuzz leaves out as not ASCII: an accented letter, but not a curly quote."""


@dataclass(frozen=True, slots=True)
class Score:
    """A purchase's score and its parts.

    Attributes:
        r_type: factor for the kind of product, one of 1, 0.5, 0.1 and 0, by query, categories and
            `title_similarity`.
        r_attributes, r_options: share of the goal's that are met, 1 where it asks for none.
        r_price: 1 within the goal's bound, else 0.
    """

    score: float
    r_type: float
    r_attributes: float
    r_options: float
    r_price: float
    title_similarity: float


def compute_score(product: Product, chosen: Iterable[str], goal: Goal, nouns: NounFinder) -> Score:
    """The score of buying a product with the values chosen of its options."""
    similarity = compute_title_similarity(product.name, goal.name, nouns)
    r_type = compute_type_factor(product, goal, similarity)

    num_attributes = len(goal.attributes)
    num_options = len(goal.options)
    met_attributes = sum(has_attribute(product, attribute) for attribute in goal.attributes)
    met_options = count_met_options(chosen, goal.options)
    r_price = float(product.price <= goal.price_bound)

    # The price counts as one more thing that the goal asks for.
    share = (met_attributes + met_options + r_price) / (num_attributes + num_options + 1)
    return Score(
        score=r_type * share,
        r_type=r_type,
        r_attributes=_compute_share(met_attributes, num_attributes),
        r_options=_compute_share(met_options, num_options),
        r_price=r_price,
        title_similarity=similarity,
    )


def _compute_share(num_met: int, num_wanted: int) -> float:
    return num_met / num_wanted if num_wanted else 1.0


def compute_title_similarity(bought: str, wanted: str, nouns: NounFinder) -> float:
    """The share of the wanted title's nouns that the bought title has, too.

    A repeated noun counts once above the line and as often as it is repeated below, as published.
    """
    wanted_nouns = nouns.find(wanted)
    if not wanted_nouns:
        return SIMILARITY_WITHOUT_NOUNS
    shared = set(nouns.find(bought)) & set(wanted_nouns)
    return len(shared) / len(wanted_nouns)


def compute_type_factor(product: Product, goal: Goal, title_similarity: float) -> float:
    if title_similarity == 0:
        return 0.0
    if title_similarity < DISSIMILAR_TITLES:
        return 0.1
    shared = _list_categories(product.product_category) & _list_categories(goal.product_category)
    is_same_type = (
        product.query == goal.query
        or len(shared) >= NUM_SHARED_CATEGORIES
        or title_similarity > SIMILAR_TITLES
    )
    return 1.0 if is_same_type else 0.5


def _list_categories(path: str) -> set[str]:
    return {name.strip() for name in path.split(CATEGORY_SEPARATOR)}


def has_attribute(product: Product, attribute: str) -> bool:
    if any(is_fuzzy_match(own, attribute) for own in product.attributes):
        return True
    texts = (product.name, " ".join(product.bullets), product.description)
    return any(attribute in text.lower() for text in texts)


def count_met_options(chosen: Iterable[str], wanted: Iterable[str]) -> int:
    colours = [normalise_colour(value) for value in chosen]
    # A chosen value may meet several wishes, as published.
    num_met = 0
    for wish in map(normalise_colour, wanted):
        num_met += any(is_fuzzy_match(value, wish) for value in colours)
    return num_met


def normalise_colour(value: str) -> str:
    for colour in COLOURS:
        if colour in value:
            return colour
    return value


def is_fuzzy_match(first: str, second: str) -> bool:
    return compute_token_set_ratio(first, second) > FUZZY_THRESHOLD


def compute_token_set_ratio(first: str, second: str) -> int:
    """thefuzz's token_set_ratio, a whole number of 0 to 100.

    Texts are reduced to letters, digits and blanks in lower case.
    """
    return round(fuzz.token_set_ratio(_reduce(first), _reduce(second)))


def _reduce(text: str) -> str:
    return _NOT_A_WORD.sub(" ", _LATIN_1.sub("", text)).lower().strip()
