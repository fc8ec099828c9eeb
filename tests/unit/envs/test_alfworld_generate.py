"""Generated games: what was shipped can be made again, is solved, and splits as it says."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from sdar.contracts.errors import ConfigurationError, ConflictError
from services.envs.alfworld import AlfworldEnvironment
from services.envs.alfworld.demonstrations import (
    ExploringPlayer,
    list_walkthrough,
    phrase,
    read_aim,
)
from services.envs.alfworld.games import SPLITS, TASK_TYPES, load_entries
from services.envs.alfworld.generate import draw_tasks, generate
from services.envs.alfworld.rooms import (
    ROOM_KINDS,
    ROOM_SIZES,
    build_scene,
    list_goals,
    list_room_kinds,
)

DATA = Path(__file__).parents[3] / "examples/data/alfworld"
TINY_DATA = DATA.with_name("alfworld-tiny")


@pytest.fixture
def environment():
    environment = AlfworldEnvironment(data_dir=str(DATA))
    yield environment
    environment.close()


def list_shipped(directory=DATA):
    return [entry for split in SPLITS for entry in load_entries(directory)[split]]


def read_tree(directory):
    return {
        path.relative_to(directory): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize(
    ("directory", "num_games"), [(DATA, 48), (TINY_DATA, 119)], ids=["alfworld", "alfworld-tiny"]
)
def test_the_expert_wins_every_shipped_game_at_the_last_command(directory, num_games):
    environment, entries = AlfworldEnvironment(data_dir=str(directory)), list_shipped(directory)
    assert len(entries) == num_games
    for entry in entries:
        environment.reset(entry.task_id, seed=0)
        results = [environment.step(text) for text in list_walkthrough(directory, entry.task_id)]
        assert [result.is_success for result in results] == [False] * (len(results) - 1) + [True]
        assert all(result.is_action_valid for result in results)
    environment.close()


@pytest.mark.parametrize("remembers", [True, False])
def test_a_player_who_must_look_for_things_wins_every_shipped_game_in_20_turns(
    environment, remembers
):
    for entry in list_shipped():
        player, observation = (
            ExploringPlayer(remembers=remembers),
            environment.reset(entry.task_id, seed=0),
        )
        for _ in range(20):
            text = player.next_action(
                entry.description, entry.task_type, observation.text, observation.admissible_actions
            )
            result = environment.step(text)
            observation = result.observation
            assert result.is_action_valid
            if result.is_over:
                break
        assert result.is_success, entry


def test_the_shipped_games_are_what_the_command_in_their_readme_makes(tmp_path):
    reported = []
    told = generate(
        tmp_path / "games",
        num_tasks=24,
        seed=0,
        report=lambda done, total: reported.append((done, total)),
    )
    shipped = {
        path: content
        for path, content in read_tree(DATA).items()
        if path.name not in {"README.md", "LICENSE"}
    }
    assert read_tree(tmp_path / "games") == shipped
    assert reported == [(done, 48) for done in range(1, 49)]
    assert told == "24 ALFWorld games to train on and 12 in each of valid_seen and valid_unseen"


def test_another_seed_makes_other_games(tmp_path):
    for seed in (1, 2):
        generate(tmp_path / str(seed), num_tasks=1, seed=seed, report=lambda done, total: None)
    assert read_tree(tmp_path / "1") != read_tree(tmp_path / "2")


def test_validation_plays_other_goals_in_seen_rooms_and_any_goals_in_unseen_rooms():
    tasks = {split: [] for split in SPLITS}
    for split, task in draw_tasks(num_tasks=96, num_validation=24, seed=7):
        tasks[split].append(task)
    scenes, goals = {}, {}
    for split, drawn in tasks.items():
        scenes[split] = {task.scene.number for task in drawn}
        goals[split] = {(task.scene.number, task.goal) for task in drawn}
    assert scenes["valid_seen"] <= scenes["train"]
    assert not scenes["valid_unseen"] & scenes["train"]
    assert not goals["valid_seen"] & goals["train"]
    assert Counter(task.goal.task_type for task in tasks["train"]) == dict.fromkeys(TASK_TYPES, 16)
    assert Counter(task.scene.size for task in tasks["train"]) == {
        "small": 72,
        "medium": 12,
        "large": 12,
    }


def test_no_game_is_won_before_it_starts_and_every_goal_has_its_objects():
    for _, task in draw_tasks(num_tasks=48, num_validation=12, seed=3):
        targets = [thing for thing in task.things if thing.kind == task.goal.target]
        assert len(targets) >= (2 if task.goal.task_type == "pick_two_obj_and_place" else 1)
        assert all(thing.place.kind != task.goal.destination for thing in targets)
        assert sum(thing.kind == task.goal.lamp for thing in task.things) == bool(task.goal.lamp)


@pytest.mark.parametrize("size", ROOM_SIZES)
def test_a_room_has_the_receptacles_of_its_size_each_in_its_own_spot(size):
    low, high = ROOM_SIZES[size].num_receptacles
    for kind in ROOM_KINDS:
        for number in (*ROOM_SIZES[size].train_scenes, *ROOM_SIZES[size].unseen_scenes):
            scene = build_scene(kind, size, number, seed=0)
            assert low <= len(scene.receptacles) <= high
            assert len({receptacle.location for receptacle in scene.receptacles}) == len(
                scene.receptacles
            )
            assert scene == build_scene(kind, size, number, seed=0)


@pytest.mark.parametrize("task_type", TASK_TYPES)
def test_every_small_room_of_the_right_kind_allows_goals(task_type):
    for kind in list_room_kinds(task_type):
        assert any(
            list_goals(build_scene(kind, "small", number, seed=0), task_type)
            for number in range(18)
        )


def test_sizes_do_not_share_scenes():
    numbers = [n for size in ROOM_SIZES.values() for n in (*size.train_scenes, *size.unseen_scenes)]
    assert sorted(numbers) == list(range(30))


def test_a_trajectory_file_says_what_public_loaders_read():
    entry = next(entry for entry in list_shipped() if entry.task_type == "look_at_obj_in_light")
    trajectory = json.loads((DATA / entry.task_id / "traj_data.json").read_text())
    target, _, lamp = entry.task_id.split("/")[1].split("-")[1:4]
    assert trajectory["task_type"] == entry.task_type
    assert trajectory["pddl_params"] == {
        "object_target": target,
        "parent_target": "",
        "toggle_target": lamp,
        "mrecep_target": "",
        "object_sliced": False,
    }
    assert trajectory["turk_annotations"]["anns"][0]["task_desc"] == entry.description


def test_games_are_not_written_over_what_is_there(tmp_path):
    (tmp_path / "mine").write_text("keep")
    with pytest.raises(ConflictError, match="not empty"):
        generate(tmp_path, num_tasks=1, seed=0, report=lambda done, total: None)
    assert read_tree(tmp_path) == {Path("mine"): b"keep"}


def test_no_task_at_all_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="at least 1"):
        generate(tmp_path, num_tasks=0, seed=0, report=lambda done, total: None)


@pytest.mark.parametrize(
    ("sentence", "aim"),
    [
        ("put a mug in microwave.", ("mug", "microwave")),
        ("put some book on sidetable.", ("book", "sidetable")),
        ("put a clean pan in countertop.", ("pan", "countertop")),
        ("heat some egg and put it in fridge.", ("egg", "fridge")),
        ("put two pen in drawer.", ("pen", "drawer")),
        ("find two pen and put them in drawer.", ("pen", "drawer")),
        ("look at bowl under the desklamp.", ("bowl", "desklamp")),
        ("examine the bowl with the desklamp.", ("bowl", "desklamp")),
    ],
)
def test_every_wording_of_a_goal_is_understood(sentence, aim):
    found = read_aim(sentence)
    assert (found.target, found.destination) == aim


def test_a_response_has_the_form_that_the_environment_asks_for():
    assert phrase("find a mug", "look") == "<think>find a mug</think><action>look</action>"
