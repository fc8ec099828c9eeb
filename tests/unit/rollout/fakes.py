"""Fakes for a rollout worker: scripted parts, a byte-level tokenizer, a tiny random model."""

from __future__ import annotations

import asyncio
from collections import deque
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from sdar.contracts.errors import (
    EngineFailedError,
    EnvironmentFailedError,
    UnavailableError,
    WeightsUnavailableError,
)
from sdar.contracts.types import (
    EnvironmentIdentity,
    ModelIdentity,
    Purpose,
    SamplingParameters,
    StopReason,
    Task,
    TaskGroup,
    WeightsManifest,
)
from services.rollout.engine import EngineStats, Generation
from services.rollout.environment_client import EnvironmentProfile, Session, StepOutcome
from services.rollout.episode import EpisodeRules
from services.rollout.prompting import Conversation

RUN_ID = "test"
MODEL = ModelIdentity("tiny", "f00d")
IDENTITY = EnvironmentIdentity("script", "1")
SAMPLING = SamplingParameters(1.0, 1.0, 8)
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] "
    "}}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_model(
    path: Path, *, is_tied: bool = True, seed: int = 0, num_key_values: int = 1
) -> Path:
    """A Qwen2 of 2 layers with random weights, and a tokenizer of single bytes."""
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {
        token: index
        for index, token in enumerate([*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())])
    }
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    fast.chat_template = TEMPLATE
    fast.save_pretrained(path)
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=num_key_values,
        max_position_embeddings=512,
        tie_word_embeddings=is_tied,
        eos_token_id=2,
        pad_token_id=0,
        bos_token_id=None,
        initializer_range=0.2,
    )
    Qwen2ForCausalLM(config).save_pretrained(path)
    return path


def make_group(
    group_id="group-1", size=2, *, purpose=Purpose.TRAIN, version=0, max_turns=4, sampling=SAMPLING
) -> TaskGroup:
    return TaskGroup(
        run_id=RUN_ID,
        group_id=group_id,
        task=Task("script", "train", "t0", "clean", "clean the mug .", 7),
        group_size=size,
        purpose=purpose,
        admitted_version=version,
        sampling=sampling,
        max_turns=max_turns,
        environment_address="here:1",
        evaluation_id="eval" if purpose is Purpose.EVALUATION else "",
    )


def make_manifest(version: int) -> WeightsManifest:
    return WeightsManifest(RUN_ID, version, f"v{version}", (), 0, MODEL, 0.0)


def make_rules(tokenizer, *, max_sequence_tokens=512, penalty=0.1) -> EpisodeRules:
    return EpisodeRules(
        tokenizer=tokenizer,
        build_prompts=lambda setting: Conversation(tokenizer, setting),
        model=MODEL,
        max_sequence_tokens=max_sequence_tokens,
        invalid_action_penalty=penalty,
    )


def answer(
    observation="next", *, reward=0.0, over=False, cut=False, valid=True, success=False, actions=()
) -> StepOutcome:
    return StepOutcome(
        observation=observation,
        reward=reward,
        reward_components={"success": reward},
        is_terminated=over,
        is_truncated=cut,
        action="act",
        is_action_valid=valid,
        is_success=success,
        admissible_actions=actions,
    )


class ScriptedEnvironment:
    """Every session plays the same script of answers; an error in it is raised. Its own directory.

    Args:
        num_failures: sessions whose first step fails before the script is followed.
        gate: steps wait for it.
    """

    def __init__(
        self, *script, instructions="", action_format="", first="start", num_failures=0, gate=None
    ) -> None:
        self.script = script or (answer(over=True, reward=1.0, success=True),)
        self.instructions, self.first = instructions, first
        self.action_format = action_format
        self.num_failures, self.gate = num_failures, gate
        self.keys: list[str] = []
        self.texts: list[str] = []
        self.num_waiting = 0
        self.opened: set[str] = set()
        self.closed: set[str] = set()
        self.max_open = 0
        self._remaining: dict[str, deque] = {}

    def get(self, address):
        return self

    async def close(self):
        pass

    async def describe(self, environment):
        return EnvironmentProfile(IDENTITY, self.instructions, self.action_format)

    async def open_session(self, task, idempotency_key):
        session_id = f"s{len(self.opened)}"
        script = self.script
        if self.num_failures:
            self.num_failures -= 1
            script = (EnvironmentFailedError("the simulator died"),)
        self._remaining[session_id] = deque(script)
        self.keys.append(idempotency_key)
        self.opened.add(session_id)
        self.max_open = max(self.max_open, len(self.opened - self.closed))
        return Session(session_id, self.first)

    async def step(self, session_id, step_index, text):
        if self.gate is not None:
            await self.gate.wait()
        self.texts.append(text)
        outcome = self._remaining[session_id].popleft()
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    async def close_session(self, session_id):
        self.closed.add(session_id)


class ScriptedEngine:
    """Answers every prompt with the next of `responses` (repeating the last), stamped with the
    version of each moment.

    Attributes:
        switch_after: the version changes to `version + 1` after so many tokens of each response.
    """

    def __init__(self, *responses, switch_after=None, missing=()) -> None:
        self.responses = deque(responses or ([10, 11, 2],))
        self.switch_after, self.missing = switch_after, set(missing)
        self.policy_version = 0
        self.is_alive = True
        self.prompts: list[list[int]] = []
        self.updates: list[int] = []
        self.served: list[int] = []

    @property
    def stats(self):
        return EngineStats(
            num_generated_tokens=3 * len(self.prompts), num_weight_updates=len(self.updates)
        )

    async def start(self):
        pass

    async def stop(self):
        self.is_alive = False

    async def generate(self, prompt_token_ids, sampling):
        await asyncio.sleep(0)
        if not self.is_alive:
            raise EngineFailedError("dead")
        self.prompts.append(list(map(int, prompt_token_ids)))
        self.served.append(self.policy_version)
        response = self.responses.popleft() if len(self.responses) > 1 else self.responses[0]
        versions = np.full(len(response), self.policy_version)
        if self.switch_after is not None:
            versions[self.switch_after :] += 1
            self.policy_version += 1
        return Generation(
            response_token_ids=np.asarray(response, dtype=np.int32),
            logprobs=np.linspace(-1, -0.5, len(response), dtype=np.float32),
            policy_versions=versions.astype(np.int32),
            stop_reason=StopReason.END_OF_TURN if response[-1] == 2 else StopReason.LENGTH,
            num_cached_tokens=0,
        )

    async def update_weights(self, manifest):
        await asyncio.sleep(0)
        if not self.is_alive:
            raise UnavailableError("stopped")
        if manifest.policy_version in self.missing:
            raise WeightsUnavailableError("gone")
        self.policy_version = manifest.policy_version
        self.updates.append(manifest.policy_version)
