"""Real DeepSpeed on gloo: every ZeRO stage and number of ranks steps as plain PyTorch does."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sdar.algorithms.batching import build_microbatches, count_response_tokens
from sdar.algorithms.logprobs import TokenScorer
from sdar.contracts import codec
from sdar.contracts.streams import Stream
from sdar.model.causal_lm import export_tensors, load_causal_lm
from sdar.process.ports import find_free_port
from sdar.weights.store import WeightStore
from services.learner.model import PolicyModel
from services.learner.ranks import stand_alone
from services.learner.service import open_learner
from tests.integration.learner_ranks import (
    LEARNING_RATE,
    TOKEN_BUDGETS,
    check_skipped,
    compute_share,
    make_batches,
    make_step_config,
    skip_steps,
    take_steps,
)
from tests.support import until
from tests.unit.learner.builders import (
    MODEL_PATH,
    count_pending,
    make_bus,
    make_config,
    make_group,
    read_ledger,
    send,
)
from tests.unit.model.architectures import make_model

ROOT = Path(__file__).parents[2]
TOLERANCE = 1e-4
"""Adam magnifies rounding of tiny gradients; three steps may move a weight by 3e-3."""


def run_ranks(*arguments):
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "tests.integration.learner_ranks",
        *map(str, arguments),
    ]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(*processes, timeout_s=600):
    """Outputs of processes that all end well, read at once so that none waits for its reader."""
    with ThreadPoolExecutor(len(processes)) as readers:
        reading = [readers.submit(process.communicate, timeout=timeout_s) for process in processes]
        is_late = any(isinstance(one.exception(), subprocess.TimeoutExpired) for one in reading)
    for process in processes:
        process.kill()
    outputs = [
        process.communicate()[0] if one.exception() else one.result()[0]
        for process, one in zip(processes, reading, strict=True)
    ]
    said = "\n".join(
        f"exit code {process.returncode}:\n{output}"
        for process, output in zip(processes, outputs, strict=True)
    )
    assert not is_late, f"Not over within {timeout_s} s.\n{said}"
    assert [process.returncode for process in processes] == [0] * len(processes), said
    return outputs


@pytest.fixture(scope="module")
def expected():
    """Weights and gradient norms after the same steps in plain PyTorch, the whole batch at once."""
    config = make_step_config(0)
    policy = TokenScorer(load_causal_lm(MODEL_PATH, "float32"), temperature=1.0, chunk_size=7)
    reference = TokenScorer(load_causal_lm(MODEL_PATH, "float32"), temperature=1.0, chunk_size=7)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LEARNING_RATE, weight_decay=0.1)
    norms = []
    for step, sequences in enumerate(make_batches()):
        [[batch]] = build_microbatches(sequences, 100_000)
        with torch.no_grad():
            ref_logprobs = reference(batch.input_ids, batch.response_mask)[0]
        logprobs, entropy = policy(batch.input_ids, batch.response_mask)
        loss = compute_share(
            config, batch, logprobs, entropy, ref_logprobs, count_response_tokens(sequences), step
        )
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(policy.parameters(), 0.5)))
        optimizer.step()
    return export_tensors(policy.causal_lm), norms


def assert_same(found, expected, norms, expected_norms):
    assert found.keys() == expected.keys()
    assert norms == pytest.approx(expected_norms, rel=1e-3)
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=0, atol=TOLERANCE), name


@pytest.mark.parametrize("budget", TOKEN_BUDGETS)
@pytest.mark.parametrize("stage", range(4))
def test_one_rank_steps_as_plain_pytorch_does(stage, budget, expected):
    weights, norms = take_steps(stand_alone("cpu"), stage, budget)
    assert_same(weights, expected[0], norms, expected[1])


def test_gradient_checkpointing_and_offloading_the_reference_change_nothing(expected):
    weights, norms = take_steps(
        stand_alone("cpu"), 0, 128, gradient_checkpointing=True, offload_reference=True
    )
    assert_same(weights, expected[0], norms, expected[1])


@pytest.mark.parametrize("stage", [0, 3])
def test_bfloat16_trains_with_float32_master_weights(stage, expected):
    weights, norms = take_steps(stand_alone("cpu"), stage, 128, dtype="bfloat16")
    assert norms == pytest.approx(expected[1], rel=0.3)
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    moved = torch.cat(
        [(weights[name].float() - value).abs().flatten() for name, value in expected[0].items()]
    )
    # Half a bfloat16 step of a weight near 1, and three steps of the learning rate.
    assert moved.max() < 2**-8 + 6 * LEARNING_RATE


def test_sharded_experts_are_published_under_the_names_of_the_checkpoint(tmp_path):
    make_model("mixtral").save_pretrained(tmp_path)
    model = PolicyModel(
        tmp_path,
        dtype="float32",
        temperature=1.0,
        training=make_step_config(3).training,
        needs_reference=False,
        ranks=stand_alone("cpu"),
    )
    exported, stored = model.export(), load_file(tmp_path / "model.safetensors")
    model.close()
    assert exported.keys() == stored.keys()
    assert all(torch.equal(exported[name], stored[name]) for name in stored)


def test_two_ranks_step_as_one_does(expected, tmp_path):
    port = find_free_port("127.0.0.1")
    finish(*(run_ranks("steps", rank, 2, port, tmp_path) for rank in range(2)))
    for stage in range(4):
        for budget in TOKEN_BUDGETS:
            found = load_file(tmp_path / f"stage{stage}-budget{budget}.safetensors")
            norms = found.pop("norms").tolist()
            assert_same(found, expected[0], norms, expected[1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stage", range(4))
def test_a_step_that_is_not_finite_leaves_weights_and_moments_bit_for_bit(stage, dtype):
    check_skipped(*skip_steps(stand_alone("cpu"), stage, dtype))


def test_two_ranks_skip_a_step_together_though_the_fault_is_of_one():
    port = find_free_port("127.0.0.1")
    finish(*(run_ranks("skip", rank, 2, port) for rank in range(2)))


def test_two_ranks_under_zero_3_resume_bitwise(tmp_path):
    finish(run_ranks("train", tmp_path / "whole"))
    resumed = tmp_path / "resumed"
    shutil.copytree(
        tmp_path / "whole" / "checkpoints" / "update-00000001",
        resumed / "checkpoints" / "update-00000001",
    )
    finish(run_ranks("train", resumed))
    whole, again = (
        load_file(next(directory.glob("result-*"))) for directory in (tmp_path / "whole", resumed)
    )
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[name], again[name]) for name in whole)


class Run:
    """One learner of one rank on an in-memory bus, started as often as a test likes."""

    def __init__(self, directory, **config):
        self.config = make_config(**config)
        self.bus = make_bus(self.config)
        self.store = WeightStore(str(directory / "weights"), self.config.name)
        self.checkpoints = directory / "checkpoints"

    async def train(self, until_update, *, is_killed=False):
        """One life of the learner, drained at its end or killed without a last checkpoint."""
        async with open_learner(self.config, self.bus, self.store, self.checkpoints) as learner:
            stopping = asyncio.Event()
            task = asyncio.create_task(learner.run(stopping))
            await until(
                lambda: self.has_published(learner.progress, until_update) or task.done(),
                timeout_s=120,
            )
            if is_killed:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
            else:
                stopping.set()
                await task
            return learner.progress

    def has_published(self, progress, until_update):
        return (
            progress.num_updates >= until_update
            and self.store.list_versions()[-1] == progress.policy_version
        )

    def weights(self):
        return dict(self.store.iter_tensors(self.store.fetch_manifest()))


NAMES = ("a", "b", "c", "d", "e", "f", "g", "h")


@pytest.mark.parametrize("method", ["sdar", "grpo"])
async def test_a_resumed_run_ends_with_the_same_weights_bit_for_bit(method, tmp_path):
    training = {
        "num_updates": 4,
        "max_staleness": 4,
        "num_minibatches": 2,
        "checkpoint_every": 1,
        "warmup_updates": 3,
    }
    items = [item for name in NAMES for item in make_group(name, has_score=method == "sdar")]
    runs = [Run(tmp_path / name, method=method, **training) for name in ("whole", "parts")]
    for run in runs:
        await send(run.bus, *items)
    await runs[0].train(4)
    for until_update in (1, 2, 3, 4):
        progress = await runs[1].train(until_update)
    assert progress.num_updates == 4
    whole, parts = (run.weights() for run in runs)
    start = export_tensors(load_causal_lm(MODEL_PATH, "float32"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert not any(torch.equal(whole[name], start[name]) for name in whole)


async def test_updates_lost_in_a_kill_are_replayed_to_the_same_weights_bit_for_bit(tmp_path):
    """Killed after update 3, checkpoint 2 on disk: e and f train again, as another version."""
    runs = [
        Run(tmp_path / name, num_updates=4, max_staleness=4, checkpoint_every=2)
        for name in ("whole", "killed")
    ]
    for run in runs:
        await send(run.bus, *[item for name in NAMES[:6] for item in make_group(name)])
    await runs[0].train(3)
    await runs[1].train(3, is_killed=True)
    newest = runs[1].store.list_versions()[-1]
    progress = await runs[1].train(3)
    assert progress.trained_groups == (("a", "b"), ("c", "d"), ("e", "f"))
    assert progress.policy_version == newest + 2, (
        "the restored weights and the replayed update each have a version of their own"
    )
    expected, found = (run.weights() for run in runs)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


async def test_a_finished_learner_started_for_more_updates_goes_on_under_the_new_settings(
    tmp_path,
):
    run = Run(tmp_path, num_updates=2, checkpoint_every=1)
    await send(run.bus, *[item for name in NAMES[:5] for item in make_group(name)])
    await run.train(2)
    run.config = make_config(num_updates=3, checkpoint_every=1, max_staleness=4, learning_rate=3e-4)
    await send(run.bus, *[item for name in NAMES[5:7] for item in make_group(name)])
    progress = await run.train(3)
    # e came after what was then the last update
    assert progress.trained_groups == (("a", "b"), ("c", "d"), ("f", "g"))
    assert sorted(await read_ledger(run.bus)) == sorted(
        [(name, "trained") for name in "abcdfg"] + [("e", "cancelled")]
    )
    records = [
        codec.decode_metric_record(e.payload) for e in await run.bus.tail(Stream.METRICS, "0-0", 10)
    ]
    before, again, last = (record.values["learning_rate"] for record in records)
    assert before == again != last == 3e-4


async def test_the_whole_loop_publishes_measures_and_closes_its_ledger(tmp_path):
    run = Run(tmp_path, num_updates=2, checkpoint_every=1)
    await send(run.bus, *[item for name in NAMES[:4] for item in make_group(name)])
    await run.train(2)
    assert await read_ledger(run.bus) == [(name, "trained") for name in NAMES[:4]]
    assert await count_pending(run.bus) == 0
    assert run.store.list_versions() == [0, 1, 2]
    records = [
        codec.decode_metric_record(e.payload) for e in await run.bus.tail(Stream.METRICS, "0-0", 10)
    ]
    wanted = """
        loss reward_mean success_mean success_heat num_episodes_heat gate_mean gate_open_share
        teacher_gap_mean k3_kl entropy gradient_norm clip_fraction engine_mismatch_abs
        off_policy_weight_mean staleness_mean staleness_max num_tokens tokens_per_s step_s
        wait_share publish_s num_groups_skipped num_groups_stale num_policy_versions learning_rate
    """
    assert set(wanted.split()) <= records[0].values.keys()
    assert records[0].values["k3_kl"] == pytest.approx(0, abs=1e-6), (
        "the first update begins at the reference"
    )
    assert records[1].values["k3_kl"] > 0


async def test_a_group_whose_loss_is_infinite_costs_its_own_step_and_the_run_goes_on(tmp_path):
    """A teacher that scores tokens at 3e38 makes the loss of its groups overflow, not its gradient.
    A batch of them is passed over; one of them beside a sound group costs its own step only.
    """
    run = Run(tmp_path, num_updates=2, checkpoint_every=1, num_minibatches=2)
    poisoned = [break_score(item) for name in "abc" for item in make_group(name)]
    await send(run.bus, *poisoned, *[item for name in "def" for item in make_group(name)])
    await run.train(2)
    assert sorted(await read_ledger(run.bus)) == sorted(
        [(name, "failed") for name in "abc"] + [(name, "trained") for name in "def"]
    )
    assert await count_pending(run.bus) == 0
    assert all(torch.isfinite(value).all() for value in run.weights().values())
    records = [
        codec.decode_metric_record(e.payload).values
        for e in await run.bus.tail(Stream.METRICS, "0-0", 10)
    ]
    assert [record["num_skipped_steps"] for record in records] == [2, 1, 0]
    assert all(math.isfinite(value) for record in records for value in record.values())


def break_score(item):
    """With tokens that the policy is five times likelier to sample, at least: their weight is at
    its cap.
    """
    logprobs = tuple(np.full_like(values, 3e38) for values in item.score.turn_logprobs)
    turns = [
        dataclasses.replace(turn, behavior_logprobs=np.full_like(turn.behavior_logprobs, -50))
        for turn in item.trajectory.turns
    ]
    return dataclasses.replace(
        item,
        trajectory=dataclasses.replace(item.trajectory, turns=tuple(turns)),
        score=dataclasses.replace(item.score, turn_logprobs=logprobs),
    )


def test_ranks_meet_where_only_this_machine_reaches_them():
    port = find_free_port("127.0.0.1")
    output = finish(run_ranks("listen", port))[0]
    addresses = next(
        line.split()[1:] for line in output.splitlines() if line.startswith("listening:")
    )
    assert f"127.0.0.1:{port}" in addresses
    assert all(address.startswith("127.") for address in addresses)
