"""Traces of a whole small run, received as a collector receives them: OTLP over gRPC."""

from __future__ import annotations

import subprocess
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Status

from sdar.config import RunConfig, load_config
from sdar.contracts.errors import ConfigurationError
from sdar.environments.base import StepResult
from sdar.in_process.run import play_run
from sdar.process import tracing
from sdar.process.ports import find_free_port
from sdar.process.settings import Settings
from services.envs.household import HouseholdEnvironment
from tests.collector import Collector, Received, collecting

ROOT = Path(__file__).parents[2]


class OnceBroken(HouseholdEnvironment):
    """The first episode of training breaks at its first step; its group is played again."""

    name = "once-broken"
    has_broken = False

    def step(self, text: str) -> StepResult:
        if not OnceBroken.has_broken and self._game.task.split == "train":
            OnceBroken.has_broken = True
            raise RuntimeError("a secret of this episode")
        return super().step(text)


def small_run(**changes: object) -> RunConfig:
    small = {
        "training.num_updates": 2,
        "training.groups_per_update": 2,
        "training.group_size": 2,
        "training.skip_zero_signal": False,
        "rollout.max_concurrent_episodes": 4,
        "environment.max_turns": 4,
        "evaluation.num_tasks": 1,
        "teacher.skills": str(ROOT / "skills" / "household"),
    }
    return load_config(ROOT / "examples" / "household.yaml", small | changes)


def settings_for(endpoint: str, share: float = 1.0) -> Settings:
    values = {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint}
    return Settings(**values, trace_share=share, instance="worker-7")


@pytest.fixture(scope="module")
async def collector(tmp_path_factory: pytest.TempPathFactory) -> Collector:
    """What a collector has after a run."""
    config = small_run(**{"environment.name": f"{__name__}:OnceBroken"})
    with collecting() as (collector, endpoint):
        with tracing.serve_traces(settings_for(endpoint), "in-process", config.name):
            await play_run(config, tmp_path_factory.mktemp("run"))
        return collector


def test_a_trajectory_is_followed_from_its_task_to_the_step_that_trains_it(
    collector: Collector,
) -> None:
    trained = collector.named("learner.trained")
    assert len(trained) == 4
    for end in trained:
        trace = [span for span in collector.spans if span.trace_id == end.trace_id]
        assert len({span.span_id for span in trace}) == len(trace)
        (root,) = [span for span in trace if not span.parent_id]
        assert root.name == "gateway.issue"
        names = {span.span_id: span.name for span in trace}
        parents: defaultdict[str, set[str]] = defaultdict(set)
        for span in trace:
            if span is not root:
                parents[span.name].add(names[span.parent_id])
        assert parents == {
            "rollout.attempt": {"gateway.issue"},
            "rollout.episode": {"rollout.attempt"},
            "environment.open": {"rollout.episode"},
            "rollout.generate": {"rollout.episode"},
            "environment.step": {"rollout.episode"},
            "teacher.retrieve": {"rollout.episode"},
            "teacher.score": {"rollout.episode"},
            "learner.buffer": {"gateway.issue"},
            "learner.trained": {"gateway.issue"},
        }
        assert {
            span.attributes["sdar.group_id"] for span in trace if "sdar.group_id" in span.attributes
        } == {root.attributes["sdar.group_id"]}
        buffered = next(span for span in trace if span.name == "learner.buffer")
        assert root.began <= buffered.began <= buffered.ended <= end.ended


def test_each_episode_has_its_own_turns_and_scores(collector: Collector) -> None:
    scored = collector.named("teacher.score")
    assert len(scored) >= 8
    episodes = {span.span_id: span for span in collector.named("rollout.episode")}
    turns = Counter(span.parent_id for span in collector.named("rollout.generate"))
    for span in scored:
        episode = episodes[span.parent_id]
        assert span.attributes["sdar.trajectory_id"] == episode.attributes["sdar.trajectory_id"]
        assert turns[episode.span_id] == episode.attributes["sdar.num_turns"]


def test_an_update_points_to_the_groups_it_trained_and_they_to_it(collector: Collector) -> None:
    updates = collector.named("learner.update")
    roots = {(span.trace_id, span.span_id) for span in collector.named("gateway.issue")}
    assert [update.attributes["sdar.update"] for update in updates] == [1, 2]
    for update in updates:
        assert len(update.links) == 2
        assert set(update.links) <= roots
        inner = [span.name for span in collector.spans if span.parent_id == update.span_id]
        assert sorted(inner) == ["learner.publish", "learner.step"]
        pointing = [
            span
            for span in collector.named("learner.trained")
            if span.links == [(update.trace_id, update.span_id)]
        ]
        expected = {trace_id for trace_id, _ in update.links}
        assert {span.trace_id for span in pointing} == expected
        for span in pointing:
            told = span.attributes
            assert (
                told["sdar.staleness"] == told["sdar.policy_version"] - told["sdar.sampled_version"]
            )


def test_a_repeated_attempt_is_seen_beside_the_one_that_failed(collector: Collector) -> None:
    attempts: defaultdict[bytes, dict[int, Received]] = defaultdict(dict)
    for span in collector.named("rollout.attempt"):
        attempts[span.trace_id][span.attributes["sdar.attempt"]] = span
    (found,) = [found for found in attempts.values() if len(found) > 1]
    codes = {number: (span.status.code, span.status.message) for number, span in found.items()}
    assert codes == {
        0: (Status.STATUS_CODE_ERROR, "EnvironmentFailedError"),
        1: (Status.STATUS_CODE_UNSET, ""),
    }


def test_spans_hold_no_words_of_an_episode(collector: Collector) -> None:
    texts = {
        key: value
        for span in collector.spans
        for key, value in span.attributes.items()
        if isinstance(value, str)
    }
    known = {"group_id", "trajectory_id", "task_id", "task_type", "end", "retrieval", "outcome"}
    assert {key.removeprefix("sdar.") for key in texts} <= known
    assert not any(
        "secret" in f"{span.status.message} {span.attributes}" for span in collector.spans
    )


def test_spans_tell_whose_they_are(collector: Collector) -> None:
    for span in collector.spans:
        told = span.resource
        found = (told["service.name"], told["service.instance.id"])
        assert found == ("sdar-in-process", "worker-7")
        assert told["sdar.run_id"] == "household"


def test_services_that_are_told_the_same_share_trace_the_same_groups() -> None:
    ids = [f"group-{number:08d}" for number in range(400)]
    found = {}
    for share in (0.25, 0.5):
        with tracing.serve_traces(settings_for("http://127.0.0.1:9", share), "gateway", "run"):
            found[share] = {
                one for one in ids if tracing.group_span("x", one) is not tracing.NOTHING
            }
    assert 60 < len(found[0.25]) < 140 < len(found[0.5]) < 260
    assert found[0.25] < found[0.5]


def test_off_nothing_of_it_is_imported_and_nothing_is_made() -> None:
    code = (
        "import sys; from sdar.process import tracing; from sdar.process.settings import Settings\n"
        "import services.gateway.scheduler, services.rollout.worker, services.learner.ingest\n"
        "with tracing.serve_traces(Settings(), 'gateway', 'run'):\n"
        "    made = [tracing.open_group('g'), tracing.group_span('x', 'g'), tracing.span('x'), "
        "tracing.span_over('x', ['g'])]\n"
        "    tracing.record('x', 'g', 0.0)\n"
        "assert all(one is tracing.NOTHING for one in made), made\n"
        "assert not [name for name in sys.modules if name.startswith('opentelemetry')]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=120)


def test_a_collector_that_is_away_costs_neither_the_work_nor_the_end(
    capsys: pytest.CaptureFixture[str],
) -> None:
    began = time.monotonic()
    with tracing.serve_traces(
        settings_for(f"http://127.0.0.1:{find_free_port('127.0.0.1')}"), "gateway", "run"
    ):
        for number in range(3000):  # more than the queue holds
            with tracing.group_span("rollout.attempt", f"group-{number}"):
                pass
        working_s = time.monotonic() - began
    assert working_s < 20
    assert time.monotonic() - began < working_s + 10
    assert capsys.readouterr().out.count("traces_not_sent") == 1


def test_an_endpoint_that_is_no_url_is_refused() -> None:
    with (
        pytest.raises(ConfigurationError, match="http://HOST:4317"),
        tracing.serve_traces(settings_for("x:4317"), "a", "b"),
    ):
        pass
