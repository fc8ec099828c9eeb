"""Scores with vLLM, for models that span several GPUs.

Its log-probs differ from the learner's by what the two engines differ.

Axes: L tokens of a sequence, N sampled tokens of a sequence.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import structlog

from sdar.algorithms.batching import TokenSequence
from sdar.contracts.errors import ContractError, EngineFailedError, UnavailableError
from sdar.contracts.types import LogProbs, WeightsManifest
from sdar.engines.vllm_scoring import score_sequence
from sdar.engines.vllm_weights import (
    VllmWeights,
    build_llm,
    close_llm,
    engine_errors,
    memory_arguments,
)
from services.teacher.context import PrivilegedContext
from services.teacher.scorer import (
    TurnLogProbs,
    build_sequences,
    check_temperature,
    check_vocabulary,
)

log = structlog.get_logger()

_NUM_CONCURRENT_SEQUENCES = 64


class VllmScorer:
    """`Scorer` on vLLM's prompt log-probs.

    They are of the untempered distribution, so it serves temperature 1 only.

    Args:
        model_path: directory or hub name of the model whose weights are version 0.
        dtype: "float32" or "bfloat16".
        max_sequence_tokens: longest privileged prompt plus response.
        batch_tokens: tokens of one forward pass.
        weight_store_url, run_id: where `update_weights` finds what a manifest names.
        tensor_parallel_size: GPUs the model spans.
        kv_cache_gib: KV cache on a CPU; a GPU's is sized by `gpu_memory_utilization`.
    """

    name = "vllm"

    def __init__(
        self,
        model_path: Path | str,
        *,
        dtype: str,
        max_sequence_tokens: int,
        batch_tokens: int,
        weight_store_url: str,
        run_id: str,
        tensor_parallel_size: int = 1,
        kv_cache_gib: float = 0.5,
        gpu_memory_utilization: float = 0.85,
    ) -> None:
        self._model_path = str(model_path)
        self._arguments: dict[str, Any] = {
            "dtype": dtype,
            # vLLM scores a prompt only on its way to generating a token.
            "max_model_len": max_sequence_tokens + 1,
            "max_num_seqs": _NUM_CONCURRENT_SEQUENCES,
            "max_num_batched_tokens": max(batch_tokens, _NUM_CONCURRENT_SEQUENCES),
            "tensor_parallel_size": tensor_parallel_size,
            "distributed_executor_backend": "uni" if tensor_parallel_size == 1 else "mp",
        }
        self._memory = {
            "kv_cache_gib": kv_cache_gib,
            "gpu_memory_utilization": gpu_memory_utilization,
        }
        self._weights = VllmWeights(
            self._model_path, dtype=dtype, weight_store_url=weight_store_url, run_id=run_id
        )
        self._llm: Any = None
        self._version = 0
        self._vocabulary_size = 0
        self._request_ids = map(str, itertools.count())

    @property
    def teacher_version(self) -> int:
        return self._version

    async def start(self) -> None:
        """Loads the model.

        Raises:
            EngineFailedError: vLLM did not come up; its own log on stderr says why.
        """
        await asyncio.to_thread(self._build)
        await self._weights.attach(self._llm, self._version)
        self._vocabulary_size = self._llm.model_config.get_vocab_size()

    def _build(self) -> None:
        # Set here, not returned: an executor's thread holds on to what its last call returned.
        self._llm = build_llm(
            self._model_path,
            # A cached prefix has no log-probs to return.
            enable_prefix_caching=False,
            generation_config="vllm",
            logprobs_mode="raw_logprobs",
            **self._arguments,
            **memory_arguments(**self._memory),
        )

    async def stop(self) -> None:
        # Taken away first, so that a second call finds nothing.
        llm, self._llm = self._llm, None
        if llm is not None:
            close_llm(llm)

    def check(self, context: PrivilegedContext) -> None:
        check_temperature(context)
        check_vocabulary(context, self._vocabulary_size)
        temperature = context.trajectory.sampling.temperature
        if temperature != 1:
            raise ContractError(
                f"Trajectory {context.trajectory.trajectory_id} was sampled at temperature "
                f"{temperature}; vLLM's prompt log-probs are those of temperature 1. Use "
                "teacher.scorer transformers, or rollout.temperature 1."
            )

    async def score(self, contexts: Sequence[PrivilegedContext]) -> list[TurnLogProbs]:
        sequences = build_sequences(contexts)
        turns = [[np.empty(0, np.float32)] * len(context.trajectory.turns) for context in contexts]
        with engine_errors():
            scored = await asyncio.gather(*map(self._score_sequence, sequences))
        # A sequence holds one turn, or several that extend each other.
        for sequence, logprobs in zip(sequences, scored, strict=True):
            for turn_index in np.unique(sequence.turn_index):
                turns[sequence.trajectory_index][turn_index] = logprobs[
                    sequence.turn_index == turn_index
                ]
        return [tuple(values) for values in turns]

    async def update_weights(self, manifest: WeightsManifest) -> None:
        # Shielded: a cancellation between pause and resume would leave the engine paused for good.
        await asyncio.shield(asyncio.create_task(self._update_weights(manifest)))

    async def _update_weights(self, manifest: WeightsManifest) -> None:
        llm = self._require_llm()
        with engine_errors():
            await self._weights.replace(llm, manifest)
        self._version = manifest.policy_version

    async def _score_sequence(self, sequence: TokenSequence) -> LogProbs:
        """Log-probs [N] of one sequence's sampled tokens."""
        logprobs = await score_sequence(
            self._require_llm(), sequence.token_ids.tolist(), next(self._request_ids)
        )
        # Nothing predicts the first token, so the log-probs start with the second one's.
        return logprobs[sequence.response_mask[1:]]

    def _require_llm(self) -> Any:
        if self._llm is None:
            raise UnavailableError("The engine is not running. Start it first.")
        if self._llm.errored:
            raise EngineFailedError(
                "The engine has died; its log on stderr says why. Restart the service."
            )
        return self._llm
