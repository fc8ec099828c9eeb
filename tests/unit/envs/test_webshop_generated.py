"""Generated catalogues: same bytes for a seed, near misses, goals that can be reached."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path

import pytest

from sdar.contracts.errors import ConflictError
from services.envs.webshop import WebShopEnvironment
from services.envs.webshop.demonstrations import Shopper, list_expert_actions, parse_results
from services.envs.webshop.generate import generate
from services.envs.webshop.reward import is_fuzzy_match
from services.envs.webshop.wares import OPTION_VALUES, WARES

SHIPPED = Path(__file__).parents[3] / "examples/data/webshop"
SHIPPED_TASKS, SHIPPED_SEED = 150, 0
FILES = ["items_human_ins.json", "items_ins_v2.json", "items_shuffle.json", "reviews.json"]


@pytest.fixture(autouse=True)
def _use_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("SDAR_CACHE", str(tmp_path_factory.getbasetemp() / "generated-cache"))


def make(directory, num_tasks, seed=0):
    return generate(directory, num_tasks=num_tasks, seed=seed, report=lambda done, total: None)


def hash_files(directory):
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.iterdir())
    }


def play(environment, task, player):
    """All results of an episode; the player answers an observation with a text."""
    observation = environment.reset(task.task_id, seed=0)
    results = []
    while not results or not results[-1].is_over:
        results.append(environment.step(player(observation)))
        observation = results[-1].observation
    return results


def build_expert(environment, task):
    texts = iter(list_expert_actions(environment, task.task_id))
    return lambda _: next(texts)


def build_shopper(task):
    shopper = Shopper()
    return lambda seen: shopper.next_action(
        task.description, task.task_type, seen.text, seen.admissible_actions
    )


def list_all_tasks(environment):
    return [task for split in environment.splits for task in environment.list_tasks(split)]


def test_the_shipped_catalogue_is_what_the_generator_makes(tmp_path):
    found = make(tmp_path / "made", SHIPPED_TASKS, SHIPPED_SEED)
    assert found == "250 products, 150 goals to train on and 50 to test."
    assert hash_files(tmp_path / "made") == hash_files(SHIPPED)
    assert list(hash_files(SHIPPED)) == FILES
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) < 1.5e6


def test_another_seed_makes_another_catalogue(tmp_path):
    make(tmp_path / "a", 20, seed=0)
    make(tmp_path / "b", 20, seed=1)
    first, second = hash_files(tmp_path / "a"), hash_files(tmp_path / "b")
    assert all(first[name] != second[name] for name in FILES)


@pytest.mark.parametrize(
    ("num_tasks", "num_test"), [(1, 0), (3, 1), (100, 33), (1499, 499), (1500, 500), (1600, 500)]
)
def test_so_many_goals_are_there_to_train_on(tmp_path, num_tasks, num_test):
    done = []
    said = generate(
        tmp_path / "made",
        num_tasks=num_tasks,
        seed=0,
        report=lambda *progress: done.append(progress),
    )
    assert said.endswith(f"{num_tasks} goals to train on and {num_test} to test.")
    assert done == [(number + 1, num_tasks + num_test) for number in range(num_tasks + num_test)]


def test_the_catalogue_has_the_tasks_that_were_announced(tmp_path):
    make(tmp_path / "made", 40)
    environment = WebShopEnvironment(data_dir=str(tmp_path / "made"))
    assert [len(environment.list_tasks(split)) for split in ("train", "test")] == [40, 13]


def test_a_directory_that_holds_something_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConflictError, match="is not empty"):
        make(tmp_path, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("ware", WARES, ids=lambda ware: ware.noun)
def test_no_two_attributes_of_a_kind_stand_for_each_other(ware):
    texts = [*ware.attributes, ware.noun]
    assert not [(a, b) for a in texts for b in texts if a < b and is_fuzzy_match(a, b)]
    values = [value for option in ware.options for value in OPTION_VALUES[option]]
    assert len(set(values)) == len(values)


def test_every_category_of_the_published_catalogue_is_there():
    environment = WebShopEnvironment(data_dir=str(SHIPPED))
    for split in environment.splits:
        counts = Counter(task.task_type for task in environment.list_tasks(split))
        assert set(counts) == {"fashion", "beauty", "electronics", "grocery", "garden"}


def test_the_expert_scores_one_on_every_goal_of_the_shipped_catalogue():
    environment = WebShopEnvironment(data_dir=str(SHIPPED))
    for task in list_all_tasks(environment):
        results = play(environment, task, build_expert(environment, task))
        assert results[-1].reward_components["score"] == 1.0, task
        assert all(result.is_action_valid for result in results)
        assert len(results) <= 6


def test_the_shopper_who_sees_only_texts_is_often_but_not_always_right():
    """Near-duplicates matter: what is asked for may stand in bullets, which he skips."""
    environment = WebShopEnvironment(data_dir=str(SHIPPED))
    successes = []
    for task in list_all_tasks(environment):
        results = play(environment, task, build_shopper(task))
        assert all(result.is_action_valid for result in results)
        successes.append(results[-1].is_success)
    assert 0.8 < sum(successes) / len(successes) < 0.98


def test_buying_the_first_result_is_not_enough():
    """Neither without options, nor with the first value of each: search and options both matter."""
    environment = WebShopEnvironment(data_dir=str(SHIPPED))
    successes = []
    for task in environment.list_tasks("test"):
        environment.reset(task.task_id, seed=0)
        found = environment.step(f"<think></think><action>search[{task.description}]</action>")
        asin = parse_results(found.observation.text)[0][0]
        environment.step(f"<think></think><action>click[{asin}]</action>")
        successes.append(
            environment.step("<think></think><action>click[buy now]</action>").is_success
        )
    assert not any(successes)
