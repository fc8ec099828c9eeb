"""Computes teacher log-probs of sampled tokens from privileged contexts, and holds the weights.

Which skills are shown, and when weights are due, is decided elsewhere.

Axes: N sampled tokens of a micro-batch, T sampled tokens of a turn.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Protocol, TypeVar

import torch

from sdar.algorithms.batching import TokenSequence, build_microbatches, split_by_turn
from sdar.algorithms.logprobs import TokenScorer
from sdar.contracts.errors import ContractError
from sdar.contracts.types import LogProbs, WeightsManifest
from sdar.model.causal_lm import install_tensors
from services.teacher.context import PrivilegedContext

_T = TypeVar("_T")

TurnLogProbs = tuple[LogProbs, ...]
"""float32 [T] for each turn of a trajectory, empty where nothing was sampled."""


class WeightReader(Protocol):
    """The part of `sdar.weights.store.WeightStore` that scoring needs."""

    def iter_tensors(self, manifest: WeightsManifest) -> Iterable[tuple[str, torch.Tensor]]: ...


class Scorer(Protocol):
    """What a teacher needs of an engine.

    One caller at a time: scoring and weight updates never overlap.
    """

    @property
    def name(self) -> str:
        """Recorded with every score."""

    @property
    def teacher_version(self) -> int:
        """The policy version that scores.

        The weights an engine starts with are version 0, the run's base.
        """

    async def start(self) -> None: ...

    async def stop(self) -> None:
        """Safe to call twice."""

    def check(self, context: PrivilegedContext) -> None:
        """Raises ContractError for a context that no weights let this scorer score."""

    async def score(self, contexts: Sequence[PrivilegedContext]) -> list[TurnLogProbs]:
        """Log-probs of every context's sampled tokens, in the order of the contexts.

        They are of the distribution that the tokens were drawn from: temperature is applied.
        """

    async def update_weights(self, manifest: WeightsManifest) -> None:
        """Switch to the manifest's weights.

        Raises:
            CorruptionError, WeightsUnavailableError: they cannot be read, or are not of this model;
                the previous ones stay.
        """


class TransformersScorer:
    """`Scorer` on the learner's own log-prob code and batching: no engine mismatch enters the gap.

    Torch works in one thread of its own, so that the event loop goes on answering.

    Args:
        causal_lm: a loaded model in evaluation mode; its weights are version 0.
        weights: where published versions are read.
        batch_tokens: tokens of one forward pass, padding included.
        chunk_tokens: sampled tokens whose logits exist at once.
    """

    name = "transformers"

    def __init__(
        self, causal_lm: Any, weights: WeightReader, *, batch_tokens: int, chunk_tokens: int
    ) -> None:
        self._causal_lm = causal_lm
        self._weights = weights
        self._batch_tokens = batch_tokens
        self._chunk_tokens = chunk_tokens
        self._vocabulary_size = int(causal_lm.config.vocab_size)
        self._version = 0
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="teacher-torch")

    @property
    def teacher_version(self) -> int:
        return self._version

    async def start(self) -> None:
        """Nothing to start: the model is loaded."""

    async def stop(self) -> None:
        await asyncio.to_thread(self._thread.shutdown)

    def check(self, context: PrivilegedContext) -> None:
        check_temperature(context)
        check_vocabulary(context, self._vocabulary_size)

    async def score(self, contexts: Sequence[PrivilegedContext]) -> list[TurnLogProbs]:
        # A forward pass divides all its logits by one temperature.
        by_temperature: defaultdict[float, list[int]] = defaultdict(list)
        for index, context in enumerate(contexts):
            by_temperature[context.trajectory.sampling.temperature].append(index)
        scores: list[TurnLogProbs] = [()] * len(contexts)
        for temperature, indices in by_temperature.items():
            scored = await self._in_thread(
                partial(self._score, [contexts[i] for i in indices], temperature)
            )
            for index, turns in zip(indices, scored, strict=True):
                scores[index] = turns
        return scores

    async def update_weights(self, manifest: WeightsManifest) -> None:
        await self._in_thread(partial(self._install, manifest))
        self._version = manifest.policy_version

    async def _in_thread(self, work: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def _install(self, manifest: WeightsManifest) -> None:
        install_tensors(self._causal_lm, self._weights.iter_tensors(manifest))

    @torch.inference_mode()
    def _score(
        self, contexts: Sequence[PrivilegedContext], temperature: float
    ) -> list[TurnLogProbs]:
        scorer = TokenScorer(
            self._causal_lm, temperature=temperature, chunk_size=self._chunk_tokens
        )
        # One list of micro-batches, for there is one device; the learner has one a rank.
        (micro_batches,) = build_microbatches(build_sequences(contexts), self._batch_tokens)
        device = self._causal_lm.device
        values = []
        for micro_batch in micro_batches:
            logprobs, _ = scorer(
                micro_batch.input_ids.to(device), micro_batch.response_mask.to(device)
            )
            values.append(logprobs.float().cpu().numpy())
        num_turns = [len(context.trajectory.turns) for context in contexts]
        return split_by_turn(micro_batches, values, num_turns)


def build_sequences(contexts: Sequence[PrivilegedContext]) -> list[TokenSequence]:
    """The sequences of all contexts; each has the index of its context as its trajectory's."""
    sequences: list[TokenSequence] = []
    for index, context in enumerate(contexts):
        sequences += context.build_sequences(index)
    return sequences


def check_temperature(context: PrivilegedContext) -> None:
    """Raises ContractError for greedy or top-p sampling.

    Such tokens were not drawn from the full distribution, which a log-prob is of.
    """
    sampling = context.trajectory.sampling
    if sampling.temperature <= 0 or sampling.top_p != 1:
        raise ContractError(
            f"Trajectory {context.trajectory.trajectory_id} was sampled with temperature "
            f"{sampling.temperature} and top_p {sampling.top_p}; its tokens have no log-probs to "
            "compare with. Score training episodes, sampled with temperature > 0 and top_p 1."
        )


def check_vocabulary(context: PrivilegedContext, vocabulary_size: int) -> None:
    """Raises ContractError for a token id that the model does not know.

    On an accelerator it would end the process.
    """
    for turn in context.trajectory.turns:
        for token_ids in (turn.prompt_token_ids, turn.response_token_ids):
            if len(token_ids) and not 0 <= token_ids.min() <= token_ids.max() < vocabulary_size:
                raise ContractError(
                    f"Trajectory {context.trajectory.trajectory_id} turn {turn.turn_index} holds "
                    f"token ids up to {token_ids.max()}, the model knows {vocabulary_size}. Give "
                    "rollout and teacher the same model.path."
                )
