"""Owns the making of the demo's model: a tokenizer and a tiny Qwen2, supervised into a poor household player.

The result follows a skill it is shown and plays badly without one, which is what reinforcement learning and distillation
need. It never sees a held-out task. It knows nothing of the services: the output is an ordinary model directory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from sdar.contracts.types import ChatMessage
from sdar.runtime.chat import ChatTokenizer, place_skills
from services.envs.household import demonstrations
from services.envs.household.game import (
    NOTHING_HAPPENS,
    OBJECTS,
    PROCEDURES,
    STATIONS,
    TASK_TYPES,
    TRAIN,
    HouseholdGame,
    HouseholdTask,
    list_household_tasks,
)

CODE_VERSION = 1
"""Raise it with any change to this file that changes the model: caches are keyed by it."""

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
PAD_ID, END_OF_TURN_ID = 0, 2
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_CLUMSY_VERBS = ("use", "take", "open", "put")
_MOST_STEPS = max(map(len, PROCEDURES.values()))

Progress = Callable[[int, int, float], None]
"""Called after every update with the updates done, the updates in all, and the loss on the player's own tokens."""


@dataclass(frozen=True, slots=True)
class WarmStartPhase:
    """One run of the optimizer. `hinted_early` is the share of episodes that show a skill in the first half of the updates,
    `hinted_late` in the second. A hinted episode follows a random procedure, so that the model learns to obey the text
    instead of the task type."""

    num_updates: int
    learning_rate: float
    hinted_early: float
    hinted_late: float


@dataclass(frozen=True, slots=True)
class WarmStartRecipe:
    """Everything that decides the weights.

    Attributes:
        right_share, misconception_share: the demonstrator's odds, see `draw_misguided_procedure`.
        mislabelled_share: share of hints that name another task type than the task's; they are obeyed all the same.
        clumsy_share: chance per action of a senseless action before it, so that the model has seen one fail.
        language_model_weight: weight of the loss over all tokens, observations included, beside that over the player's.
    """

    hidden_size: int = 64
    num_layers: int = 2
    num_heads: int = 2
    intermediate_size: int = 192
    max_positions: int = 1024
    vocabulary_limit: int = 640
    vocabulary_multiple: int = 64
    num_tokenizer_episodes: int = 4000
    batch_size: int = 32
    warmup_updates: int = 30
    final_learning_rate_share: float = 0.1
    adam_betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.01
    max_gradient_norm: float = 1.0
    language_model_weight: float = 0.3
    right_share: float = 0.3
    misconception_share: float = 0.4
    mislabelled_share: float = 0.3
    clumsy_share: float = 0.03
    phases: tuple[WarmStartPhase, ...] = (
        WarmStartPhase(num_updates=1200, learning_rate=5e-3, hinted_early=0.85, hinted_late=0.5),
        WarmStartPhase(num_updates=400, learning_rate=2e-3, hinted_early=0.35, hinted_late=0.35),
    )
    seed: int = 0

    @property
    def num_updates(self) -> int:
        return sum(phase.num_updates for phase in self.phases)

    @property
    def digest(self) -> str:
        """Hex sha256 over the recipe, this file's version and the game's wording: equal digests mean the same model."""
        example = HouseholdTask("restore", OBJECTS[0], "drawer", "desk")
        wording = [
            _first_message(HouseholdGame(example), "skill").content,
            [demonstrations.skill_wording(task_type, procedure) for task_type, procedure in PROCEDURES.items()],
            demonstrations.list_demonstration(example, example.procedure),
        ]
        content = [dataclasses.asdict(self), CODE_VERSION, CHAT_TEMPLATE, wording]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def create_model(recipe: WarmStartRecipe, cache_dir: Path, progress: Progress | None = None) -> Path:
    """Return the directory of the recipe's model in `cache_dir`, making it first if it is not there.

    The directory appears whole or not at all; two processes that make the same model at once both succeed.
    """
    model_dir = cache_dir / f"household-tiny-{recipe.digest[:12]}"
    if (model_dir / "recipe.json").exists():
        return model_dir
    cache_dir.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{model_dir.name}-", dir=cache_dir))
    try:
        _build(recipe, building, progress)
        # Private modes of temporary files are not for a cache that others read.
        for path in (building, *building.iterdir()):
            path.chmod(0o755 if path.is_dir() else 0o644)
        # A rename onto a full directory fails: somebody else was faster, and made the same model.
        with contextlib.suppress(OSError):
            os.rename(building, model_dir)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return model_dir


def _build(recipe: WarmStartRecipe, target: Path, progress: Progress | None) -> None:
    tokenizer = _train_tokenizer(recipe)
    tokenizer.save_pretrained(target)
    model = _new_model(recipe, len(tokenizer))
    _train(recipe, model, ChatTokenizer(target), progress)
    model.save_pretrained(target)
    content = {"digest": recipe.digest, "code_version": CODE_VERSION, "recipe": dataclasses.asdict(recipe)}
    (target / "recipe.json").write_text(json.dumps(content, indent=2) + "\n")


def _train_tokenizer(recipe: WarmStartRecipe) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the game's own sentences: any text can be encoded, household text in about one token a word."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocabulary_limit,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_iterate_sentences(recipe), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=SPECIAL_TOKENS[2], pad_token=SPECIAL_TOKENS[0])
    fast.chat_template = CHAT_TEMPLATE
    fast.model_max_length = recipe.max_positions
    return fast


def _iterate_sentences(recipe: WarmStartRecipe) -> Iterator[str]:
    rng = random.Random(recipe.seed)
    tasks = list_household_tasks(TRAIN)
    for _ in range(recipe.num_tokenizer_episodes):
        task = rng.choice(tasks)
        procedure = _draw_procedure(rng)
        game = HouseholdGame(task)
        yield _first_message(game, demonstrations.skill_wording(task.task_type, procedure)).content
        yield demonstrations.skill_wording(task.task_type, ())
        yield from ("system\n", "user\n", "assistant\n", NOTHING_HAPPENS)
        for action in demonstrations.list_demonstration(task, procedure):
            yield action
            yield game.act(action)


def _new_model(recipe: WarmStartRecipe, vocabulary_size: int) -> Qwen2ForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        config = Qwen2Config(
            vocab_size=-(-vocabulary_size // recipe.vocabulary_multiple) * recipe.vocabulary_multiple,
            hidden_size=recipe.hidden_size,
            intermediate_size=recipe.intermediate_size,
            num_hidden_layers=recipe.num_layers,
            num_attention_heads=recipe.num_heads,
            num_key_value_heads=recipe.num_heads,
            max_position_embeddings=recipe.max_positions,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=END_OF_TURN_ID,
            pad_token_id=PAD_ID,
            dtype=torch.float32,
        )
        return Qwen2ForCausalLM(config).float()


def _train(recipe: WarmStartRecipe, model: Qwen2ForCausalLM, chat: ChatTokenizer, progress: Progress | None) -> None:
    writer = _EpisodeWriter(recipe, chat)
    num_done = 0
    for phase in recipe.phases:
        # A fresh optimizer each time: the second phase is a new, gentler start from the first one's weights.
        optimizer = torch.optim.AdamW(model.parameters(), betas=recipe.adam_betas, weight_decay=recipe.weight_decay)
        for update in range(phase.num_updates):
            _set_learning_rate(optimizer, recipe, phase, update)
            hinted = phase.hinted_early if update < phase.num_updates / 2 else phase.hinted_late
            loss = _update(recipe, model, optimizer, [writer.write(hinted) for _ in range(recipe.batch_size)])
            num_done += 1
            if progress is not None:
                progress(num_done, recipe.num_updates, loss)


def _set_learning_rate(optimizer: torch.optim.Optimizer, recipe: WarmStartRecipe, phase: WarmStartPhase, update: int) -> None:
    warmup = min(1.0, (update + 1) / recipe.warmup_updates)
    floor = recipe.final_learning_rate_share
    for group in optimizer.param_groups:
        group["lr"] = phase.learning_rate * warmup * (floor + (1 - floor) * (1 - update / phase.num_updates))


def _update(
    recipe: WarmStartRecipe, model: Qwen2ForCausalLM, optimizer: torch.optim.Optimizer, episodes: list[Episode]
) -> float:
    """One optimizer step; returns the mean loss over the player's tokens in nats.

    B episodes right-padded to T tokens: with causal attention no real token sees a padding, so no mask is needed.
    """
    token_ids, is_real, is_response = _pad(episodes)
    hidden = model.model(input_ids=token_ids[:, :-1], use_cache=False).last_hidden_state
    is_target = is_real[:, 1:]
    losses = functional.cross_entropy(model.lm_head(hidden[is_target]), token_ids[:, 1:][is_target], reduction="none")
    response_loss = losses[is_response[:, 1:][is_target]].mean()
    optimizer.zero_grad()
    torch.autograd.backward(response_loss + recipe.language_model_weight * losses.mean())
    torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_gradient_norm)
    optimizer.step()
    return float(response_loss.detach())


Episode = list[tuple[list[int], bool]]
"""A conversation in token segments, each with whether the player wrote it."""


def _pad(episodes: list[Episode]) -> tuple[Tensor, Tensor, Tensor]:
    """token_ids, is_real, is_response: [B, T] each."""
    num_tokens = [sum(len(ids) for ids, _ in episode) for episode in episodes]
    shape = (len(episodes), max(num_tokens))
    token_ids = torch.full(shape, PAD_ID, dtype=torch.long)
    is_response = torch.zeros(shape, dtype=torch.bool)
    for row, (episode, length) in enumerate(zip(episodes, num_tokens, strict=True)):
        token_ids[row, :length] = torch.tensor([token for ids, _ in episode for token in ids])
        is_response[row, :length] = torch.tensor([is_mine for ids, is_mine in episode for _ in ids])
    is_real = torch.arange(shape[1])[None, :] < torch.tensor(num_tokens)[:, None]
    return token_ids, is_real, is_response


class _EpisodeWriter:
    """Writes demonstrated episodes in the tokens an agent would see and write: prompt, response, what comes between."""

    def __init__(self, recipe: WarmStartRecipe, chat: ChatTokenizer) -> None:
        self._recipe = recipe
        self._chat = chat
        self._rng = random.Random(recipe.seed + 1)
        self._tasks = list_household_tasks(TRAIN)

    def write(self, hinted_share: float) -> Episode:
        """One episode; with probability `hinted_share` it shows a skill and obeys it."""
        rng, recipe = self._rng, self._recipe
        task, hint = rng.choice(self._tasks), ""
        if rng.random() < hinted_share:
            procedure = _draw_procedure(rng)
            label = rng.choice(TASK_TYPES) if rng.random() < recipe.mislabelled_share else task.task_type
            hint = demonstrations.skill_wording(label, procedure)
        else:
            procedure = demonstrations.draw_misguided_procedure(rng, task, recipe.right_share, recipe.misconception_share)
        game = HouseholdGame(task)
        episode: Episode = [(self._chat.render_fresh([_first_message(game, hint)]).tolist(), False)]
        for action, answer in self._play(game, procedure):
            episode.append((self._write_action(action), True))
            episode.append((self._chat.render_delta((ChatMessage("user", answer),), is_closed=True).tolist(), False))
        return episode[:-1]

    def _play(self, game: HouseholdGame, procedure: list[str]) -> Iterator[tuple[str, str]]:
        """Action and answer, turn by turn. A clumsy action is shown without being played: it must not use up a turn."""
        rng = self._rng
        for action in demonstrations.list_demonstration(game.task, procedure):
            clumsy = f"{rng.choice(_CLUMSY_VERBS)} {rng.choice(OBJECTS + STATIONS)}"
            if rng.random() < self._recipe.clumsy_share and clumsy not in game.list_actions():
                yield clumsy, NOTHING_HAPPENS
            yield action, game.act(action)

    def _write_action(self, action: str) -> list[int]:
        return [*self._chat.tokenizer.encode(action, add_special_tokens=False), END_OF_TURN_ID]


def _first_message(game: HouseholdGame, hint: str) -> ChatMessage:
    """What opens an episode, with the skill placed exactly as the teacher's prompts place it."""
    (message,) = place_skills((ChatMessage("user", game.first_observation),), hint)
    return message


def _draw_procedure(rng: random.Random) -> list[str]:
    return rng.sample(STATIONS, rng.randint(0, _MOST_STEPS))
