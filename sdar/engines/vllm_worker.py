"""Loads policy versions into a vLLM worker; this module runs inside vLLM's worker processes.

Two steps, so that generation pauses only for the second: `stage` reads and verifies the tensors
into host memory while tokens are still sampled; vLLM's own weight-transfer session then installs
them between two tokens. Whatever is wrong with a publication shows in the first step, which never
touches the model.

Importing this module registers the backend with vLLM; a worker imports it as its extension class.
From then on the process ends with the one that started it, however that one ends: a killed service
leaves no engine behind.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

from sdar.contracts import codec
from sdar.contracts.errors import WeightsUnavailableError
from sdar.contracts.types import WeightsManifest
from sdar.weights.store import WeightStore

BACKEND = "sdar_weight_store"


@dataclass
class StoreInitInfo(WeightTransferInitInfo):
    """Where published weights lie."""

    url: str
    run_id: str


@dataclass
class StoreUpdateInfo(WeightTransferUpdateInfo):
    """Which staged version to install."""

    policy_version: int


class StoreWeightTransfer(WeightTransferEngine[StoreInitInfo, StoreUpdateInfo]):
    """vLLM's weight-transfer session, fed from what `stage` has read."""

    init_info_cls = StoreInitInfo
    update_info_cls = StoreUpdateInfo

    _store: WeightStore
    _staged: Future[dict[str, torch.Tensor]] | None = None
    _staged_version: int = -1

    def init_transfer_engine(self, init_info: StoreInitInfo) -> None:
        self._store = WeightStore(init_info.url, init_info.run_id)
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="weight-staging")

    def stage(self, manifest: WeightsManifest) -> None:
        """Start reading a version; whatever was staged before is dropped."""
        # In a thread: this worker goes on sampling meanwhile.
        self._staged_version = manifest.policy_version
        self._staged = self._reader.submit(lambda: dict(self._store.iter_tensors(manifest)))

    def staging_result(self) -> tuple[str, str] | str:
        """'reading', 'ready', or the class name and message of the error that ended the reading."""
        if self._staged is None or not self._staged.done():
            return "reading"
        error = self._staged.exception()
        return (type(error).__name__, str(error)) if error else "ready"

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, object]) -> None:
        self.receive_weights(self.parse_update_info(update_info))
        # The stock method synchronises unconditionally, which fails where there is no accelerator.
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: StoreUpdateInfo) -> None:
        # Taken out, so that the host memory of a version is free once it is installed.
        staged, self._staged = self._staged, None
        if staged is None or self._staged_version != update_info.policy_version:
            raise WeightsUnavailableError(
                f"Version {update_info.policy_version} is not staged (staged: "
                f"{self._staged_version}). Stage it first."
            )
        # A method of vLLM's models, which the type of this field, torch's Module, does not know.
        model: Any = self.model
        model.load_weights(iter(staged.result().items()))

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        if self.device.type == "cpu":
            self._repack_heads()

    def _repack_heads(self) -> None:
        """Give the head its new weights.

        On a CPU it multiplies by a packed copy of the weights, which a reload leaves as it was if
        they are tied. The head is the embedding itself in some models, so all of the kind are
        packed anew.
        """
        for module in self.model.modules():
            if isinstance(module, VocabParallelEmbedding):
                dispatch_cpu_unquantized_gemm(module, remove_weight=False)

    def shutdown(self) -> None:
        if hasattr(self, "_reader"):
            self._reader.shutdown(wait=False, cancel_futures=True)


class StagingWorker:
    """Methods that vLLM mixes into its worker class, where `collective_rpc` reaches them."""

    weight_transfer_engine: StoreWeightTransfer

    def stage_weights(self, encoded_manifest: bytes) -> None:
        self.weight_transfer_engine.stage(codec.decode_weights_manifest(encoded_manifest))

    def weight_staging_result(self) -> tuple[str, str] | str:
        return self.weight_transfer_engine.staging_result()


# At import, and so in each worker, whose extension class is of this module.
WeightTransferEngineFactory.register_engine(BACKEND, StoreWeightTransfer)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is None:
        return  # an engine inside the service's own process

    def wait() -> None:
        parent.join()
        # Nothing here is worth saving, and vLLM's own shutdown would wait for the dead.
        os._exit(1)

    threading.Thread(target=wait, name="parent-watch", daemon=True).start()


_end_with_parent()
