"""Which folders count as games, and in which order they are listed.

Copies of shipped games stand for public ones.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from pathlib import Path

import pytest

from sdar.contracts.errors import ConfigurationError
from services.envs.alfworld.games import (
    INDEX_FILE,
    TASK_TYPES,
    GameEntry,
    find_goal_template,
    load_entries,
    order_by_type,
    read_index,
    replace_goal_template,
)

DATA = Path(__file__).parents[3] / "examples/data/alfworld"
NAMES = ("train/a-Mug-None-Desk-1/trial_1", "train/b-Cup-None-Desk-2/trial_2")


@pytest.fixture
def public(tmp_path, monkeypatch):
    """A directory of two games without an index, and a cache of its own."""
    monkeypatch.setenv("SDAR_CACHE", str(tmp_path / "cache"))
    for entry, name in zip(load_entries(DATA)["train"], NAMES, strict=False):
        shutil.copytree(DATA / entry.task_id, tmp_path / "games" / name)
    return tmp_path / "games"


def list_ids(directory):
    load_entries.cache_clear()
    return [entry.task_id for games in load_entries(directory).values() for entry in games]


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_public_games_are_listed_without_an_index(public):
    assert sorted(list_ids(public)) == list(NAMES)
    first = load_entries(DATA)["train"][0]
    found = {entry.task_id: entry for entry in load_entries(public)["train"]}[NAMES[0]]
    seen = (found.task_type, found.description, found.num_receptacles)
    assert seen == (first.task_type, first.description, 0)


def test_the_index_of_public_games_is_kept_until_a_game_changes(public, tmp_path):
    def list_cached():
        return sorted((tmp_path / "cache/alfworld").glob("*.json"))

    list_ids(public)
    (index,) = list_cached()
    index.write_text(index.read_text().replace('"description": "', '"description": "kept: '))
    list_ids(public)
    assert all(entry.description.startswith("kept: ") for entry in load_entries(public)["train"])
    os.utime(public / NAMES[0] / "game.tw-pddl", ns=(1, 1))
    list_ids(public)
    assert not any(
        entry.description.startswith("kept: ") for entry in load_entries(public)["train"]
    )
    assert len(list_cached()) == 2


@pytest.mark.parametrize(
    "folder",
    ["pick_and_place_with_movable_recep-Mug-Bowl-Desk-1", "pick_heat-AppleSliced-None-Desk-1"],
)
def test_movable_receptacles_and_slices_are_left_out_as_upstream_does(public, folder):
    (public / NAMES[0]).rename(public / folder)
    shutil.move(public / folder, public / "train" / folder / "trial_1")
    assert list_ids(public) == [NAMES[1]]


def test_unsolved_other_and_incomplete_games_are_left_out_as_upstream_does(public):
    edit(public / NAMES[0] / "game.tw-pddl", solvable=False)
    assert list_ids(public) == [NAMES[1]]
    edit(public / NAMES[1] / "traj_data.json", task_type="pick_and_dance")
    assert list_ids(public) == []
    edit(public / NAMES[0] / "game.tw-pddl", solvable=True)
    (public / NAMES[1] / "game.tw-pddl").unlink()
    assert list_ids(public) == [NAMES[0]]
    (public / NAMES[0] / "traj_data.json").unlink()
    assert list_ids(public) == []


@pytest.mark.parametrize(
    ("file", "text", "why"),
    [
        ("traj_data.json", "{", "cannot be read"),
        ("traj_data.json", "{}", "'task_type' is None"),
        ("game.tw-pddl", "[1]", "holds a list"),
        ("game.tw-pddl", '{"solvable": true}', "'grammar' is None"),
        ("game.tw-pddl", '{"solvable": true, "grammar": "x"}', "0 rules"),
        ("game.tw-pddl", "\x00", "cannot be read"),
    ],
)
def test_a_damaged_file_is_named(public, file, text, why):
    path = public / NAMES[1] / file
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=why) as failure:
        list_ids(public)
    assert str(path) in failure.value.message


@pytest.mark.parametrize(
    "text",
    [
        "{",
        '{"games": [{"task": 1}]}',
        '{"games": [1]}',
        '{"games": 1}',
        '{"games": [{"task_id": 5, "task_type": "look_at_obj_in_light", "description": "x"}]}',
        (
            '{"games": [{"task_id": "test/x", "task_type": "look_at_obj_in_light", "description": '
            '"x"}]}'
        ),
        '{"games": [{"task_id": "train/x", "task_type": "dance", "description": "x"}]}',
    ],
)
def test_a_damaged_index_is_named(tmp_path, text):
    index = tmp_path / INDEX_FILE
    index.write_text(text)
    with pytest.raises(ConfigurationError, match=r"index\.json"):
        read_index(index)


def test_types_take_turns_and_the_rest_follows():
    """Three of the first type and one of the second: first, second, first, first."""
    first, second = TASK_TYPES[:2]
    games = [
        GameEntry(f"train/{number}", kind, "")
        for number, kind in enumerate([first, first, first, second])
    ]
    ordered = order_by_type(games)
    assert [entry.task_type for entry in ordered] == [first, second, first, first]
    assert Counter(ordered) == Counter(games)
    assert order_by_type(reversed(games)) == ordered


def test_a_goal_is_read_and_replaced_in_the_grammar():
    grammar = (
        'x "task": [\n {\n "rhs": "Your task is to: put a \\"hot\\" egg in fridge."\n }\n ], y'
    )
    assert find_goal_template(grammar) == 'Your task is to: put a "hot" egg in fridge.'
    replaced = replace_goal_template(grammar, r"Your task is to: \1 dance.")
    assert find_goal_template(replaced) == r"Your task is to: \1 dance."
    assert replaced.startswith('x "task"')
    assert replaced.endswith("], y")
