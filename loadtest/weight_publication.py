"""Measures the way of new weights from the learner's tensors to a vLLM that samples from them.

Ours: `WeightStore.publish` (shards, a checksum per tensor, an atomic manifest), then
`VllmEngine.update_weights` (read, verify, install between two tokens). The peer: the same bytes,
already one file, copied and flushed to the same disk, nothing installed.

Then what deltas save: each update of a bfloat16 policy published as what changed, against the same
update published whole.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from loadtest.comparison import (
    Comparison,
    Measurement,
    Say,
    Table,
    Target,
    describe_pair,
    format_figure,
)
from loadtest.peers import copy_durably
from loadtest.workloads import MODEL_PATH, RUN_ID, SEED
from sdar.contracts.types import ModelIdentity
from sdar.engines.vllm_weights import vllm_environment
from sdar.model.causal_lm import export_tensors, load_causal_lm
from sdar.process.settings import apply_environment
from sdar.weights.store import WeightStore
from services.rollout.engine import VllmEngine

IDENTITY = ModelIdentity("bench", "0" * 16)


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one version: its size, and seconds to publish and to read it."""

    mib: float
    publish_s: float
    read_s: float


@dataclass(frozen=True, slots=True)
class Size:
    """A model to move. `shape` are Qwen2 configuration values; None is the shipped model."""

    name: str
    num_pairs: int
    shape: dict[str, int] | None = None


LARGE = {
    "vocab_size": 32_000,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 8,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "max_position_embeddings": 512,
}
"""Qwen2 configuration values of a model of 100M parameters."""
STEP_SIZE = 1e-6
"""A usual one for reinforcement learning of language models."""
NUM_UPDATES = 5
SIZES = (
    Size("household model", num_pairs=7),
    Size("100M parameters", num_pairs=4, shape=LARGE),
)


NOTES = (
    "float32 weights, engine idle, store and copy on the same disk, one thread each side. "
    "Every tensor is hashed when it is published and again before it is installed; a copy "
    "checks nothing and installs nothing.",
    "Generation goes on while a version is read and verified; it is held only for the last column.",
    f"Deltas: the 100M parameters under AdamW at a step size of {STEP_SIZE:g} on float32 "
    "master weights, published in bfloat16 after every update; the reader holds the "
    "version before. Each side of a pair is the same update.",
)


def measure(say: Say) -> Measurement:
    return asyncio.run(_measure(say))


async def _measure(say: Say) -> Measurement:
    apply_environment(vllm_environment(1))
    comparisons: list[Comparison] = []
    rows: list[tuple[str, ...]] = []
    for size in SIZES:
        comparison, row = await _compare(size, say)
        comparisons.append(comparison)
        rows.append(row)
    comparisons += _compare_deltas(say)
    columns = ("model", "MiB", "publish, s", "read and verify, s", "generation paused, s")
    return Measurement(
        tuple(comparisons),
        (Table("Where our time goes (the last update of each size)", columns, tuple(rows)),),
        NOTES,
    )


async def _compare(size: Size, say: Say) -> tuple[Comparison, tuple[str, ...]]:
    """The comparison for a size, and its row of the table."""
    with tempfile.TemporaryDirectory(prefix="sdar-bench-") as name:
        directory = Path(name)
        model_path = MODEL_PATH
        if size.shape is not None:
            model_path = _write_model(directory / "model", size.shape)
        tensors = export_tensors(load_causal_lm(model_path, "float32"))
        file = _save(tensors, directory / "weights.safetensors")
        store = WeightStore(str(directory / "store"), RUN_ID)

        pairs = []
        publish_s = 0.0
        say(f"{size.name}: starting vLLM")
        async with _engine(model_path, directory / "store") as engine:
            for index in range(1 + size.num_pairs):
                publish_s, ours_s = await _time_update(store, engine, index + 1, tensors)
                theirs_s = await asyncio.to_thread(_time_copy, file, directory / "copy")
                store.collect_garbage(keep_newest=1)
                if index:  # the first pair warms up
                    pairs.append((ours_s, theirs_s))
                    say(describe_pair(index, size.num_pairs, (ours_s, theirs_s)))
            stats = engine.stats
        mib = file.stat().st_size / 2**20

    parts = (mib, publish_s, stats.weight_staging_s, stats.weight_pause_s)
    comparison = Comparison(
        f"weights from publish to serving, {size.name}",
        "copy and fsync of the same bytes",
        "s",
        tuple(pairs),
    )
    return comparison, (size.name, *map(format_figure, parts))


async def _time_update(
    store: WeightStore, engine: VllmEngine, version: int, tensors: dict[str, torch.Tensor]
) -> tuple[float, float]:
    """Seconds until a version is published, and until the engine samples from it."""
    began = time.perf_counter()
    manifest = await asyncio.to_thread(store.publish, version, tensors, IDENTITY)
    publish_s = time.perf_counter() - began
    await engine.update_weights(manifest)
    return publish_s, time.perf_counter() - began


def _save(tensors: dict[str, torch.Tensor], file: Path) -> Path:
    # Tied tensors share memory, which safetensors refuses.
    own = {name: tensor.clone() for name, tensor in tensors.items()}
    safetensors.torch.save_file(own, file)
    return file


def _compare_deltas(say: Say) -> list[Comparison]:
    """Publish and read each update as a delta and whole."""
    pairs: list[tuple[Cost, Cost]] = []
    with tempfile.TemporaryDirectory(prefix="sdar-bench-") as name:
        publisher = WeightStore(name, "deltas")
        reader = WeightStore(name, "deltas")
        for index, tensors in enumerate(_iterate_updates()):
            delta = _publish_and_read(publisher, reader, index, tensors)
            # A store that has just been opened has no base, and publishes whole.
            whole = _publish_and_read(
                WeightStore(name, "whole"), WeightStore(name, "whole"), index, tensors
            )
            if index:  # the first version has none before it, and is whole on both sides
                pairs.append((delta, whole))
                say(f"delta {describe_pair(index, NUM_UPDATES, (delta.mib, whole.mib))}")

    mebibytes = tuple((delta.mib, whole.mib) for delta, whole in pairs)
    publish_s = tuple((delta.publish_s, whole.publish_s) for delta, whole in pairs)
    read_s = tuple((delta.read_s, whole.read_s) for delta, whole in pairs)
    what = "of an update, bfloat16, 100M parameters, as a delta"
    return [
        Comparison(f"size {what}", "the update whole", "MiB", mebibytes, Target("at_most", 0.5)),
        Comparison(f"publishing {what}", "the update whole", "s", publish_s),
        Comparison(f"reading and verifying {what}", "the update whole", "s", read_s),
    ]


def _iterate_updates() -> Iterator[dict[str, torch.Tensor]]:
    """The weights before the first update, and after each of them."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(SEED)
    model = Qwen2ForCausalLM(Qwen2Config(**LARGE, tie_word_embeddings=True))
    optimizer = torch.optim.AdamW(model.parameters(), lr=STEP_SIZE)
    for _ in range(1 + NUM_UPDATES):
        tensors = export_tensors(model)
        yield {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
        _update(model, optimizer)


def _publish_and_read(
    publisher: WeightStore, reader: WeightStore, version: int, tensors: dict[str, torch.Tensor]
) -> Cost:
    began = time.perf_counter()
    manifest = publisher.publish(version, tensors, IDENTITY)
    published = time.perf_counter()
    for _ in reader.iter_tensors(manifest):
        pass
    read = time.perf_counter()
    return Cost(manifest.size_bytes / 2**20, published - began, read - published)


def _update(model: Any, optimizer: torch.optim.Optimizer) -> None:
    """One step on random text: as in training, each token of the vocabulary is in few batches."""
    tokens = torch.randint(LARGE["vocab_size"], (4, 128))
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def _write_model(path: Path, shape: dict[str, int]) -> Path:
    """A Qwen2 of random weights; nobody will read what it writes, so it needs no tokenizer."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(SEED)
    Qwen2ForCausalLM(Qwen2Config(**shape, tie_word_embeddings=True)).save_pretrained(path)
    return path


@contextlib.asynccontextmanager
async def _engine(model_path: Path, store: Path) -> AsyncIterator[VllmEngine]:
    arguments: dict[str, Any] = {
        "max_model_len": 512,
        "max_num_seqs": 8,
        "stop_token_ids": [],
        "kv_cache_gib": 0.5,
    }
    engine = VllmEngine(
        model_path, dtype="float32", weight_store_url=str(store), run_id=RUN_ID, **arguments
    )
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


def _time_copy(source: Path, target: Path) -> float:
    began = time.perf_counter()
    copy_durably(source, target)
    return time.perf_counter() - began
