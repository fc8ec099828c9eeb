"""The shop on the hand-written catalogue of webshop_files: pages, text, reward, splits."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdar.contracts.errors import ConfigurationError, UnknownResourceError
from services.envs.webshop import WebShopEnvironment
from services.envs.webshop.environment import MAX_TURNS
from tests.unit.envs.webshop_files import (
    JACKET,
    LOTION,
    REVIEWS,
    SHOES,
    TRAIL,
    build_choices,
    build_entry,
    write_files,
)

SHOES_PAGE = (
    "Back to Search [SEP] < Prev [SEP] color [SEP] navy blue [SEP] red [SEP] size [SEP] 8 [SEP] "
    "9 | 10 [SEP] Swift Running Shoes with Mesh [SEP] Price: $42.5 [SEP] Rating: 4.5 [SEP] "
    "Description [SEP] Features [SEP] Reviews [SEP] Buy Now"
)
SHOES_LINKS = (
    *("back to search", "< prev", "description", "features", "reviews", "buy now"),
    *("navy blue", "red", "8", "9 | 10"),
)


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _use_cache(monkeypatch, cache):
    monkeypatch.setenv("SDAR_CACHE", str(cache))
    monkeypatch.delenv("WEBSHOP_DATA", raising=False)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    return str(write_files(tmp_path_factory.mktemp("webshop"), reviews=REVIEWS))


@pytest.fixture
def shop(data_dir):
    return WebShopEnvironment(data_dir=data_dir)


def find_task(environment, asin):
    tasks = [task for split in environment.splits for task in environment.list_tasks(split)]
    return next(task for task in tasks if environment.get_goal(task.task_id).asin == asin)


def say(action):
    return f"<think>so</think><action>{action}</action>"


def play(environment, actions, asin=SHOES):
    environment.reset(find_task(environment, asin).task_id, seed=0)
    return [environment.step(say(action)) for action in actions]


def list_links(observation):
    return tuple(action.removeprefix("click[")[:-1] for action in observation.admissible_actions)


def test_the_first_page_is_the_search_page_and_has_nothing_to_click(shop):
    observation = shop.reset(find_task(shop, SHOES).task_id, seed=0)
    assert (observation.text, observation.admissible_actions) == ("WebShop [SEP] Search", ())


def test_results_show_id_title_and_price(shop):
    found = play(shop, ["search[rain jacket]"])[-1]
    assert found.observation.text == (
        f"Back to Search [SEP] Page 1 (Total results: 1) [SEP] {JACKET} [SEP] Storm Rain Jacket "
        "[SEP] $12.99 to $15.49"
    )
    assert list_links(found.observation) == ("back to search", JACKET.lower())


def test_an_item_shows_its_options_and_facts(shop):
    item = play(shop, ["search[mesh]", f"click[{SHOES}]"])[-1]
    assert item.observation.text == SHOES_PAGE
    assert list_links(item.observation) == SHOES_LINKS


@pytest.mark.parametrize(
    ("link", "text"),
    [
        ("description", "About the Swift Running Shoes with Mesh."),
        ("features", "Made with care [SEP] Ships in two days"),
        ("reviews", '"Nice" [SEP] 5 [SEP] They fit.'),
    ],
)
def test_the_pages_below_an_item_lead_back_to_it(shop, link, text):
    below, back = play(
        shop, ["search[mesh]", f"click[{SHOES}]", f"click[{link}]", "click[< prev]"]
    )[-2:]
    assert below.observation.text == f"Back to Search [SEP] < Prev [SEP] {text}"
    assert list_links(below.observation) == ("back to search", "< prev")
    assert back.observation.text == SHOES_PAGE


def test_what_an_item_lacks_is_said(shop):
    pages = play(
        shop,
        [
            "search[volt cable]",
            "click[b07dddddd1]",
            "click[description]",
            "click[< prev]",
            "click[features]",
        ],
    )
    texts = [page.observation.text.rpartition(" [SEP] ")[2] for page in (pages[2], pages[4])]
    assert texts == ["No Description", "No Features"]
    below = play(shop, ["search[volt cable]", "click[b07dddddd1]", "click[reviews]"])[-1]
    assert below.observation.text == "Back to Search [SEP] < Prev [SEP] No Reviews"


def test_the_right_purchase_scores_one_and_ends_the_episode(shop):
    results = play(
        shop,
        [
            "search[mesh shoes]",
            f"click[{SHOES.lower()}]",
            "click[navy blue]",
            "click[8]",
            "click[Buy Now]",
        ],
    )
    assert [result.reward for result in results] == [0, 0, 0, 0, 10]
    assert all(result.is_action_valid for result in results)
    last = results[-1]
    assert (last.terminated, last.truncated, last.is_success) == (True, False, True)
    assert last.reward_components == {
        "score": 1.0,
        "r_type": 1.0,
        "r_attributes": 1.0,
        "r_options": 1.0,
        "r_price": 1.0,
        "title_similarity": 1.0,
    }
    found = (last.observation.text, last.observation.admissible_actions)
    assert found == ("Thank you for shopping with us!", ())
    assert all(result.reward_components == {} for result in results[:-1])


def test_a_partial_purchase_earns_nothing_but_shows_its_score(shop):
    """The goal: 1 attribute, 2 options. One option missing: (1 + 1 + 1) / 4."""
    last = play(shop, ["search[mesh]", f"click[{SHOES}]", "click[navy blue]", "click[buy now]"])[-1]
    assert (last.terminated, last.is_success, last.reward) == (True, False, 0.0)
    assert (last.reward_components["score"], last.reward_components["r_options"]) == (0.75, 0.5)


def test_the_wrong_product_scores_by_the_formula(shop):
    """Trail for running shoes: same query, so r_type 1; no mesh or option, too dear: 0 / 4."""
    last = play(shop, ["search[trail]", f"click[{TRAIL}]", "click[buy now]"])[-1]
    assert (last.reward_components["r_type"], last.reward_components["score"]) == (1.0, 0.0)
    lotion = play(shop, ["search[lotion]", f"click[{LOTION}]", "click[buy now]"])[-1]
    found = (lotion.reward_components["r_type"], lotion.reward_components["title_similarity"])
    assert found == (0.0, 0.0)


def test_the_last_value_of_an_option_counts(shop):
    actions = [
        "search[mesh]",
        f"click[{SHOES}]",
        "click[red]",
        "click[9 | 10]",
        "click[8]",
        "click[navy blue]",
        "click[buy now]",
    ]
    assert play(shop, actions)[-1].is_success


@pytest.mark.parametrize(
    "way",
    [
        ["search[mesh]", f"click[{SHOES}]"],
        ["click[< prev]", f"click[{SHOES}]"],
        ["click[back to search]", "search[mesh]", f"click[{SHOES}]"],
        ["click[description]", "click[back to search]", "search[mesh]", f"click[{SHOES}]"],
        ["click[features]", "search[mesh]", f"click[{SHOES}]"],
    ],
    ids=[
        "a new search",
        "back from the item",
        "back to search",
        "back to search from below",
        "a search from below",
    ],
)
def test_leaving_an_item_forgets_what_was_chosen(shop, way):
    chosen = ["search[mesh]", f"click[{SHOES}]", "click[navy blue]", "click[8]"]
    assert play(shop, [*chosen, *way, "click[buy now]"])[-1].reward_components["r_options"] == 0.0


def test_a_look_below_keeps_what_was_chosen(shop):
    chosen = ["search[mesh]", f"click[{SHOES}]", "click[navy blue]", "click[8]"]
    assert play(shop, [*chosen, "click[features]", "click[< prev]", "click[buy now]"])[
        -1
    ].is_success


def test_fifty_results_come_ten_to_a_page(tmp_path):
    entries = [build_entry(f"B08AAAAA{number:02}", f"Lamp {number}") for number in range(70)]
    human = {
        "B08AAAAA00": [
            {"instruction": "a lamp", "instruction_attributes": ["lamp"], "instruction_options": []}
        ]
    }
    shop = WebShopEnvironment(data_dir=str(write_files(tmp_path, entries=entries, human=human)))
    pages = play(
        shop,
        ["search[lamp]", *["click[next >]"] * 4, "click[next >]", *["click[< prev]"] * 4],
        "B08AAAAA00",
    )
    headings = [page.observation.text.split(" [SEP] ")[1:4] for page in pages[:5]]
    assert headings[0][:2] == ["Page 1 (Total results: 50)", "Next >"]
    assert headings[1] == ["Page 2 (Total results: 50)", "< Prev", "Next >"]
    assert headings[4] == ["Page 5 (Total results: 50)", "< Prev", "B08AAAAA40"]
    assert not pages[5].is_action_valid
    assert pages[9].observation == pages[0].observation
    assert len(pages[0].observation.admissible_actions) == 2 + 10
    shown = [
        link
        for page in pages[:5]
        for link in list_links(page.observation)
        if link.startswith("b08")
    ]
    assert shown == [f"b08aaaaa{number:02}" for number in range(50)]


def test_an_item_is_left_to_the_page_of_results_it_was_opened_from(tmp_path):
    entries = [build_entry(f"B08AAAAA{number:02}", f"Lamp {number}") for number in range(15)]
    human = {
        "B08AAAAA00": [
            {"instruction": "a lamp", "instruction_attributes": ["lamp"], "instruction_options": []}
        ]
    }
    shop = WebShopEnvironment(data_dir=str(write_files(tmp_path, entries=entries, human=human)))
    pages = play(
        shop, ["search[lamp]", "click[next >]", "click[b08aaaaa12]", "click[< prev]"], "B08AAAAA00"
    )
    assert pages[3].observation == pages[1].observation


def test_a_button_keeps_its_name_and_a_value_belongs_to_the_later_option(tmp_path):
    """No option named like a button can be chosen; of two that share a value, the later one."""
    options = {"style": build_choices("Reviews", "oak"), "frame": build_choices("oak")}
    entries = [build_entry("B08AAAAA01", "Oak Desk", customization_options=options)]
    wish = {
        "instruction": "a desk",
        "instruction_attributes": ["desk"],
        "instruction_options": ["oak"],
    }
    shop = WebShopEnvironment(
        data_dir=str(write_files(tmp_path, entries=entries, human={"B08AAAAA01": [wish]}))
    )
    pages = play(
        shop,
        ["search[desk]", "click[b08aaaaa01]", "click[reviews]", "click[< prev]", "click[oak]"],
        "B08AAAAA01",
    )
    assert "No Reviews" in pages[2].observation.text
    assert shop._pages.chosen == {"frame": "oak"}
    assert list_links(pages[1].observation).count("oak") == 1


@pytest.mark.parametrize(
    "action",
    [
        "",
        "click",
        "click[]",
        "search[]",
        "click[search]",
        "click[buy now]",
        "buy now",
        "click[b07aaaaaa1]",
        "look[around]",
        "x" * 9,
    ],
)
def test_what_cannot_be_done_changes_nothing_but_costs_a_turn(shop, action):
    wrong, *rest = play(
        shop,
        [
            action,
            "search[mesh]",
            f"click[{SHOES}]",
            "click[8]",
            "click[navy blue]",
            "click[buy now]",
        ],
    )
    found = (wrong.observation.text, wrong.is_action_valid, wrong.action)
    assert found == ("WebShop [SEP] Search", False, action)
    assert rest[-1].is_success


@pytest.mark.parametrize(
    ("text", "action", "is_valid", "is_done"),
    [
        ("<think>so</think><action>search[mesh]</action>", "search[mesh]", True, True),
        ("<think>so</think>\n<action>\n Search[Mesh] </action> bye", "Search[Mesh]", True, True),
        (
            "<think>a [b] c</think><action>search[a [b] mesh]</action>",
            "search[a [b] mesh]",
            True,
            True,
        ),
        ("<action>search[mesh]</action>", "search[mesh]", False, True),
        ("search[mesh]", "", False, False),
        ("<think>so</think>search[mesh]", "", False, False),
        ("<think>so</think><action>search[mesh]", "", False, False),
        (
            "<think>so</think><action>search[mesh]</action><action>search[mesh]</action>",
            "",
            False,
            False,
        ),
        ("<think></think><action></action>", "", False, False),
        ("", "", False, False),
        ("\x00\ufffd\u202e" * 10, "", False, False),
        ("<action>" * 100_000, "", False, False),
        (
            "<think>" + "so " * 300_000 + "</think><action>search[mesh]</action>",
            "search[mesh]",
            True,
            True,
        ),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_one_thought_and_one_action_make_a_response(shop, text, action, is_valid, is_done):
    shop.reset(find_task(shop, SHOES).task_id, seed=0)
    result = shop.step(text)
    assert (result.action, result.is_action_valid) == (action, is_valid)
    assert ("Page 1" in result.observation.text) is is_done


def test_a_megabyte_of_query_is_answered(shop):
    result = play(shop, [f"search[{'mesh [] ' * 125_000}]"])[0]
    assert result.is_action_valid
    assert "Total results: 1)" in result.observation.text


def test_the_fifteenth_turn_truncates_without_a_score(shop):
    results = play(shop, ["search[mesh]"] * MAX_TURNS)
    assert [result.truncated for result in results] == [False] * 14 + [True]
    last = results[-1]
    found = (last.terminated, last.reward_components, last.observation.admissible_actions)
    assert found == (False, {}, ())


def test_a_purchase_in_the_last_turn_counts(shop):
    actions = ["search[mesh]"] * 11 + [
        f"click[{SHOES}]",
        "click[8]",
        "click[navy blue]",
        "click[buy now]",
    ]
    last = play(shop, actions)[-1]
    found = (len(actions), last.terminated, last.truncated, last.is_success)
    assert found == (MAX_TURNS, True, False, True)


@settings(max_examples=40, derandomize=True, deadline=None)
@given(st.randoms(use_true_random=False))
def test_every_listed_action_is_valid_on_every_walk_and_walks_repeat(data_dir, rng: random.Random):
    """Random walks of listed actions and searches; a second session sees the same."""
    shop, other = WebShopEnvironment(data_dir=data_dir), WebShopEnvironment(data_dir=data_dir)
    task = rng.choice(shop.list_tasks("train"))
    observation = shop.reset(task.task_id, seed=1)
    assert other.reset(task.task_id, seed=2) == observation
    for turn in range(MAX_TURNS):
        actions = [
            *observation.admissible_actions,
            f"search[{rng.choice(['shoes', 'rain', 'lotion', 'nothing', 'swift'])}]",
        ]
        text = say(rng.choice(actions))
        result = shop.step(text)
        assert result.is_action_valid
        assert other.step(text) == result
        if result.is_over:
            assert result.terminated or turn == MAX_TURNS - 1
            assert not result.observation.admissible_actions
            break
        observation = result.observation


def test_sessions_do_not_touch_each_other(data_dir):
    first, second = WebShopEnvironment(data_dir=data_dir), WebShopEnvironment(data_dir=data_dir)
    play(first, ["search[mesh]", f"click[{SHOES}]", "click[8]", "click[navy blue]"])
    play(second, ["search[rain]", f"click[{JACKET}]"], JACKET)
    assert first.step(say("click[buy now]")).is_success


def test_a_reset_forgets_the_episode_before(shop):
    play(shop, ["search[mesh]", f"click[{SHOES}]"])
    assert shop.reset(find_task(shop, SHOES).task_id, seed=0).text == "WebShop [SEP] Search"
    assert not shop.step(say("click[buy now]")).is_action_valid


def test_a_task_is_its_instruction_and_its_category(shop):
    tasks = [task for split in shop.splits for task in shop.list_tasks(split)]
    assert {task.task_type for task in tasks} == {"fashion", "beauty"}
    assert len(shop.list_tasks("test")) == 1
    assert sorted(task.task_id for task in tasks) == ["goal-0", "goal-1", "goal-2", "goal-3"]
    task = find_task(shop, LOTION)
    assert task.description == shop.get_goal(task.task_id).instruction
    assert shop.get_task(task.task_id) == task
    bound = shop.get_goal(task.task_id).price_bound
    assert task.description == f"some lotion, and price lower than {bound:.2f} dollars"


def test_the_version_tells_catalogue_and_noun_finder_apart(shop, tmp_path):
    other = WebShopEnvironment(data_dir=str(write_files(tmp_path)))
    assert shop.describe().identity.version == f"1-{shop._nouns.name}-{shop.catalogue.digest[:8]}"
    assert other.version != shop.version


@pytest.mark.parametrize("task_id", ["", "goal-4", "goal--1", "0"])
def test_an_unknown_task_is_refused(shop, task_id):
    for ask in (shop.get_task, shop.get_goal, lambda task_id: shop.reset(task_id, seed=0)):
        with pytest.raises(UnknownResourceError, match="has no task"):
            ask(task_id)


def test_an_unknown_split_is_refused(shop):
    with pytest.raises(UnknownResourceError, match="Use one of train, test"):
        shop.list_tasks("heldout")


def test_without_a_directory_the_variable_is_read(data_dir, monkeypatch):
    for is_empty in (False, True):
        if is_empty:
            monkeypatch.setenv("WEBSHOP_DATA", "")
        with pytest.raises(
            ConfigurationError,
            match=r"option data_dir or the variable WEBSHOP_DATA.*sdar env generate webshop",
        ):
            WebShopEnvironment()
    monkeypatch.setenv("WEBSHOP_DATA", data_dir)
    assert len(WebShopEnvironment().list_tasks("train")) == 3


def test_an_unknown_kind_of_goals_is_refused(data_dir):
    with pytest.raises(ConfigurationError, match="expected one of auto, human, synthetic"):
        WebShopEnvironment(data_dir=data_dir, goals="both")


def test_synthetic_goals_are_an_option(data_dir):
    shop = WebShopEnvironment(data_dir=data_dir, goals="synthetic")
    assert sum(len(shop.list_tasks(split)) for split in shop.splits) == 6
