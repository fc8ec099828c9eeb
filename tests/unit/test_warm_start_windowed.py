"""Demonstrations for environments with a window of history, and the models made of them."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from sdar.cli.warm_start.alfworld import AlfworldRecipe
from sdar.cli.warm_start.making import create_model
from sdar.cli.warm_start.recipe import END_OF_TURN_ID, WarmStartPhase, load_recipe
from sdar.cli.warm_start.search import SearchDemonstrator, SearchRecipe
from sdar.cli.warm_start.webshop import WebshopRecipe
from sdar.contracts.errors import ConfigurationError
from sdar.model.chat import ChatTokenizer, place_skills
from services.rollout.prompting import EpisodeSetting, HistoryWindow
from services.teacher.retrieval import Retriever
from services.teacher.skills import SHIPPED_LIBRARIES, format_skills, load_skill_library

MODELS = Path(__file__).parents[2] / "examples/models"
SMALL_WORLD = {"num_questions": 40, "num_tokenizer_episodes": 20}
NUM_SKILLS = 3


def open_search(**changes: object) -> tuple[SearchDemonstrator, ChatTokenizer]:
    recipe = SearchRecipe(**(SMALL_WORLD | changes))
    return recipe.open_demonstrator(), ChatTokenizer(MODELS / "search-tiny")


def test_a_model_for_an_unknown_environment_is_refused_with_those_that_are_known():
    with pytest.raises(ConfigurationError, match="household, alfworld, webshop, search"):
        load_recipe("chess")


@pytest.mark.parametrize("environment", ["alfworld", "webshop", "search"])
def test_a_shipped_model_is_its_default_recipe_s_and_small(environment):
    shipped = MODELS / f"{environment}-tiny"
    found = json.loads((shipped / "recipe.json").read_text())["digest"]
    assert found == load_recipe(environment).digest
    assert sum(file.stat().st_size for file in shipped.iterdir()) < 1_500_000


@pytest.mark.parametrize("environment", ["alfworld", "webshop", "search"])
def test_to_a_tiny_model_instructions_and_every_skill_are_one_token(environment):
    tokenizer = ChatTokenizer(MODELS / f"{environment}-tiny").tokenizer
    for skill in load_skill_library(SHIPPED_LIBRARIES / environment).skills:
        assert len(tokenizer.encode(skill.text)) == 1


def test_a_hinted_demonstration_shows_skills_exactly_as_a_teacher_s_prompt_does():
    demonstrator, chat = open_search(expert_share=1.0)
    demonstrator.tasks = demonstrator.tasks[:1]
    (task,) = demonstrator.tasks
    first = demonstrator.write(chat, random.Random(0), hinted_share=1.0)
    setting = EpisodeSetting(
        demonstrator.environment.instructions,
        demonstrator.environment.action_format,
        task.description,
    )
    observation = demonstrator.environment.reset(task.task_id, task.seed)
    plain = HistoryWindow(chat, setting, 0, 512).begin(observation.text).messages
    skills = (
        Retriever(demonstrator.skill_library, kind="task_type", num_skills=NUM_SKILLS)
        .retrieve(task, "key")
        .skills
    )
    privileged = chat.render_fresh(place_skills(plain, format_skills(skills))).tolist()
    shown = [first, *demonstrator._written]
    assert privileged in [prompt for (prompt, _), _ in shown]
    assert all(not is_mine and is_response for (_, is_mine), (_, is_response) in shown)


def test_where_a_skill_is_shown_the_expert_is_imitated_and_elsewhere_the_player_who_errs():
    demonstrator, chat = open_search(expert_share=0.0)
    task = next(task for task in demonstrator.tasks if task.task_type == "two_hop")
    observation = demonstrator.environment.reset(task.task_id, task.seed)
    choice = demonstrator.open_player(task)(observation, random.Random(0))
    for hinted_share, imitated in ((1.0, choice.expert), (0.0, choice.erring)):
        demonstrator, chat = open_search(expert_share=0.0)
        demonstrator.tasks = [task]
        responses = [
            demonstrator.write(chat, random.Random(0), hinted_share)[1][0] for _ in range(100)
        ]
        assert [*chat.tokenizer.encode(imitated), END_OF_TURN_ID] in responses
        unwanted = choice.erring if imitated == choice.expert else choice.expert
        assert [*chat.tokenizer.encode(unwanted), END_OF_TURN_ID] not in responses


def test_the_expert_of_search_answers_every_question_of_its_own_world():
    demonstrator, _ = open_search(expert_share=1.0)
    for task in demonstrator.tasks:
        played = [turn.played for turn in demonstrator._play(task, random.Random(0))]
        demonstrator.environment.reset(task.task_id, task.seed)
        results = [demonstrator.environment.step(text) for text in played]
        assert results[-1].is_success


def test_alfworld_is_learnt_in_small_rooms_with_one_object_and_its_expert_wins():
    demonstrator = AlfworldRecipe(num_games=6, expert_share=1.0, max_turns=40).open_demonstrator()
    expected = {
        *("pick_and_place_simple", "look_at_obj_in_light"),
        *(f"pick_{treated}_then_place_in_recep" for treated in ("clean", "heat", "cool")),
    }
    assert {task.task_type for task in demonstrator.tasks} == expected
    for task in demonstrator.tasks:
        played = [turn.played for turn in demonstrator._play(task, random.Random(0))]
        demonstrator.environment.reset(task.task_id, task.seed)
        assert [demonstrator.environment.step(text) for text in played][-1].is_success


def test_a_thinned_list_keeps_the_action_that_is_taken_and_the_order():
    demonstrator = WebshopRecipe(thinned_share=1.0).open_demonstrator()
    actions = [f"click[{letter}]" for letter in "abcdefgh"]
    thinned = demonstrator._thin_out(
        actions, "<think></think><action>click[e]</action>", random.Random(0)
    )
    assert "click[e]" in thinned
    assert list(thinned) == [action for action in actions if action in thinned]
    assert len(thinned) <= 3


def test_webshop_s_expert_buys_most_training_goals_with_a_full_score():
    demonstrator = WebshopRecipe(expert_share=1.0).open_demonstrator()
    num_bought = 0
    for task in demonstrator.tasks[:40]:
        played = [turn.played for turn in demonstrator._play(task, random.Random(0))]
        demonstrator.environment.reset(task.task_id, task.seed)
        num_bought += [demonstrator.environment.step(text) for text in played][-1].is_success
    assert num_bought > 30


def test_equal_recipes_make_equal_models_of_search(tmp_path):
    recipe = SearchRecipe(
        **SMALL_WORLD, num_layers=1, batch_size=2, phases=(WarmStartPhase(2, 1e-3, 0.5, 0.5),)
    )
    first, second = (create_model(recipe, tmp_path / name) / "model.safetensors" for name in "ab")
    assert first.read_bytes() == second.read_bytes()
