"""The sampler: token ids in, sampled tokens out, each stamped with the version that sampled it.

It never renders prompts, decodes text or knows what an episode is.

Axes: P prompt tokens, T response tokens.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import structlog

from sdar.contracts.errors import EngineFailedError, InvalidInputError, UnavailableError
from sdar.contracts.types import (
    LogProbs,
    PolicyVersions,
    SamplingParameters,
    StopReason,
    TokenIds,
    WeightsManifest,
)
from sdar.engines.vllm_weights import (
    VllmWeights,
    build_llm,
    close_llm,
    engine_errors,
    memory_arguments,
)

log = structlog.get_logger()


@dataclass(frozen=True, slots=True, eq=False)
class Generation:
    """One sampled response.

    Attributes:
        response_token_ids: int32 [T]; ends with the stop token when `stop_reason` is END_OF_TURN.
        logprobs: float32 [T], of the distribution each token was drawn from (temperature and top_p
            applied; a greedy token's is that of the unscaled distribution). All finite.
        policy_versions: int32 [T], the policy version that sampled each token.
        num_cached_tokens: how many of the P prompt tokens the prefix cache served.
    """

    response_token_ids: TokenIds
    logprobs: LogProbs
    policy_versions: PolicyVersions
    stop_reason: StopReason
    num_cached_tokens: int


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counters since start and the present load, for metrics."""

    num_generated_tokens: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_running_requests: int = 0
    num_weight_updates: int = 0
    weight_staging_s: float = 0.0
    """Reading and verifying of the last update, beside generation."""
    weight_pause_s: float = 0.0
    """How long the last update held generation."""


class Engine(Protocol):
    """What a rollout worker needs of a sampler. All methods run on one event loop."""

    @property
    def policy_version(self) -> int:
        """The version that the next token will be sampled by.

        The weights an engine starts with are version 0, the run's base.
        """

    @property
    def is_alive(self) -> bool:
        """False before start, after stop, and for good once the engine has died.

        Then the service must stop.
        """

    @property
    def stats(self) -> EngineStats: ...

    async def start(self) -> None: ...

    async def stop(self) -> None:
        """Ends running generations with UnavailableError. Safe to call twice."""

    async def generate(
        self, prompt_token_ids: Sequence[int] | TokenIds, sampling: SamplingParameters
    ) -> Generation:
        """Samples one response. Cancelling the call frees the request.

        Raises:
            InvalidInputError: prompt empty, too long for the context or with an unknown token, or
                sampling out of range.
            UnavailableError: the engine is not running, or was stopped meanwhile.
            EngineFailedError: the engine died.
        """

    async def update_weights(self, manifest: WeightsManifest) -> None:
        """Switches to the manifest's weights between two tokens.

        Running generations go on under the new version.
        Once begun it is carried through, even if the caller is cancelled. Updating to the present
        version does nothing.

        Raises:
            CorruptionError, WeightsUnavailableError: the weights cannot be read, or are not of this
                model; the previous ones still serve.
            UnavailableError: the engine is not running.
            EngineFailedError: the engine died.
        """


class VllmEngine:
    """`Engine` on vLLM, on a CPU and on GPUs alike; vLLM computes in processes of its own.

    Args:
        model_path: directory or hub name of the model whose weights are version 0.
        dtype: "float32" or "bfloat16".
        max_model_len: longest prompt plus response, in tokens.
        max_num_seqs: sequences sampled at once; more wait their turn.
        stop_token_ids: tokens that end a response (`ChatTokenizer.stops`).
        weight_store_url, run_id: where `update_weights` finds what a manifest names.
        tensor_parallel_size: GPUs the model spans.
        kv_cache_gib: KV cache on a CPU; a GPU's is sized by `gpu_memory_utilization`.
        seed: of the sampler. Give every engine of a run its own, or they draw the same tokens.
    """

    def __init__(
        self,
        model_path: Path | str,
        *,
        dtype: str,
        max_model_len: int,
        max_num_seqs: int,
        stop_token_ids: Sequence[int],
        weight_store_url: str,
        run_id: str,
        tensor_parallel_size: int = 1,
        kv_cache_gib: float = 0.5,
        gpu_memory_utilization: float = 0.85,
        seed: int = 0,
    ) -> None:
        self._model_path = str(model_path)
        self._dtype = dtype
        self._max_model_len = max_model_len
        self._max_num_seqs = max_num_seqs
        self._stop_token_ids = list(stop_token_ids)
        self._weights = VllmWeights(
            self._model_path, weight_store_url=weight_store_url, run_id=run_id
        )
        self._tensor_parallel_size = tensor_parallel_size
        self._kv_cache_gib = kv_cache_gib
        self._gpu_memory_utilization = gpu_memory_utilization
        self._seed = seed

        # vLLM copies the parameters of each request, so requests may share them: building them was
        # a tenth of our own time.
        self._sampling_parameters = functools.lru_cache(maxsize=256)(self._build_sampling)
        self._llm: Any = None
        self._policy_version = 0
        self._is_broken = False
        self._vocabulary_size = 0
        self._request_ids = map(str, itertools.count())
        self._running: set[str] = set()
        self._update_lock = asyncio.Lock()
        self._num_generated_tokens = 0
        self._num_prompt_tokens = 0
        self._num_cached_tokens = 0
        self._num_weight_updates = 0
        self._weight_staging_s = 0.0
        self._weight_pause_s = 0.0

    @property
    def policy_version(self) -> int:
        return self._policy_version

    @property
    def is_alive(self) -> bool:
        return self._llm is not None and not self._is_broken and not self._llm.errored

    @property
    def stats(self) -> EngineStats:
        return EngineStats(
            num_generated_tokens=self._num_generated_tokens,
            num_prompt_tokens=self._num_prompt_tokens,
            num_cached_tokens=self._num_cached_tokens,
            num_running_requests=len(self._running),
            num_weight_updates=self._num_weight_updates,
            weight_staging_s=self._weight_staging_s,
            weight_pause_s=self._weight_pause_s,
        )

    async def start(self) -> None:
        """Loads the model. Takes some 15 s even for the smallest: two processes import vLLM, one
        after the other.

        Raises:
            EngineFailedError: vLLM did not come up; its own log on stderr says why.
        """
        started = time.monotonic()
        self._policy_version = 0
        self._is_broken = False
        await asyncio.to_thread(self._build_llm)
        await self._weights.attach(self._llm, self._policy_version)
        self._vocabulary_size = self._llm.model_config.get_vocab_size()
        log.info(
            "engine_started",
            model=self._model_path,
            duration_s=round(time.monotonic() - started, 1),
        )

    def _build_llm(self) -> None:
        # Set here, not returned: an executor's thread holds on to what its last call returned.
        self._llm = build_llm(
            self._model_path,
            dtype=self._dtype,
            seed=self._seed,
            max_model_len=self._max_model_len,
            max_num_seqs=self._max_num_seqs,
            tensor_parallel_size=self._tensor_parallel_size,
            distributed_executor_backend="uni" if self._tensor_parallel_size == 1 else "mp",
            enable_prefix_caching=True,
            # The model's own would add sampling defaults that nobody asked for; its stop tokens are
            # among ours.
            generation_config="vllm",
            logprobs_mode="processed_logprobs",
            **memory_arguments(
                kv_cache_gib=self._kv_cache_gib, gpu_memory_utilization=self._gpu_memory_utilization
            ),
        )

    async def stop(self) -> None:
        # Taken away first: from here on `generate` refuses, and a second `stop` finds nothing.
        llm, self._llm = self._llm, None
        if llm is None:
            return
        await llm.abort(list(self._running))
        close_llm(llm)

    async def generate(
        self, prompt_token_ids: Sequence[int] | TokenIds, sampling: SamplingParameters
    ) -> Generation:
        llm = self._require_llm()
        prompt = self._check_prompt(prompt_token_ids)
        max_tokens = min(sampling.max_response_tokens, self._max_model_len - len(prompt))
        parameters = self._sampling_parameters(sampling, max_tokens)
        generation = _build_generation(await self._run_request(llm, prompt, parameters))
        self._num_generated_tokens += len(generation.response_token_ids)
        self._num_prompt_tokens += len(prompt)
        self._num_cached_tokens += generation.num_cached_tokens
        return generation

    async def _run_request(self, llm: Any, prompt: list[int], parameters: Any) -> Any:
        """vLLM's final output of one request."""
        request_id = next(self._request_ids)
        # Known while it runs, so that `stop` can abort it: vLLM would leave its caller waiting.
        self._running.add(request_id)
        try:
            with engine_errors():
                outputs = llm.generate(
                    {"type": "token", "prompt_token_ids": prompt}, parameters, request_id
                )
                async for output in outputs:
                    final = output
        finally:
            self._running.discard(request_id)
        return final

    def _check_prompt(self, prompt_token_ids: Sequence[int] | TokenIds) -> list[int]:
        """Refuse here what would kill the engine or hang there."""
        prompt = np.asarray(prompt_token_ids, dtype=np.int64)
        if not 0 < len(prompt) < self._max_model_len:
            raise InvalidInputError(
                f"Prompt of {len(prompt)} tokens; this engine takes 1 to "
                f"{self._max_model_len - 1}. End the episode earlier or raise "
                "model.max_sequence_tokens."
            )
        if prompt.min() < 0 or prompt.max() >= self._vocabulary_size:
            unknown = prompt.max() if prompt.min() >= 0 else prompt.min()
            raise InvalidInputError(
                f"Prompt holds token {unknown}; the model knows 0 to {self._vocabulary_size - 1}. "
                "Tokenize with the model's own tokenizer."
            )
        tokens: list[int] = prompt.tolist()
        return tokens

    def _build_sampling(self, sampling: SamplingParameters, max_tokens: int) -> Any:
        from vllm import SamplingParams
        from vllm.exceptions import VLLMClientError
        from vllm.sampling_params import RequestOutputKind

        # No seed per request: on a CPU it kills the engine.
        try:
            return SamplingParams(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                max_tokens=max_tokens,
                stop_token_ids=self._stop_token_ids,
                logprobs=0,  # the sampled token's only
                flat_logprobs=True,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
        except VLLMClientError as error:
            raise InvalidInputError(f"Cannot sample with {sampling}: {error}") from error

    async def update_weights(self, manifest: WeightsManifest) -> None:
        # Shielded: a cancellation between pause and resume would leave generation paused for good.
        await asyncio.shield(asyncio.create_task(self._update_weights(manifest)))

    async def _update_weights(self, manifest: WeightsManifest) -> None:
        # One at a time: two that stage and install in turn would leave a mix of both.
        async with self._update_lock:
            if manifest.policy_version == self._policy_version:
                return
            llm = self._require_llm()
            with engine_errors():
                started = time.monotonic()
                await self._weights.stage(llm, manifest)
                staged = time.monotonic()
                await self._install(llm, manifest.policy_version)
            self._num_weight_updates += 1
            self._weight_staging_s = staged - started
            self._weight_pause_s = time.monotonic() - staged
            log.info(
                "weights_updated",
                policy_version=manifest.policy_version,
                staging_s=round(self._weight_staging_s, 3),
                pause_s=round(self._weight_pause_s, 3),
            )

    async def _install(self, llm: Any, policy_version: int) -> None:
        try:
            await self._weights.install(llm, policy_version)
        except EngineFailedError:
            # It may hold some tensors of either version: nothing may be sampled from that.
            self._is_broken = True
            await llm.abort(list(self._running))
            raise
        self._policy_version = policy_version

    def _require_llm(self) -> Any:
        if self._llm is None:
            raise UnavailableError("The engine is not running. Start it first.")
        if not self.is_alive:
            raise EngineFailedError(
                "The engine has died; its log on stderr says why. Restart the service."
            )
        return self._llm


def _build_generation(output: Any) -> Generation:
    """Read vLLM's final output of a request.

    Raises:
        UnavailableError: the request was aborted, because the engine stops.
    """
    completion = output.outputs[0]
    if completion.finish_reason not in ("stop", "length"):
        raise UnavailableError(
            f"Generation ended as {completion.finish_reason!r}: the engine is stopping or failed. "
            "Repeat it."
        )
    is_complete = completion.finish_reason == "stop"
    return Generation(
        response_token_ids=np.asarray(completion.token_ids, dtype=np.int32),
        logprobs=np.asarray(completion.logprobs.logprobs, dtype=np.float32),
        policy_versions=_spread_versions(completion.weight_versions),
        stop_reason=StopReason.END_OF_TURN if is_complete else StopReason.LENGTH,
        num_cached_tokens=output.num_cached_tokens or 0,
    )


def _spread_versions(spans: Any) -> PolicyVersions:
    """int32 [T] from vLLM's spans of tokens that one version of the weights sampled."""
    versions = [int(span.version) for span in spans]
    lengths = [span.end - span.start for span in spans]
    return np.repeat(np.asarray(versions, dtype=np.int32), lengths)
