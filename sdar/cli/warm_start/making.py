"""Makes the model directory of a recipe: trains a tokenizer and a Qwen2, and caches the result.

Knows no environment: what is imitated comes from the recipe's demonstrator.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from sdar.cli.warm_start.recipe import (
    CHAT_TEMPLATE,
    END_OF_TURN_ID,
    PAD_ID,
    SPECIAL_TOKENS,
    Demonstrator,
    Example,
    WarmStartPhase,
    WarmStartRecipe,
)
from sdar.model.chat import ChatTokenizer

Progress = Callable[[int, int, float], None]
"""Called after every update with the updates done, the updates in all, and the loss on the player's
own tokens.
"""


def create_model(
    recipe: WarmStartRecipe, cache_dir: Path, progress: Progress | None = None
) -> Path:
    """The directory of the recipe's model in `cache_dir`; the model is made if it is not there.

    The directory appears whole or not at all; two processes that make the same model at once both
    succeed.
    """
    model_dir = cache_dir / f"{recipe.model_name}-{recipe.digest[:12]}"
    if (model_dir / "recipe.json").exists():
        return model_dir

    # Beside its place, for only within one file system is a rename atomic.
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
    demonstrator = recipe.open_demonstrator()
    tokenizer = train_tokenizer(recipe, demonstrator)
    tokenizer.save_pretrained(target)
    model = _new_model(recipe, len(tokenizer))
    _train(recipe, demonstrator, model, ChatTokenizer(target), progress)
    model.save_pretrained(target)
    # Last: its existence says that the model is complete.
    (target / "recipe.json").write_text(json.dumps(recipe.to_json(), indent=2) + "\n")


def train_tokenizer(recipe: WarmStartRecipe, demonstrator: Demonstrator) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the environment's own sentences: any text can be encoded, its own in
    about one token a word.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()

    phrases = demonstrator.list_phrases()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocabulary_limit - len(phrases),
        special_tokens=list(SPECIAL_TOKENS),
        # Every byte, so that no text is unknown.
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    sentences = demonstrator.iterate_sentences(random.Random(recipe.seed))
    if phrases:
        sentences = _leave_out(phrases, sentences)
    tokenizer.train_from_iterator(sentences, trainer)
    tokenizer.add_tokens([AddedToken(phrase, normalized=False) for phrase in phrases])

    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=SPECIAL_TOKENS[2], pad_token=SPECIAL_TOKENS[0]
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.model_max_length = recipe.max_positions
    return fast


def _leave_out(phrases: Sequence[str], sentences: Iterable[str]) -> Iterator[str]:
    """What stands between the phrases: the only text that the vocabulary will have to spell."""
    # Longest first: an alternative that matches ends the search, and phrases begin alike.
    by_length = sorted(phrases, key=len, reverse=True)
    is_phrase = re.compile("|".join(map(re.escape, by_length)))
    for sentence in sentences:
        yield from filter(None, is_phrase.split(sentence))


def _new_model(recipe: WarmStartRecipe, vocabulary_size: int) -> Qwen2ForCausalLM:
    # Rounded up to the multiple.
    multiple = recipe.vocabulary_multiple
    padded_size = math.ceil(vocabulary_size / multiple) * multiple

    # The seed decides the weights, and the caller's generator stays as it is.
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        config = Qwen2Config(
            vocab_size=padded_size,
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
        model: Qwen2ForCausalLM = Qwen2ForCausalLM(config).float()
        return model


def _train(
    recipe: WarmStartRecipe,
    demonstrator: Demonstrator,
    model: Qwen2ForCausalLM,
    chat: ChatTokenizer,
    progress: Progress | None,
) -> None:
    # Other examples than those of the tokenizer's sentences.
    rng = random.Random(recipe.seed + 1)
    num_done = 0
    for phase in recipe.phases:
        # A fresh optimizer each time: the second phase is a new, gentler start from the first one's
        # weights.
        optimizer = torch.optim.AdamW(
            model.parameters(), betas=recipe.adam_betas, weight_decay=recipe.weight_decay
        )
        for update in range(phase.num_updates):
            is_early = update < phase.num_updates / 2
            hinted = phase.hinted_early if is_early else phase.hinted_late
            examples = [demonstrator.write(chat, rng, hinted) for _ in range(recipe.batch_size)]

            _set_learning_rate(optimizer, recipe, phase, update)
            loss = _update(recipe, model, optimizer, examples)
            num_done += 1
            if progress is not None:
                progress(num_done, recipe.num_updates, loss)


def _set_learning_rate(
    optimizer: torch.optim.Optimizer, recipe: WarmStartRecipe, phase: WarmStartPhase, update: int
) -> None:
    """Linear warm-up, then a linear descent to the recipe's share of the phase's rate."""
    warmup = min(1.0, (update + 1) / recipe.warmup_updates)
    floor = recipe.final_learning_rate_share
    descent = floor + (1 - floor) * (1 - update / phase.num_updates)
    for group in optimizer.param_groups:
        group["lr"] = phase.learning_rate * warmup * descent


def _update(
    recipe: WarmStartRecipe,
    model: Qwen2ForCausalLM,
    optimizer: torch.optim.Optimizer,
    examples: Sequence[Example],
) -> float:
    """One optimizer step on B examples; returns the mean loss over the player's tokens in nats."""
    token_ids, is_real, is_response = pad_examples(examples)
    # No attention mask: paddings are on the right, where with causal attention no real token sees
    # them.
    hidden = model.model(input_ids=token_ids[:, :-1], use_cache=False).last_hidden_state

    # Position t predicts token t + 1. The large product with the vocabulary leaves paddings out.
    is_target = is_real[:, 1:]
    logits = model.lm_head(hidden[is_target])
    targets = token_ids[:, 1:][is_target]
    is_players = is_response[:, 1:][is_target]
    losses = functional.cross_entropy(logits, targets, reduction="none")
    response_loss = losses[is_players].mean()

    optimizer.zero_grad()
    torch.autograd.backward(response_loss + recipe.language_model_weight * losses.mean())
    torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_gradient_norm)
    optimizer.step()
    return float(response_loss.detach())


def pad_examples(examples: Sequence[Example]) -> tuple[Tensor, Tensor, Tensor]:
    """token_ids, is_real, is_response: [B, T] each."""
    lengths = [_count_tokens(example) for example in examples]
    shape = (len(examples), max(lengths))
    token_ids = torch.full(shape, PAD_ID, dtype=torch.long)
    is_response = torch.zeros(shape, dtype=torch.bool)
    for row, example in enumerate(examples):
        begin = 0
        for ids, is_players in example:
            end = begin + len(ids)
            token_ids[row, begin:end] = torch.tensor(ids)
            is_response[row, begin:end] = is_players
            begin = end

    is_real = torch.arange(shape[1])[None, :] < torch.tensor(lengths)[:, None]
    return token_ids, is_real, is_response


def _count_tokens(example: Example) -> int:
    return sum(len(ids) for ids, _ in example)
