"""The native score by hand: r_type * (attributes + options + price) / (number asked for + 1)."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.envs.webshop.catalogue import Product
from services.envs.webshop.goals import Goal
from services.envs.webshop.nouns import HeuristicNouns, SpacyNouns, load_noun_finder
from services.envs.webshop.reward import (
    COLOURS,
    Score,
    compute_score,
    compute_title_similarity,
    compute_token_set_ratio,
    compute_type_factor,
    count_met_options,
    has_attribute,
    is_fuzzy_match,
    normalise_colour,
)


class EveryWord:
    """Every word of a title is a noun."""

    name = "every-word"

    def find(self, title):
        return tuple(title.lower().split())


def build_product(**fields):
    defaults = {
        "asin": "B1",
        "name": "swift running shoes",
        "category": "fashion",
        "query": "running shoes",
        "product_category": "Clothing \u203a Shoes \u203a Running",
        "description": "Runs Fast",
        "bullets": ("Made with Care", "hand wash"),
        "price": 42.5,
        "price_tag": "$42.5",
        "options": {"color": ("navy blue", "red"), "size": ("8", "9")},
        "attributes": ("breathable mesh", "rubber sole"),
        "rating": "N.A.",
        "reviews": (),
    }
    return Product(**{**defaults, **fields})


def build_goal(**fields):
    defaults = {
        "asin": "B1",
        "name": "swift running shoes",
        "category": "fashion",
        "query": "running shoes",
        "product_category": "Clothing \u203a Shoes \u203a Running",
        "instruction": "i need shoes",
        "attributes": ("breathable mesh", "rubber sole"),
        "options": ("navy blue", "8"),
        "price_bound": 50.0,
    }
    return Goal(**{**defaults, **fields})


def score(product=None, chosen=("navy blue", "8"), **goal):
    return compute_score(product or build_product(), chosen, build_goal(**goal), EveryWord())


def test_what_was_asked_for_scores_one():
    """1 * (2 + 2 + 1) / (2 + 2 + 1)"""
    assert score() == Score(
        score=1.0, r_type=1.0, r_attributes=1.0, r_options=1.0, r_price=1.0, title_similarity=1.0
    )


def test_a_wrong_option_costs_its_share():
    """1 * (2 + 1 + 1) / 5"""
    wrong = score(chosen=("red", "8"))
    assert (wrong.score, wrong.r_options) == (0.8, 0.5)


def test_no_option_chosen_costs_all_of_them():
    """1 * (2 + 0 + 1) / 5"""
    assert score(chosen=()).score == 0.6


def test_a_price_above_the_bound_costs_one_share():
    """1 * (2 + 2 + 0) / 5; the bound itself is within."""
    dear = score(build_product(price=50.01))
    assert (dear.score, dear.r_price) == (0.8, 0.0)
    assert score(build_product(price=50.0)).score == 1.0


def test_a_missing_attribute_costs_one_share():
    """1 * (1 + 2 + 1) / 5"""
    plain = score(build_product(attributes=("rubber sole",)))
    assert (plain.score, plain.r_attributes) == (0.8, 0.5)


def test_all_wrong_at_once():
    """Title "swift lamp" has 1 of 3 wanted nouns: r_type 1. Nothing else fits: 1 * 0 / 5."""
    product = build_product(
        name="swift lamp", query="lamp", product_category="Home", price=60.0, attributes=()
    )
    assert score(product, chosen=("red",)) == Score(0.0, 1.0, 0.0, 0.0, 0.0, pytest.approx(1 / 3))


def test_a_goal_that_asks_for_no_option_counts_them_as_met():
    """1 * (2 + 0 + 1) / 3, whatever is chosen."""
    free = score(chosen=("red",), options=())
    assert (free.score, free.r_options) == (1.0, 1.0)


def test_the_factor_multiplies_the_whole():
    """A title with 1 of 10 nouns, another query and shelf: 0.5 * (2 + 2 + 1) / 5."""
    product = build_product(name="a z", query="lamp", product_category="Home")
    assert score(product, name="a b c d e f g h i j").score == 0.5


@pytest.mark.parametrize(
    ("similarity", "query", "shelf", "factor"),
    [
        (0.0, "running shoes", "Clothing \u203a Shoes \u203a Running", 0.0),
        (0.09, "running shoes", "Clothing \u203a Shoes \u203a Running", 0.1),
        (0.1, "lamp", "Home", 0.5),
        (0.2, "lamp", "Home", 0.5),
        (0.21, "lamp", "Home", 1.0),
        (0.1, "running shoes", "Home", 1.0),
        (0.1, "lamp", "Running\u203aHome \u203a  Shoes", 1.0),
        (0.1, "lamp", "Home \u203a Shoes", 0.5),
        (0.1, "lamp", "Shoes \u203a Shoes", 0.5),
    ],
    ids=[
        "0",
        "0.1",
        "0.5",
        "0.5 at the edge",
        "title",
        "query",
        "two shelves in any order",
        "one shelf",
        "one shelf twice",
    ],
)
def test_the_factor_of_the_type(similarity, query, shelf, factor):
    product = build_product(query=query, product_category=shelf)
    assert compute_type_factor(product, build_goal(), similarity) == factor


@pytest.mark.parametrize(
    ("bought", "wanted", "similarity"),
    [
        ("a b", "a b c d", 0.5),
        ("a a", "a a a b", 0.25),
        ("x", "a", 0.0),
        ("A", "a", 1.0),
        ("x", "", 0.2),
    ],
)
def test_title_similarity_is_shared_nouns_over_the_wanted_ones(bought, wanted, similarity):
    """Shared nouns count once, wanted ones as often as they stand; without any, 0.2 holds."""
    assert compute_title_similarity(bought, wanted, EveryWord()) == similarity


@pytest.mark.parametrize(
    ("attribute", "is_there"),
    [
        ("breathable mesh", True),
        ("mesh", True),
        ("Rubber-Sole", True),
        ("robber sole", True),
        ("rubber soap", False),
        ("swift", True),
        ("hand wash", True),
        ("care hand", True),
        ("runs fast", True),
        ("Runs Fast", False),
        ("waterproof", False),
    ],
    ids=[
        "equal",
        "part of one",
        "case and hyphen",
        "close: 95",
        "not close",
        "title",
        "bullet",
        "across bullets",
        "description",
        "searched as it is written",
        "nowhere",
    ],
)
def test_an_attribute_is_had_by_likeness_or_in_the_texts(attribute, is_there):
    assert has_attribute(build_product(), attribute) is is_there


@pytest.mark.parametrize(
    ("value", "colour"),
    [
        ("", ""),
        ("navy blue", "blue"),
        ("black forest", "black"),
        ("123alabaster", "alabaster"),
        ("bluetooth", "blue"),
        ("large", "large"),
        ("Red", "Red"),
    ],
)
def test_a_colour_word_anywhere_stands_for_the_value(value, colour):
    """The first in the list's order, in lower case only, as published."""
    assert normalise_colour(value) == colour


def test_the_colours_are_in_their_fixed_order():
    assert list(COLOURS) == sorted(COLOURS)
    assert len(COLOURS) == 102


@pytest.mark.parametrize(
    ("chosen", "wanted", "num_met"),
    [
        (["light blue"], ["navy blue"], 1),
        (["x-large"], ["large"], 1),
        (["medium"], ["large"], 0),
        (["8", "red"], ["red", "8"], 2),
        (["red"], ["red", "dark red"], 1),
        ([], ["red"], 0),
    ],
    ids=[
        "same colour",
        "words of another",
        "other size",
        "any order",
        "dark comes first",
        "nothing",
    ],
)
def test_options_are_met_by_colour_and_likeness(chosen, wanted, num_met):
    assert count_met_options(chosen, wanted) == num_met


def compute_classic_ratio(first, second):
    """thefuzz's token_set_ratio: the best of three ratios between shared and whole sets."""

    def reduce(text):
        return (
            re.sub(r"\W", " ", "".join(c for c in text if not 128 <= ord(c) < 256)).lower().strip()
        )

    def ratio(a, b):
        """Twice the longest common subsequence over both lengths, in whole percent."""
        if not a or not b:
            return 0
        row = [0] * (len(b) + 1)
        for x in a:
            before = row
            row = [0]
            for index, y in enumerate(b):
                row.append(before[index] + 1 if x == y else max(before[index + 1], row[index]))
        return round(200 * row[-1] / (len(a) + len(b)))

    a, b = set(reduce(first).split()), set(reduce(second).split())
    shared = " ".join(sorted(a & b))
    whole_a, whole_b = (f"{shared} {' '.join(sorted(words - (a & b)))}".strip() for words in (a, b))
    return max(ratio(shared, whole_a), ratio(shared, whole_b), ratio(whole_a, whole_b))


SAMPLES = (
    "red",
    "Red",
    "dark-red",
    "x_l",
    "large",
    "café",
    "8",
    "8.5",
    "ünï",
    "",
    "'s",
    "\u2019s",
    "4\u2033x6",
    "\u5c3a",
)
WORDS = st.lists(st.sampled_from(SAMPLES), max_size=5)


@settings(max_examples=300, derandomize=True, deadline=None)
@given(
    st.one_of(WORDS.map(" ".join), st.text(alphabet="abc -é\u2019", max_size=12)),
    WORDS.map(" ".join),
)
def test_the_ratio_is_the_classic_one(first, second):
    assert compute_token_set_ratio(first, second) == compute_classic_ratio(first, second)


@pytest.mark.parametrize(
    ("first", "second", "ratio"),
    [
        *[
            ("red", "RED!", 100),
            ("8", "8.5", 100),
            ("", "", 0),
            ("é", "é", 0),
            ("abc", "abd", 67),
            ("large", "x large", 100),
        ],
        # Curly quotes part words as straight ones do; Latin-1 letters are lost, others stay.
        *[
            ("women\u2019s m", "women's m", 100),
            ("4\u2033x6\u2033", '4"x6"', 100),
            ("\u5c3a", "\u5c3a", 100),
        ],
    ],
)
def test_the_ratio_of_texts_reduced_to_words(first, second, ratio):
    assert compute_token_set_ratio(first, second) == ratio


def test_a_match_needs_more_than_85():
    """2 * 6 / 14 is 85.7 percent and rounds to 86; 2 * 17 / 40 is 85."""
    assert compute_token_set_ratio("abcdefg", "abcdefx") == 86
    assert is_fuzzy_match("abcdefg", "abcdefx")
    twenty = "abcdefghijklmnopqrst"
    assert compute_token_set_ratio(twenty, twenty[:17] + "123") == 85
    assert not is_fuzzy_match(twenty, twenty[:17] + "123")


def test_the_rule_of_thumb_keeps_what_looks_like_nouns():
    nouns = HeuristicNouns()
    title = (
        "Swift Women's Running Shoes with Comfortable 2-Pack Mesh, "
        "Wireless, Padded 10oz - the Best Table & Bed"
    )
    found = nouns.find(title)
    assert found == ("swift", "women", "running", "shoes", "pack", "mesh", "table", "bed")
    assert nouns.find("42 oz, best!") == ()


def test_spacy_nouns_are_nouns_and_proper_nouns():
    tags = {"Swift": "PROPN", "light": "ADJ", "Shoes": "NOUN"}
    nouns = SpacyNouns(
        "model-1",
        lambda title: [SimpleNamespace(text=word, pos_=tags[word]) for word in title.split()],
    )
    assert nouns.find("Swift light Shoes Shoes") == ("swift", "shoes", "shoes")


def test_the_noun_finder_is_named():
    """The name is part of the environment's version, whichever finder this machine has."""
    assert re.fullmatch(r"heuristic|en_core_web_(lg|md|sm)-[\d.]+", load_noun_finder().name)
