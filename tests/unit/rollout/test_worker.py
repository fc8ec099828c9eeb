"""The rollout worker's loop on the in-memory bus, with a scripted sampler and environment."""

from __future__ import annotations

import asyncio
import gc
import time
from contextlib import asynccontextmanager

import pytest

from sdar.bus.protocol import BEFORE_FIRST, BusLimits
from sdar.contracts import codec
from sdar.contracts.errors import EngineFailedError, UnavailableError, UnknownResourceError
from sdar.contracts.streams import ConsumerGroup, Stream
from sdar.contracts.types import FailureStage, GroupOutcome, Purpose
from sdar.in_process.memory_bus import MemoryBus
from sdar.process.telemetry import Health
from services.rollout.metrics import (
    EPISODES,
    LATE_RESULTS,
    RECLAIMED_GROUPS,
    REPEATED_TOKENS,
    RETRIED_GROUPS,
    RolloutMetrics,
)
from services.rollout.worker import RolloutLimits, RolloutWorker
from tests.support import until
from tests.unit.rollout.fakes import (
    RUN_ID,
    ScriptedEngine,
    ScriptedEnvironment,
    answer,
    make_group,
    make_manifest,
    make_rules,
)

CONSUMERS = {
    Stream.TASKS: (ConsumerGroup.ROLLOUT,),
    Stream.TRAJECTORIES: (ConsumerGroup.LEARNER,),
    Stream.EVALUATIONS: (ConsumerGroup.GATEWAY,),
    Stream.LEDGER: (ConsumerGroup.GATEWAY,),
}


class Skills:
    async def retrieve(self, task, key):
        return f"skill for {task.task_type} ."


class Bench:
    """One bus, and workers on it that share a scripted engine and environment."""

    def __init__(
        self, tokenizer, environment=None, engine=None, *, bus_limits=None, **limits
    ) -> None:
        self.bus = MemoryBus(CONSUMERS, bus_limits)
        self.engine = engine or ScriptedEngine()
        self.environment = environment or ScriptedEnvironment()
        self.limits = {
            "max_concurrent_episodes": 8,
            "read_block_s": 0.01,
            "lease_s": 0.2,
            "grace_s": 0.5,
            "retry_delay_s": 0.01,
        } | limits
        self.metrics = RolloutMetrics()
        self.health = Health()
        self.tokenizer = tokenizer

    def build(self, instance="worker-1", skills=None) -> RolloutWorker:
        return RolloutWorker(
            self.bus,
            self.engine,
            self.environment,
            make_rules(self.tokenizer),
            run_id=RUN_ID,
            instance=instance,
            limits=RolloutLimits(**self.limits),
            health=self.health,
            metrics=self.metrics,
            skills=skills,
        )

    @asynccontextmanager
    async def running(self, **options):
        stopping = asyncio.Event()
        task = asyncio.create_task(self.build(**options).run(stopping))
        try:
            yield task
        finally:
            stopping.set()
            await asyncio.wait([task], timeout=5)
        await task

    async def issue(self, *groups):
        await self.bus.publish(Stream.TASKS, [codec.encode_task_group(group) for group in groups])

    async def entries(self, stream):
        return [entry.payload for entry in await self.bus.tail(stream, BEFORE_FIRST, 1000)]

    async def ledger(self):
        return [codec.decode_ledger_event(payload) for payload in await self.entries(Stream.LEDGER)]

    async def num_open_tasks(self):
        lag = await self.bus.stream_lag(Stream.TASKS, ConsumerGroup.ROLLOUT)
        return lag.num_undelivered + lag.num_pending

    async def settled(self, timeout_s=5.0):
        async with asyncio.timeout(timeout_s):
            while await self.num_open_tasks():  # noqa: ASYNC110  the bus offers no event for it
                await asyncio.sleep(0.005)


async def test_a_group_is_published_whole_booked_and_acknowledged(tokenizer):
    bench = Bench(tokenizer)
    async with bench.running():
        await bench.issue(make_group("g1", size=3), make_group("g2", size=2))
        await bench.settled()
    trajectories = [
        codec.decode_trajectory(payload) for payload in await bench.entries(Stream.TRAJECTORIES)
    ]
    found = sorted(t.trajectory_id for t in trajectories)
    assert found == ["g1.0.a0", "g1.1.a0", "g1.2.a0", "g2.0.a0", "g2.1.a0"]
    events = {event.group_id: event for event in await bench.ledger()}
    assert {key: (event.outcome, event.num_trajectories) for key, event in events.items()} == {
        "g1": (GroupOutcome.GENERATED, 3),
        "g2": (GroupOutcome.GENERATED, 2),
    }


async def test_evaluation_episodes_are_pinned_published_apart_and_not_booked(tokenizer):
    bench = Bench(tokenizer)
    await bench.bus.publish(
        Stream.POLICY_UPDATES, [codec.encode_weights_manifest(make_manifest(v)) for v in (0, 1, 2)]
    )
    async with bench.running():
        await bench.issue(make_group("e1", size=1, purpose=Purpose.EVALUATION, version=1))
        await bench.settled()
    (payload,) = await bench.entries(Stream.EVALUATIONS)
    trajectory = codec.decode_trajectory(payload, Stream.EVALUATIONS)
    assert (trajectory.min_policy_version, trajectory.max_policy_version) == (1, 1)
    assert await bench.entries(Stream.TRAJECTORIES) == await bench.ledger() == []


@pytest.mark.parametrize("purpose", list(Purpose))
async def test_a_group_whose_environment_keeps_failing_is_closed_with_the_reason(
    tokenizer, purpose
):
    bench = Bench(tokenizer, ScriptedEnvironment(num_failures=99), max_attempts=3)
    async with bench.running():
        await bench.issue(make_group("g1", size=1, purpose=purpose))
        await bench.settled()
    (event,) = await bench.ledger()
    assert (event.outcome, event.num_trajectories) == (GroupOutcome.FAILED, 0)
    assert event.reason == "Given up after 3 attempts: the simulator died"
    assert event.stage == FailureStage.ENVIRONMENT
    assert bench.environment.keys == [f"test.g1.0.a{number}" for number in range(3)]
    assert bench.environment.closed == bench.environment.opened
    assert await bench.entries(Stream.TRAJECTORIES) == []


@pytest.mark.parametrize("purpose", list(Purpose))
async def test_a_group_whose_environment_failed_is_played_again_whole_as_another_attempt(
    tokenizer, purpose
):
    environment = ScriptedEnvironment(answer(), answer(over=True), num_failures=1)
    bench = Bench(tokenizer, environment)
    async with bench.running():
        await bench.issue(make_group("g1", size=3, purpose=purpose))
        await bench.settled()
    stream = Stream.TRAJECTORIES if purpose is Purpose.TRAIN else Stream.EVALUATIONS
    trajectories = [
        codec.decode_trajectory(payload, stream) for payload in await bench.entries(stream)
    ]
    assert sorted(t.trajectory_id for t in trajectories) == ["g1.0.a1", "g1.1.a1", "g1.2.a1"]
    assert environment.closed == environment.opened
    num_kept = sum(trajectory.num_response_tokens for trajectory in trajectories)
    assert bench.metrics.read(RETRIED_GROUPS) == 1
    assert bench.metrics.read(REPEATED_TOKENS) == 3 * len(bench.engine.prompts) - num_kept > 0


async def test_attempts_are_counted_across_workers(tokenizer):
    """One attempt died with its worker, so two of three are left for a failing environment."""
    bench = Bench(tokenizer, ScriptedEnvironment(num_failures=99), max_attempts=3)
    await bench.issue(make_group("g1", size=1))
    await bench.bus.read(Stream.TASKS, ConsumerGroup.ROLLOUT, "dead", 1)
    async with bench.running():
        await bench.settled()
    assert bench.environment.keys == ["test.g1.0.a1", "test.g1.0.a2"]
    assert (await bench.ledger())[0].reason.startswith("Given up after 3 attempts")


async def test_a_group_that_waits_for_its_next_attempt_holds_no_place_for_episodes(tokenizer):
    """There is room for one group.

    The first one's environment fails and its next attempt is far off; the second is played.
    """
    bench = Bench(
        tokenizer,
        ScriptedEnvironment(num_failures=1),
        max_concurrent_episodes=1,
        retry_delay_s=60.0,
        grace_s=0.0,
    )
    async with bench.running():
        await bench.issue(make_group("g1", size=1), make_group("g2", size=1))
        async with asyncio.timeout(5):
            while not await bench.ledger():  # noqa: ASYNC110  the bus offers no event for it
                await asyncio.sleep(0.005)
    assert [event.group_id for event in await bench.ledger()] == ["g2"]
    assert await bench.num_open_tasks() == 1


async def test_an_environment_that_went_away_in_the_middle_costs_an_attempt_not_the_group(
    tokenizer,
):
    environment = ScriptedEnvironment(UnavailableError("connection refused"))
    bench = Bench(tokenizer, environment, retry_delay_s=0.1)
    async with bench.running():
        await bench.issue(make_group("g1", size=1))
        await until(lambda: bench.metrics.read(RETRIED_GROUPS) == 1)
        environment.script = (answer(over=True),)
        await bench.settled()
    assert [event.outcome for event in await bench.ledger()] == [GroupOutcome.GENERATED]


async def test_an_unknown_task_is_not_tried_again(tokenizer):
    environment = ScriptedEnvironment(UnknownResourceError("no such task"))
    bench = Bench(tokenizer, environment)
    async with bench.running():
        await bench.issue(make_group("g1", size=1))
        await bench.settled()
    assert len(environment.opened) == 1
    (event,) = await bench.ledger()
    assert (event.outcome, event.stage) == (GroupOutcome.FAILED, FailureStage.ENVIRONMENT)


async def test_a_first_prompt_that_leaves_no_room_fails_its_group_at_the_rollout(tokenizer):
    bench = Bench(tokenizer, ScriptedEnvironment(first="long " * 200))
    async with bench.running():
        await bench.issue(make_group("g1", size=1))
        await bench.settled()
    (event,) = await bench.ledger()
    assert "model.max_sequence_tokens" in event.reason
    assert event.stage == FailureStage.ROLLOUT


async def test_skills_that_the_teacher_refuses_fail_a_group_at_the_teacher(tokenizer):
    class NoSkills:
        async def retrieve(self, task, key):
            raise UnknownResourceError("no such skill")

    bench = Bench(tokenizer)
    async with bench.running(skills=NoSkills()):
        await bench.issue(make_group("g1", size=1))
        await bench.settled()
    (event,) = await bench.ledger()
    assert (event.reason, event.stage) == ("no such skill", FailureStage.TEACHER)


async def test_bytes_that_are_no_task_group_are_set_aside(tokenizer):
    bench = Bench(tokenizer)
    async with bench.running():
        await bench.bus.publish(Stream.TASKS, [b"\xff\xff"])
        await bench.issue(make_group("g1"))
        await bench.settled()
    (letter,) = await bench.bus.list_dead_letters()
    assert "cannot be read" in letter.reason
    assert [event.outcome for event in await bench.ledger()] == [GroupOutcome.GENERATED]


async def test_a_defect_sets_one_group_aside_and_the_others_go_on(tokenizer):
    environment = ScriptedEnvironment(ZeroDivisionError("oops"))
    bench = Bench(tokenizer, environment)
    async with bench.running():
        await bench.issue(make_group("g1", size=1))
        await bench.settled()
        environment.script = (answer(over=True),)
        await bench.issue(make_group("g2", size=1))
        await bench.settled()
    (letter,) = await bench.bus.list_dead_letters()
    assert "ZeroDivisionError: oops" in letter.reason
    found = [event.outcome for event in await bench.ledger()]
    assert found == [GroupOutcome.FAILED, GroupOutcome.GENERATED]


async def test_no_more_episodes_run_than_allowed(tokenizer):
    environment = ScriptedEnvironment(answer(), answer(over=True))
    bench = Bench(tokenizer, environment, max_concurrent_episodes=5)
    async with bench.running():
        await bench.issue(*(make_group(f"g{index}", size=4) for index in range(6)))
        await bench.settled()
    assert environment.max_open == 5
    assert len(environment.opened) == 24


async def test_a_busy_worker_leaves_groups_to_others(tokenizer):
    environment = ScriptedEnvironment(gate=asyncio.Event())
    bench = Bench(tokenizer, environment, max_concurrent_episodes=4)
    async with bench.running():
        await bench.issue(*(make_group(f"g{index}", size=4) for index in range(5)))
        await until(lambda: len(environment.opened) == 4)
        lag = await bench.bus.stream_lag(Stream.TASKS, ConsumerGroup.ROLLOUT)
        assert (lag.num_pending, lag.num_undelivered) == (1, 4)
        environment.gate.set()
        await bench.settled()


async def test_a_long_group_is_not_taken_from_the_worker_that_plays_it(tokenizer):
    environment = ScriptedEnvironment(gate=asyncio.Event())
    bench = Bench(tokenizer, environment)
    async with bench.running(instance="one"), bench.running(instance="two"):
        await bench.issue(make_group("g1", size=2))
        await asyncio.sleep(0.6)  # three times the idle time after which it would be anybody's
        environment.gate.set()
        await bench.settled()
    assert len(environment.opened) == 2
    assert len(await bench.ledger()) == 1


async def test_the_groups_of_a_dead_worker_are_played_again_under_the_next_attempt(tokenizer):
    bench = Bench(tokenizer)
    await bench.issue(make_group("g1", size=2))
    await bench.bus.read(Stream.TASKS, ConsumerGroup.ROLLOUT, "dead", 1)
    async with bench.running():
        await bench.settled()
    trajectories = [
        codec.decode_trajectory(payload) for payload in await bench.entries(Stream.TRAJECTORIES)
    ]
    assert sorted(t.trajectory_id for t in trajectories) == ["g1.0.a1", "g1.1.a1"]


async def test_a_group_that_was_taken_over_is_dropped_by_the_worker_that_lost_it(tokenizer):
    environment = ScriptedEnvironment(gate=asyncio.Event())
    bench = Bench(tokenizer, environment)
    async with bench.running():
        await bench.issue(make_group("g1", size=2))
        await until(lambda: len(environment.opened) == 2)
        await bench.bus.reclaim(Stream.TASKS, ConsumerGroup.ROLLOUT, "other", 0.0, 1)
        await until(lambda: len(environment.closed) == 2)
        assert await bench.ledger() == []
        environment.gate.set()


async def test_a_late_result_is_refused_counted_and_published_nowhere(tokenizer):
    """The claim is lost while the last step is played, long before the next renewal would tell."""
    environment = ScriptedEnvironment(gate=asyncio.Event())
    bench = Bench(tokenizer, environment, lease_s=60.0)
    async with bench.running():
        await bench.issue(make_group("g1", size=2))
        await until(lambda: len(environment.opened) == 2)
        (taken,) = await bench.bus.reclaim(Stream.TASKS, ConsumerGroup.ROLLOUT, "other", 0.0, 1)
        environment.gate.set()
        await until(lambda: bench.metrics.read(LATE_RESULTS) == 1)
        assert await bench.bus.renew([taken]) == [taken]
        await bench.issue(make_group("g2", size=2))
        await until(lambda: bench.metrics.read(EPISODES) == 2)
    assert [event.group_id for event in await bench.ledger()] == ["g2"]
    assert len(await bench.entries(Stream.TRAJECTORIES)) == 2
    assert (bench.metrics.read(REPEATED_TOKENS), environment.closed) == (6, environment.opened)


async def test_a_renewal_that_crosses_a_commit_does_not_take_the_group_for_lost(tokenizer):
    """The bus has committed, its reply is on its way, and a renewal finds the group not held."""

    class SlowToReply(MemoryBus):
        num_renewals = 0

        async def commit(self, *args, **kwargs):
            await super().commit(*args, **kwargs)
            if kwargs.get("transitions"):
                seen = self.num_renewals
                await until(lambda: self.num_renewals > seen)

        async def renew(self, deliveries):
            held = await super().renew(deliveries)
            self.num_renewals += 1
            return held

    bench = Bench(tokenizer, lease_s=0.04)
    bench.bus = SlowToReply(CONSUMERS)
    async with bench.running():
        await bench.issue(make_group("g1", size=2))
        await until(lambda: bench.metrics.read(EPISODES) == 2)
    assert (bench.metrics.read(REPEATED_TOKENS), bench.metrics.read(LATE_RESULTS)) == (0, 0)


async def test_a_worker_plays_at_once_what_its_earlier_life_held_and_spares_a_silent_peer(
    tokenizer,
):
    bench = Bench(tokenizer, lease_s=60.0)
    await bench.issue(*(make_group(f"g{number}", size=1) for number in range(4)))
    await bench.bus.read(Stream.TASKS, ConsumerGroup.ROLLOUT, "worker-1", 2)
    await bench.bus.read(Stream.TASKS, ConsumerGroup.ROLLOUT, "silent", 1)
    async with bench.running(instance="worker-1"):
        await until(lambda: bench.metrics.read(EPISODES) == 3)
    trajectories = [
        codec.decode_trajectory(payload) for payload in await bench.entries(Stream.TRAJECTORIES)
    ]
    assert [t.trajectory_id for t in trajectories] == ["g0.0.a1", "g1.0.a1", "g3.0.a0"]
    assert bench.metrics.read(RECLAIMED_GROUPS) == 2
    assert await bench.num_open_tasks() == 1


async def test_a_paused_worker_is_spared_while_it_is_connected_and_loses_its_groups_in_the_end(
    tokenizer,
):
    """Suspect after 0.2 s, taken for dead after three times as long."""
    bench = Bench(tokenizer)
    paused = bench.bus.view("paused")
    await bench.issue(make_group("g1", size=1))
    await paused.read(Stream.TASKS, ConsumerGroup.ROLLOUT, "paused", 1)
    began_s = time.monotonic()
    async with bench.running():
        await bench.settled()
    assert time.monotonic() - began_s >= 0.6
    assert [event.outcome for event in await bench.ledger()] == [GroupOutcome.GENERATED]


async def test_a_group_that_kills_its_workers_is_set_aside(tokenizer):
    bench = Bench(tokenizer, max_attempts=2)
    await bench.issue(make_group("g1"))
    await bench.bus.read(Stream.TASKS, ConsumerGroup.ROLLOUT, "dead", 1)
    await bench.bus.reclaim(Stream.TASKS, ConsumerGroup.ROLLOUT, "dead too", 0.0, 1)
    async with bench.running():
        await bench.settled()
    (event,) = await bench.ledger()
    assert (event.outcome, event.stage, event.reason) == (
        GroupOutcome.FAILED,
        FailureStage.ROLLOUT,
        "Delivered 3 times without an end. Look for what kills its workers.",
    )


async def test_a_stop_finishes_what_is_in_hand_and_reads_no_more(tokenizer):
    environment = ScriptedEnvironment(gate=asyncio.Event())
    bench = Bench(tokenizer, environment, max_concurrent_episodes=2, grace_s=5.0)
    async with bench.running():
        await bench.issue(make_group("g1"), make_group("g2"))
        await until(lambda: len(environment.opened) == 2)
        asyncio.get_running_loop().call_later(0.1, environment.gate.set)
    assert [event.group_id for event in await bench.ledger()] == ["g1"]
    assert await bench.num_open_tasks() == 1


async def test_what_is_unfinished_after_the_grace_is_handed_back_with_its_sessions_closed(
    tokenizer,
):
    environment = ScriptedEnvironment(gate=asyncio.Event())
    bench = Bench(tokenizer, environment, grace_s=0.05, lease_s=60.0)
    async with bench.running():
        await bench.issue(make_group("g1"))
        await until(lambda: len(environment.opened) == 2)
    assert await bench.ledger() == []
    assert environment.closed == environment.opened
    [taken] = await bench.bus.reclaim(Stream.TASKS, ConsumerGroup.ROLLOUT, "worker-2", 60.0, 9)
    assert taken.num_deliveries == 2


async def test_a_worker_that_is_leaving_takes_over_nothing_that_another_handed_back(tokenizer):
    """It could hardly end it either, and every attempt counts."""
    environment = ScriptedEnvironment(gate=asyncio.Event())
    bench = Bench(tokenizer, environment, lease_s=0.04, grace_s=0.5)
    stopping = asyncio.Event()
    leaving = asyncio.create_task(bench.build().run(stopping))
    await bench.issue(make_group("g1", size=2))
    await until(lambda: len(environment.opened) == 2)
    stopping.set()
    await until(lambda: not bench.health.is_ready)
    await bench.issue(make_group("g2", size=2))
    lent = await bench.bus.read(Stream.TASKS, ConsumerGroup.ROLLOUT, "worker-2", 1)
    await bench.bus.hand_back(lent)
    await leaving
    taken = await bench.bus.reclaim(Stream.TASKS, ConsumerGroup.ROLLOUT, "worker-3", 60.0, 9)
    assert [delivery.num_deliveries for delivery in taken] == [2, 2]


class SlowToTakeOver(MemoryBus):
    """Answers a take-over once `answering` is set; `asked` is set when one waits for that."""

    def __init__(self, consumers):
        super().__init__(consumers)
        self.asked = asyncio.Event()
        self.answering = asyncio.Event()

    async def reclaim(self, stream, group, consumer, min_idle_s, *page, **whose):
        if min_idle_s and consumer == "worker-1":
            self.asked.set()
            await self.answering.wait()
        return await super().reclaim(stream, group, consumer, min_idle_s, *page, **whose)


async def test_a_take_over_under_way_when_the_engine_dies_is_handed_back_at_once(tokenizer):
    bench = Bench(tokenizer, ScriptedEnvironment(gate=asyncio.Event()), lease_s=60.0)
    bench.bus = SlowToTakeOver(CONSUMERS)
    await bench.issue(make_group("g1", size=2))
    await bench.bus.hand_back(
        await bench.bus.read(Stream.TASKS, ConsumerGroup.ROLLOUT, "worker-2", 1)
    )
    worker = bench.build()
    running = asyncio.create_task(worker.run(asyncio.Event()))
    await until(bench.bus.asked.is_set)
    bench.engine.is_alive = False
    await until(lambda: worker._is_leaving)
    bench.bus.answering.set()
    with pytest.raises(EngineFailedError):
        await running
    [taken] = await bench.bus.reclaim(Stream.TASKS, ConsumerGroup.ROLLOUT, "worker-3", 60.0, 9)
    assert taken.num_deliveries == 3


async def test_a_dead_engine_ends_the_worker_and_acknowledges_nothing(tokenizer):
    environment = ScriptedEnvironment(answer(), answer(over=True), gate=asyncio.Event())
    bench = Bench(tokenizer, environment)
    worker = asyncio.create_task(bench.build().run(asyncio.Event()))
    await bench.issue(make_group("g1"))
    await until(lambda: len(environment.opened) == 2)
    bench.engine.is_alive = False
    environment.gate.set()
    with pytest.raises(EngineFailedError):
        await worker
    assert await bench.ledger() == []
    assert await bench.num_open_tasks() == 1
    assert environment.closed == environment.opened


async def test_when_all_groups_fail_with_the_engine_one_error_ends_the_worker_and_none_leaks(
    tokenizer,
):
    class DyingEngine(ScriptedEngine):
        async def generate(self, prompt_token_ids, sampling):
            raise EngineFailedError("out of memory")

    unhandled = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: unhandled.append(context))
    bench = Bench(tokenizer, engine=DyingEngine())
    await bench.issue(*(make_group(f"g{number}", size=1) for number in range(4)))
    with pytest.raises(EngineFailedError, match="out of memory"):
        await bench.build().run(asyncio.Event())
    gc.collect()
    assert unhandled == []
    assert await bench.num_open_tasks() == 4


async def test_an_engine_that_dies_while_nothing_is_played_ends_the_worker_too(tokenizer):
    bench = Bench(tokenizer)
    worker = asyncio.create_task(bench.build().run(asyncio.Event()))
    await until(lambda: bench.health.is_ready)
    bench.engine.is_alive = False
    with pytest.raises(EngineFailedError):
        await worker


async def test_episodes_played_while_the_stream_was_full_are_published_when_there_is_room(
    tokenizer,
):
    bench = Bench(tokenizer, bus_limits=BusLimits(max_entries=2, publish_timeout_s=0.02))
    await bench.bus.publish(Stream.TRAJECTORIES, [b"one", b"two"])
    async with bench.running():
        await bench.issue(make_group("g1"))
        await until(lambda: len(bench.environment.closed) == 2)
        await asyncio.sleep(0.7)  # longer than the claim would last without renewals
        assert await bench.ledger() == []
        assert not await bench.bus.reclaim(Stream.TASKS, ConsumerGroup.ROLLOUT, "greedy", 0.2, 1)
        taken = await bench.bus.read(Stream.TRAJECTORIES, ConsumerGroup.LEARNER, "learner", 2)
        await bench.bus.acknowledge(taken)
        await bench.settled()
    assert len(await bench.ledger()) == 1


async def test_the_student_of_skill_grpo_sees_the_skills(tokenizer):
    bench = Bench(tokenizer)
    async with bench.running(skills=Skills()):
        await bench.issue(make_group("g1", size=1))
        await bench.settled()
    (payload,) = await bench.entries(Stream.TRAJECTORIES)
    found = codec.decode_trajectory(payload).turns[0].messages[0].content
    assert found == "skill for clean . Task: clean the mug .\nstart"


async def test_records_tell_what_the_worker_did_and_waited_for(tokenizer):
    bench = Bench(tokenizer, report_interval_s=0.05)
    async with bench.running():
        await bench.issue(make_group("g1", size=3))
        await bench.settled()
        await asyncio.sleep(0.15)
    records = [
        codec.decode_metric_record(payload) for payload in await bench.entries(Stream.METRICS)
    ]
    assert (records[-1].service, records[-1].instance) == ("rollout", "worker-1")
    assert records[-1].values["num_episodes"] == records[-1].values["num_successes"] == 3
    assert records[-1].values["num_tokens_generated"] == 9
    assert records[-1].values["waiting_share"] == pytest.approx(1.0, abs=0.05)
    assert records[-1].values["running_episodes"] == 0


async def test_the_worker_is_ready_while_it_reads(tokenizer):
    bench = Bench(tokenizer)
    async with bench.running():
        await until(lambda: bench.health.is_ready)
    assert not bench.health.is_ready
