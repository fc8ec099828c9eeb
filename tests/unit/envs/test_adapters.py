"""Gymnasium's environments, and what both adapters share, without a server."""

from __future__ import annotations

import itertools
import json

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from sdar.contracts.errors import ConfigurationError, EnvironmentFailedError, UnknownResourceError
from services.envs.adapters.gymnasium_adapter import (
    GymnasiumEnvironment,
    describe_space,
    parse_action,
    to_plain,
)
from services.envs.adapters.openenv_adapter import OpenEnvEnvironment
from services.envs.adapters.seeded import find_action, parse_json

NUMBERS = itertools.count()
"""Every id is new: what is known of an id is kept for the life of a process."""
WIDE = spaces.Dict({"move": spaces.Discrete(3, start=1), "say": spaces.Text(5)})


class Scripted(gymnasium.Env):
    """Takes a list of two integers and ends as its options say; remembers what it was asked.

    ## Rewards
    What the option says.

    ## Arguments
    Not for players.
    """

    metadata = {"render_modes": []}  # noqa: RUF012 - as Gymnasium wants it
    observation_space = spaces.Dict({"where": spaces.Box(-1, 1, (2,)), "note": spaces.Text(20)})
    action_space = spaces.MultiDiscrete([3, 4])
    made: list[Scripted] = []  # noqa: RUF012 - shared on purpose

    def __init__(self, render_mode=None, outcome=(1.0, True, False, {})):
        self.outcome = outcome
        self.asked = []
        self.is_closed = False
        self.made.append(self)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.asked.append(seed)
        return self._see(), {"lives": np.int64(3), "map": np.zeros(2)}

    def step(self, action):
        self.asked.append(action.tolist())
        return self._see(), *self.outcome

    def close(self):
        self.is_closed = True

    def _see(self):
        return {"where": np.array([1 / 3, -1e-9], dtype=np.float32), "note": "é"}


@pytest.fixture
def register():
    """Registers `Scripted` under a fresh id with the specification given, and takes it back."""
    ids = []

    def register(entry_point=Scripted, **specification):
        ids.append(f"sdar/Scripted{next(NUMBERS)}-v0")
        gymnasium.register(ids[-1], entry_point=entry_point, **specification)
        return ids[-1]

    yield register
    for id in ids:
        del gymnasium.registry[id]


def play(environment, *texts, task_id="train-0", seed=0):
    first = environment.reset(task_id, seed)
    return first, [environment.step(text) for text in texts]


@pytest.mark.parametrize(
    "id", ["CartPole-v1", "Taxi-v4", "FrozenLake-v1", "Blackjack-v1", "CliffWalking-v1"]
)
def test_the_same_task_and_seed_give_the_same_episode(id):
    texts = ["0", "<action>1</action>", "nonsense"]
    episodes = [play(GymnasiumEnvironment(id=id), *texts, seed=7) for _ in range(2)]
    assert episodes[0] == episodes[1]


def test_another_task_split_or_seed_is_another_start():
    starts = {
        play(GymnasiumEnvironment(id="CartPole-v1"), task_id=task_id, seed=seed)[0].text
        for task_id, seed in (
            ("train-0", 0),
            ("train-1", 0),
            ("heldout-0", 0),
            ("train-0", 1),
            ("train-0", -1),
        )
    }
    assert len(starts) == 5


def test_cartpole_is_won_by_reaching_its_threshold_not_by_falling():
    """The pole falls under a constant push, though the last step's reward is 1 as every step's."""
    environment = GymnasiumEnvironment(id="CartPole-v1")
    _, results = play(environment, *["1"] * 7)
    while not results[-1].is_over:
        results.append(environment.step("1"))
    last = results[-1]
    found = (last.terminated, last.truncated, last.is_success, last.reward)
    assert found == (True, False, False, 1.0)
    assert last.reward_components == {"return": float(len(results))}


def test_a_time_limit_truncates(register):
    never_over = (0.0, False, False, {})
    environment = GymnasiumEnvironment(
        id=register(max_episode_steps=2, kwargs={"outcome": never_over})
    )
    assert environment.max_turns == 2
    _, (first, second) = play(environment, "[0, 0]", "[0, 0]")
    found = (first.is_over, second.terminated, second.truncated, second.is_success)
    assert found == (False, False, True, False)


@pytest.mark.parametrize(
    ("outcome", "ends", "is_success"),
    [
        ((1.0, True, False, {}), (True, False), True),
        ((0.0, True, False, {}), (True, False), False),
        ((1.0, False, True, {}), (False, True), False),
        ((1.0, True, True, {}), (True, False), True),
        ((1.0, True, False, {"is_success": False}), (True, False), False),
        ((0.0, False, True, {"is_success": np.True_}), (False, True), True),
        ((1.0, False, False, {"is_success": True}), (False, False), False),
    ],
)
def test_ends_are_kept_apart_and_success_is_the_environments_word(
    register, outcome, ends, is_success
):
    _, (result,) = play(GymnasiumEnvironment(id=register(kwargs={"outcome": outcome})), "[2, 3]")
    assert (result.terminated, result.truncated) == ends
    assert result.is_success is is_success


def test_an_action_outside_the_space_uses_a_turn_and_does_not_reach_the_environment(register):
    environment = GymnasiumEnvironment(id=register())
    _, results = play(environment, "[3, 0]", "[1]", "[1.5, 1]", "left", "", "[1, 3]")
    assert [result.is_action_valid for result in results] == [False] * 5 + [True]
    assert Scripted.made[-1].asked[1:] == [[1, 3]]
    assert results[3].action == "left"
    assert results[3].observation.text == (
        "That is no action here. Answer with a JSON list of integers of shape [2], at least 0, at "
        "most [2, 3], alone or in <action> tags."
    )


def test_observations_are_rounded_sorted_and_whole(register):
    first, _ = play(GymnasiumEnvironment(id=register()))
    assert first.text == '{"note": "é", "where": [0.3333, 0.0]}'
    assert first.info == {"lives": "3"}


def test_instructions_are_what_the_environment_tells_players(register):
    instructions = GymnasiumEnvironment(id=register()).instructions
    assert instructions.endswith("## Rewards\nWhat the option says.")
    assert "2: Move east (right)" in GymnasiumEnvironment(id="Taxi-v4").instructions


def test_a_text_rendering_is_shown_with_its_colours_by_name():
    first, (moved,) = play(GymnasiumEnvironment(id="FrozenLake-v1"), "9")
    assert first.text == "<red>S</red>FFF\nFHFH\nFFFH\nHFFG\n\n0"
    assert first.admissible_actions == moved.observation.admissible_actions == ("0", "1", "2", "3")


def test_an_action_mask_shortens_the_list_but_forbids_nothing():
    """Taxi's mask leaves out moves that change nothing; a vain pick-up costs 10 but is playable."""
    first, (result,) = play(GymnasiumEnvironment(id="Taxi-v4"), "4")
    assert "4" not in first.admissible_actions
    assert (result.is_action_valid, result.reward) == (True, -10.0)


def test_the_wrapped_environment_is_closed_once_and_anew_at_reset(register):
    environment = GymnasiumEnvironment(id=register())
    environment.close()
    play(environment)
    play(environment)
    first, second = Scripted.made[-2:]
    assert (first.is_closed, second.is_closed) == (True, False)
    environment.close()
    assert second.is_closed


@pytest.mark.parametrize(
    ("space", "written", "action"),
    [
        (spaces.Discrete(3, start=-1), "-1", -1),
        (spaces.MultiBinary(2), "[1, 0]", [1, 0]),
        (spaces.Box(-1, 1, (2, 1)), "[[0.5], [1]]", [[0.5], [1.0]]),
        (spaces.Box(0, 255, (1,), dtype=np.uint8), "[255]", [255]),
        (spaces.Text(5), "left", "left"),
        (WIDE, '{"say": "hi", "move": 3}', {"move": 3, "say": "hi"}),
        (spaces.Tuple([spaces.Discrete(2), spaces.Text(3)]), '[1, "a"]', [1, "a"]),
    ],
)
def test_every_kind_of_action_can_be_written(space, written, action):
    parsed = parse_action(space, written)
    assert space.contains(parsed)
    assert to_plain(parsed) == action


@pytest.mark.parametrize(
    ("space", "written"),
    [
        *[
            (spaces.Discrete(3), text)
            for text in ("3", "-1", "1.0", "true", "null", "[1]", "9" * 5000, "\u0661")
        ],
        *[
            (spaces.Box(-1, 1, (1,)), text)
            for text in ("[2]", "[NaN]", "[true]", "[[0]]", '["0"]', "0", "[" * 100_000)
        ],
        *[
            (spaces.Box(-np.inf, np.inf, (1,)), text)
            for text in ("[Infinity]", "[1e999]", "[1e39]")
        ],
        *[
            (spaces.Box(0, 255, (1,), dtype=np.uint8), text)
            for text in ("[256]", "[-1]", "[0.5]", f"[{10**30}]")
        ],
        (spaces.MultiBinary(2), "[2, 0]"),
        (spaces.Box(-1, 1, (2, 2)), "[[0], [0, 0]]"),
        (spaces.Text(5), "too long"),
        (spaces.Text(5), "hé"),
        (WIDE, "{}"),
        (WIDE, '{"move": 0, "say": "a"}'),
        (WIDE, '{"move": 1, "say": 1}'),
        (WIDE, '{"move": 1, "say": "a", "x": 1}'),
        (spaces.Tuple([spaces.Discrete(2)]), "[1, 1]"),
    ],
)
def test_what_is_outside_a_space_is_no_action(space, written):
    assert parse_action(space, written) is None


def test_a_space_says_what_to_write():
    assert describe_space(WIDE).startswith(
        "A JSON object (move: An integer of 1 to 3; say: A text of 1 to 5 of the characters 0"
    )
    found = describe_space(spaces.Box(-1, 1, (3,)))
    assert found == "A JSON list of numbers of shape [3], at least -1.0, at most 1.0"


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"id": "CartPol-v1"}, "Use one of CartPole-v1"),
        ({"id": "Zzzzzzzz"}, "pprint_registry"),
        ({"id": "no_such_module:Chess-v0"}, "No module named"),
        ({"id": "CartPole-v1", "num_tasks": 0}, "num_tasks"),
        ({"id": "CartPole-v1", "num_tasks": "many"}, "num_tasks"),
        ({"id": "CartPole-v1", "max_turns": -1}, "max_turns"),
    ],
)
def test_options_that_cannot_be_used_are_refused(options, why):
    with pytest.raises(ConfigurationError, match=why):
        GymnasiumEnvironment(**options)


def test_what_cannot_be_told_as_text_is_refused(register):
    class Picture(Scripted):
        observation_space = spaces.Box(0, 255, (64, 64, 3), dtype=np.uint8)

    class Unwritable(Scripted):
        action_space = spaces.Sequence(spaces.Discrete(2))

    with pytest.raises(ConfigurationError, match=r"12,288 numbers, at most 1,024"):
        GymnasiumEnvironment(id=register(Picture))
    with pytest.raises(ConfigurationError, match="Actions of Sequence"):
        GymnasiumEnvironment(id=register(Unwritable))


def test_tasks_are_seeds_in_two_splits():
    environment = GymnasiumEnvironment(id="CartPole-v1", num_tasks=15)
    train, heldout = map(environment.list_tasks, environment.splits)
    assert (len(train), len(heldout)) == (15, 2)
    assert [environment.get_task(task.task_id) for task in (*train, *heldout)] == [*train, *heldout]
    assert train[14].description == "Play CartPole-v1."
    with pytest.raises(UnknownResourceError):
        environment.list_tasks("test")


@pytest.mark.parametrize(
    "task_id",
    ["train-15", "train-01", "train--1", "train-", "0", "", "test-0", "train-" + "9" * 5000],
)
def test_an_unknown_task_is_refused(task_id):
    with pytest.raises(UnknownResourceError, match="has no task"):
        GymnasiumEnvironment(id="CartPole-v1", num_tasks=15).reset(task_id, 0)


def test_the_last_tagged_action_counts_and_otherwise_the_whole_text():
    assert find_action("<action>0</action> no, <action>\n1 </action>.") == "1"
    assert find_action(" 1\n") == "1"
    assert parse_json(json.dumps({"a": 1})) == {"a": 1}


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://host", "http://", ""])
def test_an_address_that_is_no_url_is_refused(url):
    with pytest.raises(ConfigurationError, match="expected http://HOST:PORT"):
        OpenEnvEnvironment(url=url)


@pytest.mark.parametrize(
    "options", [{"max_turns": 0}, {"max_turns": "2"}, {"timeout_s": 0}, {"timeout_s": float("nan")}]
)
def test_limits_that_cannot_be_used_are_refused(options):
    with pytest.raises(ConfigurationError, match="above 0"):
        OpenEnvEnvironment(url="http://127.0.0.1:1", **options)


def test_an_openenv_server_that_is_not_there_is_named():
    with pytest.raises(
        EnvironmentFailedError, match=r"http://127.0.0.1:1 does not answer: .* Start it first"
    ):
        OpenEnvEnvironment(url="http://127.0.0.1:1")
