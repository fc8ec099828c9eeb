"""The probe of a policy version: by it an engine proves that it computes what the learner computes.

The learner scores a few short sequences under each version and announces their log-probs with it.
Whoever has installed the version scores the same sequences and compares. Wrong weights, a layer
that kept its old ones, or an engine that computes a model differently are off by whole nats.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sdar.contracts.errors import MismatchError
from sdar.contracts.types import LogProbs, WeightsManifest

NUM_SEQUENCES = 4
SEQUENCE_TOKENS = 32
TOLERANCE = {"float32": 0.01, "bfloat16": 0.3}
"""By the model's dtype: most nats by which an engine's log-probs may differ from the learner's of
the same weights, on average. Measured: at most 3e-5 in float32 and 0.13 in bfloat16, where an
engine that serves other weights, or scales its logits otherwise, is off by 1.4 to 14.
"""


@dataclass(frozen=True, slots=True)
class Mismatch:
    """Absolute differences of log-probs in nats, over all tokens of a probe."""

    mean: float
    largest: float


def draw_probe(token_ids: Sequence[int], max_tokens: int) -> list[tuple[int, ...]]:
    """The probe's sequences, the same for the same arguments.

    Random tokens, so that every version of a run has the same probe, whatever it was trained on.

    Args:
        token_ids: what to draw from: ordinary tokens of the model's vocabulary.
        max_tokens: longest sequence that every engine of the run can score, at least 2.
    """
    generator = random.Random(0)
    length = min(SEQUENCE_TOKENS, max_tokens)
    return [tuple(generator.choices(token_ids, k=length)) for _ in range(NUM_SEQUENCES)]


def measure_mismatch(manifest: WeightsManifest, scored: Sequence[LogProbs]) -> Mismatch:
    """How far an engine's log-probs of a manifest's probe are from the learner's.

    Args:
        scored: for each sequence of the probe, log-probs of every token but the first.
    """
    expected = np.concatenate([np.asarray(each.logprobs, np.float64) for each in manifest.probe])
    distances = np.abs(np.concatenate(scored) - expected)
    return Mismatch(float(distances.mean()), float(distances.max()))


def check_mismatch(manifest: WeightsManifest, mismatch: Mismatch, dtype: str) -> None:
    """Raises MismatchError if an engine with this version computes something else than the
    learner.
    """
    num_tokens = sum(len(sequence.logprobs) for sequence in manifest.probe)
    # Written so that a difference that is no number fails, too.
    if not mismatch.mean <= TOLERANCE[dtype]:
        raise MismatchError(
            f"With version {manifest.policy_version} this engine computes other log-probs than the "
            f"learner: off by {mismatch.mean:.3g} nats on average and {mismatch.largest:.3g} at "
            f"most over the {num_tokens} tokens of its probe, where {TOLERANCE[dtype]} on average "
            f"are right for {dtype}. Its weights were installed wrongly, or this engine does not "
            "compute this model as transformers does: see docs/models.md."
        )
