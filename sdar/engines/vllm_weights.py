"""Loads policy versions into a running vLLM, from the rollout worker or teacher that runs it.

The other half, `sdar.engines.vllm_worker`, runs inside vLLM's worker processes. Neither decides
when weights are due: their caller does.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import shutil
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import structlog

from sdar.contracts import codec, errors
from sdar.contracts.errors import (
    CorruptionError,
    EngineFailedError,
    MismatchError,
    WeightsUnavailableError,
)
from sdar.contracts.types import WeightsManifest
from sdar.engines.vllm_scoring import score_sequence
from sdar.process.settings import thread_environment
from sdar.weights.probe import Mismatch, check_mismatch, measure_mismatch

log = structlog.get_logger()

T = TypeVar("T")

_LONGEST_STAGING_POLL_S = 0.25


def vllm_environment(num_threads: int) -> dict[str, str]:
    """Variables that vLLM reads when it is imported: set them before a process's first engine."""
    variables = {
        # vLLM's own binding claims all cores but one, whoever else needs them
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        # A CPU engine runs its one worker in the engine process: it starts 7 s faster.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_PLUGINS": "",
        # vLLM warns of every tied head and rotary buffer at each weight update
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_LOGGING_STREAM": "ext://sys.stderr",
        # Of the engine's processes: what a killed one leaves behind is collected, and vLLM's own
        # deprecations are not ours.
        "PYTHONWARNINGS": "ignore:resource_tracker:UserWarning,ignore::FutureWarning",
    }
    if shutil.which("g++") is None:
        # Even without compiled models, vLLM compiles a small function of its sampler. Without a
        # compiler, as in our images, it would end.
        variables["TORCHDYNAMO_DISABLE"] = "1"
    return thread_environment(num_threads) | variables


def build_llm(model_path: str, **arguments: Any) -> Any:
    """Start an AsyncLLM whose weights can be replaced from the weight store.

    Blocks the caller, for some 15 s with the smallest model.

    Args:
        arguments: of vLLM's AsyncEngineArgs.

    Raises:
        EngineFailedError: vLLM did not come up; its own log on stderr says why.
    """
    from vllm.config import WeightTransferConfig
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    full = AsyncEngineArgs(
        model=model_path,
        load_format="safetensors",
        trust_remote_code=False,
        weight_transfer_config=WeightTransferConfig(backend="sdar_weight_store"),
        # Its import in each worker registers the backend named above.
        worker_extension_cls="sdar.engines.vllm_worker.StagingWorker",
        enforce_eager=True,
        # Prompts and responses travel as token ids; the tokenizer is ours.
        skip_tokenizer_init=True,
        disable_log_stats=True,
        use_tqdm_on_load=False,
        **arguments,
    )
    try:
        return AsyncLLM.from_engine_args(full)
    except (RuntimeError, ValueError, OSError) as error:
        raise EngineFailedError(
            f"vLLM did not start with {model_path}: {error}. Its log on stderr, above, has the "
            "worker's own error."
        ) from error


def close_llm(llm: Any) -> None:
    """End an engine and its processes at once.

    They hold nothing that outlives them; asked to end by themselves they take 5 s.
    """
    context = llm.engine_core.resources.ctx
    llm.shutdown(timeout=0)
    # vLLM closes its sockets and forgets the context that they belong to.
    context.destroy(linger=0)


def memory_arguments(*, kv_cache_gib: float, gpu_memory_utilization: float) -> dict[str, Any]:
    """Memory of an engine: a cache of this size on a CPU, a share of the device on a GPU."""
    from vllm.platforms import current_platform

    # An explicit cache size spares a CPU the profiling run, and its default is most of the machine.
    # Blocks of 32 instead of 128 tokens let the prefix cache serve short prompts.
    if current_platform.is_cpu():
        return {"kv_cache_memory_bytes": int(kv_cache_gib * 2**30), "block_size": 32}
    return {"gpu_memory_utilization": gpu_memory_utilization}


@contextlib.contextmanager
def engine_errors() -> Iterator[None]:
    """Translate vLLM's exceptions into ours."""
    from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

    try:
        yield
    except (EngineDeadError, EngineGenerateError) as error:
        raise EngineFailedError(
            f"The engine died: {error}. Its log on stderr says why. Restart the service."
        ) from error


@dataclass(frozen=True, slots=True)
class WeightUpdate:
    """How a version came into an engine. Durations in seconds.

    Attributes:
        staging_s: reading and verifying, beside generation.
        pause_s: how long generation was held.
        proof_s: scoring of the version's probe, beside generation.
        mismatch: of the engine's log-probs against the learner's; None without a probe.
    """

    staging_s: float = 0.0
    pause_s: float = 0.0
    proof_s: float = 0.0
    mismatch: Mismatch | None = None


async def _ignore() -> None: ...


class VllmWeights:
    """Weight updates of one AsyncLLM: `attach` once, then `replace` for each version.

    A version is proven by its probe once it is installed (`sdar.weights.probe`). Generation goes on
    meanwhile; what it has brought with a version is good only after `wait_proven`, and not if
    `is_disproven` then says so.

    Args:
        model_path: directory or hub name of the model whose weights are version 0.
        dtype: "float32" or "bfloat16".
        weight_store_url, run_id: where the workers read what a manifest names.
        on_disproven: called when the engine has gone back from a version that was wrong: requests
            that run may have tokens of it.
    """

    def __init__(
        self,
        model_path: str,
        *,
        dtype: str,
        weight_store_url: str,
        run_id: str,
        on_disproven: Callable[[], Awaitable[None]] = _ignore,
    ) -> None:
        self._model_path = model_path
        self._dtype = dtype
        self._store = {"url": weight_store_url, "run_id": run_id}
        self._on_disproven = on_disproven
        self._layout: dict[str, tuple[int, ...]] = {}
        self._version = 0
        self._proven: WeightsManifest | None = None
        self._disproven_version: int | None = None
        self._is_settled = asyncio.Event()
        self._is_settled.set()
        self._probe_ids = map("probe-{}".format, itertools.count())

    @property
    def version(self) -> int:
        """The version that the next token is sampled by."""
        return self._version

    async def wait_proven(self) -> None:
        """Return once no version is being proven."""
        await self._is_settled.wait()

    def is_disproven(self, versions: Iterable[int]) -> bool:
        """Whether one of these is the version that was found wrong last."""
        return any(version == self._disproven_version for version in versions)

    async def attach(self, llm: Any, policy_version: int) -> None:
        """Give vLLM's workers the weight store's address and the version that they hold now."""
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        # Imports for a second or two. In a thread and now, since at the first update running
        # requests would wait for it.
        self._layout = await asyncio.to_thread(_compute_layout, self._model_path)
        await _draw_one_token(llm)
        await llm.init_weight_transfer_engine(WeightTransferInitRequest(init_info=self._store))
        await llm.update_weight_version(str(policy_version))
        self._version = policy_version

    async def replace(self, llm: Any, manifest: WeightsManifest) -> WeightUpdate:
        """Bring a version into the engine, and prove it. One call at a time.

        The engine's own version is only proven.

        Raises:
            CorruptionError, WeightsUnavailableError: the version cannot be read, or is not of this
                model; the version before serves.
            MismatchError: the engine computes other log-probs with it than the learner does; the
                version before serves again.
            EngineFailedError: the engine died or was closed, or holds weights that nobody has
                proven: it must not be used any more.
        """
        started = time.monotonic()
        if manifest.policy_version != self._version:
            await _while_alive(llm, self._stage(llm, manifest))
        staged = time.monotonic()
        # Until the version is proven, whoever has sampled with it waits.
        self._is_settled.clear()
        self._disproven_version = None
        try:
            if manifest.policy_version != self._version:
                await _while_alive(llm, self._install(llm, manifest.policy_version))
            installed = time.monotonic()
            mismatch = await self._prove_or_go_back(llm, manifest)
        finally:
            self._is_settled.set()
        self._proven = manifest
        proof_s = time.monotonic() - installed
        return WeightUpdate(staged - started, installed - staged, proof_s, mismatch)

    async def _prove_or_go_back(self, llm: Any, manifest: WeightsManifest) -> Mismatch | None:
        try:
            return await _while_alive(llm, self._prove(llm, manifest))
        except MismatchError as error:
            self._disproven_version = manifest.policy_version
            await self._go_back(llm, error)
            # Now that nothing new can be sampled with it.
            await self._on_disproven()
            raise

    async def _go_back(self, llm: Any, reason: MismatchError) -> None:
        """Serve the last proven version again. Raises EngineFailedError if that is impossible."""
        before = self._proven
        if before is None or before.policy_version == self._version:
            raise EngineFailedError(f"{reason.message} There is no version to go back to.")
        log.error("version_disproven", policy_version=self._version, error=reason.message)
        try:
            await _while_alive(llm, self._stage(llm, before))
            await _while_alive(llm, self._install(llm, before.policy_version))
            await _while_alive(llm, self._prove(llm, before))
        except (CorruptionError, WeightsUnavailableError) as error:
            raise EngineFailedError(
                f"{reason.message} Going back to version {before.policy_version} failed: "
                f"{error.message}"
            ) from error

    async def _prove(self, llm: Any, manifest: WeightsManifest) -> Mismatch | None:
        if not manifest.probe:
            return None
        scored = await asyncio.gather(
            *(score_sequence(llm, each.token_ids, next(self._probe_ids)) for each in manifest.probe)
        )
        mismatch = measure_mismatch(manifest, scored)
        check_mismatch(manifest, mismatch, self._dtype)
        return mismatch

    async def _stage(self, llm: Any, manifest: WeightsManifest) -> None:
        self._check_layout(manifest)
        await llm.collective_rpc("stage_weights", args=(codec.encode_weights_manifest(manifest),))
        # Asked again and again: vLLM has no call that would wait in a worker and let it sample.
        poll_s = 0.005
        while "reading" in (results := await llm.collective_rpc("weight_staging_result")):
            await asyncio.sleep(poll_s)
            poll_s = min(2 * poll_s, _LONGEST_STAGING_POLL_S)
        # The worker's error by its class's name: an exception itself would reach us as a text.
        for result in results:
            if result != "ready":
                name, message = result
                raise getattr(errors, name, EngineFailedError)(message)

    async def _install(self, llm: Any, policy_version: int) -> None:
        """Switch to the staged version between two tokens.

        The pause completes when no step is in flight, and the engine process itself stamps each
        step's tokens with the version set here, so the stamps are exact however late this process
        reads them. Clearing the cache makes running requests compute their context anew: keys and
        values of the old weights would belong to no policy.
        """
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        await llm.pause_generation(mode="keep", clear_cache=True)
        # From here on an error leaves it paused: better no tokens than tokens of no version.
        try:
            await llm.start_weight_update()
            await llm.update_weights(
                WeightTransferUpdateRequest(update_info={"policy_version": policy_version})
            )
            await llm.finish_weight_update(weight_version=str(policy_version))
        except Exception as error:
            raise EngineFailedError(
                f"Installing version {policy_version} failed halfway: {error}. The engine holds "
                "weights of no version; restart the service."
            ) from error
        self._version = policy_version
        await llm.resume_generation()

    def _check_layout(self, manifest: WeightsManifest) -> None:
        """Refuse weights of another model before a worker reads them.

        vLLM would load the names that it knows and leave the rest as it is.
        """
        published = {tensor.name: tensor.shape for tensor in manifest.tensors}
        if published != self._layout:
            # Of a tensor in another shape both sides differ: its name counts once.
            different = sorted({name for name, _ in published.items() ^ self._layout.items()})
            raise CorruptionError(
                f"Version {manifest.policy_version} of {manifest.run_id} is not of the model "
                f"{self._model_path}: {len(different)} tensors are missing, unknown or of another "
                f"shape, first {different[0]}. Publish from the same model.path."
            )


async def _draw_one_token(llm: Any) -> None:
    """Have vLLM load for 2 s what it loads at the first request.

    The request also starts vLLM's reader of the engine's outputs, which `_while_alive` watches.
    """
    from vllm import SamplingParams

    async for _ in llm.generate(
        {"type": "token", "prompt_token_ids": [0]}, SamplingParams(max_tokens=1), "warm-up"
    ):
        continue


async def _while_alive(llm: Any, calls: Coroutine[Any, Any, T]) -> T:
    """Await calls to the engine's process, which vLLM never answers once that process is gone.

    Raises:
        EngineFailedError: the engine died or was closed before the calls were through.
    """
    task = asyncio.create_task(calls)
    # The reader of outputs ends with the engine, whether that dies or is closed.
    await asyncio.wait([task, llm.output_handler], return_when=asyncio.FIRST_COMPLETED)
    if not task.done():
        task.cancel()
        raise EngineFailedError(
            "The engine was gone before its weights were updated; its log on stderr says why."
        )
    return await task


def _compute_layout(model_path: str) -> dict[str, tuple[int, ...]]:
    # Here, since it imports for a second or two.
    from sdar.model.causal_lm import compute_version_shapes

    return compute_version_shapes(Path(model_path))
