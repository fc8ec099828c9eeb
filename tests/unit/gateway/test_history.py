"""What the newest records say of whether training is right."""

from __future__ import annotations

import math

import pytest

from sdar.contracts import codec
from sdar.contracts.streams import Stream
from sdar.contracts.types import MetricRecord
from sdar.in_process.memory_bus import MemoryBus
from services.gateway.history import History

from .fakes import build_config

NOW = 1000.0
UPDATE = {
    "success_mean": 0.95,
    "num_episodes": 20.0,
    "trained_success_mean": 0.75,
    "num_trajectories": 4.0,
    "policy_behavior_gap_abs": 0.02,
    "num_skipped_steps_in_a_row": 0.0,
}


async def read(*records: tuple[str, str, float, dict[str, float]]) -> dict[str, float]:
    """The figures after records of (service, instance, seconds ago, values), oldest first."""
    bus = MemoryBus(build_config().stream_consumers)
    history = History(Stream.TRAJECTORIES, clock=lambda: NOW)
    for service, instance, age_s, values in records:
        record = MetricRecord("test", service, instance, 1, NOW - age_s, values)
        await bus.publish(Stream.METRICS, [codec.encode_metric_record(record)])
    await history.follow(bus)
    return history.collect_figures()


async def test_before_the_first_update_there_is_none() -> None:
    assert await read() == {}


async def test_what_the_newest_update_did_not_measure_is_absent() -> None:
    fresh = UPDATE | {"engine_mismatch_abs": 0.5, "loss": 3.0}
    assert await read(("learner", "l", 9, fresh), ("learner", "l", 1, UPDATE)) == UPDATE


async def test_batches_that_were_passed_over_leave_the_newest_update_in_sight() -> None:
    skipped = {"num_skipped_steps": 1.0, "num_skipped_steps_in_a_row": 2.0}
    figures = await read(("learner", "l", 9, UPDATE), *[("learner", "l", 1, skipped)] * 2)
    assert figures == UPDATE | {"num_skipped_steps_in_a_row": 2.0}


@pytest.mark.parametrize("worst", [0.4, math.nan])
async def test_the_probe_shown_is_that_of_the_worst_worker_of_those_alive(worst: float) -> None:
    figures = await read(
        ("rollout", "gone", 500, {"probe_mismatch": 9.0}),
        ("rollout", "a", 5, {"probe_mismatch": 3.0}),
        ("rollout", "a", 1, {"probe_mismatch": 0.1}),
        ("rollout", "b", 2, {"probe_mismatch": worst}),
        ("rollout", "c", 2, {"probe_mismatch": 0.2}),
        ("rollout", "old", 2, {}),
    )
    assert figures == pytest.approx({"probe_mismatch": worst}, nan_ok=True)
