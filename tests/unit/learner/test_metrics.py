"""What Prometheus sees of an update."""

import math
import re

import pytest
from prometheus_client import CollectorRegistry

from sdar.bus.protocol import Delivery
from sdar.contracts.streams import ConsumerGroup, Stream
from sdar.process.measurements import Gauge
from services.learner.ingest import Group, IngestCounts
from services.learner.metrics import LEARNER, LearnerMetrics, Timing, build_record
from services.learner.progress import Progress
from tests.unit.learner.builders import make_group

TRAINED = {
    "loss": -0.5,
    "gate_mean": 0.6,
    "teacher_gap_abs": 0.4,
    "entropy": 1.5,
    "gradient_norm": 0.7,
}


STEPS = {"num_skipped_steps": 1.0, "num_skipped_steps_in_a_row": 0.0}


class Seen:
    """A learner's metrics, after updates that are given as lists of episodes."""

    def __init__(self):
        self.registry = CollectorRegistry()
        self.metrics, self.progress = LearnerMetrics(self.registry), Progress()

    def update(self, *episodes, trained=TRAINED, checkpoint_s=0.0, stale_turns=(), dropped=()):
        groups = []
        for items in episodes:
            read = [(item, read_as(index)) for index, item in enumerate(items)]
            groups.append(Group.of(items[0].trajectory.group_id, read))
        timing = Timing(
            wait_s=1.0, step_s=2.0, publish_s=0.5, checkpoint_s=checkpoint_s, total_s=4.0
        )
        counts = IngestCounts(num_stale=1, stale_turns=list(stale_turns), dropped=list(dropped))
        record = build_record(
            groups, self.progress, trained | STEPS, timing, counts, num_buffered=3
        )
        self.progress = self.progress.after_update(group.group_id for group in groups)
        self.metrics.observe_update(self.progress, record, num_unacknowledged=5)
        self.metrics.observe_episodes(groups, counts.stale_turns)
        return record

    def get(self, name, **labels):
        return self.registry.get_sample_value(f"sdar_learner_{name}", labels)


def read_as(index):
    return Delivery(Stream.SCORED, ConsumerGroup.LEARNER, "learner", f"{index + 1}-0", b"")


@pytest.fixture
def seen():
    return Seen()


def test_tokens_are_counted_by_how_stale_they_were(seen):
    seen.progress = Progress(num_updates=2, policy_version=2)
    record = seen.update(make_group("a", version=2), make_group("b", version=0))
    fresh, old = (
        seen.get("trained_tokens_total", staleness="0"),
        seen.get("trained_tokens_total", staleness="2"),
    )
    assert fresh + old == record["num_tokens"]
    assert fresh > 0
    assert old > 0
    assert seen.get("staleness_max") == 2


def test_success_and_reward_come_by_task_type_with_their_counts(seen):
    seen.update(make_group("a", rewards=(0.0, 1.0)), make_group("b", rewards=(1.0, 0.5)))
    episodes = {
        kind: seen.get("trained_episodes_total", task_type=kind) for kind in ("heat", "cool")
    }
    successes = {
        kind: seen.get("trained_successes_total", task_type=kind) for kind in ("heat", "cool")
    }
    assert (episodes, successes) == ({"heat": 3, "cool": 1}, {"heat": 3, "cool": 0})
    assert seen.get("task_reward_mean", task_type="heat") == pytest.approx(2.5 / 3)
    assert seen.get("task_reward_mean", task_type="cool") == 0
    assert seen.get("reward_mean") == pytest.approx(2.5 / 4)


def test_success_in_training_counts_all_that_was_played_beside_what_was_trained(seen):
    """19 of 20 episodes solve their task; all groups but one of four episodes solve all and are
    skipped: of the trained ones 3 of 4 do.
    """
    record = seen.update(
        make_group("a", rewards=(0.0, 1.0, 1.0, 1.0)), dropped=[("heat", True)] * 16
    )
    assert record["success_mean"] == pytest.approx(0.95)
    assert record["trained_success_mean"] == pytest.approx(0.75)
    assert (record["num_episodes"], record["num_trajectories"]) == (20, 4)
    assert (record["success_heat"], record["num_episodes_heat"]) == (1.0, 19)
    assert (record["success_cool"], record["num_episodes_cool"]) == (0.0, 1)
    assert (seen.get("success_mean"), seen.get("trained_success_mean")) == (0.95, 0.75)


def test_the_largest_finite_rewards_have_a_finite_mean(seen):
    record = seen.update(make_group("a", rewards=(1.7e308, 1.7e308)))
    assert record["reward_mean"] == pytest.approx(1.7e308)
    assert seen.get("task_reward_mean", task_type="heat") == pytest.approx(1.7e308)


def test_skipped_steps_are_counted_and_shown(seen):
    seen.update(make_group("a"))
    seen.metrics.observe_skipped({"num_skipped_steps": 2.0, "num_skipped_steps_in_a_row": 3.0})
    assert seen.get("skipped_steps_total") == 3
    assert seen.get("num_skipped_steps_in_a_row") == 3


def test_what_was_not_measured_is_no_number(seen):
    values = [found for found in LEARNER.measurements if isinstance(found, Gauge)]
    unknown = [found.key for found in values if math.isnan(found.initial)]
    assert len(unknown) > 20
    assert all(math.isnan(seen.get(name)) for name in unknown)
    seen.update(make_group("a"))
    assert {name: seen.get(name) for name in TRAINED} == TRAINED
    assert math.isnan(seen.get("k3_kl"))


def test_a_checkpoint_takes_its_time_only_where_there_was_one(seen):
    seen.update(make_group("a"))
    assert seen.get("seconds_count", part="checkpoint") is None
    seen.update(make_group("b"), checkpoint_s=3.0)
    assert (
        seen.get("seconds_count", part="checkpoint"),
        seen.get("seconds_sum", part="checkpoint"),
    ) == (1, 3)
    assert (seen.get("seconds_count", part="step"), seen.get("seconds_sum", part="step")) == (2, 4)


def test_lengths_of_trained_and_of_stale_episodes_are_told_apart(seen):
    seen.update(make_group("a", num_turns=3), stale_turns=[7, 8])
    assert seen.get("episode_turns_sum", outcome="trained") == 6
    assert seen.get("episode_turns_sum", outcome="stale") == 15
    assert seen.get("groups_total", outcome="stale") == 1


def test_every_key_of_a_record_is_declared(seen):
    record = seen.update(make_group("a"), trained={**TRAINED, "loss_policy": 0.1})
    families = [re.sub("<.*>", ".+", key) for key in LEARNER.reported]
    assert [key for key in record if not any(re.fullmatch(f, key) for f in families)] == []


def test_every_time_and_present_value_of_a_record_is_shown(seen):
    seen.update(make_group("a"))
    assert (seen.get("updates"), seen.get("buffered_groups")) == (1, 3)
    assert seen.get("unacknowledged_entries") == 5
    assert seen.get("wait_share") == 0.25
