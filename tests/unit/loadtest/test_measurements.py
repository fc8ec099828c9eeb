from __future__ import annotations

import numpy as np
import psutil
import pytest
import torch
from torch import nn

from loadtest.logprob_memory import compute_in_chunks, compute_naively
from loadtest.peers import PickleStream, copy_durably, to_training_texts
from loadtest.rollout_throughput import InstantEnvironment
from loadtest.service_waiting import ProcessorTime, Window, compute_waiting, find_window
from loadtest.workloads import (
    AgentShape,
    build_agent_groups,
    build_household_groups,
    record_scripts,
)
from sdar.bus.embedded_redis import EmbeddedRedis

SHAPE = AgentShape(
    num_turns=3,
    num_first_tokens=20,
    num_observation_tokens=5,
    num_response_tokens=8,
    vocabulary_size=100,
)


def test_both_ways_to_logprobs_agree_in_values_and_gradients():
    torch.manual_seed(0)
    head, targets = nn.Linear(8, 50, bias=False), torch.randint(50, (11,))
    results = []
    for compute in (lambda *inputs: compute_in_chunks(*inputs, chunk_tokens=4), compute_naively):
        hidden = torch.arange(88, dtype=torch.float32).reshape(11, 8).sin().requires_grad_()
        logprobs, entropy = compute(hidden, head, targets)
        (logprobs.sum() + entropy.sum()).backward()
        results.append((logprobs, entropy, hidden.grad, head.weight.grad))
        head.weight.grad = None
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_peers_records_hold_what_the_trajectory_holds():
    ((trajectory, _),) = build_agent_groups(1, 2, SHAPE)
    records = to_training_texts(trajectory)
    assert len(records) == 3
    for record, turn in zip(records, trajectory.turns, strict=True):
        assert record["input_ids"] == [*turn.prompt_token_ids, *turn.response_token_ids]
        assert record["labels"][record["prompt_tokens"] :] == turn.response_token_ids.tolist()
        assert len(record["labels"]) == len(record["input_ids"])
        assert np.allclose(record["logprobs"], turn.behavior_logprobs)


def test_the_peers_stream_gives_back_what_was_written_in_order(tmp_path):
    with EmbeddedRedis(tmp_path) as redis:
        stream = PickleStream(redis.url, "key")
        for content in ([{"a": 1}], "two", [3.0]):
            stream.write(content)
        assert [stream.read() for _ in range(3)] == [[{"a": 1}], "two", [3.0]]
        stream.close()


def test_a_durable_copy_has_the_same_bytes(tmp_path):
    (tmp_path / "source").write_bytes(b"weights")
    copy_durably(tmp_path / "source", tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == b"weights"


@pytest.mark.parametrize(
    "build", [lambda: build_household_groups(2, 3), lambda: build_agent_groups(2, 3, SHAPE)]
)
def test_workloads_are_whole_groups_and_the_same_each_time(build):
    groups = build()
    assert len(groups) == 2
    for group in groups:
        assert [trajectory.episode_index for trajectory in group] == [0, 1, 2]
        for trajectory in group:
            assert all(turn.extends_previous for turn in trajectory.turns[1:])
    assert groups == build()


async def test_the_instant_environment_plays_the_experts_game():
    (script,) = record_scripts(1)
    environment = InstantEnvironment([script]).get("anywhere")
    session = await environment.open_session(script.task, "key")
    seen = [session.observation]
    for index in range(len(script.actions)):
        outcome = await environment.step(session.session_id, index, "whatever")
        seen.append(outcome.observation)
    assert seen[:-1] == list(script.observations)
    assert outcome.is_terminated
    await environment.close_session(session.session_id)


def test_shares_are_taken_between_the_updates_that_count():
    """Four updates are left out; the window (4, 6] holds one rollout and two learner records."""
    records = [
        {"service": "learner", "at_s": float(at_s), "values": {"wait_s": wait_s, "total_s": 1.0}}
        for at_s, wait_s in ((1, 9), (2, 9), (3, 9), (4, 9), (5, 0.2), (6, 0.4))
    ]
    records += [
        {"service": "rollout", "at_s": at_s, "values": {"waiting_share": at_s / 10}}
        for at_s in (3.5, 5.5)
    ]
    window = find_window(records)
    assert window == Window(4.0, 6.0)
    assert compute_waiting(records, window) == pytest.approx({"rollout": 0.55, "learner": 0.3})


def test_a_run_too_short_to_tell_is_refused():
    with pytest.raises(ValueError, match="more than 4"):
        find_window([])
    with pytest.raises(ValueError, match="too short"):
        ProcessorTime().compute_share("gateway", Window(0.0, 1.0))


def test_processor_time_is_the_slope_inside_the_window():
    processor = ProcessorTime()
    processor.samples["envs"] = [(0.0, 0.0), (1.0, 5.0), (2.0, 5.25), (3.0, 5.5), (9.0, 99.0)]
    assert processor.compute_share("envs", Window(0.5, 4.0)) == 0.25


def test_a_process_that_serves_nothing_is_not_counted():
    processor = ProcessorTime()
    processor.sample(psutil.Process())
    assert not processor.samples
