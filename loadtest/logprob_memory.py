"""Measures the memory of scoring on top of its inputs: recomputed chunks against all logits.

Forward and backward pass of log-prob and entropy through a head of Qwen2.5-0.5B's shape. Chunk and
batch keep the proportion of the configuration's defaults (1,024 of 16,384 tokens), both eight times
smaller so that the naive form fits into this machine. Each figure comes from a fresh process: the
peak of its resident memory less what it held when the inputs were ready. `python -m
loadtest.logprob_memory chunked` is one such process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from loadtest.comparison import Comparison, Measurement, Say, Target, describe_pair
from loadtest.workloads import SEED
from sdar.algorithms.logprobs import compute_logprobs

VOCABULARY_SIZE = 151_936
HIDDEN_SIZE = 896
NUM_TOKENS = 2048
CHUNK_TOKENS = 128
TEMPERATURE = 1.0
NUM_PAIRS = 1
TARGET = Target("at_most", 0.3)

LogProbsAndEntropy = tuple[Tensor, Tensor]


NOTES = (
    f"Forward and backward, float32, hidden size {HIDDEN_SIZE}. On both sides inputs and "
    "weights are not counted, and the gradient of the head "
    f"({VOCABULARY_SIZE * HIDDEN_SIZE * 4 / 2**20:.0f} MiB) is counted.",
    "The saved memory costs time: each chunk's logits are computed again in the backward "
    "pass, and each chunk adds a gradient of the head's size to the sum. The default "
    "chunks are eight times as large, which makes the second cost an eighth.",
    "One pair is enough, because memory repeats within 1%.",
)


def measure(say: Say) -> Measurement:
    memory: list[tuple[float, float]] = []
    seconds: list[tuple[float, float]] = []
    for index in range(NUM_PAIRS):
        ours_bytes, ours_s = _run_child("chunked")
        peer_bytes, peer_s = _run_child("naive")
        memory.append((ours_bytes / 2**20, peer_bytes / 2**20))
        seconds.append((ours_s, peer_s))
        say(describe_pair(index + 1, NUM_PAIRS, memory[-1]))

    what = f"of log-probs and entropy, {NUM_TOKENS:,} tokens, vocabulary {VOCABULARY_SIZE:,}"
    naive = "log_softmax over all logits"
    return Measurement(
        (
            Comparison(
                f"peak memory {what}, chunks of {CHUNK_TOKENS}", naive, "MiB", tuple(memory), TARGET
            ),
            Comparison(f"time {what}, chunks of {CHUNK_TOKENS}", naive, "CPU s", tuple(seconds)),
        ),
        notes=NOTES,
    )


def _run_child(variant: str) -> tuple[float, float]:
    """(bytes, CPU seconds) of one variant."""
    command = [sys.executable, "-m", "loadtest.logprob_memory", variant]
    reply = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return float(reply["peak_bytes"]), float(reply["cpu_s"])


def compute_naively(hidden: Tensor, head: nn.Linear, targets: Tensor) -> LogProbsAndEntropy:
    """The textbook form: logits, log-probs and probabilities of [tokens, vocabulary], all kept."""
    logprobs = torch.log_softmax(head(hidden).float() / TEMPERATURE, dim=-1)
    entropy = -(logprobs.exp() * logprobs).sum(dim=-1)
    return logprobs.gather(-1, targets[:, None])[:, 0], entropy


def compute_in_chunks(
    hidden: Tensor, head: nn.Linear, targets: Tensor, chunk_tokens: int = CHUNK_TOKENS
) -> LogProbsAndEntropy:
    return compute_logprobs(hidden, head, targets, TEMPERATURE, chunk_tokens)


VARIANTS: dict[str, Callable[[Tensor, nn.Linear, Tensor], LogProbsAndEntropy]] = {
    "chunked": compute_in_chunks,
    "naive": compute_naively,
}


def _measure_here(variant: str) -> None:
    torch.manual_seed(SEED)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    head = nn.Linear(HIDDEN_SIZE, VOCABULARY_SIZE, bias=False)

    # A small pass first: it loads the libraries' code and makes their buffers.
    _backward(variant, head, *_draw_inputs(num_tokens=2))
    head.zero_grad(set_to_none=True)

    hidden, targets = _draw_inputs(NUM_TOKENS)
    # Linux sets the high-water mark back to the present size when asked with 5.
    Path("/proc/self/clear_refs").write_text("5")
    before = _read_status("VmRSS")
    began = time.process_time()
    _backward(variant, head, hidden, targets)
    cpu_s = time.process_time() - began
    peak_bytes = _read_status("VmHWM") - before
    print(json.dumps({"peak_bytes": peak_bytes, "cpu_s": cpu_s}))


def _draw_inputs(num_tokens: int) -> tuple[Tensor, Tensor]:
    """Hidden states and target tokens."""
    hidden = torch.randn(num_tokens, HIDDEN_SIZE, requires_grad=True)
    return hidden, torch.randint(VOCABULARY_SIZE, (num_tokens,))


def _backward(variant: str, head: nn.Linear, hidden: Tensor, targets: Tensor) -> None:
    logprobs, entropy = VARIANTS[variant](hidden, head, targets)
    (logprobs.mean() + entropy.mean()).backward()


def _read_status(field: str) -> int:
    """Bytes of one field of this process's memory, as the kernel counts it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}; this measurement needs Linux.")


if __name__ == "__main__":
    _measure_here(sys.argv[1])
