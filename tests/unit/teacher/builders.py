"""Fakes for a teacher's parts, a small real model, and episodes of the household."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from sdar.contracts.errors import CorruptionError, WeightsUnavailableError
from sdar.contracts.types import (
    ChatMessage,
    EnvironmentIdentity,
    EpisodeEnd,
    ModelIdentity,
    Purpose,
    SamplingParameters,
    StopReason,
    Task,
    Trajectory,
    Turn,
    WeightsManifest,
)
from sdar.model.chat import ChatTokenizer
from sdar.weights.pins import PinnedVersions
from services.envs.household.game import HouseholdGame, list_household_tasks
from services.teacher.context import PrivilegedContext
from services.teacher.metrics import TeacherMetrics
from services.teacher.policy import ScoringPolicy
from services.teacher.retrieval import Retrieval
from services.teacher.scorer import TurnLogProbs
from services.teacher.skills import Skill, SkillLibrary

RUN_ID = "test"
MODEL = ModelIdentity("tiny", "f00d")
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] "
    "}}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LIBRARY = SkillLibrary(
    (
        Skill("general", "Always", "look before you act ."),
        Skill(
            "clean", "How to clean", "skill clean : first use sink . after sink put .", ("clean",)
        ),
        Skill("heat", "How to heat", "skill heat : first use oven . after oven put .", ("heat",)),
        Skill("heat-2", "How to warm up", "an oven is hot .", ("heat",)),
        Skill(
            "cool", "How to cool", "skill cool : first use fridge . after fridge put .", ("cool",)
        ),
    )
)
CLEAN = Task("household", "train", "t0", "clean", "clean the mug and put it in the desk .", 0)


def make_model_directory(path: Path, seed: int = 0) -> Path:
    """A Qwen2 of a few thousand random weights with a byte-level household tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        [HouseholdGame(task).first_observation for task in list_household_tasks("train")], trainer
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(path)
    torch.manual_seed(seed)
    # Large weights: the log-probs of a nearly uniform model would agree with anything.
    config = Qwen2Config(
        vocab_size=len(fast),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.2,
        tie_word_embeddings=True,
    )
    Qwen2ForCausalLM(config).save_pretrained(path)
    return path


def play(
    chat: ChatTokenizer,
    task: Task = CLEAN,
    *,
    num_turns: int = 3,
    group_id: str = "g0",
    episode_index: int = 0,
    group_size: int = 4,
    policy_version: int = 0,
    temperature: float = 1.0,
    is_windowed: bool = False,
    seed: int = 0,
) -> Trajectory:
    """An episode of random responses.

    `is_windowed`: every turn is a fresh prompt, as with a history window.
    """
    rng = random.Random(seed)
    turns: list[Turn] = []
    context = np.array([], np.int32)
    for index in range(num_turns):
        seen = f"task : {task.description} turn {index} you see sink oven ."
        messages: Sequence[ChatMessage] = (ChatMessage("user", seen),)
        extends = bool(index) and not is_windowed
        prompt = chat.render_fresh(messages)
        if extends:
            prompt = np.concatenate(
                [context, chat.render_delta(messages, ended_by=chat.stops.closing_id)]
            )
        said = rng.choice(["use sink", "use oven", "put mug in desk"])
        words = chat.tokenizer.encode(said, add_special_tokens=False)
        response = [*words, chat.stops.closing_id]
        turn = Turn(
            turn_index=index,
            prompt_token_ids=prompt,
            messages=messages,
            extends_previous=extends,
            response_token_ids=response,
            behavior_logprobs=[-1.0] * len(response),
            policy_versions=[policy_version] * len(response),
            response_text=chat.decode_response(response),
            stop_reason=StopReason.END_OF_TURN,
            action="",
            is_action_valid=True,
            reward=0.0,
        )
        turns.append(turn)
        context = np.concatenate([prompt, np.array(response, np.int32)])
    return Trajectory(
        run_id=RUN_ID,
        group_id=group_id,
        trajectory_id=f"{group_id}.{episode_index}.a0",
        attempt=0,
        episode_index=episode_index,
        group_size=group_size,
        task=task,
        purpose=Purpose.TRAIN,
        environment=EnvironmentIdentity("household", "1"),
        model=MODEL,
        sampling=SamplingParameters(temperature, 1.0, 16),
        turns=tuple(turns),
        end=EpisodeEnd.TERMINATED,
        is_success=False,
    )


def plain_context(trajectory: Trajectory, chat: ChatTokenizer) -> PrivilegedContext:
    """A context that shows nothing: the prompts the student saw."""
    prompts = {
        t.turn_index: chat.render_fresh(t.messages)
        for t in trajectory.turns
        if not t.extends_previous
    }
    return PrivilegedContext(
        trajectory, prompts, Retrieval((), (), "none"), num_tokens=1, num_dropped_skills=0
    )


def make_manifest(policy_version: int) -> WeightsManifest:
    return WeightsManifest(RUN_ID, policy_version, f"v{policy_version}", (), 0, MODEL, 0.0)


class MemoryWeights:
    """Published versions in memory: version to state dict."""

    def __init__(self, versions: dict[int, dict[str, torch.Tensor]]) -> None:
        self.versions = versions

    def iter_tensors(self, manifest: WeightsManifest) -> Iterator[tuple[str, torch.Tensor]]:
        if manifest.policy_version not in self.versions:
            raise WeightsUnavailableError(f"No version {manifest.policy_version}.")
        yield from self.versions[manifest.policy_version].items()


class FakeScorer:
    """Scores every token as minus its teacher version.

    `poison` names trajectories that make it raise.
    """

    name = "fake"

    def __init__(self, poison: Sequence[str] = ()) -> None:
        self.teacher_version = 0
        self.loaded: list[int] = []
        self.missing: set[int] = set()
        self.corrupt: set[int] = set()
        self.num_calls = 0
        self._poison = set(poison)

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    def check(self, context: PrivilegedContext) -> None: ...

    async def score(self, contexts: Sequence[PrivilegedContext]) -> list[TurnLogProbs]:
        self.num_calls += 1
        if self._poison & {context.trajectory.trajectory_id for context in contexts}:
            raise RuntimeError("kernel panic")
        value = -float(self.teacher_version)
        scores = []
        for context in contexts:
            lengths = [len(turn.response_token_ids) for turn in context.trajectory.turns]
            scores.append(tuple(np.full(length, value, np.float32) for length in lengths))
        return scores

    async def update_weights(self, manifest: WeightsManifest) -> None:
        if manifest.policy_version in self.missing:
            raise WeightsUnavailableError(f"No version {manifest.policy_version}.")
        if manifest.policy_version in self.corrupt:
            raise CorruptionError("bad checksum")
        self.loaded.append(manifest.policy_version)
        self.teacher_version = manifest.policy_version


def build_follower(bus, scorer, max_lag, *, metrics=None, **options) -> ScoringPolicy:
    return ScoringPolicy(
        bus, scorer, PinnedVersions(bus, "me"), metrics or TeacherMetrics(), max_lag, **options
    )
