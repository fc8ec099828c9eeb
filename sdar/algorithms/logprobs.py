"""Log-probs of sampled tokens under a model, and their entropy, a chunk of logits at a time.

The learner, the reference and the teacher all score through `TokenScorer`, so no engine mismatch
enters a gap between them. Never masks attention: sequences are right-padded, so the causal mask
alone keeps padding out of every scored position.

Axes: B sequences, T tokens of the longest sequence, N sampled tokens (row-major over B, T), H
hidden, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sdar.contracts.errors import ConfigurationError, ContractError

LogitsHead = Callable[[Tensor], Tensor]
"""Hidden states [N, H] to logits [N, V]."""


def compute_logprobs(
    hidden: Float[Tensor, "N H"],
    lm_head: LogitsHead,
    targets: Int[Tensor, " N"],
    temperature: float,
    chunk_size: int,
    num_chunks: int | None = None,
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """Log-prob of each target and entropy (nats) of its distribution, under logits / temperature.

    Each chunk's logits are dropped after the forward pass and made again in the backward pass, so
    at most [chunk_size, V] values exist at any time in either.

    Args:
        lm_head: hidden states to logits.
        num_chunks: calls of `lm_head` to make, at least as many as N needs. Under ZeRO-3 every call
            is a collective: pass the same number on every rank. Calls beyond N get an empty slice
            and a zero gradient.

    Returns:
        logprobs and entropy, float32 (float64 if the logits are).
    """
    if temperature <= 0 or chunk_size < 1:
        raise ConfigurationError(
            f"Log-probs need temperature > 0 and chunk_size >= 1, got {temperature} and "
            f"{chunk_size}. "
            "Greedy decoding has no log-probs to train on."
        )
    # At least one call, so that the head's weights get a gradient, of 0, without any target.
    needed = max(1, -(-targets.shape[0] // chunk_size))
    if num_chunks is not None and num_chunks < needed:
        raise ContractError(
            f"{targets.shape[0]} tokens need {needed} chunks of {chunk_size}, got num_chunks "
            f"{num_chunks}. "
            "Pass the largest number any rank needs."
        )
    parts = []
    for index in range(num_chunks or needed):
        rows = slice(index * chunk_size, (index + 1) * chunk_size)
        arguments = (hidden[rows], lm_head, targets[rows], temperature)
        # Made again in the backward pass instead of kept: logits are what would fill the memory.
        if torch.is_grad_enabled():
            parts.append(
                checkpoint(_score_chunk, *arguments, use_reentrant=False, preserve_rng_state=False)
            )
        else:
            parts.append(_score_chunk(*arguments))
    logprobs = torch.cat([part for part, _ in parts])
    entropy = torch.cat([part for _, part in parts])
    return logprobs, entropy


def _score_chunk(
    hidden: Float[Tensor, "N H"],
    lm_head: LogitsHead,
    targets: Int[Tensor, " N"],
    temperature: float,
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    logits = lm_head(hidden)
    # In bfloat16 a sum over the vocabulary would lose the small differences that gaps are made of.
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    log_normalizer = logits.logsumexp(dim=-1)
    logprobs = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - log_normalizer
    # H = -sum p log p = log Z - sum p logit.
    entropy = log_normalizer - (torch.softmax(logits, dim=-1) * logits).sum(dim=-1)
    return logprobs, entropy


class TokenScorer(nn.Module):
    """A Hugging Face causal language model that returns log-probs.

    Its body is called once a micro-batch. What it does with the hidden states from there on (head,
    scale, cap) is its own forward pass, called on a chunk of them at a time.
    Gradient checkpointing of the body and dtype are set on the wrapped model by its owner.
    """

    def __init__(self, causal_lm: nn.Module, *, temperature: float, chunk_size: int) -> None:
        """Args:
        temperature: the sampler's.
        chunk_size: sampled tokens whose logits exist at once.

        Raises:
            ConfigurationError: the model has no body apart from its head.
        """
        super().__init__()
        self.causal_lm = causal_lm
        self.temperature = temperature
        self.chunk_size = chunk_size
        self._body_name = _find_body(causal_lm)

    def forward(
        self,
        input_ids: Int[Tensor, "B T"],
        response_mask: Bool[Tensor, "B T"],
        max_rank_tokens: int | None = None,
    ) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
        """Score the tokens where `response_mask` is true.

        Args:
            response_mask: true exactly on sampled tokens, never at t = 0.
            max_rank_tokens: most sampled tokens that any rank scores in this call,
                `MicroBatch.max_rank_tokens`. Needed where the weights are sharded; see
                `compute_logprobs`.

        Returns:
            flat logprobs and entropy, row-major over the true entries. With none, two empty tensors
            whose gradient is zero but still runs through every parameter, so that gradient hooks of
            all ranks fire.
        """
        body = self.causal_lm.get_submodule(self._body_name)
        output = body(input_ids=input_ids, attention_mask=None, use_cache=False, return_dict=True)
        # The token at t is predicted from position t - 1: both are shifted against each other.
        is_target = response_mask[:, 1:]
        num_chunks = (
            None if max_rank_tokens is None else max(1, -(-max_rank_tokens // self.chunk_size))
        )
        return compute_logprobs(
            output.last_hidden_state[:, :-1][is_target],
            _build_head(self.causal_lm, self._body_name),
            input_ids[:, 1:][is_target],
            self.temperature,
            self.chunk_size,
            num_chunks,
        )


def _find_body(causal_lm: Any) -> str:
    """The name of the child that turns tokens into hidden states.

    It differs between architectures (`model`, `transformer`, `gpt_neox`, `backbone`), so the child
    is known by the embedding that it holds.
    """
    embedding, head = causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings()
    for name, child in causal_lm.named_children():
        modules = set(child.modules())
        if head is not None and child is not embedding and embedding in modules - {head}:
            return str(name)
    raise ConfigurationError(
        f"{type(causal_lm).__name__} has no head apart from the part that holds its embedding, so "
        "its logits cannot be made a chunk at a time. Use a decoder such as Qwen3 or Llama."
    )


def _build_head(causal_lm: Any, body_name: str) -> LogitsHead:
    """The model's own forward pass from the hidden states on.

    Built for each call, for whoever owns the model may add hooks or change its mode in between.
    """
    # A copy of the model's attributes, not of its modules: head and weights are the very same, so
    # hooks that gather sharded weights still run.
    head, body = copy.copy(causal_lm), causal_lm.get_submodule(body_name)
    head._modules = {**causal_lm._modules, body_name: _GivenHiddenStates(body)}

    def compute_logits(hidden: Float[Tensor, "N H"]) -> Float[Tensor, "N V"]:
        # Not as a module: the hooks of the whole model belong to one whole forward pass.
        output = head.forward(inputs_embeds=hidden[None], use_cache=False, return_dict=True)
        logits: Tensor = output.logits[0]
        return logits

    return compute_logits


class _GivenHiddenStates(nn.Module):
    """Stands where a body was, and returns the hidden states given as embeddings."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        # In a tuple, or torch would make it a part of this module.
        self._body = (body,)

    def forward(
        self, *_: Any, inputs_embeds: Float[Tensor, "1 N H"], **_options: Any
    ) -> _BodyOutput:
        return _BodyOutput(inputs_embeds)

    def __getattr__(self, name: str) -> Any:
        """The body's numbers, such as Falcon-H1's multiplier of logits, but none of its layers.

        A model that calls a layer of its body itself would call it twice.
        """
        value = getattr(self.__dict__["_body"][0], name)
        if isinstance(value, nn.Module):
            raise AttributeError(f"the model calls {name} of its body, not the body")
        return value


class _BodyOutput:
    """What a body returns, with nothing in it but hidden states: no cache, attention or router."""

    def __init__(self, hidden: Float[Tensor, "1 N H"]) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: Any) -> Any:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        return None
