from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from loadtest.bench_gpu import (
    SMALL,
    TINY_SHAPE,
    Shape,
    build_settings,
    count_flops,
    draw_sequences,
    find_peak,
    format_table,
)
from loadtest.page import ROOT
from sdar.config import MethodConfig

# `None` in sys.modules makes the import fail, as on a machine that has only torch and transformers.
WITHOUT_JAXTYPING = """
import runpy, sys
sys.modules["jaxtyping"] = None
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_the_script_runs_on_a_cpu_without_jaxtyping_and_writes_its_figures(tmp_path):
    output = tmp_path / "figures.json"
    script = ROOT / "loadtest" / "bench_gpu.py"
    arguments = [script, "--device", "cpu", "--tiny", "--pairs", "1", "--output", output]
    command = [sys.executable, "-c", WITHOUT_JAXTYPING, *map(str, arguments)]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(output.read_text())
    assert [row["gradient_checkpointing"] for row in results["rows"]] == [False, True]
    assert all(row["tokens_per_s"] > 0 and row["share_of_peak"] is None for row in results["rows"])
    assert done.stdout.strip() == results["table"]


@pytest.mark.parametrize("method", ["sdar", "grpo"])
def test_what_is_measured_has_the_defaults_of_a_run(method):
    settings = vars(build_settings(method))
    defaults = MethodConfig(name=method).model_dump(include=set(settings))
    assert settings == defaults


def test_episodes_sample_about_half_of_their_tokens_and_never_the_first():
    sequences = draw_sequences(TINY_SHAPE)
    num_sampled = sum(sequence.num_response_tokens for sequence in sequences)
    share = num_sampled / sum(sequence.num_tokens for sequence in sequences)
    assert 0.35 < share < 0.65
    assert not any(s.response_mask[0] for s in sequences)
    assert all(len(s.behavior_logprobs) == s.num_response_tokens for s in sequences)


def test_flops_are_six_per_weight_and_token_plus_attention():
    """One sequence of 10 tokens, 5 sampled; hidden 4, 2 heads of 2, one of keys and values, 3
    layers, vocabulary 7.

    A layer has 4*4 (queries) + 2 * 4*2 (keys, values) + 4*4 (output) + 3 * 4*8 (MLP) = 144 weights.
    """
    config = {
        "vocab_size": 7,
        "hidden_size": 4,
        "intermediate_size": 8,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    shape = Shape("by hand", config, 1, 10, 10, 100, 10)
    (sequence,) = draw_sequences(shape)
    assert (sequence.num_tokens, sequence.num_response_tokens) == (10, 5)
    body = 6 * 3 * 144 * 10
    head = 6 * 7 * 4 * 5
    attention = 6 * 3 * 4 * 10 * 10
    assert count_flops(shape, [sequence]) == body + head + attention


def test_the_small_shape_has_the_parameters_of_the_half_billion_model():
    hidden, layers = SMALL["hidden_size"], SMALL["num_hidden_layers"]
    kv_size = 2 * hidden // SMALL["num_attention_heads"]
    per_layer = 2 * hidden**2 + 2 * hidden * kv_size + 3 * hidden * SMALL["intermediate_size"]
    assert np.isclose(layers * per_layer + SMALL["vocab_size"] * hidden, 494e6, rtol=0.01)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA A100-SXM4-40GB", 312.0),
        ("CPU", None),
    ],
)
def test_a_device_is_known_by_its_name_or_has_no_peak(name, peak):
    assert find_peak(name) == peak


def test_a_shape_that_does_not_fit_says_so_in_its_row():
    row = {"model": "big", "gradient_checkpointing": True, "error": "out of memory"}
    table = format_table({"device": "d", "versions": "v", "date": "t", "seed": 0, "rows": [row]})
    assert table.endswith("| big | on | out of memory | - | - | - | - |")
