"""Measures the learner's step on one GPU: tokens/s, share of peak, memory, SDAR's cost over GRPO's.

    python loadtest/bench_gpu.py                        Qwen2.5's 0.5B and 1.5B shapes in bfloat16
    python loadtest/bench_gpu.py --device cpu --tiny    a tiny shape, to see that the code runs

One file that needs Python 3.11, torch and transformers, and this repository around it for
`sdar.algorithms`. The step is what a learner does between two weight versions, less the reference's
forward pass: forward with chunked log-probs, loss, backward, float32 gradients summed over
micro-batches, clipping, AdamW on float32 master weights, copy back to bfloat16. It prints a
Markdown table and writes every figure to a JSON file, which `python -m loadtest.bench --page` puts
into docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import gc
import json
import statistics
import sys
import time
import types
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "loadtest" / "results_gpu.json"


def _stand_in_for_jaxtyping() -> None:
    """Let `sdar.algorithms` be imported without jaxtyping, which only annotates shapes."""
    try:
        import jaxtyping  # noqa: F401
    except ImportError:
        module = types.ModuleType("jaxtyping")
        # `Float[Tensor, "tokens"]` means `Tensor`.
        annotation = type(
            "Annotation", (), {"__class_getitem__": classmethod(lambda cls, item: item[0])}
        )
        for name in ("Bool", "Float", "Int"):
            setattr(module, name, annotation)
        sys.modules["jaxtyping"] = module


_stand_in_for_jaxtyping()
sys.path.insert(0, str(ROOT))  # so that it runs from anywhere, uninstalled

from sdar.algorithms.batching import (  # noqa: E402
    MicroBatch,
    TokenSequence,
    build_microbatches,
    count_response_tokens,
)
from sdar.algorithms.logprobs import TokenScorer  # noqa: E402
from sdar.algorithms.loss import compute_loss  # noqa: E402

SEED = 0
METHODS = ("sdar", "grpo")
LEARNING_RATE = 1e-6
MAX_GRADIENT_NORM = 1.0
NUM_WARM_UPS = 2
"""Pairs of steps that don't count: kernels are loaded and the optimizer's state is made."""
# Dense bfloat16 TFLOP/s of data sheets, by a part of the device's name; the first match counts.
PEAK_TFLOPS = {
    "B200": 2250.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "A10": 125.0,
    "L40S": 362.0,
    "L4": 121.0,
    "4090": 165.0,
}


@dataclass(frozen=True, slots=True)
class Shape:
    """A model and how it is fed. `microbatch_tokens` bounds one forward pass, padding included."""

    name: str
    config: dict[str, Any]
    num_sequences: int
    min_tokens: int
    max_tokens: int
    microbatch_tokens: int
    chunk_tokens: int


QWEN = {
    "vocab_size": 151_936,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "max_position_embeddings": 32_768,
}
SMALL = QWEN | {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
}
LARGE = QWEN | {
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
}
TINY = QWEN | {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
AGENT = {
    "num_sequences": 64,
    "min_tokens": 1024,
    "max_tokens": 3072,
    "microbatch_tokens": 16_384,
    "chunk_tokens": 1024,
}
SHAPES = (Shape("Qwen2.5-0.5B", SMALL, **AGENT), Shape("Qwen2.5-1.5B", LARGE, **AGENT))
TINY_SHAPE = Shape(
    "tiny",
    TINY,
    num_sequences=6,
    min_tokens=16,
    max_tokens=48,
    microbatch_tokens=96,
    chunk_tokens=32,
)


def build_settings(method: str) -> types.SimpleNamespace:
    """A run's `method` section with its defaults.

    They are spelled out, since sdar.config needs pydantic; a test compares.
    """
    return types.SimpleNamespace(
        name=method,
        distillation_weight=0.01,
        gate="gap",
        gate_sharpness=5.0,
        kl_coefficient=0.01,
        entropy_coefficient=0.0,
        clip_low=0.2,
        clip_high=0.2,
        off_policy="decoupled",
        off_policy_cap=5.0,
        weigh_distillation=True,
    )


def main() -> None:
    arguments = _parse()
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit(
            "error: torch sees no CUDA device. Run this on a machine with one, "
            "or pass --device cpu --tiny."
        )

    rows = []
    shapes = (TINY_SHAPE,) if arguments.tiny else SHAPES
    for shape in shapes:
        for is_checkpointed in (False, True):
            state = "on" if is_checkpointed else "off"
            print(f"{shape.name}, gradient checkpointing {state} ...", file=sys.stderr, flush=True)
            rows.append(measure(shape, is_checkpointed, device, arguments.pairs))

    results = describe_results(rows, device)
    arguments.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(results["table"])


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1 or cpu")
    parser.add_argument("--tiny", action="store_true", help="a tiny shape, to see that it runs")
    parser.add_argument(
        "--pairs",
        type=int,
        default=5,
        help="steps of SDAR and GRPO in turn, after two pairs that don't count",
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the figures go")
    return parser.parse_args()


def describe_results(rows: list[dict[str, Any]], device: torch.device) -> dict[str, Any]:
    """The rows with where they come from, and their table."""
    results: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": " ".join(["python", "loadtest/bench_gpu.py", *sys.argv[1:]]),
        "seed": SEED,
        "device": name_device(device),
        "peak_tflops": find_peak(name_device(device)),
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
        "rows": rows,
    }
    results["table"] = format_table(results)
    return results


def measure(
    shape: Shape, is_checkpointed: bool, device: torch.device, num_pairs: int
) -> dict[str, Any]:
    """One row. A shape that does not fit into the device's memory says so instead of figures."""
    row: dict[str, Any] = {"model": shape.name, "gradient_checkpointing": is_checkpointed}
    try:
        return row | _measure(shape, is_checkpointed, device, num_pairs)
    except torch.OutOfMemoryError:
        return row | {"error": "out of memory"}
    finally:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _measure(
    shape: Shape, is_checkpointed: bool, device: torch.device, num_pairs: int
) -> dict[str, Any]:
    sequences = draw_sequences(shape)
    learner = Learner(shape, is_checkpointed, device)
    batches = {method: learner.place(sequences, has_teacher=method == "sdar") for method in METHODS}
    num_response_tokens = count_response_tokens(sequences)

    reset_peak_memory(device)
    pairs = []
    for index in range(NUM_WARM_UPS + num_pairs):
        sdar_s = learner.time_step("sdar", batches["sdar"], num_response_tokens)
        grpo_s = learner.time_step("grpo", batches["grpo"], num_response_tokens)
        if index >= NUM_WARM_UPS:
            pairs.append((sdar_s, grpo_s))

    num_tokens = sum(sequence.num_tokens for sequence in sequences)
    sdar_s = statistics.median(sdar for sdar, _ in pairs)
    ratios = [sdar / grpo for sdar, grpo in pairs]
    tflops_per_s = count_flops(shape, sequences) / sdar_s / 1e12
    peak = find_peak(name_device(device))
    return {
        "num_parameters": learner.num_parameters,
        "num_tokens": num_tokens,
        "num_response_tokens": num_response_tokens,
        "num_padded_tokens": sum(batch.input_ids.numel() for batch in batches["sdar"]),
        "pairs_s": pairs,
        "tokens_per_s": num_tokens / sdar_s,
        "tflops_per_s": tflops_per_s,
        "share_of_peak": None if peak is None else tflops_per_s / peak,
        "peak_memory_gib": read_peak_memory(device),
        "sdar_over_grpo": [statistics.median(ratios), min(ratios), max(ratios)],
    }


class Learner:
    """A bfloat16 model with float32 master weights, gradients and AdamW state.

    This is what DeepSpeed keeps for a rank on its own.
    """

    def __init__(self, shape: Shape, is_checkpointed: bool, device: torch.device) -> None:
        torch.manual_seed(SEED)
        with torch.device(device):
            causal_lm = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**shape.config))
        if is_checkpointed:
            causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
        causal_lm.train()
        self._scorer = TokenScorer(
            causal_lm.to(torch.bfloat16), temperature=1.0, chunk_size=shape.chunk_tokens
        )
        self._shape = shape
        self._device = device

        # A bfloat16 weight is too coarse to take a small update, so the sums are kept in float32.
        self._weights: list[torch.Tensor] = list(self._scorer.parameters())
        self._masters = [weight.detach().float().requires_grad_() for weight in self._weights]
        self._optimizer = torch.optim.AdamW(
            self._masters, lr=LEARNING_RATE, weight_decay=0.01, fused=device.type == "cuda"
        )
        self.num_parameters = sum(weight.numel() for weight in self._weights)

    def place(self, sequences: Sequence[TokenSequence], *, has_teacher: bool) -> list[MicroBatch]:
        """The batch on the device. GRPO's has no teacher log-probs, as in a run."""
        if not has_teacher:
            sequences = [dataclasses.replace(one, teacher_logprobs=None) for one in sequences]
        # One rank's share, and there is one rank.
        [micro_batches] = build_microbatches(sequences, self._shape.microbatch_tokens)
        return [micro_batch.to(self._device) for micro_batch in micro_batches]

    def time_step(self, method: str, micro_batches: Sequence[MicroBatch], num_tokens: int) -> float:
        """Seconds of one whole step, the device's queue empty before and after."""
        self._synchronize()
        began = time.perf_counter()
        self.step(method, micro_batches, num_tokens)
        self._synchronize()
        return time.perf_counter() - began

    def step(self, method: str, micro_batches: Sequence[MicroBatch], num_tokens: int) -> None:
        for micro_batch in micro_batches:
            logprobs, entropy = self._scorer(micro_batch.input_ids, micro_batch.response_mask)
            loss, _ = compute_loss(
                micro_batch,
                policy_logprobs=logprobs,
                entropy=entropy,
                # Any fixed values: the reference's forward pass is not measured.
                ref_logprobs=micro_batch.behavior_logprobs,
                num_tokens_global=num_tokens,
                settings=build_settings(method),
                update_index=0,
                learner_version=0,
            )
            loss.backward()
            self._accumulate()

        torch.nn.utils.clip_grad_norm_(self._masters, MAX_GRADIENT_NORM, foreach=True)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=False)
        with torch.no_grad():
            torch._foreach_copy_(self._weights, self._masters)

    def _accumulate(self) -> None:
        """Move this micro-batch's gradients into the float32 ones."""
        for weight, master in zip(self._weights, self._masters, strict=True):
            if weight.grad is None:
                continue
            if master.grad is None:
                master.grad = weight.grad.float()
            else:
                master.grad.add_(weight.grad)
            weight.grad = None

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def draw_sequences(shape: Shape) -> list[TokenSequence]:
    """Episodes of random tokens: prompts, responses and observations; half are sampled."""
    rng = np.random.default_rng(SEED)
    sequences = []
    for index in range(shape.num_sequences):
        length = int(rng.integers(shape.min_tokens, shape.max_tokens + 1))
        mask = (np.arange(length) // max(1, shape.min_tokens // 8)) % 2 == 1
        count = int(mask.sum())
        sequences.append(
            TokenSequence(
                token_ids=rng.integers(0, shape.config["vocab_size"], length),
                response_mask=mask,
                behavior_logprobs=-rng.exponential(2.0, count).astype(np.float32),
                policy_versions=np.zeros(count, np.int64),
                advantages=rng.standard_normal(count).astype(np.float32),
                teacher_logprobs=-rng.exponential(2.0, count).astype(np.float32),
                turn_index=np.zeros(count, np.int64),
                trajectory_index=index,
            )
        )
    return sequences


def count_flops(shape: Shape, sequences: Sequence[TokenSequence]) -> float:
    """Floating-point operations that the step needs.

    They are 6 per weight and token that meet (2 forward, 4 backward), and causal attention. The
    head meets sampled tokens only; the embedding is a lookup. Neither padding nor what
    checkpointing computes again counts.
    """
    config = shape.config
    layers = int(config["num_hidden_layers"])
    hidden = int(config["hidden_size"])
    kv_size = config["num_key_value_heads"] * hidden // config["num_attention_heads"]
    queries_and_output = 2 * hidden * hidden
    keys_and_values = 2 * hidden * kv_size
    feed_forward = 3 * hidden * config["intermediate_size"]
    per_layer = queries_and_output + keys_and_values + feed_forward

    body = sum(6.0 * layers * per_layer * sequence.num_tokens for sequence in sequences)
    head = 6.0 * config["vocab_size"] * hidden * count_response_tokens(sequences)
    # Scores and weighted values: 2 products of 2 * length * hidden per token, half of it masked,
    # three times with the backward.
    attention = sum(6.0 * layers * hidden * sequence.num_tokens**2 for sequence in sequences)
    return float(body + head + attention)


def name_device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def find_peak(name: str) -> float | None:
    """TFLOP/s of a device, None for one whose data sheet is not known here."""
    for part, peak in PEAK_TFLOPS.items():
        if all(word in name for word in part.split()):
            return peak
    return None


def reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def read_peak_memory(device: torch.device) -> float | None:
    """GiB at the peak, None on a CPU."""
    if device.type != "cuda":
        return None
    return torch.cuda.max_memory_allocated(device) / 2**30


def format_table(results: dict[str, Any]) -> str:
    """Markdown. Absent figures are dashes."""
    lines = [
        f"{results['device']}, {results['versions']}, {results['date']}, seed {results['seed']}\n",
        "| model | checkpointing | tokens/s | TFLOP/s | share of peak | peak memory, GiB "
        "| SDAR over GRPO (range) |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        checkpointing = "on" if row["gradient_checkpointing"] else "off"
        cells = [row["model"], checkpointing, *_format_figures(row)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _format_figures(row: dict[str, Any]) -> list[str]:
    if "error" in row:
        return [row["error"], "-", "-", "-", "-"]
    share_of_peak = row["share_of_peak"]
    peak_memory_gib = row["peak_memory_gib"]
    median, low, high = row["sdar_over_grpo"]
    return [
        f"{row['tokens_per_s']:,.0f}",
        f"{row['tflops_per_s']:.3g}",
        "-" if share_of_peak is None else f"{share_of_peak:.1%}",
        "-" if peak_memory_gib is None else f"{peak_memory_gib:.1f}",
        f"{median:.3f} ({low:.3f} to {high:.3f})",
    ]


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
