"""What Prometheus sees of a rollout worker."""

from types import SimpleNamespace

import pytest
from prometheus_client import CollectorRegistry

from sdar.contracts.types import Purpose
from services.rollout.engine import EngineStats
from services.rollout.episode import EpisodeClock, TextSource
from services.rollout.metrics import RolloutMetrics


class Seen:
    def __init__(self):
        self.registry, self.now_s = CollectorRegistry(), 0.0
        self.metrics = RolloutMetrics(self.registry, now=lambda: self.now_s)

    def get(self, name, **labels):
        return self.registry.get_sample_value(f"sdar_rollout_{name}", labels)


@pytest.fixture
def seen():
    return Seen()


def episode(task_type, is_success, purpose=Purpose.TRAIN):
    task = SimpleNamespace(task_type=task_type)
    return SimpleNamespace(
        purpose=purpose, task=task, is_success=is_success, duration_s=1.0, turns=(1, 2)
    )


def test_episodes_and_successes_are_counted_by_purpose_and_task_type(seen):
    seen.metrics.observe_group(
        [episode("heat", True), episode("heat", False), episode("cool", False)]
    )
    seen.metrics.observe_group([episode("heat", True, Purpose.EVALUATION)])
    assert seen.get("episodes_total", purpose="train", task_type="heat") == 2
    assert seen.get("successes_total", purpose="train", task_type="heat") == 1
    assert seen.get("successes_total", purpose="train", task_type="cool") == 0
    assert seen.get("episodes_total", purpose="evaluation", task_type="heat") == 1


def test_tokens_are_counted_while_they_are_sampled_not_when_their_episode_ends(seen):
    seen.metrics.observe_engine(
        EngineStats(num_generated_tokens=70, num_prompt_tokens=500, num_cached_tokens=300),
        EpisodeClock(),
        0,
        0,
    )
    seen.metrics.observe_engine(
        EngineStats(num_generated_tokens=90, num_prompt_tokens=600, num_cached_tokens=320),
        EpisodeClock(),
        0,
        0,
    )
    found = [seen.get(f"{kind}_tokens_total") for kind in ("generated", "prompt", "cached")]
    assert found == [90, 600, 320]


def test_time_without_a_group_in_hand_is_waiting_time(seen):
    seen.now_s = 10.0
    seen.metrics.observe_running(2)
    seen.now_s = 14.0
    seen.metrics.observe_running(0)
    seen.now_s = 15.0
    seen.metrics.collect_record(num_running_episodes=6, num_waiting_sessions=0)
    assert seen.get("waiting_seconds_total") == 11
    assert seen.get("running_episodes") == 6


def test_a_record_holds_totals_and_the_rates_since_the_record_before(seen):
    seen.metrics.observe_running(1)
    seen.metrics.observe_group([episode("heat", True), episode("cool", False)])
    seen.metrics.observe_engine(
        EngineStats(num_generated_tokens=70, num_weight_updates=1, weight_pause_s=0.5),
        EpisodeClock(engine_s=3.0, environment_s=1.0),
        2,
        3,
    )
    seen.now_s = 10.0
    record = seen.metrics.collect_record(num_running_episodes=4, num_waiting_sessions=2)
    assert record == {
        "num_tokens_generated": 70,
        "num_prompt_tokens": 0,
        "num_cached_tokens": 0,
        "tokens_per_s": 7,
        "num_episodes": 2,
        "num_successes": 1,
        "num_failed_groups": 0,
        "num_reclaimed_groups": 0,
        "num_retried_groups": 0,
        "num_late_results": 0,
        "num_repeated_tokens": 0,
        "num_control_texts": 0,
        "running_episodes": 4,
        "waiting_sessions": 2,
        "waiting_share": 0,
        "environment_share": 0.25,
        "engine_share": 0.75,
        "num_weight_updates": 1,
        "weight_staging_s": 0,
        "weight_pause_s": 0.5,
    }
    seen.now_s = 20.0
    record = seen.metrics.collect_record(num_running_episodes=0, num_waiting_sessions=0)
    assert (record["num_tokens_generated"], record["tokens_per_s"]) == (70, 0)


def test_texts_of_control_tokens_are_counted_by_who_wrote_them(seen):
    clock = EpisodeClock()
    for num_texts in (2, 5):
        clock.num_control_texts[TextSource.OBSERVATION] = num_texts
        seen.metrics.observe_engine(EngineStats(), clock, 0, 0)
    assert seen.get("control_texts_total", source="observation") == 5
