from __future__ import annotations

import asyncio

import pytest

from sdar.config import RunConfig
from sdar.contracts import codec
from sdar.contracts.errors import RefusedError
from sdar.contracts.streams import ConsumerGroup, Stream
from sdar.contracts.types import GroupOutcome, LedgerEvent, Purpose, SamplingParameters, Task, TaskGroup
from sdar.runtime.memory_bus import MemoryBus
from sdar.runtime.telemetry import Health
from services.gateway.history import History
from services.gateway.scheduler import Scheduler
from services.gateway.state import RunPhase
from tests.support import until

from .fakes import FakeCatalog, build_config, build_manifest, play


def evaluation_group(task_type: str) -> TaskGroup:
    task = Task("fake", "heldout", "t", task_type, "do it", 0)
    return TaskGroup("test", "e-00000", task, 1, Purpose.EVALUATION, 3, SamplingParameters(1.0, 1.0, 4), 3, "here:1", "e")


class Run:
    """A scheduler on an in-memory bus, and the test in the place of every other service."""

    def __init__(self, config: RunConfig, bus: MemoryBus | None = None, address: str = "here:1") -> None:
        self.config = config
        self.bus = bus or MemoryBus(config.stream_consumers)
        self.stopping = asyncio.Event()
        history = History(Stream.TRAJECTORIES)
        self.scheduler = Scheduler(config, self.bus, FakeCatalog(), history, Health(), default_address=address)
        self.task = asyncio.create_task(self.scheduler.run(self.stopping))

    async def take(self, number: int) -> list[TaskGroup]:
        """The next `number` task groups; fails if they don't come."""
        groups: list[TaskGroup] = []
        async with asyncio.timeout(5):
            while len(groups) < number:
                deliveries = await self.bus.read(Stream.TASKS, ConsumerGroup.ROLLOUT, "r", number - len(groups), block_s=1)
                await self.bus.acknowledge(deliveries)
                groups += [codec.decode_task_group(delivery.payload) for delivery in deliveries]
        return groups

    async def settle(self) -> None:
        """Wait until the scheduler has absorbed everything and decided on it."""
        async with asyncio.timeout(5):
            while True:
                lags = [await self.bus.stream_lag(s, ConsumerGroup.GATEWAY) for s in (Stream.LEDGER, Stream.EVALUATIONS)]
                if not any(lag.num_undelivered + lag.num_pending for lag in lags):
                    return
                await asyncio.sleep(0)

    async def num_waiting(self) -> int:
        await self.settle()
        return (await self.bus.stream_lag(Stream.TASKS, ConsumerGroup.ROLLOUT)).num_undelivered

    async def publish_policy(self, version: int) -> None:
        await self.bus.publish(Stream.POLICY_UPDATES, [codec.encode_weights_manifest(build_manifest(version))])

    async def report(self, outcome: GroupOutcome, *groups: TaskGroup, version: int = 0) -> None:
        events = [LedgerEvent("test", g.group_id, outcome, g.group_size, version, "because") for g in groups]
        await self.bus.publish(Stream.LEDGER, [codec.encode_ledger_event(event) for event in events])

    async def answer_evaluations(self, groups: list[TaskGroup], version: int, *, is_success: bool = True) -> None:
        played = [codec.encode_trajectory(play(group, version, is_success=is_success)) for group in groups]
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
    """Publish the first policy; returns the first evaluations' groups and the first training groups."""
    await run.publish_policy(0)
    groups = await run.take(6 + 4)
    return groups[:6], groups[6:]


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
    # (max_staleness 1 + version 0 + 1) * 2 groups per update = 4 are out; no more before something is trained.
    assert await run.num_waiting() == 0
    await run.report(GroupOutcome.GENERATED, *training)
    assert await run.num_waiting() == 0
    await run.report(GroupOutcome.TRAINED, *training[:2], version=1)
    # The target of 2 updates needs 4 groups: 2 trained, 2 buffered, none missing.
    assert await run.num_waiting() == 0


async def test_a_stale_or_failed_group_is_replaced(run: Run) -> None:
    _, training = await begin(run)
    await run.report(GroupOutcome.STALE, training[0])
    await run.report(GroupOutcome.FAILED, training[1])
    replacements = await run.take(2)
    assert {group.group_id for group in replacements}.isdisjoint({group.group_id for group in training})
    assert run.scheduler.state.ledger.find_gap() == 0


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
    counts = run.scheduler.state.ledger.counts()
    assert counts["issued"] == counts["trained"] == 4
    assert [evaluation.summary()["success"] for evaluation in run.scheduler.state.evaluations] == [0.0, 0.0, 1.0, 1.0]


async def test_an_evaluation_episode_sampled_under_another_version_is_played_again(run: Run) -> None:
    evaluations, _ = await begin(run)
    await run.answer_evaluations(evaluations[:1], 1)
    again = await run.take(1)
    assert again[0] == evaluations[0]


async def test_pause_stops_the_issue_and_resume_takes_it_up(run: Run) -> None:
    _, training = await begin(run)
    run.scheduler.pause()
    await run.report(GroupOutcome.FAILED, training[0])
    assert await run.num_waiting() == 0
    run.scheduler.resume()
    assert len(await run.take(1)) == 1


async def test_stop_ends_the_run_early_with_an_evaluation(run: Run) -> None:
    before, training = await begin(run)
    await run.answer_evaluations(before, 0)
    await run.report(GroupOutcome.GENERATED, *training[:2])
    await run.publish_policy(1)
    await run.report(GroupOutcome.TRAINED, *training[:2], version=1)
    await run.settle()
    run.scheduler.stop()
    await run.report(GroupOutcome.FAILED, *training[2:])
    after = await run.take(6)
    await run.answer_evaluations(after, 1)
    await run.reach(RunPhase.FINISHED)


async def test_a_run_that_has_not_started_cannot_be_paused(run: Run) -> None:
    with pytest.raises(RefusedError, match="starting"):
        run.scheduler.pause()


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
    assert second.scheduler.state.ledger.counts()["issued"] == 5
    await second.stop()


async def test_a_gateway_restarted_after_the_end_is_ready_at_once() -> None:
    first = Run(build_config())
    before, training = await begin(first)
    await first.answer_evaluations(before, 0)
    await first.publish_policy(2)
    await first.report(GroupOutcome.TRAINED, *training, version=2)
    await first.answer_evaluations(await first.take(6), 2)
    await first.reach(RunPhase.FINISHED)
    await first.settle()
    await first.stop()
    second = Run(build_config(), first.bus)
    await until(lambda: second.scheduler.health.is_ready)
    assert second.scheduler.state.phase is RunPhase.FINISHED
    await second.stop()


async def test_a_restarted_gateway_plays_where_the_environment_is_now_and_not_where_it_was() -> None:
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
    await first.report(GroupOutcome.GENERATED, training[0])
    assert await first.bus.read(Stream.LEDGER, ConsumerGroup.GATEWAY, "gateway", 10)  # read, and never acknowledged
    second = Run(build_config(), first.bus)
    await until(lambda: second.scheduler.state.ledger.num_generated == 1)
    await second.stop()


async def test_an_unreadable_event_does_not_stop_the_scheduler(run: Run) -> None:
    _, training = await begin(run)
    await run.bus.publish(Stream.LEDGER, [b"\xff\xff nonsense"])
    await run.report(GroupOutcome.FAILED, training[0])
    assert len(await run.take(1)) == 1


async def test_a_run_whose_groups_all_fail_gives_up_and_says_why(run: Run) -> None:
    _, training = await begin(run)
    num_failed = 0
    while num_failed < 8:
        await run.report(GroupOutcome.FAILED, *training)
        num_failed += len(training)
        training = await run.take(4) if num_failed < 8 else []
    await run.reach(RunPhase.FAILED)
    assert "8 groups failed in a row" in run.scheduler.detail
    assert "because" in run.scheduler.detail
    assert await run.num_waiting() == 0


async def test_failures_between_successes_do_not_end_a_run(run: Run) -> None:
    _, training = await begin(run)
    for _ in range(5):
        await run.report(GroupOutcome.FAILED, *training[:3])
        await run.report(GroupOutcome.GENERATED, training[3])
        await run.report(GroupOutcome.STALE, training[3])
        training = await run.take(4)
    assert run.scheduler.state.phase is RunPhase.RUNNING
