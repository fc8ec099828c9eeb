from __future__ import annotations

import asyncio
import dataclasses
import json
import time
from collections.abc import Callable

import pytest

from sdar.bus.ledger import LedgerAccount, parse_group_number
from sdar.bus.protocol import BusLimits
from sdar.config import RunConfig
from sdar.contracts import codec
from sdar.contracts.errors import (
    CorruptionError,
    RefusedError,
    SupersededError,
    UnknownResourceError,
)
from sdar.contracts.streams import ConsumerGroup, Stream
from sdar.contracts.types import (
    FailureStage,
    GroupOutcome,
    LedgerEvent,
    MetricRecord,
    Purpose,
    SamplingParameters,
    Task,
    TaskGroup,
)
from sdar.in_process.memory_bus import MemoryBus
from sdar.process.telemetry import Health
from services.gateway.history import History
from services.gateway.scheduler import Scheduler
from services.gateway.state import STATE_NAME, GatewayState, RunPhase
from services.gateway.watch import Watch
from tests.support import until

from .fakes import FakeCatalog, build_config, build_manifest, play


def evaluation_group(task_type: str) -> TaskGroup:
    task = Task("fake", "heldout", "t", task_type, "do it", 0)
    return TaskGroup(
        "test",
        "e-00000",
        task,
        1,
        Purpose.EVALUATION,
        3,
        SamplingParameters(1.0, 1.0, 4),
        3,
        "here:1",
        "e",
    )


def group_named(group_id: str) -> TaskGroup:
    return dataclasses.replace(evaluation_group("a"), group_id=group_id)


def shorten(config: RunConfig, num_tasks: int = 1) -> RunConfig:
    """The same run with so many held-out tasks in an evaluation."""
    evaluation = config.evaluation.model_copy(update={"num_tasks": num_tasks})
    return config.model_copy(update={"evaluation": evaluation})


class Run:
    """A scheduler on an in-memory bus, and the test in the place of every other service."""

    def __init__(
        self,
        config: RunConfig,
        bus: MemoryBus | None = None,
        address: str = "here:1",
        clock: Callable[[], float] = time.time,
        is_scaled: bool = True,
    ) -> None:
        self.config = config
        self.bus = bus or MemoryBus(config.stream_consumers)
        self.stopping = asyncio.Event()
        history = History(Stream.TRAJECTORIES, clock=clock)
        self.scheduler = Scheduler(
            config,
            self.bus.view(),
            FakeCatalog(),
            history,
            Health(),
            default_address=address,
            clock=clock,
            is_scaled=is_scaled,
        )
        self.task = asyncio.create_task(self.scheduler.run(self.stopping))

    async def take(self, number: int) -> list[TaskGroup]:
        """The next `number` task groups; fails if they don't come."""
        groups: list[TaskGroup] = []
        async with asyncio.timeout(5):
            while len(groups) < number:
                deliveries = await self.bus.read(
                    Stream.TASKS, ConsumerGroup.ROLLOUT, "r", number - len(groups), block_s=1
                )
                await self.bus.acknowledge(deliveries)
                groups += [codec.decode_task_group(delivery.payload) for delivery in deliveries]
        return groups

    async def settle(self) -> None:
        """Wait until the scheduler has absorbed everything and decided on it."""
        async with asyncio.timeout(5):
            while True:
                lags = [
                    await self.bus.stream_lag(s, ConsumerGroup.GATEWAY)
                    for s in (Stream.LEDGER, Stream.EVALUATIONS)
                ]
                if not any(lag.num_undelivered + lag.num_pending for lag in lags):
                    return
                await asyncio.sleep(0)

    async def num_waiting(self) -> int:
        await self.settle()
        return (await self.bus.stream_lag(Stream.TASKS, ConsumerGroup.ROLLOUT)).num_undelivered

    async def publish_policy(self, version: int, num_updates: int | None = None) -> None:
        manifest = build_manifest(version, num_updates)
        await self.bus.publish(Stream.POLICY_UPDATES, [codec.encode_weights_manifest(manifest)])
        await until(lambda: self.scheduler.policy.version == version)

    async def report(
        self,
        outcome: GroupOutcome,
        *groups: TaskGroup,
        version: int = 0,
        reason: str = "because",
        stage: str = "",
    ) -> None:
        events = [
            LedgerEvent("test", g.group_id, outcome, g.group_size, version, reason, stage=stage)
            for g in groups
        ]
        await self.bus.commit({}, transitions=events)

    async def set_aside(
        self, stream: Stream, group: ConsumerGroup, payload: bytes, reason: str = "no good"
    ) -> str:
        """Let a consumer give an entry up; returns its letter's id."""
        await self.bus.publish(stream, [payload])
        deliveries = await self.bus.read(stream, group, "r", 100, block_s=1)
        await self.bus.dead_letter(deliveries[-1], reason)
        await self.bus.acknowledge(deliveries[:-1])
        return (await self.bus.list_dead_letters(1))[0].letter_id

    async def answer_evaluations(
        self, groups: list[TaskGroup], version: int, *, is_success: bool = True
    ) -> None:
        played = [
            codec.encode_trajectory(play(group, version, is_success=is_success)) for group in groups
        ]
        await self.bus.publish(Stream.EVALUATIONS, played)

    async def reach(self, phase: RunPhase) -> None:
        await until(lambda: self.scheduler.state.phase is phase)

    async def stop(self) -> None:
        self.stopping.set()
        await self.task


@pytest.fixture
async def run():
    run = Run(build_config())
    yield run
    await run.stop()


async def begin(run: Run) -> tuple[list[TaskGroup], list[TaskGroup]]:
    """Publish the first policy; returns the first evaluations' groups and the first training
    groups.
    """
    await run.publish_policy(0)
    groups = await run.take(6 + 4)
    return groups[:6], groups[6:]


async def finish(run: Run) -> None:
    """Play and train everything, from the start to the last evaluation."""
    before, training = await begin(run)
    await run.answer_evaluations(before, 0)
    await run.publish_policy(2)
    await run.report(GroupOutcome.TRAINED, *training, version=2)
    await run.answer_evaluations(await run.take(6), 2)
    await run.reach(RunPhase.FINISHED)


async def test_nothing_is_issued_before_a_first_policy(run: Run) -> None:
    await until(lambda: run.scheduler.detail.startswith("waiting for the learner"))
    assert await run.num_waiting() == 0


async def test_the_first_policy_is_evaluated_sampled_and_greedy_before_training(run: Run) -> None:
    evaluations, training = await begin(run)
    assert [group.purpose for group in evaluations] == [Purpose.EVALUATION] * 6
    assert {group.sampling.temperature for group in evaluations} == {0.0, 1.0}
    assert all(group.admitted_version == 0 and group.group_size == 1 for group in evaluations)
    assert [group.purpose for group in training] == [Purpose.TRAIN] * 4


async def test_groups_in_flight_never_exceed_what_staleness_allows(run: Run) -> None:
    _, training = await begin(run)
    # (max_staleness 1 + version 0 + 1) * 2 groups per update = 4 are out; no more before something
    # is trained.
    assert await run.num_waiting() == 0
    await run.report(GroupOutcome.GENERATED, *training)
    assert await run.num_waiting() == 0
    await run.publish_policy(1)
    await run.report(GroupOutcome.TRAINED, *training[:2], version=1)
    # The target of 2 updates needs 4 groups: 2 trained, 2 buffered, none missing.
    assert await run.num_waiting() == 0


async def test_a_stale_or_failed_group_is_replaced(run: Run) -> None:
    _, training = await begin(run)
    await run.report(GroupOutcome.STALE, training[0])
    await run.report(GroupOutcome.FAILED, training[1])
    replacements = await run.take(2)
    assert {group.group_id for group in replacements}.isdisjoint(
        {group.group_id for group in training}
    )
    assert run.scheduler.ledger_gap == 0


async def test_the_run_finishes_after_the_last_evaluation_with_a_closed_ledger(run: Run) -> None:
    before, training = await begin(run)
    await run.answer_evaluations(before, 0, is_success=False)
    await run.report(GroupOutcome.GENERATED, *training)
    await run.publish_policy(2)
    await run.report(GroupOutcome.TRAINED, *training, version=2)
    after = await run.take(6)
    assert {group.admitted_version for group in after} == {2}
    await run.answer_evaluations(after, 2)
    await run.reach(RunPhase.FINISHED)
    counts = run.scheduler.ledger.counts()
    assert counts["issued"] == counts["trained"] == 4
    assert (run.scheduler.ledger_gap, run.scheduler.state.unaccounted) == (0, [])
    assert [evaluation.summary()["success"] for evaluation in run.scheduler.state.evaluations] == [
        0.0,
        0.0,
        1.0,
        1.0,
    ]


async def test_an_evaluation_episode_sampled_under_another_version_is_played_again(
    run: Run,
) -> None:
    evaluations, _ = await begin(run)
    await run.answer_evaluations(evaluations[:1], 1)
    again = await run.take(1)
    assert again[0] == evaluations[0]


async def test_pause_stops_the_issue_and_resume_takes_it_up(run: Run) -> None:
    _, training = await begin(run)
    run.scheduler.control.pause()
    await run.report(GroupOutcome.FAILED, training[0])
    assert await run.num_waiting() == 0
    run.scheduler.control.resume()
    assert len(await run.take(1)) == 1


async def test_stop_ends_the_run_early_with_an_evaluation(run: Run) -> None:
    before, training = await begin(run)
    await run.answer_evaluations(before, 0)
    await run.report(GroupOutcome.GENERATED, *training[:2])
    await run.publish_policy(1)
    await run.report(GroupOutcome.TRAINED, *training[:2], version=1)
    await run.settle()
    run.scheduler.control.stop()
    await run.report(GroupOutcome.FAILED, *training[2:])
    after = await run.take(6)
    await run.answer_evaluations(after, 1)
    await run.reach(RunPhase.FINISHED)


async def test_a_stop_outlives_its_gateway() -> None:
    first = Run(build_config())
    _, training = await begin(first)
    first.scheduler.control.stop()
    await first.report(GroupOutcome.FAILED, training[0])
    await first.settle()
    await first.stop()
    second = Run(build_config(), first.bus)
    await second.reach(RunPhase.STOPPING)
    assert await second.num_waiting() == 0
    await second.stop()


async def test_a_pause_outlives_its_gateway_until_somebody_resumes() -> None:
    first = Run(build_config())
    _, training = await begin(first)
    first.scheduler.control.pause()
    await first.report(GroupOutcome.FAILED, training[0])
    await first.settle()
    await first.stop()
    second = Run(build_config(), first.bus)
    await second.reach(RunPhase.PAUSED)
    assert await second.num_waiting() == 0
    second.scheduler.control.resume()
    assert len(await second.take(1)) == 1
    await second.settle()
    await second.stop()
    third = Run(build_config(), first.bus)
    await third.reach(RunPhase.RUNNING)
    await third.stop()


async def test_a_pause_for_a_drain_ends_with_the_gateway_and_spares_one_that_was_asked_for() -> (
    None
):
    first = Run(build_config())
    await begin(first)
    first.scheduler.control.pause(until_restart=True)
    await first.settle()
    await first.stop()
    second = Run(build_config(), first.bus)
    await second.reach(RunPhase.RUNNING)
    second.scheduler.control.pause()
    second.scheduler.control.pause(until_restart=True)
    await second.settle()
    await second.scheduler.confirm_tenure()
    await second.stop()
    third = Run(build_config(), first.bus)
    await third.reach(RunPhase.PAUSED)
    await third.stop()


async def test_a_run_that_gave_up_tries_again_when_it_is_resumed(run: Run) -> None:
    _, training = await begin(run)
    await run.report(GroupOutcome.FAILED, *training)
    await run.report(GroupOutcome.FAILED, *await run.take(4))
    await run.reach(RunPhase.FAILED)
    run.scheduler.control.resume()
    assert len(await run.take(4)) == 4
    assert (run.scheduler.state.phase, run.scheduler.detail) == (RunPhase.RUNNING, "")


async def test_a_run_whose_learner_skips_three_steps_in_a_row_ends_with_the_reason(
    run: Run,
) -> None:
    async def say(num_skipped: float) -> None:
        values = {"num_skipped_steps_in_a_row": num_skipped}
        record = MetricRecord("test", "learner", "l", 0, run.scheduler.control._clock(), values)
        await run.bus.publish(Stream.METRICS, [codec.encode_metric_record(record)])

    await begin(run)
    await say(2.0)
    await run.settle()
    assert run.scheduler.state.phase is RunPhase.RUNNING
    await say(3.0)
    await run.reach(RunPhase.FAILED)
    assert "skipped 3 optimizer steps in a row" in run.scheduler.detail


async def test_a_failed_run_that_sleeps_reads_no_results_until_it_is_resumed_with_its_tasks() -> (
    None
):
    first = Run(build_config())
    evaluations, training = await begin(first)
    await first.report(GroupOutcome.FAILED, *training)
    await first.report(GroupOutcome.FAILED, *await first.take(4))
    await first.reach(RunPhase.FAILED)
    first.scheduler.control.fall_asleep("idle", {})
    await first.scheduler.confirm_tenure()
    await first.stop()
    second = Run(build_config(), first.bus)
    await until(lambda: second.scheduler.is_restored)
    await second.report(GroupOutcome.FAILED, evaluations[0])
    async with asyncio.timeout(5):
        await second.scheduler.confirm_tenure()
    assert second.scheduler.state.phase is RunPhase.FAILED
    second.scheduler.control.resume()
    await second.settle()
    assert second.scheduler.state.evaluations[0].failed == [0]
    await second.stop()


async def test_a_finished_run_refuses_to_be_resumed_and_says_what_would_help(run: Run) -> None:
    await finish(run)
    with pytest.raises(RefusedError, match=r"Raise training\.num_updates"):
        run.scheduler.control.resume()


async def test_a_finished_run_goes_on_when_more_is_wanted_and_ends_with_its_own_evaluation() -> (
    None
):
    first = Run(build_config(num_updates=2))
    await finish(first)
    await first.settle()
    await first.stop()
    second = Run(build_config(num_updates=3), first.bus)
    more = await second.take(2)
    assert [group.purpose for group in more] == [Purpose.TRAIN] * 2
    assert [group.group_id for group in more] == ["group-00000004", "group-00000005"]
    await second.publish_policy(3)
    await second.report(GroupOutcome.TRAINED, *more, version=3)
    last = await second.take(6)
    assert {group.admitted_version for group in last} == {3}
    await second.answer_evaluations(last, 3)
    await second.reach(RunPhase.FINISHED)
    evaluations = [(e.num_updates, e.is_greedy) for e in second.scheduler.state.evaluations]
    assert evaluations == [(0, False), (0, True), (2, False), (2, True), (3, False), (3, True)]
    assert (second.scheduler.ledger.num_trained, second.scheduler.state.unaccounted) == (6, [])
    await second.settle()
    await second.stop()


async def test_a_finished_run_of_which_no_more_is_wanted_stays_finished() -> None:
    first = Run(build_config(num_updates=2))
    await finish(first)
    await first.settle()
    await first.stop()
    for target in (1, 2):
        again = Run(build_config(num_updates=target), first.bus)
        await until(lambda scheduler=again.scheduler: scheduler.health.is_ready)
        assert again.scheduler.state.phase is RunPhase.FINISHED
        assert await again.num_waiting() == 0
        await again.stop()


async def test_a_run_that_was_stopped_early_goes_on_only_when_more_than_before_is_wanted() -> None:
    first = Run(build_config(num_updates=5))
    before, training = await begin(first)
    await first.answer_evaluations(before, 0)
    first.scheduler.control.stop()
    await first.publish_policy(1)
    await first.report(GroupOutcome.TRAINED, *training[:2], version=1)
    await first.report(GroupOutcome.FAILED, *training[2:])
    await first.answer_evaluations(await first.take(6), 1)
    await first.reach(RunPhase.FINISHED)
    await first.settle()
    await first.stop()
    second = Run(build_config(num_updates=5), first.bus)
    await until(lambda: second.scheduler.health.is_ready)
    assert second.scheduler.state.phase is RunPhase.FINISHED
    await second.stop()
    third = Run(build_config(num_updates=6), first.bus)
    await third.reach(RunPhase.RUNNING)
    assert [group.purpose for group in await third.take(1)] == [Purpose.TRAIN]
    await third.stop()


async def test_a_changed_setting_in_the_middle_is_taken_up_by_the_next_gateway() -> None:
    first = Run(build_config(num_updates=9, max_staleness=1))
    await begin(first)
    await first.settle()
    await first.stop()
    second = Run(build_config(num_updates=9, max_staleness=2), first.bus)
    assert len(await second.take(2)) == 2  # (2 + 0 + 1) * 2 may be out now, 4 are
    await second.stop()


@pytest.mark.parametrize("what_comes", ["a failure", "another version", "a retry"])
async def test_an_evaluation_that_was_begun_longer_than_it_is_now_wanted_is_finished_as_begun(
    what_comes: str,
) -> None:
    first = Run(build_config())
    evaluations, _ = await begin(first)
    last = evaluations[2]
    if what_comes == "a retry":
        await first.report(GroupOutcome.FAILED, last)
    await first.settle()
    await first.stop()
    second = Run(shorten(build_config()), first.bus)
    await second.reach(RunPhase.RUNNING)
    if what_comes == "a failure":
        await second.report(GroupOutcome.FAILED, last)
        await second.settle()
    elif what_comes == "another version":
        await second.answer_evaluations([last], 1)
        assert await second.take(1) == [last]
    else:
        letter_id = await second.set_aside(
            Stream.TASKS, ConsumerGroup.ROLLOUT, codec.encode_task_group(last)
        )
        assert await second.scheduler.retry_dead_letter(letter_id) == last.group_id
    evaluation = second.scheduler.state.evaluations[0]
    assert evaluation.failed == ([2] if what_comes == "a failure" else [])
    await second.stop()


async def test_an_evaluation_that_is_begun_takes_as_many_tasks_as_are_now_wanted() -> None:
    first = Run(build_config())
    await begin(first)
    await first.settle()
    await first.stop()
    second = Run(shorten(build_config()), first.bus)
    await second.reach(RunPhase.RUNNING)
    second.scheduler.control.stop()
    await second.publish_policy(1)
    await until(lambda: second.scheduler.ledger.num_running == 4)
    await second.report(
        GroupOutcome.CANCELLED, *(group_named(f"group-0000000{n}") for n in (0, 1, 2, 3))
    )
    assert len(await second.take(2)) == 2
    assert [one.num_tasks for one in second.scheduler.state.evaluations] == [3, 3, 1, 1]
    await second.stop()


async def test_a_run_that_has_not_started_cannot_be_paused(run: Run) -> None:
    with pytest.raises(RefusedError, match="starting"):
        run.scheduler.control.pause()


async def test_a_restarted_gateway_goes_on_where_it_was_and_issues_nothing_twice() -> None:
    first = Run(build_config())
    _, training = await begin(first)
    await first.report(GroupOutcome.GENERATED, training[0])
    await first.settle()
    await first.stop()
    second = Run(build_config(), first.bus)
    await second.reach(RunPhase.RUNNING)
    assert await second.num_waiting() == 0
    await second.report(GroupOutcome.STALE, training[0])
    replacement = (await second.take(1))[0]
    assert replacement.group_id == "group-00000004"
    assert (await second.bus.read_ledger()).num_issued == 5
    await second.stop()


async def test_a_gateway_restarted_after_the_end_is_ready_at_once() -> None:
    first = Run(build_config())
    await finish(first)
    await first.settle()
    await first.stop()
    second = Run(build_config(), first.bus)
    await until(lambda: second.scheduler.health.is_ready)
    assert second.scheduler.state.phase is RunPhase.FINISHED
    await second.stop()


async def test_a_restarted_gateway_plays_where_the_environment_is_now_and_not_where_it_was() -> (
    None
):
    first = Run(build_config())
    _, training = await begin(first)
    await first.settle()
    await first.stop()
    second = Run(build_config(), first.bus, address="elsewhere:2")
    await second.reach(RunPhase.RUNNING)
    await second.report(GroupOutcome.FAILED, training[0])
    assert (await second.take(1))[0].environment_address == "elsewhere:2"
    await second.scheduler.register_environment("fake", "moved:3")
    await second.report(GroupOutcome.FAILED, training[1])
    assert (await second.take(1))[0].environment_address == "moved:3"
    await second.stop()


async def test_events_read_by_a_gateway_that_died_are_booked_by_the_next() -> None:
    first = Run(build_config())
    _, training = await begin(first)
    await first.settle()
    await first.stop()
    await first.report(GroupOutcome.FAILED, training[0])
    assert await first.bus.read(
        Stream.LEDGER, ConsumerGroup.GATEWAY, "gateway", 10
    )  # read, and never acknowledged
    second = Run(build_config(), first.bus)
    await until(lambda: second.scheduler.state.failure_reasons == {training[0].group_id: "because"})
    await second.stop()


async def test_an_unreadable_event_is_set_aside_and_does_not_stop_the_scheduler(run: Run) -> None:
    _, training = await begin(run)
    await run.bus.publish(Stream.EVALUATIONS, [b"\xff\xff nonsense"])
    await run.report(GroupOutcome.FAILED, training[0])
    assert len(await run.take(1)) == 1
    await run.settle()
    assert [letter.payload for letter in await run.bus.list_dead_letters()] == [
        b"\xff\xff nonsense"
    ]


@pytest.mark.parametrize(
    "group_id",
    ["sampled-000000-v000000-99999", "sampled-000000-v000000-²", "group-99999999", "-", ""],
)
async def test_what_is_reported_of_a_group_that_nobody_issued_changes_nothing(
    run: Run, group_id: str
) -> None:
    evaluations, training = await begin(run)
    await run.report(GroupOutcome.FAILED, dataclasses.replace(training[0], group_id=group_id))
    await run.answer_evaluations([dataclasses.replace(evaluations[0], group_id=group_id)], 7)
    assert await run.num_waiting() == 0
    assert run.scheduler.ledger.counts()["running"] == 4
    assert not any(evaluation.num_episodes for evaluation in run.scheduler.state.evaluations)


async def test_a_manifest_that_cannot_be_read_is_passed_over(run: Run) -> None:
    await run.bus.publish(Stream.POLICY_UPDATES, [b"\xff\xff nonsense"])
    assert await begin(run)


async def test_after_a_crash_that_lost_updates_no_more_is_issued_than_they_leave_room_for() -> None:
    run = Run(build_config(num_updates=100))
    _, training = await begin(run)
    await run.report(GroupOutcome.GENERATED, *training)
    await run.publish_policy(
        1
    )  # trained by the learner, not durable: they stay buffered and make room for an update ahead
    training += await run.take(2)
    await run.publish_policy(2)
    training += await run.take(2)
    await run.publish_policy(
        3, num_updates=0
    )  # the learner died before its first checkpoint and begins again from nothing
    await run.report(GroupOutcome.STALE, training[0])
    assert run.scheduler.policy.num_updates == 0
    assert await run.num_waiting() == 0  # 7 groups are out, updates 0 and 1 need 4
    await run.publish_policy(4, num_updates=1)
    await run.publish_policy(5, num_updates=2)
    assert len(await run.take(1)) == 1  # 8 fit again, one is missing
    await run.stop()


async def test_groups_whose_effect_a_damaged_checkpoint_took_along_are_replaced() -> None:
    run = Run(build_config(num_updates=3))
    _, training = await begin(run)
    await run.publish_policy(2)
    await run.report(GroupOutcome.TRAINED, *training, version=2)
    assert len(await run.take(2)) == 2
    await run.publish_policy(
        3, num_updates=1
    )  # what 2 of the 4 taught is gone; updates 2 and 3 need 4 groups, 2 are out
    assert await run.num_waiting() == 2
    await run.stop()


async def test_the_last_evaluation_is_of_the_policy_that_is_durable(run: Run) -> None:
    before, training = await begin(run)
    await run.answer_evaluations(before, 0)
    await run.report(GroupOutcome.GENERATED, *training)
    await run.publish_policy(2)
    assert await run.num_waiting() == 0  # its groups are not closed: a crash may still lose it
    await run.publish_policy(3, num_updates=0)
    await run.publish_policy(5, num_updates=2)
    await run.report(GroupOutcome.TRAINED, *training, version=5)
    assert {group.admitted_version for group in await run.take(6)} == {5}


async def test_a_superseded_gateway_ends_without_writing() -> None:
    first = Run(build_config())
    _, training = await begin(first)
    second = Run(build_config(), first.bus)
    await second.reach(RunPhase.RUNNING)
    await second.report(GroupOutcome.FAILED, training[0])
    assert len(await second.take(1)) == 1
    await second.settle()
    first.scheduler.control.pause()
    with pytest.raises(SupersededError, match="gateway"):
        await first.task
    assert (
        second.scheduler.state.next_group_number == (await second.bus.read_ledger()).num_issued == 5
    )
    await second.stop()


async def test_a_redis_that_forgot_what_it_confirmed_ends_the_gateway(run: Run) -> None:
    await begin(run)
    await run.bus.commit(
        {}, transitions=[LedgerEvent("test", "group-00000004", GroupOutcome.ISSUED, 0, 0)]
    )
    with pytest.raises(CorruptionError, match="has 5 groups, this gateway issued 4"):
        await run.task
    run.task = asyncio.create_task(asyncio.sleep(0))


async def test_a_gateway_that_finds_an_account_and_no_state_of_its_own_issues_nothing() -> None:
    config = build_config()
    bus = MemoryBus(config.stream_consumers)
    await bus.commit(
        {}, transitions=[LedgerEvent("test", "group-00000000", GroupOutcome.ISSUED, 0, 0)]
    )
    run = Run(config, bus)
    await bus.publish(Stream.POLICY_UPDATES, [codec.encode_weights_manifest(build_manifest(0))])
    with pytest.raises(CorruptionError, match="has 1 groups, this gateway issued 0"):
        await run.task
    assert await bus.load_state(STATE_NAME) is None


async def test_a_gateway_whose_redis_came_back_empty_ends_so_that_it_is_started_again(
    run: Run,
) -> None:
    await begin(run)
    run.bus._store.account = LedgerAccount()
    run.bus._store.tenures.clear()
    run.scheduler.control.pause()
    with pytest.raises(CorruptionError, match="came back without this run"):
        await run.task
    run.task = asyncio.create_task(asyncio.sleep(0))


async def test_a_gateway_on_an_emptied_redis_goes_on_from_the_snapshot_of_the_learner() -> None:
    first = Run(build_config())
    evaluations, training = await begin(first)
    await first.answer_evaluations(evaluations[:5], 0)
    await first.report(GroupOutcome.GENERATED, *training[:2])
    await first.settle()
    snapshot = await first.bus.take_snapshot()
    await first.stop()
    second = Run(build_config())
    await until(lambda: second.scheduler.detail.startswith("waiting for the learner"))
    await second.scheduler.register_environment("other", "there:1")
    assert await second.bus.restore_snapshot(snapshot, trained=[0, 1])
    await second.publish_policy(1)
    groups = await second.take(3)
    assert groups[0].group_id == evaluations[5].group_id  # its task was lost with the streams
    assert [group.group_id for group in groups[1:]] == ["group-00000004", "group-00000005"]
    assert second.scheduler.state.environments == {"other": "there:1"}
    assert second.scheduler.ledger_gap == 0
    await second.stop()


async def test_a_gateway_that_comes_after_the_snapshot_sends_lost_tasks_once() -> None:
    first = Run(build_config())
    evaluations, _ = await begin(first)
    await first.answer_evaluations(evaluations[:5], 0)
    await first.settle()
    snapshot = await first.bus.take_snapshot()
    await first.stop()
    bus = MemoryBus(first.config.stream_consumers)
    assert await bus.restore_snapshot(snapshot, trained=[])
    second = Run(build_config(), bus)
    await second.publish_policy(1)
    lost, *training = await second.take(5)
    assert lost == evaluations[5]
    assert {group.purpose for group in training} == {Purpose.TRAIN}
    await second.stop()
    third = Run(build_config(), bus)
    await third.reach(RunPhase.RUNNING)
    await third.scheduler.confirm_tenure()
    assert await third.num_waiting() == 0
    await third.stop()


async def test_a_snapshot_with_a_longer_evaluation_than_is_now_wanted_is_gone_on_from() -> None:
    first = Run(build_config())
    evaluations, _ = await begin(first)
    await first.settle()
    snapshot = await first.bus.take_snapshot()
    await first.stop()
    second = Run(shorten(build_config()))
    await until(lambda: second.scheduler.detail.startswith("waiting for the learner"))
    assert await second.bus.restore_snapshot(snapshot, trained=[])
    await second.publish_policy(1)
    assert await second.take(6) == evaluations
    await second.stop()


async def test_a_group_without_an_outcome_at_the_end_is_named_and_the_run_finishes(
    run: Run,
) -> None:
    before, training = await begin(run)
    await run.answer_evaluations(before, 0)
    await run.publish_policy(2)
    await run.report(GroupOutcome.TRAINED, *training, version=2)
    after = await run.take(6)
    account = run.bus._store.account
    account.ended[1] = (
        GroupOutcome.ISSUED
    )  # somebody wrote into Redis: the group counts as trained, and nothing says which
    await run.answer_evaluations(after, 2)
    await run.reach(RunPhase.FINISHED)
    assert (run.scheduler.state.unaccounted, run.scheduler.ledger_gap) == ([1], 1)


async def test_groups_still_buffered_after_an_early_stop_are_no_gap(run: Run) -> None:
    before, training = await begin(run)
    await run.answer_evaluations(before, 0)
    await run.report(GroupOutcome.GENERATED, *training)
    await run.settle()
    run.scheduler.control.stop()
    await run.reach(RunPhase.FINISHED)
    assert run.scheduler.ledger.num_buffered == 4
    assert run.scheduler.ledger_gap == 0


async def test_a_gateway_waits_for_room_in_a_full_stream_and_lives() -> None:
    config = build_config()
    run = Run(
        config, MemoryBus(config.stream_consumers, BusLimits(max_entries=8, publish_timeout_s=0.01))
    )
    await run.publish_policy(0)
    # Ten groups in one commit pass the bound once; the next commit finds the stream full.
    await until(lambda: run.scheduler.state.next_group_number == 4)
    await run.scheduler.register_environment("other", "there:1")
    await run.report(GroupOutcome.FAILED, group_named("group-00000000"))
    await until(lambda: run.scheduler.state.next_group_number == 5)
    assert not run.task.done()
    groups = await run.take(11)
    assert groups[-1].group_id == "group-00000004"
    await run.settle()
    await run.stop()


async def test_what_was_asked_for_while_a_commit_was_under_way_outlives_its_refusal() -> None:
    config = build_config()
    run = Run(
        config, MemoryBus(config.stream_consumers, BusLimits(max_entries=8, publish_timeout_s=30))
    )
    await run.publish_policy(0)
    await until(lambda: run.scheduler.state.next_group_number == 4)
    await run.report(GroupOutcome.FAILED, group_named("group-00000000"))
    await until(
        lambda: run.scheduler.state.next_group_number == 5
    )  # decided; the commit waits for room
    run.scheduler.control.pause()
    await run.scheduler.register_environment("other", "there:1")
    assert (
        len(await run.bus.reclaim(Stream.LEDGER, ConsumerGroup.GATEWAY, "somebody", 0.0, 10)) == 1
    )
    await run.take(10)
    await run.scheduler.confirm_tenure()
    assert run.scheduler.state.next_group_number == 4, "the commit was refused"
    await run.stop()
    second = Run(config, run.bus)
    await second.reach(RunPhase.PAUSED)
    assert second.scheduler.state.environments["other"] == "there:1"
    second.scheduler.control.resume()
    assert [group.group_id for group in await second.take(1)] == ["group-00000004"]
    await second.stop()


async def test_a_dead_letter_of_training_is_retried_as_a_new_group_in_one_transaction(
    run: Run,
) -> None:
    _, training = await begin(run)
    trajectory = codec.encode_trajectory(play(training[0], 0))
    letter_id = await run.set_aside(Stream.TRAJECTORIES, ConsumerGroup.LEARNER, trajectory)
    first, second = await asyncio.gather(
        *(run.scheduler.retry_dead_letter(letter_id) for _ in range(2))
    )
    assert first == second == "group-00000004"
    again = await run.take(1)
    assert (again[0].group_id, again[0].task) == ("group-00000004", training[0].task)
    assert await run.bus.count_dead_letters() == 0
    assert (await run.bus.read_ledger()).num_issued == 5
    with pytest.raises(UnknownResourceError, match=letter_id):
        await run.scheduler.retry_dead_letter(letter_id)


async def test_a_dead_letter_of_an_evaluation_is_published_as_it_was_and_counts_as_no_failure(
    run: Run,
) -> None:
    evaluations, _ = await begin(run)
    await run.report(GroupOutcome.FAILED, evaluations[0])
    letter_id = await run.set_aside(
        Stream.TASKS, ConsumerGroup.ROLLOUT, codec.encode_task_group(evaluations[0])
    )
    await run.settle()
    assert len(run.scheduler.state.evaluations[0].failed) == 1
    assert await run.scheduler.retry_dead_letter(letter_id) == evaluations[0].group_id
    assert await run.take(1) == [evaluations[0]]
    assert run.scheduler.state.evaluations[0].failed == []
    await run.answer_evaluations(evaluations[:1], 0)
    await run.settle()
    assert run.scheduler.state.evaluations[0].num_episodes == 1
    letter_id = await run.set_aside(
        Stream.TASKS, ConsumerGroup.ROLLOUT, codec.encode_task_group(evaluations[0])
    )
    with pytest.raises(RefusedError, match="it has its result"):
        await run.scheduler.retry_dead_letter(letter_id)


async def test_a_letter_that_holds_no_work_is_refused(run: Run) -> None:
    await begin(run)
    letter_id = await run.set_aside(Stream.TRAJECTORIES, ConsumerGroup.LEARNER, b"\xff nonsense")
    with pytest.raises(RefusedError, match="cannot be read"):
        await run.scheduler.retry_dead_letter(letter_id)
    await run.bus.publish(Stream.EVALUATIONS, [b"\xff nonsense"])
    await run.settle()
    letter_id = (await run.bus.list_dead_letters(1))[0].letter_id
    with pytest.raises(RefusedError, match="no work"):
        await run.scheduler.retry_dead_letter(letter_id)


async def test_a_letter_that_vanished_under_its_retry_is_not_found_and_the_run_goes_on(
    run: Run,
) -> None:
    _, training = await begin(run)
    trajectory = codec.encode_trajectory(play(training[0], 0))
    letter_id = await run.set_aside(Stream.TRAJECTORIES, ConsumerGroup.LEARNER, trajectory)
    retry = asyncio.ensure_future(run.scheduler.retry_dead_letter(letter_id))
    await until(lambda: bool(run.scheduler._retries._waiting))
    await run.bus.commit({}, retired_letters=[letter_id])
    with pytest.raises(UnknownResourceError, match=letter_id):
        await retry
    await run.report(GroupOutcome.FAILED, training[1])
    assert parse_group_number((await run.take(1))[0].group_id) == 4
    assert run.scheduler.ledger_gap == 0


async def test_a_finished_run_retries_nothing() -> None:
    run = Run(build_config())
    _, training = await begin(run)
    await run.stop()
    run = Run(build_config())
    await finish(run)
    letter_id = await run.set_aside(
        Stream.TASKS, ConsumerGroup.ROLLOUT, codec.encode_task_group(training[0])
    )
    with pytest.raises(RefusedError, match="finished"):
        await run.scheduler.retry_dead_letter(letter_id)
    await run.stop()


STAGES = [
    # Who fails the groups, and whether they were generated before.
    (FailureStage.ROLLOUT, False, "model.path"),
    (FailureStage.ENVIRONMENT, False, "sdar env check"),
    (FailureStage.TEACHER, True, "sdar logs teacher"),
    (FailureStage.LEARNER, True, "sdar logs learner"),
]


@pytest.mark.parametrize(("stage", "is_generated", "remedy"), STAGES)
async def test_a_run_whose_groups_all_fail_ends_with_stage_reason_and_remedy(
    run: Run, stage: FailureStage, is_generated: bool, remedy: str
) -> None:
    _, training = await begin(run)
    for is_last in (False, True):
        if is_generated:
            await run.report(GroupOutcome.GENERATED, *training)
        await run.report(GroupOutcome.FAILED, *training, stage=stage)
        training = [] if is_last else await run.take(4)
    await run.reach(RunPhase.FAILED)
    assert run.scheduler.detail.startswith(
        f"8 groups failed in a row and none was trained or skipped in between. Stage {stage}: "
        "because. "
    )
    assert remedy in run.scheduler.detail
    assert run.scheduler.state.failure_reasons["group-00000007"] == f"{stage}: because"
    assert await run.num_waiting() == 0


@pytest.mark.parametrize("outcome", [GroupOutcome.TRAINED, GroupOutcome.SKIPPED])
async def test_failures_between_trained_or_skipped_groups_do_not_end_a_run(
    outcome: GroupOutcome,
) -> None:
    run = Run(build_config(groups_per_update=4))
    await run.publish_policy(0)
    training = (await run.take(6 + 8))[6:]
    num_failed = 0
    for _ in range(3):
        await run.report(GroupOutcome.GENERATED, *training)
        await run.report(GroupOutcome.FAILED, *training[:-1], stage=FailureStage.TEACHER)
        await run.report(outcome, training[-1])
        num_failed += len(training) - 1
        training = await run.take(len(training))
    assert num_failed > 2 * 8
    assert await run.num_waiting() == 0
    assert run.scheduler.state.phase is RunPhase.RUNNING
    await run.stop()


@pytest.mark.parametrize("outcome", [GroupOutcome.STALE, GroupOutcome.CANCELLED])
async def test_a_stale_or_cancelled_group_does_not_show_that_the_run_gets_on(
    run: Run, outcome: GroupOutcome
) -> None:
    _, training = await begin(run)
    for is_last in (False, False, True):
        await run.report(GroupOutcome.GENERATED, *training)
        await run.report(GroupOutcome.FAILED, *training[:3], stage=FailureStage.TEACHER)
        await run.report(outcome, training[3])
        training = [] if is_last else await run.take(4)
    await run.reach(RunPhase.FAILED)


async def test_an_update_shows_that_the_run_gets_on_long_before_a_checkpoint_holds_its_groups() -> (
    None
):
    run = Run(build_config(num_updates=20))
    _, training = await begin(run)
    kept: list[TaskGroup] = []
    for _ in range(10):
        await run.report(GroupOutcome.GENERATED, *training)
        await run.report(GroupOutcome.FAILED, *training[:-1], stage=FailureStage.TEACHER)
        kept.append(training[-1])
        if len(kept) % 2 == 0:
            await run.publish_policy(len(kept) // 2)
        training = await run.take(await run.num_waiting())
    assert run.scheduler.state.phase is RunPhase.RUNNING
    assert run.scheduler.ledger.num_trained == 0
    await run.stop()


async def test_groups_that_wait_to_be_trained_excuse_failures_but_not_for_ever() -> None:
    run = Run(build_config(num_updates=20))
    _, training = await begin(run)
    await run.report(GroupOutcome.GENERATED, training.pop())
    num_failed = 0
    while run.scheduler.state.phase is RunPhase.RUNNING:
        group = training.pop() if training else (await run.take(1))[0]
        await run.report(GroupOutcome.FAILED, group, stage=FailureStage.ENVIRONMENT)
        num_failed += 1
        await run.settle()
        await until(
            lambda: run.scheduler.state.failed_training.num_failed == num_failed  # noqa: B023
        )
    assert num_failed == 8 + 9
    await run.stop()


async def test_every_stage_that_failed_is_named_with_its_newest_reason(run: Run) -> None:
    _, training = await begin(run)
    await run.report(GroupOutcome.FAILED, *training, stage=FailureStage.ENVIRONMENT, reason="cold")
    training = await run.take(4)
    await run.report(GroupOutcome.FAILED, *training, stage="tomorrow's", reason="odd.")
    await run.reach(RunPhase.FAILED)
    assert "Stage environment: cold. Look at `sdar logs envs`" in run.scheduler.detail
    assert run.scheduler.detail.endswith("Stage tomorrow's: odd.")


async def test_a_gateway_that_starts_again_counts_failures_anew(run: Run) -> None:
    _, training = await begin(run)
    await run.report(GroupOutcome.FAILED, *training, stage=FailureStage.TEACHER)
    again = await run.take(4)
    await run.report(GroupOutcome.FAILED, *again[:3], stage=FailureStage.TEACHER)
    await run.settle()
    await run.stop()
    other = Run(run.config, run.bus)
    await other.reach(RunPhase.RUNNING)
    await other.report(GroupOutcome.FAILED, again[3], stage=FailureStage.TEACHER)
    await other.settle()
    await until(lambda: other.scheduler.state.failed_training.num_failed == 1)
    assert other.scheduler.state.phase is RunPhase.RUNNING
    await other.stop()


async def test_a_run_whose_evaluation_episodes_all_fail_gives_up_and_goes_on_when_resumed() -> None:
    run = Run(shorten(build_config(), 4))
    await run.publish_policy(0)
    groups = await run.take(8 + 4)
    # The training groups come through: the environment is broken for evaluations alone.
    await run.report(GroupOutcome.GENERATED, *groups[8:])
    await run.report(GroupOutcome.FAILED, *groups[:8], stage=FailureStage.ENVIRONMENT)
    await run.reach(RunPhase.FAILED)
    assert run.scheduler.detail.startswith(
        "8 evaluation episodes failed in a row and none was played in between. "
        "Stage environment: because. Look at `sdar logs envs`"
    )
    run.scheduler.control.resume()
    await run.reach(RunPhase.RUNNING)
    await run.stop()


async def test_an_evaluation_episode_that_was_played_shows_that_evaluations_get_on() -> None:
    run = Run(shorten(build_config(), 5))
    await run.publish_policy(0)
    groups = await run.take(10 + 4)
    await run.report(GroupOutcome.FAILED, *groups[:7], stage=FailureStage.ENVIRONMENT)
    await run.settle()
    await run.answer_evaluations(groups[7:8], 0)
    await run.settle()
    await run.report(GroupOutcome.FAILED, *groups[8:10], stage=FailureStage.ENVIRONMENT)
    await run.settle()
    await until(lambda: run.scheduler.state.failed_evaluation.num_failed == 2)
    assert run.scheduler.state.phase is RunPhase.RUNNING
    await run.stop()


def test_the_state_of_a_gateway_that_counted_failures_otherwise_is_taken_over() -> None:
    older = json.loads(GatewayState(next_group_number=3).to_bytes())
    del older["failed_training"], older["failed_evaluation"]
    older["num_failed_in_a_row"] = 7
    assert GatewayState.from_bytes(json.dumps(older).encode()) == GatewayState(next_group_number=3)


async def test_a_run_whose_actions_are_never_valid_says_so_until_one_is(run: Run) -> None:
    _, training = await begin(run)
    watch = Watch(run.scheduler, run.bus.view())

    async def show(number: int, *, is_valid: bool) -> set[str]:
        played = play(training[0], 0)
        turn = dataclasses.replace(played.turns[0], is_action_valid=is_valid, response_text="hm")
        name = f"t{number}"
        played = dataclasses.replace(played, trajectory_id=name, turns=(turn,))
        await run.bus.publish(Stream.TRAJECTORIES, [codec.encode_trajectory(played)])
        await until(lambda: name in run.scheduler.history.trajectory_ids(1))
        await watch.refresh()
        return {alarm.name for alarm in watch.board.alarms}

    raised = ["invalid_actions" in await show(number, is_valid=False) for number in range(16)]
    assert raised == [False] * 15 + [True]
    (alarm,) = (one for one in watch.board.alarms if one.name == "invalid_actions")
    assert "The newest response: 'hm'. The environment expects: A word." in alarm.message
    assert "invalid_actions" not in await show(16, is_valid=True)
