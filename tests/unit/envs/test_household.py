"""The household's rules.

The example task below is drawn from the rules' own docstring: two stations, a closed place.
"""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest
import yaml

from sdar.contracts.errors import UnknownResourceError
from services.envs.household import HouseholdEnvironment
from services.envs.household.demonstrations import (
    draw_misguided_procedure,
    find_misconception,
    list_demonstration,
    skill_wording,
)
from services.envs.household.game import (
    MAX_TURNS,
    NOTHING_HAPPENS,
    PROCEDURES,
    STATIONS,
    TASK_TYPES,
    HouseholdTask,
    list_household_tasks,
    parse_task_id,
)

SKILLS = Path(__file__).parents[3] / "skills/household"
TASK_ID = "polish-apple-drawer-desk"
EXPERT = ["open drawer", "take apple", "use sink", "use lamp", "put apple in desk"]


def play(actions, task_id=TASK_ID):
    environment = HouseholdEnvironment()
    environment.reset(task_id, seed=0)
    return [environment.step(action) for action in actions]


def all_tasks():
    return [*list_household_tasks("train"), *list_household_tasks("heldout")]


def test_the_first_observation_names_everything_but_the_procedure():
    observation = HouseholdEnvironment().reset(TASK_ID, seed=0)
    assert observation.text == (
        "task : polish the apple and put it in the desk . the apple is in the drawer . you see "
        "sink oven fridge fan iron lamp ."
    )
    assert observation.admissible_actions == ("open drawer",)


def test_the_expert_wins_and_every_turn_is_answered_in_words():
    results = play(EXPERT)
    assert [result.observation.text for result in results] == [
        "the drawer is open . you see the apple .",
        "you have the apple .",
        "the sink is done .",
        "the lamp is done .",
        "the end .",
    ]
    assert [result.reward for result in results] == [0, 0, 0, 0, 1]
    assert all(result.is_action_valid for result in results)
    last = results[-1]
    found = (last.terminated, last.truncated, last.is_success, last.reward_components)
    assert found == (True, False, True, {"success": 1.0})


def test_the_expert_wins_every_task_of_both_splits_in_two_to_six_turns():
    environment = HouseholdEnvironment()
    lengths = Counter()
    for task in all_tasks():
        environment.reset(task.task_id, seed=0)
        results = [environment.step(action) for action in list_demonstration(task, task.procedure)]
        assert results[-1].is_success
        lengths[len(results)] += 1
    assert set(lengths) == {2, 3, 4, 5, 6}


@pytest.mark.parametrize(
    "stations",
    [[], ["sink"], ["lamp", "sink"], ["sink", "lamp", "fan"], ["sink", "sink", "lamp"]],
    ids=["none", "short", "swapped", "long", "repeated"],
)
def test_any_other_procedure_loses(stations):
    last = play(
        [
            "open drawer",
            "take apple",
            *(f"use {station}" for station in stations),
            "put apple in desk",
        ]
    )[-1]
    assert (last.terminated, last.is_success, last.reward) == (True, False, 0.0)


@pytest.mark.parametrize(
    "action",
    ["", "take apple", "use sink", "Open drawer", "open  drawer", "put apple in desk", "open box"],
)
def test_an_inadmissible_action_changes_nothing_but_costs_a_turn(action):
    wrong, *rest = play([action, *EXPERT])
    found = (wrong.observation.text, wrong.is_action_valid, wrong.reward)
    assert found == (NOTHING_HAPPENS, False, 0.0)
    assert rest[-1].is_success


def test_white_space_around_an_action_is_forgiven():
    result = play([" open drawer\n"])[0]
    assert (result.action, result.is_action_valid) == ("open drawer", True)


def test_the_eighth_turn_truncates():
    results = play(["wait"] * MAX_TURNS)
    assert [result.truncated for result in results] == [False] * 7 + [True]
    assert not results[-1].terminated
    assert results[-1].observation.admissible_actions == ()


def test_a_win_on_the_last_turn_is_a_win():
    last = play(["wait"] * 3 + EXPERT)[-1]
    assert (last.terminated, last.truncated, last.is_success) == (True, False, True)


def test_the_same_actions_give_the_same_game_whatever_the_seed():
    actions = random.Random(0).choices([*EXPERT, "use fan", "nonsense"], k=6)
    transcripts = []
    for seed in (0, 1):
        environment = HouseholdEnvironment()
        environment.reset(TASK_ID, seed)
        transcripts.append([environment.step(action) for action in actions])
    assert transcripts[0] == transcripts[1]


def test_a_reset_forgets_the_game_before():
    environment = HouseholdEnvironment()
    first = environment.reset(TASK_ID, seed=0)
    environment.step("open drawer")
    assert environment.reset(TASK_ID, seed=0) == first


def test_splits_are_disjoint_and_hold_out_a_tenth_of_every_combination():
    train, heldout = (list_household_tasks(split) for split in ("train", "heldout"))
    assert (
        len(train) + len(heldout) == len({task.task_id for task in all_tasks()}) == 12 * 12 * 8 * 7
    )
    assert 0.09 < len(heldout) / (len(train) + len(heldout)) < 0.11


def test_the_heldout_list_never_changes():
    """Evaluations are compared task by task: the list is part of the version."""
    tasks = HouseholdEnvironment().list_tasks("heldout")
    assert len(tasks) == 818
    found = [task.task_id for task in tasks[:3]]
    assert found == ["place-pan-chest-rack", "clean-knife-table-cabinet", "heat-book-chest-desk"]


@pytest.mark.parametrize("num_tasks", [12, 100, 192])
def test_the_first_heldout_tasks_are_balanced_over_types(num_tasks):
    counts = Counter(
        task.task_type for task in HouseholdEnvironment().list_tasks("heldout")[:num_tasks]
    )
    assert len(counts) == 12
    assert max(counts.values()) - min(counts.values()) <= 1


def test_a_task_is_found_by_its_id_alone():
    environment = HouseholdEnvironment()
    task = environment.get_task(TASK_ID)
    assert task in environment.list_tasks(task.split)
    assert task.description == "polish the apple and put it in the desk ."


@pytest.mark.parametrize(
    "task_id", ["", "polish-apple-drawer", "polish-apple-drawer-drawer", "fly-apple-drawer-desk"]
)
def test_an_unknown_task_is_refused(task_id):
    assert parse_task_id(task_id) is None
    with pytest.raises(UnknownResourceError, match="has no task"):
        HouseholdEnvironment().reset(task_id, seed=0)


def test_an_unknown_split_is_refused():
    with pytest.raises(UnknownResourceError, match="Use one of train, heldout"):
        HouseholdEnvironment().list_tasks("test")


def test_the_skill_library_tells_every_procedure_word_for_word():
    index = yaml.safe_load((SKILLS / "index.yaml").read_text())
    told = {entry["task_types"][0]: (SKILLS / entry["file"]).read_text().strip() for entry in index}
    assert told == {
        task_type: skill_wording(task_type, procedure)
        for task_type, procedure in PROCEDURES.items()
    }
    assert {entry["kind"] for entry in index} == {"specific"}


def test_the_demonstrator_errs_as_often_as_asked():
    """Odds over 4,000 single-step procedures: right 0.3, favourite mistake 0.4, others 0.3."""
    rng, task = random.Random(0), HouseholdTask("clean", "apple", "table", "desk")
    favourite = find_misconception("clean", 0, "sink")
    drawn = Counter(
        draw_misguided_procedure(rng, task, right=0.3, misconception=0.4)[0] for _ in range(4000)
    )
    assert drawn["sink"] / 4000 == pytest.approx(0.3, abs=0.03)
    assert drawn[favourite] / 4000 == pytest.approx(0.4, abs=0.03)
    assert set(drawn) == set(STATIONS)


def test_no_misconception_is_right():
    for task_type in TASK_TYPES:
        for step, station in enumerate(PROCEDURES[task_type]):
            assert find_misconception(task_type, step, station) != station
