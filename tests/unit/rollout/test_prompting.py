"""The exact tokens of a conversation. One token is one byte here, so texts show the layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sdar.config import load_config
from sdar.contracts.types import ChatMessage, StopReason
from services.envs.household.game import HouseholdGame, parse_task_id
from services.envs.search.environment import SearchEnvironment
from services.rollout.prompting import Conversation, EpisodeSetting, HistoryWindow
from services.rollout.service import build_rules

ROOT = Path(__file__).parents[3]

HEAD = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


def encode(tokenizer, text):
    return tokenizer.tokenizer.encode(text, add_special_tokens=False)


def test_a_prompt_grows_by_the_sampled_tokens_and_the_text_between(tokenizer):
    """<user A> <assistant> r e s <|im_end|>  \\n <user B> <assistant>"""
    prompts = Conversation(tokenizer, EpisodeSetting())
    first = prompts.begin("A")
    response = np.asarray([*encode(tokenizer, "res"), tokenizer.stops.closing_id], dtype=np.int32)
    second = prompts.extend(response, StopReason.END_OF_TURN, "act", "B")
    assert first.token_ids.tolist() == encode(tokenizer, HEAD.format("A"))
    assert second.token_ids.tolist() == encode(
        tokenizer, HEAD.format("A") + "res<|im_end|>\n" + HEAD.format("B")
    )
    assert (first.extends_previous, second.extends_previous) == (False, True)
    assert second.messages == (ChatMessage("user", "B"),)


def test_a_response_cut_at_its_length_is_closed_by_the_prompt(tokenizer):
    prompts = Conversation(tokenizer, EpisodeSetting())
    prompts.begin("A")
    second = prompts.extend(
        np.asarray(encode(tokenizer, "re"), dtype=np.int32), StopReason.LENGTH, "act", "B"
    )
    assert second.token_ids.tolist() == encode(
        tokenizer, HEAD.format("A") + "re<|im_end|>\n" + HEAD.format("B")
    )


def test_instructions_become_the_system_message(tokenizer):
    first = Conversation(tokenizer, EpisodeSetting("Rules.")).begin("A")
    assert first.token_ids.tolist() == encode(
        tokenizer, "<|im_start|>system\nRules.<|im_end|>\n" + HEAD.format("A")
    )
    assert first.messages == (ChatMessage("system", "Rules."), ChatMessage("user", "A"))


@pytest.mark.parametrize(
    ("observation", "shown"),
    [
        ("a room", "Task: clean the mug\na room"),
        ("clean the mug . a room", "clean the mug . a room"),
    ],
)
def test_a_conversation_shows_the_task_once(tokenizer, observation, shown):
    prompts = Conversation(tokenizer, EpisodeSetting(task_description="clean the mug"))
    assert user_text(prompts.begin(observation)) == shown
    assert user_text(prompts.extend(NOTHING, StopReason.LENGTH, "act", "B")) == "B"


def test_a_conversation_tells_the_action_format_once_and_the_possible_actions_every_turn(tokenizer):
    prompts = Conversation(tokenizer, EpisodeSetting("Rules.", "One action.", "clean the mug"))
    assert user_text(prompts.begin("A", ("go", "stop"))) == (
        "Task: clean the mug\nA\nPossible actions:\ngo\nstop\nOne action."
    )
    closed = np.asarray([2], dtype=np.int32)
    second = prompts.extend(closed, StopReason.END_OF_TURN, "go", "B", ("stop",))
    assert user_text(second) == "B\nPossible actions:\nstop"
    third = prompts.extend(closed, StopReason.END_OF_TURN, "stop", "C")
    assert user_text(third) == "C"


@pytest.mark.parametrize(
    ("instructions", "action_format", "is_told"),
    [
        ("Rules. One action.", "One action.", False),
        ("Search in <search> </search>.", "Write <search>words</search>.", False),
        ("Search in <search> </search>.", "Write <search> </search> or <answer> </answer>.", True),
        ("Rules.", "Write <search>words</search>.", True),
        ("Rules.", "", False),
    ],
)
def test_an_action_format_that_the_instructions_hold_is_not_repeated(
    tokenizer, instructions, action_format, is_told
):
    first = Conversation(tokenizer, EpisodeSetting(instructions, action_format)).begin("A")
    assert user_text(first) == (f"A\n{action_format}" if is_told else "A")


def test_the_search_environment_s_format_stands_in_its_instructions_alone(tokenizer):
    setting = EpisodeSetting(SearchEnvironment.instructions, SearchEnvironment.action_format)
    assert user_text(Conversation(tokenizer, setting).begin("A question.")) == "A question."


def test_the_household_example_asks_its_model_by_the_prompts_that_it_was_made_on():
    rules = build_rules(load_config(ROOT / "examples" / "household.yaml"))
    assert not rules.shows_actions
    # Neither format nor actions reach the style then.
    prompts = rules.build_prompts(EpisodeSetting())
    game = HouseholdGame(parse_task_id("restore-apple-drawer-desk"))
    chat = rules.tokenizer
    shown = ChatMessage("user", game.first_observation)
    assert prompts.begin(game.first_observation).token_ids.tolist() == (
        chat.render_fresh([shown]).tolist()
    )


def test_skills_stand_before_the_first_observation_and_nowhere_else(tokenizer):
    prompts = Conversation(tokenizer, EpisodeSetting("Rules.", skill_text="use sink ."))
    first = prompts.begin("A")
    second = prompts.extend(np.asarray([2], dtype=np.int32), StopReason.END_OF_TURN, "act", "B")
    assert first.messages[1] == ChatMessage("user", "use sink . A")
    assert tokenizer.tokenizer.decode(second.token_ids).count("use sink .") == 1


SETTING = EpisodeSetting("Rules.", "One action.", "clean the mug", "")
NOTHING = np.empty(0, dtype=np.int32)


def user_text(prompt):
    return prompt.messages[-1].content


def test_a_window_shows_the_task_the_last_turns_what_is_seen_now_and_what_is_possible(tokenizer):
    prompts = HistoryWindow(tokenizer, SETTING, 2, 10_000)
    first = prompts.begin("a room", ["go left", "go right"])
    assert user_text(first).splitlines() == [
        "Task: clean the mug",
        "Seen now: a room",
        "Possible actions:",
        "go left",
        "go right",
        "One action.",
    ]
    prompts.extend(NOTHING, StopReason.END_OF_TURN, "go left", "a mug")
    prompts.extend(NOTHING, StopReason.END_OF_TURN, "", "nothing happens")
    fourth = prompts.extend(NOTHING, StopReason.END_OF_TURN, "take mug", "mug taken", ["clean mug"])
    assert user_text(fourth) == (
        "Task: clean the mug\nActions taken: 3. The last 2:\n"
        "Seen: a mug\nDone: (no action that could be read)\n"
        "Seen: nothing happens\nDone: take mug\n"
        "Seen now: mug taken\nPossible actions:\nclean mug\nOne action."
    )


def test_every_prompt_of_a_window_is_fresh_and_carries_all_its_messages(tokenizer):
    prompts = HistoryWindow(tokenizer, SETTING, 1, 10_000)
    for prompt in (prompts.begin("A"), prompts.extend(NOTHING, StopReason.END_OF_TURN, "act", "B")):
        assert not prompt.extends_previous
        assert prompt.messages[0] == ChatMessage("system", "Rules.")
        assert prompt.token_ids.tolist() == tokenizer.render_fresh(prompt.messages).tolist()


def test_a_window_that_does_not_fit_leaves_out_the_oldest_turns_and_says_how_many(tokenizer):
    """One token is one byte: observation 0 has 300 and has to go; observation 1 may stay."""
    prompts = HistoryWindow(tokenizer, SETTING, 2, 300)
    prompts.begin("x" * 300)
    prompts.extend(NOTHING, StopReason.END_OF_TURN, "one", "B")
    third = prompts.extend(NOTHING, StopReason.END_OF_TURN, "two", "C")
    assert third.num_missing_turns == 1
    assert "Actions taken: 2. The last 1:\nSeen: B\nDone: two\nSeen now: C" in user_text(third)
    assert len(third.token_ids) <= 300


def test_a_window_of_no_turns_still_counts_the_actions(tokenizer):
    prompts = HistoryWindow(tokenizer, SETTING, 0, 10_000)
    prompts.begin("A")
    second = prompts.extend(NOTHING, StopReason.END_OF_TURN, "act", "B")
    found = (user_text(second), second.num_missing_turns)
    assert found == ("Task: clean the mug\nActions taken: 1.\nSeen now: B\nOne action.", 0)


def test_skills_stand_in_every_fresh_prompt_of_a_window(tokenizer):
    prompts = HistoryWindow(tokenizer, EpisodeSetting(skill_text="use sink ."), 1, 10_000)
    prompts.begin("A")
    assert user_text(prompts.extend(NOTHING, StopReason.END_OF_TURN, "act", "B")).startswith(
        "use sink . Actions taken: 1."
    )
