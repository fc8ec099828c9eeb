"""Owns the sampler: token ids in, sampled tokens out, each stamped with the policy version that sampled it.

It never renders prompts, decodes text or knows what an episode is.

Axes: P prompt tokens, T response tokens.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import structlog

from sdar.contracts import codec, errors
from sdar.contracts.errors import CorruptionError, EngineFailedError, InvalidInputError, UnavailableError
from sdar.contracts.types import LogProbs, PolicyVersions, SamplingParameters, StopReason, TokenIds, WeightsManifest
from sdar.runtime.settings import thread_environment

log = structlog.get_logger()

_LONGEST_STAGING_POLL_S = 0.25


@dataclass(frozen=True, slots=True, eq=False)
class Generation:
    """One sampled response.

    Attributes:
        response_token_ids: int32 [T]; ends with the stop token when `stop_reason` is END_OF_TURN.
        logprobs: float32 [T], of the distribution each token was drawn from (temperature and top_p applied; a greedy
            token's is that of the unscaled distribution). All finite.
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
        """The version the next token will be sampled by. The weights an engine starts with are version 0, the run's base."""

    @property
    def is_alive(self) -> bool:
        """False before start, after stop, and for good once the engine has died: the service must then stop."""

    @property
    def stats(self) -> EngineStats: ...

    async def start(self) -> None: ...

    async def stop(self) -> None:
        """Ends running generations with UnavailableError. Safe to call twice."""

    async def generate(self, prompt_token_ids: Sequence[int], sampling: SamplingParameters) -> Generation:
        """Samples one response. Cancelling the call frees the request.

        Raises:
            InvalidInputError: prompt empty, too long for the context or with an unknown token, or sampling out of range.
            UnavailableError: the engine is not running, or was stopped meanwhile.
            EngineFailedError: the engine died.
        """

    async def update_weights(self, manifest: WeightsManifest) -> None:
        """Switches to the manifest's weights between two tokens; running generations go on under the new version.

        Once begun it is carried through, even if the caller is cancelled. Updating to the present version does nothing.

        Raises:
            CorruptionError, WeightsUnavailableError: the weights cannot be read, or are not of this model; the previous
                ones still serve.
            UnavailableError: the engine is not running.
            EngineFailedError: the engine died.
        """


def vllm_environment(num_threads: int) -> dict[str, str]:
    """Variables vLLM reads when it is imported; set them before the first `VllmEngine.start` of a process."""
    return thread_environment(num_threads) | {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # its own binding claims all cores but one, whoever else needs them
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # lets a CPU engine run its one worker in the engine process: 7 s less to start
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_PLUGINS": "",
        "VLLM_LOGGING_LEVEL": "ERROR",  # it warns of every tied head and rotary buffer at each weight update
        "VLLM_LOGGING_STREAM": "ext://sys.stderr",
        # Of the engine's processes: what a killed one leaves behind is collected, and vLLM's own deprecations are not ours.
        "PYTHONWARNINGS": "ignore:resource_tracker:UserWarning,ignore::FutureWarning",
    }


class VllmEngine:
    """`Engine` on vLLM, on a CPU and on GPUs alike; vLLM computes in processes of its own.

    Args:
        model_path: directory or hub name of the model whose weights are version 0.
        dtype: "float32" or "bfloat16".
        max_model_len: longest prompt plus response, in tokens.
        max_num_seqs: sequences sampled at once; more wait their turn.
        stop_token_ids: tokens that end a response (the tokenizer's end-of-turn token).
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
        self._weight_store = {"url": weight_store_url, "run_id": run_id}
        self._tensor_parallel_size = tensor_parallel_size
        self._kv_cache_gib = kv_cache_gib
        self._gpu_memory_utilization = gpu_memory_utilization
        self._seed = seed

        self._llm: Any = None
        self._policy_version = 0
        self._is_broken = False
        self._vocabulary_size = 0
        self._request_ids = map(str, itertools.count())
        self._running: set[str] = set()
        self._update_lock = asyncio.Lock()
        self._layout: dict[str, tuple[int, ...]] = {}
        self._num_generated_tokens = self._num_prompt_tokens = self._num_cached_tokens = self._num_weight_updates = 0
        self._weight_staging_s = self._weight_pause_s = 0.0

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
        """Loads the model. Takes some 15 s even for the smallest: two processes import vLLM, one after the other.

        Raises:
            EngineFailedError: vLLM did not come up; its own log on stderr says why.
        """
        started = time.monotonic()
        await asyncio.to_thread(self._build_llm)
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        await self._llm.init_weight_transfer_engine(WeightTransferInitRequest(init_info=self._weight_store))
        await self._llm.update_weight_version(str(self._policy_version))
        self._vocabulary_size = self._llm.model_config.get_vocab_size()
        log.info("engine_started", model=self._model_path, duration_s=round(time.monotonic() - started, 1))

    def _build_llm(self) -> None:
        from vllm.config import WeightTransferConfig
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.platforms import current_platform
        from vllm.v1.engine.async_llm import AsyncLLM

        # An explicit cache size spares a CPU the profiling run, and its default is most of the machine. Blocks of 32 instead
        # of 128 tokens let the prefix cache serve short prompts.
        memory = (
            {"kv_cache_memory_bytes": int(self._kv_cache_gib * 2**30), "block_size": 32}
            if current_platform.is_cpu()
            else {"gpu_memory_utilization": self._gpu_memory_utilization}
        )
        arguments = AsyncEngineArgs(
            model=self._model_path,
            dtype=self._dtype,
            seed=self._seed,
            max_model_len=self._max_model_len,
            max_num_seqs=self._max_num_seqs,
            tensor_parallel_size=self._tensor_parallel_size,
            distributed_executor_backend="uni" if self._tensor_parallel_size == 1 else "mp",
            enforce_eager=True,
            enable_prefix_caching=True,
            skip_tokenizer_init=True,
            generation_config="vllm",  # the model's own would add stop tokens and sampling defaults nobody asked for
            logprobs_mode="processed_logprobs",
            weight_transfer_config=WeightTransferConfig(backend="sdar_weight_store"),
            worker_extension_cls="services.rollout.weight_transfer.StagingWorker",
            disable_log_stats=True,
            use_tqdm_on_load=False,
            **memory,
        )
        try:
            # Set here, not returned: an executor's thread holds on to what its last call returned.
            self._llm = AsyncLLM.from_engine_args(arguments)
        except (RuntimeError, ValueError, OSError) as error:
            raise EngineFailedError(
                f"vLLM did not start with {self._model_path}: {error}. Its log on stderr, above, has the worker's own error."
            ) from error

    async def stop(self) -> None:
        llm, self._llm = self._llm, None
        if llm is None:
            return
        await llm.abort(list(self._running))
        # Nothing the engine's processes hold outlives them, so they are killed: asked to leave, they take 5 s.
        llm.shutdown(timeout=0)

    async def generate(self, prompt_token_ids: Sequence[int], sampling: SamplingParameters) -> Generation:
        llm = self._require_llm()
        prompt = self._check_prompt(prompt_token_ids)
        request_id = next(self._request_ids)
        parameters = self._build_sampling(len(prompt), sampling)
        self._running.add(request_id)
        try:
            with _engine_errors():
                outputs = llm.generate({"type": "token", "prompt_token_ids": prompt}, parameters, request_id)
                async for output in outputs:
                    final = output
        finally:
            self._running.discard(request_id)
        generation = _build_generation(final)
        self._num_generated_tokens += len(generation.response_token_ids)
        self._num_prompt_tokens += len(prompt)
        self._num_cached_tokens += generation.num_cached_tokens
        return generation

    def _check_prompt(self, prompt_token_ids: Sequence[int]) -> list[int]:
        """Refuse here what would kill the engine or hang there."""
        prompt = np.asarray(prompt_token_ids, dtype=np.int64)
        if not 0 < len(prompt) < self._max_model_len:
            raise InvalidInputError(
                f"Prompt of {len(prompt)} tokens; this engine takes 1 to {self._max_model_len - 1}. "
                "End the episode earlier or raise model.max_sequence_tokens."
            )
        if prompt.min() < 0 or prompt.max() >= self._vocabulary_size:
            raise InvalidInputError(
                f"Prompt holds token {prompt.max() if prompt.min() >= 0 else prompt.min()}; the model knows 0 to "
                f"{self._vocabulary_size - 1}. Tokenize with the model's own tokenizer."
            )
        tokens: list[int] = prompt.tolist()
        return tokens

    def _build_sampling(self, num_prompt_tokens: int, sampling: SamplingParameters) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        # No seed per request: on a CPU it kills the engine.
        try:
            return SamplingParams(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                max_tokens=min(sampling.max_response_tokens, self._max_model_len - num_prompt_tokens),
                stop_token_ids=self._stop_token_ids,
                logprobs=0,  # the sampled token's only
                flat_logprobs=True,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
        except ValueError as error:
            raise InvalidInputError(f"Cannot sample with {sampling}: {error}") from error

    async def update_weights(self, manifest: WeightsManifest) -> None:
        # Shielded: a cancellation between pause and resume would leave generation paused for good.
        await asyncio.shield(asyncio.create_task(self._update_weights(manifest)))

    async def _update_weights(self, manifest: WeightsManifest) -> None:
        async with self._update_lock:
            if manifest.policy_version == self._policy_version:
                return
            llm = self._require_llm()
            with _engine_errors():
                await asyncio.to_thread(self._check_layout, manifest)
                started = time.monotonic()
                await self._stage(llm, manifest)
                staged = time.monotonic()
                await self._install(llm, manifest.policy_version)
            self._num_weight_updates += 1
            self._weight_staging_s, self._weight_pause_s = staged - started, time.monotonic() - staged
            log.info(
                "weights_updated",
                policy_version=manifest.policy_version,
                staging_s=round(self._weight_staging_s, 3),
                pause_s=round(self._weight_pause_s, 3),
            )

    def _check_layout(self, manifest: WeightsManifest) -> None:
        """Refuse weights that are not of this model before a worker reads them: vLLM would load the names it knows."""
        if not self._layout:
            self._layout = _compute_layout(self._model_path)
        published = {tensor.name: tensor.shape for tensor in manifest.tensors}
        if published != self._layout:
            different = sorted(name for name, _ in published.items() ^ self._layout.items())
            raise CorruptionError(
                f"Version {manifest.policy_version} of {manifest.run_id} is not of the model {self._model_path}: "
                f"{len(different)} tensors are missing, unknown or of another shape, first {different[0]}. "
                "Publish from the same model.path."
            )

    async def _stage(self, llm: Any, manifest: WeightsManifest) -> None:
        """Have every worker read and verify the version while generation goes on."""
        await llm.collective_rpc("stage_weights", args=(codec.encode_weights_manifest(manifest),))
        poll_s = 0.005
        while "reading" in (results := await llm.collective_rpc("weight_staging_result")):
            await asyncio.sleep(poll_s)
            poll_s = min(2 * poll_s, _LONGEST_STAGING_POLL_S)
        for result in results:
            if result != "ready":
                name, message = result
                raise getattr(errors, name, EngineFailedError)(message)

    async def _install(self, llm: Any, policy_version: int) -> None:
        """Switch between two tokens.

        The pause completes when no step is in flight, and the engine process itself stamps each step's tokens with the
        version set here, so the stamps are exact however late this process reads them. Clearing the cache makes running
        requests compute their context anew: keys and values of the old weights would belong to no policy.
        """
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        await llm.pause_generation(mode="keep", clear_cache=True)
        try:
            await llm.start_weight_update()
            await llm.update_weights(WeightTransferUpdateRequest(update_info={"policy_version": policy_version}))
            await llm.finish_weight_update(weight_version=str(policy_version))
        except Exception as error:
            # Some layers may hold the new weights and some the old: nothing may be sampled from that.
            self._is_broken = True
            await llm.abort(list(self._running))
            raise EngineFailedError(
                f"Installing version {policy_version} failed halfway: {error}. The engine holds weights of no version; "
                "restart the service."
            ) from error
        self._policy_version = policy_version
        await llm.resume_generation()

    def _require_llm(self) -> Any:
        if self._llm is None:
            raise UnavailableError("The engine is not running. Start it first.")
        if not self.is_alive:
            raise EngineFailedError("The engine has died; its log on stderr says why. Restart the service.")
        return self._llm


@contextlib.contextmanager
def _engine_errors() -> Iterator[None]:
    """Translate vLLM's exceptions into ours."""
    from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

    try:
        yield
    except (EngineDeadError, EngineGenerateError) as error:
        raise EngineFailedError(f"The engine died: {error}. Its log on stderr says why. Restart the service.") from error


def _compute_layout(model_path: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that make a policy version of this model; reads its configuration, no weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from sdar.runtime.causal_lm import export_tensors

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_path))
    return {name: tuple(tensor.shape) for name, tensor in export_tensors(model).items()}


def _build_generation(output: Any) -> Generation:
    """Read vLLM's final output of a request.

    Raises:
        UnavailableError: the request was aborted, because the engine stops.
    """
    completion = output.outputs[0]
    if completion.finish_reason not in ("stop", "length"):
        raise UnavailableError(
            f"Generation ended as {completion.finish_reason!r}: the engine is stopping or failed. Repeat it."
        )
    spans = completion.weight_versions
    return Generation(
        response_token_ids=np.asarray(completion.token_ids, dtype=np.int32),
        logprobs=np.asarray(completion.logprobs.logprobs, dtype=np.float32),
        policy_versions=np.repeat(
            np.asarray([int(span.version) for span in spans], dtype=np.int32), [span.end - span.start for span in spans]
        ),
        stop_reason=StopReason.END_OF_TURN if completion.finish_reason == "stop" else StopReason.LENGTH,
        num_cached_tokens=output.num_cached_tokens or 0,
    )
