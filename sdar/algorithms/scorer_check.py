"""Whether `TokenScorer` gives the log-probs of a model's own forward pass.

The scorer takes a model apart: body once, head a chunk at a time, padding without a mask. This is
right for decoders whose positions see only what is before them. Whether a model is one is measured
here on random tokens, before anything trains on the scores.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sdar.algorithms.logprobs import TokenScorer
from sdar.contracts.errors import ConfigurationError

_LENGTHS = (24, 20, 9, 3)
_CHUNK_SIZE = 7
"""Divides neither the tokens of the check nor those of a sequence."""

_RELATIVE_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2 * torch.finfo(torch.bfloat16).eps}
"""Of the largest logit, since rounding grows with it.

In float32 27 architectures measured 5e-6 at most. In bfloat16 a kernel for another count of rows
may round the logit of the token, and the largest, to the next number; on a CPU that did not happen
(5e-6 at most). Dropout and a router's noise measured 4e-3 to 5e-1, a forgotten scale of the logits
more than that.
"""


@dataclass(frozen=True, slots=True)
class ScorerError:
    """What `measure_scorer_error` found, in nats."""

    largest: float
    tolerance: float

    @property
    def is_exact(self) -> bool:
        """Whether rounding explains the difference. Never so for NaN."""
        return self.largest <= self.tolerance


def measure_scorer_error(causal_lm: Any) -> ScorerError:
    """Compare the scorer with the model's own forward pass, token by token.

    Four sequences of different lengths, 52 tokens to score: two short forward passes, on the
    model's device and in its dtype. The scorer runs in the mode that the model is in, the forward
    pass in evaluation mode, so dropout that training left on shows. Padding differs between the
    two, so a model in which it reaches a token shows as well; shapes do not, so that rounding stays
    far below the tolerance in bfloat16 too. Draws nothing from torch's global random state.

    Args:
        causal_lm: a Hugging Face causal language model with whole weights: call it before they are
            sharded.

    Raises:
        ConfigurationError: the model cannot be taken apart.
    """
    ids, other_padding, is_target = _draw_sequences(causal_lm)
    try:
        with torch.no_grad():
            scorer = TokenScorer(causal_lm, temperature=1.0, chunk_size=_CHUNK_SIZE)
            scores, _ = scorer(ids, is_target)
    except (AttributeError, IndexError, TypeError) as error:
        raise ConfigurationError(
            f"{type(causal_lm).__name__} cannot be scored a chunk of logits at a time: {error}. "
            "Use a decoder such as Qwen3 or Llama."
        ) from error
    logits = _compute_own_logits(causal_lm, other_padding)[:, :-1][is_target[:, 1:]]
    own = logits.log_softmax(-1).gather(-1, ids[is_target].unsqueeze(-1)).squeeze(-1)
    scale = float(logits.abs().max())
    return ScorerError(
        largest=float((scores - own).abs().max()),
        tolerance=_RELATIVE_TOLERANCE[causal_lm.dtype] * scale,
    )


def require_exact_scorer(causal_lm: Any) -> None:
    """Raises ConfigurationError for a model whose tokens `TokenScorer` would score wrongly."""
    error = measure_scorer_error(causal_lm)
    if not error.is_exact:
        raise ConfigurationError(
            f"{type(causal_lm).__name__}: log-probs of random tokens differ by up to "
            f"{error.largest:.2g} nats from those of its own forward pass, where rounding explains "
            f"{error.tolerance:.2g}. Training on them would be wrong. Use a decoder in which each "
            "position sees only earlier ones and nothing is left to chance, such as Qwen3 or Llama."
        )


def _draw_sequences(
    causal_lm: Any,
) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"], Bool[Tensor, "B T"]]:
    """Token ids padded with 0, the same padded with other tokens, and which tokens to score."""
    num_tokens = causal_lm.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    other_padding = torch.randint(
        num_tokens, (len(_LENGTHS), max(_LENGTHS)), generator=generator
    ).to(causal_lm.device)
    positions = torch.arange(max(_LENGTHS), device=causal_lm.device)
    is_token = positions < torch.tensor(_LENGTHS, device=causal_lm.device).unsqueeze(-1)
    ids = other_padding.masked_fill(~is_token, 0)
    return ids, other_padding, is_token & (positions > 0)


def _compute_own_logits(causal_lm: Any, ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T V"]:
    is_training = causal_lm.training
    causal_lm.eval()
    try:
        with torch.no_grad():
            output = causal_lm(input_ids=ids, use_cache=False, return_dict=True)
    finally:
        causal_lm.train(is_training)
    logits: Tensor = output.logits.float()
    return logits
