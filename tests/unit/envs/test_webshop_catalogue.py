"""Published files become products and goals: parsing, prices, order, refusals by place."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdar.contracts.errors import ConfigurationError
from services.envs.webshop.catalogue import find_source_files, iterate_entries, iterate_products
from services.envs.webshop.goals import (
    NO_BOUND,
    PRICE_STEPS,
    count_test_goals,
    draw_price_bound,
    shuffle_goals,
)
from services.envs.webshop.store import open_catalogue
from tests.unit.envs.webshop_files import (
    ATTRIBUTES,
    CABLE,
    JACKET,
    LOTION,
    REVIEWS,
    SHOES,
    TRAIL,
    list_entries,
    write_files,
)


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def read(directory):
    return {
        product.asin: product
        for product in iterate_products(find_source_files(directory, is_small=False))
    }


def open_goals(directory, cache, is_human=None):
    return {goal.asin: goal for goal in open_catalogue(directory, cache, False, is_human).goals}


def list_prepared(cache):
    """What lies in the cache beside the known hashes of files."""
    return sorted(path.name for path in (cache / "webshop").iterdir() if path.suffix != ".sha256")


def test_entries_without_an_id_of_their_own_are_left_out(tmp_path):
    products = read(write_files(tmp_path))
    assert list(products) == [SHOES, TRAIL, JACKET, LOTION, CABLE]
    assert products[SHOES].name == "Swift Running Shoes with Mesh"


def test_options_are_lower_case_without_slashes_and_empty_ones_vanish(tmp_path):
    products = read(write_files(tmp_path))
    assert products[SHOES].options == {"color": ("navy blue", "red"), "size": ("8", "9 | 10")}
    assert products[TRAIL].options == products[LOTION].options == {}


def test_prices_are_one_two_or_a_hundred(tmp_path):
    products = read(write_files(tmp_path))
    assert (products[SHOES].price, products[SHOES].price_tag) == (42.5, "$42.5")
    assert products[JACKET].price_tag == "$12.99 to $15.49"
    assert 12.99 <= products[JACKET].price <= 15.49
    assert products[TRAIL].price_tag == "$1049.0 to $1105.49"
    assert [products[asin].price_tag for asin in (LOTION, CABLE)] == ["$100.0", "$100.0"]


def test_missing_texts_reviews_and_attributes_have_the_published_defaults(tmp_path):
    products = read(write_files(tmp_path, reviews=REVIEWS))
    assert (products[CABLE].description, products[CABLE].bullets) == ("", ())
    assert products[LOTION].bullets == ("One text, not a list",)
    assert products[CABLE].attributes == ("DUMMY_ATTR",)
    assert products[CABLE].rating == "N.A."
    found = (products[SHOES].rating, products[SHOES].reviews)
    assert found == ("4.5", (("Nice", "5", "They fit."),))
    assert products[TRAIL].reviews == (("Hm", "2", ""),)
    assert products[JACKET].query == "rain jacket"


def test_human_instructions_become_goals_without_those_that_ask_for_nothing(tmp_path, cache):
    goals = open_goals(write_files(tmp_path), cache)
    assert set(goals) == {SHOES, TRAIL, JACKET, LOTION}
    shoes = goals[SHOES]
    assert shoes.instruction == (
        "i need breathable running shoes in navy blue, size 8, and price lower than "
        f"{shoes.price_bound:.2f} dollars"
    )
    assert (shoes.attributes, shoes.options) == (("breathable mesh",), ("navy blue", "8"))
    assert goals[JACKET].options == ("large",)


def test_a_product_too_dear_for_a_bound_has_none(tmp_path, cache):
    trail = open_goals(write_files(tmp_path), cache)[TRAIL]
    assert (trail.instruction, trail.price_bound) == ("i want trail shoes", NO_BOUND)


def test_without_human_instructions_every_combination_of_options_is_a_goal(tmp_path, cache):
    prepared = open_catalogue(write_files(tmp_path, human=None), cache, False, None)
    texts = sorted(goal.instruction.partition(", and price")[0] for goal in prepared.goals)
    assert texts == [
        "Find me a jacket. with size: description",
        "Find me a jacket. with size: large",
        "find me shoes with color: navy blue, and size: 8",
        "find me shoes with color: navy blue, and size: 9 | 10",
        "find me shoes with color: red, and size: 8",
        "find me shoes with color: red, and size: 9 | 10",
    ]


def test_synthetic_goals_can_be_asked_for_where_there_are_human_ones(tmp_path, cache):
    write_files(tmp_path)
    assert len(open_catalogue(tmp_path, cache, False, False).goals) == 6
    assert len(open_catalogue(tmp_path, cache, False, True).goals) == 4


def test_the_thousand_products_have_synthetic_goals_unless_human_ones_are_asked_for(
    tmp_path, cache
):
    """The file of human instructions comes with them but knows ten of their products."""
    write_files(tmp_path, suffix="_1000")
    assert len(open_catalogue(tmp_path, cache, False, None).goals) == 6
    assert len(open_catalogue(tmp_path, cache, False, True).goals) == 4


def test_human_goals_cannot_be_had_without_their_file(tmp_path, cache):
    with pytest.raises(ConfigurationError, match="holds no items_human_ins"):
        open_catalogue(write_files(tmp_path, human=None), cache, False, True)


@pytest.mark.parametrize("price", [0.0, 9.99, 10.0, 42.5, 969.99])
def test_a_bound_is_the_second_to_fourth_step_of_ten_dollars_above_the_price(price):
    above = [step for step in PRICE_STEPS if step > price]
    drawn = {draw_price_bound(price, str(seed)) for seed in range(200)}
    assert drawn == set(above[1:4])


def test_a_bound_depends_on_its_goal_alone():
    assert draw_price_bound(42.5, "a goal") == draw_price_bound(42.5, "a goal")
    assert draw_price_bound(985.0, "a goal") == NO_BOUND


def test_the_order_of_goals_is_the_published_shuffle():
    """random.Random(233).shuffle, whatever the process: the first ten of a thousand, for good."""
    assert shuffle_goals(range(1000))[:10] == [127, 320, 431, 331, 760, 454, 129, 769, 485, 270]


@pytest.mark.parametrize(
    ("num_goals", "num_test"), [(1, 0), (4, 1), (199, 49), (1999, 499), (2000, 500), (12087, 500)]
)
def test_five_hundred_goals_are_tested_or_a_quarter_of_a_small_catalogue(num_goals, num_test):
    assert count_test_goals(num_goals) == num_test


def test_small_prefers_the_thousand_products_and_either_stands_in_for_the_other(tmp_path):
    both, one = tmp_path / "both", tmp_path / "one"
    write_files(both)
    write_files(both, suffix="_1000")
    write_files(one, suffix="_1000")
    assert find_source_files(both, is_small=False).products.name == "items_shuffle.json"
    assert find_source_files(both, is_small=True).products.name == "items_shuffle_1000.json"
    assert find_source_files(one, is_small=False).products.name == "items_shuffle_1000.json"


def test_a_directory_without_a_catalogue_says_how_to_get_one(tmp_path):
    with pytest.raises(
        ConfigurationError, match=r"holds no WebShop catalogue.*sdar env generate webshop"
    ):
        find_source_files(tmp_path, is_small=False)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("asin", 7, "asin is 7, expected a text"),
        ("name", None, "name is None, expected a text"),
        ("pricing", "twelve", "pricing is 'twelve', expected prices"),
        ("pricing", "$1.2.3", r"pricing is '\$1.2.3', expected prices"),
        ("pricing", 12.5, "pricing is 12.5, expected a text"),
        ("small_description", [1], r"small_description is \[1\], expected a list of texts"),
        (
            "customization_options",
            ["red"],
            r"customization_options is \['red'\], expected an object",
        ),
        (
            "customization_options",
            {"color": [{"name": "red"}]},
            ".*a list of objects with a text \"value\" for 'color'",
        ),
    ],
)
def test_a_malformed_product_is_refused_by_file_entry_and_field(
    tmp_path, cache, field, value, expected
):
    entries = [*list_entries()[:2], {**list_entries()[2], field: value}]
    with pytest.raises(ConfigurationError, match=rf"items_shuffle.json entry 2: {expected}"):
        open_catalogue(write_files(tmp_path, entries=entries), cache, False, None)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"entries": {"a": 1}}, "items_shuffle.json holds no list"),
        ({"entries": ["shoes"]}, "items_shuffle.json entry 0 is 'shoes', expected an object"),
        ({"entries": []}, "no product has an instruction"),
        ({"attributes": []}, "items_ins_v2.json holds a list, expected an object"),
        (
            {"attributes": {SHOES: {"attributes": "mesh", "instruction": 5}}, "human": None},
            f"entry {SHOES}: instruction is 5",
        ),
        (
            {"attributes": {SHOES: {"instruction": "shoes"}}, "human": None},
            f"entry {SHOES}: instruction_attributes is None",
        ),
        (
            {"human": {SHOES: [{"instruction_attributes": ["x"]}]}},
            rf"items_human_ins.json entry {SHOES}\[0\]: instruction is None",
        ),
        ({"human": {SHOES: ["shoes"]}}, rf"entry {SHOES}\[0\] is 'shoes', expected an object"),
        (
            {"reviews": [{"asin": SHOES, "reviews": "good"}]},
            "reviews.json entry 0: reviews is 'good'",
        ),
    ],
)
def test_malformed_files_are_refused_by_place(tmp_path, cache, files, expected):
    with pytest.raises(ConfigurationError, match=expected):
        open_catalogue(write_files(tmp_path, **files), cache, False, None)


@pytest.mark.parametrize("text", ["", "[{]", '[{"asin": "B1"}', '[{"asin": "B1"}, {"asi'])
def test_a_file_that_breaks_off_is_refused(tmp_path, text):
    path = tmp_path / "items.json"
    path.write_text(text)
    with pytest.raises(
        ConfigurationError, match=r"items.json (holds no list|entry [01] is not JSON)"
    ):
        list(iterate_entries(path))


@pytest.mark.parametrize(
    "name", ["items_shuffle.json", "items_ins_v2.json", "items_human_ins.json"]
)
@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00\x01" * 9, b'[{"asin": "\xe9"}]', b"null"])
def test_files_that_are_no_text_or_empty_are_refused_by_name(tmp_path, cache, name, content):
    (write_files(tmp_path) / name).write_bytes(content)
    with pytest.raises(ConfigurationError, match=name):
        open_catalogue(tmp_path, cache, False, None)


def test_an_entry_is_put_together_from_what_is_read_in_pieces(tmp_path):
    path = tmp_path / "items.json"
    path.write_text(json.dumps([{"asin": "x" * length} for length in (50, 3, 50, 0)]))
    found = [len(entry.text("asin")) for entry in iterate_entries(path, chunk_characters=64)]
    assert found == [50, 3, 50, 0]


def test_a_broken_entry_is_refused_without_reading_the_rest(tmp_path):
    path = tmp_path / "items.json"
    path.write_text('[{"asin": "B1"}, {"asin" "B2"}, ' + "{}, " * 1000)
    entries = iterate_entries(path, chunk_characters=64)
    assert next(entries).text("asin") == "B1"
    with pytest.raises(ConfigurationError, match="entry 1 is not JSON"):
        next(entries)


@settings(max_examples=50, derandomize=True, deadline=None)
@given(
    st.lists(st.dictionaries(st.text(max_size=3), st.text(max_size=5), max_size=3), max_size=4),
    st.integers(0, 3),
)
def test_reading_one_by_one_gives_what_json_gives(tmp_path_factory, values, indent):
    path = tmp_path_factory.mktemp("items") / "items.json"
    path.write_text(json.dumps(values, indent=indent or None, ensure_ascii=False), encoding="utf-8")
    assert [entry._value for entry in iterate_entries(path)] == values


def test_a_catalogue_is_prepared_once_and_found_by_its_content(tmp_path, cache):
    first, second = write_files(tmp_path / "a"), write_files(tmp_path / "b")
    prepared = open_catalogue(first, cache, False, None)
    (directory,) = (path for path in (cache / "webshop").iterdir() if path.is_dir())
    made = directory.stat().st_mtime_ns
    assert open_catalogue(second, cache, False, None).digest == prepared.digest
    assert directory.stat().st_mtime_ns == made
    write_files(tmp_path / "c", attributes={**ATTRIBUTES, CABLE: {"attributes": ["braided"]}})
    assert open_catalogue(tmp_path / "c", cache, False, None).digest != prepared.digest


def test_files_are_read_to_be_known_only_when_they_are_new_or_changed(tmp_path, cache, monkeypatch):
    """The published ones have five gigabytes, and every worker that starts opens them."""
    directory = write_files(tmp_path / "data")
    read_files, digest_file = [], hashlib.file_digest
    monkeypatch.setattr(
        hashlib,
        "file_digest",
        lambda file, name: read_files.append(file.name) or digest_file(file, name),
    )
    first, second = (
        open_catalogue.__wrapped__(directory, cache, False, None).digest for _ in range(2)
    )
    assert (first == second, len(read_files)) == (True, 3)
    write_files(
        directory, entries=list_entries()[:3], attributes={SHOES: ATTRIBUTES[SHOES]}, human=None
    )
    assert open_catalogue.__wrapped__(directory, cache, False, None).digest != first
    assert len(read_files) == 5


def test_what_is_prepared_is_what_was_read(tmp_path, cache):
    directory = write_files(tmp_path, reviews=REVIEWS)
    prepared = open_catalogue(directory, cache, False, None)
    assert len(prepared) == 5
    assert [prepared.get_product(number) for number in range(5)] == list(read(directory).values())


def test_workers_that_start_together_prepare_one_catalogue(tmp_path, cache):
    """Four processes at once: all open the same content and nothing half-made is left behind."""
    directory = write_files(tmp_path / "data")
    code = f"""
from pathlib import Path
from services.envs.webshop.store import open_catalogue
print(open_catalogue(Path({str(directory)!r}), Path({str(cache)!r}), False, None).digest)
"""
    starting = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    digests = [process.communicate()[0].strip() for process in starting]
    assert [process.returncode for process in starting] == [0] * 4
    assert len(set(digests)) == 1
    assert list_prepared(cache) == [digests[0], f"{digests[0]}.lock"]


def test_a_preparation_that_fails_leaves_nothing_behind(tmp_path, cache):
    with pytest.raises(ConfigurationError):
        open_catalogue(write_files(tmp_path, entries=[]), cache, False, None)
    assert not [path for path in (cache / "webshop").iterdir() if path.is_dir()]


def test_what_a_killed_process_left_half_made_is_cleared_away(tmp_path, cache):
    digest = open_catalogue(write_files(tmp_path / "a"), tmp_path / "first", False, None).digest
    (cache / "webshop" / f"{digest}-half").mkdir(parents=True)
    open_catalogue(tmp_path / "a", cache, False, None)
    assert list_prepared(cache) == [digest, f"{digest}.lock"]


def test_a_cache_that_cannot_be_written_names_its_variable(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="SDAR_CACHE"):
        open_catalogue(write_files(tmp_path / "data"), tmp_path / "file", False, None)
