"""The exact tokens of a conversation. One token is one byte here, so texts show the layout."""

from __future__ import annotations

import numpy as np

from sdar.contracts.types import ChatMessage, StopReason
from services.rollout.prompting import Conversation

HEAD = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


def encode(tokenizer, text):
    return tokenizer.tokenizer.encode(text, add_special_tokens=False)


def test_a_prompt_grows_by_the_sampled_tokens_and_the_text_between(tokenizer):
    """<user A> <assistant> r e s <|im_end|>  \\n <user B> <assistant>"""
    prompts = Conversation(tokenizer)
    first = prompts.begin("A")
    response = np.asarray([*encode(tokenizer, "res"), tokenizer.eos_token_id], dtype=np.int32)
    second = prompts.extend(response, StopReason.END_OF_TURN, "B")
    assert first.token_ids.tolist() == encode(tokenizer, HEAD.format("A"))
    assert second.token_ids.tolist() == encode(tokenizer, HEAD.format("A") + "res<|im_end|>\n" + HEAD.format("B"))
    assert (first.extends_previous, second.extends_previous) == (False, True)
    assert second.messages == (ChatMessage("user", "B"),)


def test_a_response_cut_at_its_length_is_closed_by_the_prompt(tokenizer):
    prompts = Conversation(tokenizer)
    prompts.begin("A")
    second = prompts.extend(np.asarray(encode(tokenizer, "re"), dtype=np.int32), StopReason.LENGTH, "B")
    assert second.token_ids.tolist() == encode(tokenizer, HEAD.format("A") + "re<|im_end|>\n" + HEAD.format("B"))


def test_instructions_become_the_system_message(tokenizer):
    first = Conversation(tokenizer, instructions="Rules.").begin("A")
    assert first.token_ids.tolist() == encode(tokenizer, "<|im_start|>system\nRules.<|im_end|>\n" + HEAD.format("A"))
    assert first.messages == (ChatMessage("system", "Rules."), ChatMessage("user", "A"))


def test_skills_stand_before_the_first_observation_and_nowhere_else(tokenizer):
    prompts = Conversation(tokenizer, instructions="Rules.", skill_text="use sink .")
    first = prompts.begin("A")
    second = prompts.extend(np.asarray([2], dtype=np.int32), StopReason.END_OF_TURN, "B")
    assert first.messages[1] == ChatMessage("user", "use sink . A")
    assert tokenizer.tokenizer.decode(second.token_ids).count("use sink .") == 1
