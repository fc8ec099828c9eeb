"""ALFWorld's rules on a shipped game: a mug on a countertop must go into a closed microwave."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sdar.contracts.errors import ConfigurationError, EnvironmentFailedError, UnknownResourceError
from services.envs.alfworld import AlfworldEnvironment
from services.envs.alfworld.environment import read_response
from services.envs.alfworld.games import load_entries

ROOT = Path(__file__).parents[3]
DATA = ROOT / "examples/data/alfworld"
TASK_ID = "train/pick_and_place_simple-Mug-None-Microwave-8/trial_T76048029228217242"
EXPERT = [
    "go to countertop 2",
    "take mug 1 from countertop 2",
    "go to microwave 1",
    "open microwave 1",
    "move mug 1 to microwave 1",
]
AT_THE_START = (
    "go to countertop 1",
    "go to countertop 2",
    "go to fridge 1",
    "go to microwave 1",
    "go to sinkbasin 1",
    "inventory",
    "look",
)


def say(command: str) -> str:
    return f"<think>because</think><action>{command}</action>"


@pytest.fixture
def environment():
    environment = AlfworldEnvironment(data_dir=str(DATA))
    yield environment
    environment.close()


def play(environment, texts, task_id=TASK_ID):
    environment.reset(task_id, seed=0)
    return [environment.step(text) for text in texts]


def test_the_first_observation_is_the_scene_and_the_task_is_described_apart(environment):
    observation = environment.reset(TASK_ID, seed=0)
    assert observation.text == (
        "You are in the middle of a room. Looking quickly around you, you see a countertop 2, a "
        "countertop 1, a fridge 1, a microwave 1, and a sinkbasin 1."
    )
    assert observation.admissible_actions == AT_THE_START
    task = environment.get_task(TASK_ID)
    found = (task.description, task.task_type, task.split)
    assert found == ("put a mug in microwave.", "pick_and_place_simple", "train")


def test_the_expert_wins_ten_points_and_every_turn_tells_only_what_is_new(environment):
    results = play(environment, map(say, EXPERT))
    assert [result.observation.text for result in results] == [
        (
            "You arrive at countertop 2. On the countertop 2, you see a mug 1, "
            "a soapbottle 1, and a winebottle 2."
        ),
        "You pick up the mug 1 from the countertop 2.",
        "You arrive at microwave 1. The microwave 1 is closed.",
        "You open the microwave 1. The microwave 1 is open. In it, you see nothing.",
        "You move the mug 1 to the microwave 1.",
    ]
    assert [result.reward for result in results] == [0.0, 0.0, 0.0, 0.0, 10.0]
    assert [result.action for result in results] == EXPERT
    assert all(result.is_action_valid for result in results)
    last = results[-1]
    assert (last.terminated, last.truncated, last.is_success) == (True, False, True)
    assert last.reward_components == {"success": 1.0}
    assert last.observation.admissible_actions == ()


def test_admissible_actions_follow_the_game_and_never_offer_help(environment):
    (result,) = play(environment, [say("go to countertop 2")])
    assert "take mug 1 from countertop 2" in result.observation.admissible_actions
    assert "help" not in result.observation.admissible_actions
    assert "go to countertop 2" not in result.observation.admissible_actions


@pytest.mark.parametrize(
    ("text", "action"),
    [
        ("go to countertop 2", ""),
        ("", ""),
        (say("dance"), "dance"),
        (say(""), ""),
        (say("go to countertop 2") + "<action>look</action>", ""),
        ("<think>x</think></action>go to countertop 2<action>", ""),
        ("<think>x</think><action>go to countertop 2", ""),
        ("\x00\ud800é<action>\x00</action>", "\x00"),
    ],
    ids=[
        "no tags",
        "empty",
        "unknown",
        "empty tags",
        "two actions",
        "reversed tags",
        "open tag",
        "binary",
    ],
)
def test_an_invalid_response_changes_nothing_but_costs_a_turn(environment, text, action):
    wrong, *rest = play(environment, [text, *map(say, EXPERT)])
    found = (wrong.observation.text, wrong.is_action_valid, wrong.action, wrong.reward)
    assert found == ("Nothing happens.", False, action, 0.0)
    assert wrong.observation.admissible_actions == AT_THE_START
    assert rest[-1].is_success


@pytest.mark.parametrize(
    "text",
    [
        "<action>go to countertop 2</action>",
        "<think>x<action>go to countertop 2</action>",
        "<think>a</think><think>b</think><action>go to countertop 2</action>",
        "</think>x<think><action>go to countertop 2</action>",
    ],
    ids=["none", "open", "two", "reversed"],
)
def test_a_command_without_its_reasoning_is_played_but_is_invalid(environment, text):
    (result,) = play(environment, [text])
    assert result.observation.text.startswith("You arrive at countertop 2.")
    assert not result.is_action_valid


def test_help_is_answered_but_is_no_valid_action(environment):
    (result,) = play(environment, [say("help")])
    assert result.observation.text.lstrip().startswith("Available commands:")
    assert not result.is_action_valid


@pytest.mark.parametrize("written", [" go to countertop 2\n", "Go To CounterTop 2"])
def test_white_space_and_capitals_are_forgiven(environment, written):
    (result,) = play(environment, [say(written)])
    assert (result.action, result.is_action_valid) == ("go to countertop 2", True)


def test_a_million_tags_are_read_at_once():
    assert read_response("<think><action>" * 100_000) == ("", False)


def test_the_fiftieth_turn_truncates(environment):
    results = play(environment, [say("look")] * 50)
    assert [result.truncated for result in results] == [False] * 49 + [True]
    assert not results[-1].terminated
    assert results[-1].observation.admissible_actions == ()


def test_a_win_on_the_last_turn_is_a_win(environment):
    last = play(environment, [say("look")] * 45 + list(map(say, EXPERT)))[-1]
    assert (last.terminated, last.truncated, last.is_success) == (True, False, True)


def test_the_same_actions_give_the_same_game_whatever_the_seed(environment):
    transcripts = []
    for seed in (0, 1):
        first = environment.reset(TASK_ID, seed)
        transcripts.append(
            [first, *(environment.step(say(command)) for command in ["look", *EXPERT])]
        )
    assert transcripts[0] == transcripts[1]


def test_a_closed_episode_gives_its_engine_to_the_next(environment):
    from services.envs.alfworld import engine

    environment.reset(TASK_ID, seed=0)
    num_idle = len(engine._idle_stacks)
    environment.close()
    environment.close()
    assert len(engine._idle_stacks) == num_idle + 1
    environment.reset(TASK_ID, seed=0)
    assert len(engine._idle_stacks) == num_idle


def test_listing_tasks_does_not_import_the_engine():
    """The engine takes a second to import and 70 MB: only a process that plays pays for it."""
    program = f"""
import sys
from services.envs.alfworld import AlfworldEnvironment
tasks = AlfworldEnvironment(data_dir={str(DATA)!r}).list_tasks("train")
print(len(tasks), "textworld" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["24", "False"]


@pytest.mark.parametrize(
    "task_id", ["", "train", TASK_ID + "x", "../" + TASK_ID, str(DATA / TASK_ID)]
)
def test_an_unknown_task_is_refused(environment, task_id):
    with pytest.raises(UnknownResourceError, match="has no task"):
        environment.reset(task_id, seed=0)


def test_an_unknown_split_is_refused(environment):
    with pytest.raises(UnknownResourceError, match="Use one of train, valid_seen, valid_unseen"):
        environment.list_tasks("test")


def test_without_data_it_says_how_to_get_some(monkeypatch):
    monkeypatch.delenv("ALFWORLD_DATA", raising=False)
    with pytest.raises(ConfigurationError, match="sdar env generate alfworld"):
        AlfworldEnvironment()


def test_a_directory_without_games_is_refused_by_name(tmp_path):
    with pytest.raises(
        ConfigurationError, match=r"expected one of the folders train.*alfworld-download"
    ):
        AlfworldEnvironment(data_dir=str(tmp_path))


def test_the_public_place_is_used_where_no_directory_is_given(monkeypatch, tmp_path):
    shutil.copytree(DATA, tmp_path / "json_2.1.1")
    monkeypatch.setenv("ALFWORLD_DATA", str(tmp_path))
    assert AlfworldEnvironment().reset(TASK_ID, seed=0).admissible_actions == AT_THE_START


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda game: "{", "cannot be read"),
        (lambda game: "[]", "expected a JSON object"),
        (lambda game: json.dumps({**game, "grammar": None}), "'grammar' is None, expected a text"),
        (lambda game: json.dumps({**game, "grammar": "x"}), "0 rules of the form"),
        (
            lambda game: json.dumps({**game, "pddl_domain": game["pddl_domain"][:900]}),
            "cannot be played: ParseError",
        ),
        (lambda game: json.dumps({**game, "pddl_problem": ""}), "cannot be played: StopIteration"),
        (
            lambda game: json.dumps({**game, "pddl_problem": "(" * 100_000}),
            "cannot be played: RecursionError",
        ),
        (
            lambda game: json.dumps(
                {**game, "pddl_problem": game["pddl_problem"].replace("- agent", "- robot")}
            ),
            "'robot'",
        ),
        (
            lambda game: json.dumps(
                {**game, "pddl_problem": game["pddl_problem"].replace("agent1", "a" * 2000)}
            ),
            "1023 fit",
        ),
        (
            lambda game: json.dumps(
                {**game, "grammar": game["grammar"].replace("{o.name}", "{exit()}")}
            ),
            "exit",
        ),
        (
            lambda game: json.dumps(
                {**game, "grammar": game["grammar"].replace("{o.name}", "{o.__class__}")}
            ),
            "__class__",
        ),
    ],
    ids=[
        "json",
        "list",
        "key",
        "goal",
        "domain",
        "empty",
        "deep",
        "type",
        "long",
        "code",
        "private",
    ],
)
def test_a_malformed_game_fails_alone_and_says_which_file(tmp_path, damage, why):
    """The process goes on, with the same engine: a sound game is played afterwards."""
    shutil.copytree(DATA, tmp_path / "games")
    environment = AlfworldEnvironment(data_dir=str(tmp_path / "games"))
    path = tmp_path / "games" / TASK_ID / "game.tw-pddl"
    sound = path.read_text()
    path.write_text(damage(json.loads(sound)))
    with pytest.raises(EnvironmentFailedError, match=r"game\.tw-pddl") as failure:
        play(environment, map(say, EXPERT))
    assert why in failure.value.message
    path.write_text(sound)
    assert play(environment, map(say, EXPERT))[-1].is_success
    environment.close()


def test_a_game_that_is_listed_but_gone_is_named(tmp_path):
    shutil.copytree(DATA, tmp_path / "games")
    (tmp_path / "games" / TASK_ID / "game.tw-pddl").unlink()
    environment = AlfworldEnvironment(data_dir=str(tmp_path / "games"))
    with pytest.raises(EnvironmentFailedError, match=r"game\.tw-pddl cannot be read.*No such file"):
        environment.reset(TASK_ID, seed=0)


def test_every_shipped_split_holds_all_six_types_in_turn():
    entries = load_entries(DATA)
    assert {split: len(games) for split, games in entries.items()} == {
        "train": 24,
        "valid_seen": 12,
        "valid_unseen": 12,
    }
    for games in entries.values():
        for start in range(0, len(games), 6):
            assert len({entry.task_type for entry in games[start : start + 6]}) == 6
