"""The learner's tests run this in processes of their own: DeepSpeed joins ranks once in a process.

python -m tests.integration.learner_ranks steps RANK WORLD_SIZE PORT DIRECTORY
python -m tests.integration.learner_ranks skip RANK WORLD_SIZE PORT
python -m tests.integration.learner_ranks train DIRECTORY
python -m tests.integration.learner_ranks listen PORT
"""

from __future__ import annotations

import asyncio
import itertools
import math
import sys
from pathlib import Path

import numpy as np
import psutil
import torch
from safetensors.torch import save_file

from sdar.algorithms.batching import build_microbatches, build_sequences, count_response_tokens
from sdar.algorithms.loss import compute_loss
from sdar.weights.store import WeightStore
from services.learner.followers import FollowerProcesses
from services.learner.model import PolicyModel
from services.learner.ranks import join_ranks
from services.learner.service import open_learner
from tests.support import until
from tests.unit.learner.builders import MODEL_PATH, make_bus, make_config, make_group, send

NUM_STEPS = 3
LEARNING_RATE = 1e-3
TOKEN_BUDGETS = (100_000, 128)
"""Everything in one micro-batch, and a few sequences in each."""


def make_batches():
    """For each step its sequences, of unequal lengths, with advantages."""
    rng = np.random.default_rng(0)
    batches = []
    for step in range(NUM_STEPS):
        items = [
            item
            for g in range(5)
            for item in make_group(f"s{step}g{g}", num_turns=1 + g, version=step)
        ]
        advantages = [rng.normal(size=len(item.trajectory.turns)) for item in items]
        batches.append(build_sequences(items, advantages))
    return batches


def make_step_config(zero_stage, **training):
    return make_config(
        zero_stage=zero_stage,
        weight_decay=0.1,
        max_gradient_norm=0.5,
        logprob_chunk_tokens=7,
        **training,
    )


def compute_share(config, micro_batch, logprobs, entropy, ref_logprobs, num_tokens, step):
    return compute_loss(
        micro_batch,
        policy_logprobs=logprobs,
        entropy=entropy,
        ref_logprobs=ref_logprobs,
        num_tokens_global=num_tokens,
        settings=config.method,
        update_index=step,
        learner_version=step,
    )[0]


def make_model(ranks, config, dtype):
    return PolicyModel(
        MODEL_PATH,
        dtype=dtype,
        temperature=1.0,
        training=config.training,
        needs_reference=True,
        ranks=ranks,
    )


FAULTS = {
    "a loss that is NaN": lambda share: share * math.nan,
    "an infinite loss with a finite gradient": lambda share: share + math.inf,
    # The slope of the root at 0.
    "a finite loss with an infinite gradient": lambda share: (
        share + (share - share.detach()).sqrt()
    ),
}
"""What becomes of the loss of one micro-batch of one rank."""


def export_all(model):
    """The weights on the leader, and this rank's part of the optimizer."""
    tensors, num_steps = model.export_optimizer()
    return {**model.export(), **tensors, "num_steps": torch.tensor(num_steps)}


def skip_steps(ranks, zero_stage, dtype="float32"):
    """Takes a step, then tries one with each fault, then takes another.

    Returns:
        the gradient norms, and what a model came to that took the two good steps only and what this
        one came to; a fault must have changed nothing of it.
    """
    config = make_step_config(zero_stage)
    batches = make_batches()

    def step(model, number, break_share=None):
        sequences = batches[number]
        micro_batches = build_microbatches(sequences, 128, ranks.world_size)[ranks.rank]
        refs = model.compute_ref_logprobs(micro_batches)
        num_tokens = count_response_tokens(sequences)
        is_last_rank = ranks.rank == ranks.world_size - 1

        def share(place, micro_batch, logprobs, entropy):
            value = compute_share(
                config, micro_batch, logprobs, entropy, refs[place], num_tokens, number
            )
            is_broken = break_share is not None and is_last_rank and place == 0
            return break_share(value) if is_broken else value

        assert len(micro_batches) > 1
        return model.train_step(micro_batches, share, LEARNING_RATE)

    model = make_model(ranks, config, dtype)
    norms = [step(model, 0)]
    for fault in FAULTS.values():
        before = export_all(model)
        norms.append(step(model, 1, fault))
        after = export_all(model)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
    norms.append(step(model, 1))
    found = export_all(model)
    model.close()
    spared = make_model(ranks, config, dtype)
    for number in (0, 1):
        step(spared, number)
    expected = export_all(spared)
    spared.close()
    return norms, expected, found


def check_skipped(norms, expected, found):
    """That the steps with a fault were skipped and left no trace in the one after them."""
    assert [math.isfinite(norm) for norm in norms] == [True, *[False] * len(FAULTS), True]
    assert expected.keys() == found.keys()
    assert int(found["num_steps"]) == 2
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def take_steps(ranks, zero_stage, token_budget, dtype="float32", **training):
    """Weights and gradient norms after NUM_STEPS steps with DeepSpeed."""
    config = make_step_config(zero_stage, **training)
    model = make_model(ranks, config, dtype)
    norms = []
    for step, sequences in enumerate(make_batches()):
        micro_batches = build_microbatches(sequences, token_budget, ranks.world_size)[ranks.rank]
        ref_logprobs = model.compute_ref_logprobs(micro_batches)
        num_tokens = count_response_tokens(sequences)

        def share(
            place,
            micro_batch,
            logprobs,
            entropy,
            step=step,
            ref=ref_logprobs,
            num_tokens=num_tokens,
        ):
            return compute_share(
                config, micro_batch, logprobs, entropy, ref[place], num_tokens, step
            )

        norms.append(model.train_step(micro_batches, share, LEARNING_RATE))
        # Scoring between steps must disturb nothing.
        model.compute_policy_logprobs(micro_batches)
    weights = model.export()
    model.close()
    return weights, norms


def _steps(rank, world_size, port, directory):
    ranks = join_ranks(rank, world_size, ("127.0.0.1", port))
    for stage in range(4):
        for budget in TOKEN_BUDGETS:
            weights, norms = take_steps(ranks, stage, budget)
            if ranks.is_leader:
                save_file(
                    {**weights, "norms": torch.tensor(norms)},
                    directory / f"stage{stage}-budget{budget}.safetensors",
                )


def _skip(rank, world_size, port):
    ranks = join_ranks(rank, world_size, ("127.0.0.1", port))
    for stage, dtype in itertools.product(range(4), ("float32", "bfloat16")):
        check_skipped(*skip_steps(ranks, stage, dtype))


def _listen(port):
    """Print the addresses that a leading rank listens on."""
    join_ranks(0, 1, ("127.0.0.1", port))
    listening = [
        socket.laddr
        for socket in psutil.Process().net_connections()
        if socket.status == psutil.CONN_LISTEN
    ]
    print(
        "listening:", *sorted(f"{address.ip}:{address.port}" for address in listening), flush=True
    )


async def _train(directory):
    """Two updates on two ranks through the whole service, resuming whatever `directory` holds."""
    config = make_config(num_ranks=2, zero_stage=3, num_updates=2, checkpoint_every=1)
    bus = make_bus(config)
    await send(bus, *[item for name in "abcd" for item in make_group(name)])
    store = WeightStore(str(directory / "weights"), config.name)
    with FollowerProcesses(config) as followers:
        async with open_learner(
            config, bus, store, directory / "checkpoints", store_address=followers.store_address
        ) as learner:
            stopping = asyncio.Event()
            task = asyncio.create_task(learner.run(stopping))
            await until(lambda: learner.is_finished or task.done(), timeout_s=120)
            stopping.set()
            await task
    manifest = store.fetch_manifest()
    save_file(
        dict(store.iter_tensors(manifest)),
        directory / f"result-v{manifest.policy_version}.safetensors",
    )


def _main():
    torch.set_num_threads(1)
    if sys.argv[1] == "steps":
        _steps(*map(int, sys.argv[2:5]), Path(sys.argv[5]))
    elif sys.argv[1] == "skip":
        _skip(*map(int, sys.argv[2:5]))
    elif sys.argv[1] == "listen":
        _listen(int(sys.argv[2]))
    else:
        asyncio.run(_train(Path(sys.argv[2])))


if __name__ == "__main__":
    _main()
