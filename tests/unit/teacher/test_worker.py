from __future__ import annotations

import asyncio
import contextlib
import dataclasses

from sdar.bus.ledger import format_group_id
from sdar.bus.protocol import BusLimits
from sdar.contracts import codec
from sdar.contracts.streams import ConsumerGroup, Stream
from sdar.contracts.types import FailureStage, GroupOutcome, LedgerEvent, Purpose
from sdar.in_process.memory_bus import MemoryBus
from sdar.process.telemetry import Health
from services.teacher.context import ContextBuilder
from services.teacher.metrics import (
    DEAD_LETTERS,
    DROPPED_SKILLS,
    LATE_RESULTS,
    RECLAIMED_ENTRIES,
    REFUSED_POLICIES,
    RETRIEVAL_MISSES,
    SCORED_TRAJECTORIES,
    TeacherMetrics,
)
from services.teacher.retrieval import Retriever
from services.teacher.skills import Skill, SkillLibrary
from services.teacher.teacher import Teacher
from services.teacher.utility import SkillUtility
from services.teacher.worker import TeacherLimits, TeacherWorker
from tests.support import until
from tests.unit.teacher.builders import (
    CLEAN,
    LIBRARY,
    RUN_ID,
    FakeScorer,
    build_follower,
    make_manifest,
    play,
)

CONSUMERS = {
    Stream.TRAJECTORIES: (ConsumerGroup.TEACHER,),
    Stream.SCORED: (ConsumerGroup.LEARNER,),
    Stream.LEDGER: (ConsumerGroup.GATEWAY,),
}
HEAT = dataclasses.replace(
    CLEAN, task_type="heat", description="heat the egg and put it in the desk ."
)
LIMITS = TeacherLimits(read_block_s=0.02, lease_s=30.0, report_interval_s=0.02)


class House:
    """A worker with a fake scorer on an in-memory bus, and what came out of it."""

    def __init__(
        self,
        chat,
        scorer=None,
        *,
        max_lag=2,
        limits=LIMITS,
        bus_limits=None,
        library=LIBRARY,
        tokens=1000,
        kind="task_type",
        bus=None,
        instance="me",
    ) -> None:
        self.bus = bus or MemoryBus(CONSUMERS, bus_limits or BusLimits())
        self.scorer = scorer or FakeScorer()
        self.utility = SkillUtility(self.bus, 0.0) if kind == "ucb" else None
        contexts = ContextBuilder(
            chat,
            Retriever(
                library, kind=kind, num_skills=1 if self.utility else 3, utility=self.utility
            ),
            tokens,
        )
        self.metrics = TeacherMetrics()
        follower = build_follower(self.bus, self.scorer, max_lag, metrics=self.metrics)
        self.teacher = Teacher(contexts, self.scorer, follower, self.metrics, max_lag)
        self.health = Health()
        self.worker = TeacherWorker(
            self.bus,
            self.teacher,
            run_id=RUN_ID,
            instance=instance,
            health=self.health,
            limits=limits,
        )

    @contextlib.asynccontextmanager
    async def running(self):
        stopping = asyncio.Event()
        task = asyncio.create_task(self.worker.run(stopping))
        try:
            yield task
        finally:
            stopping.set()
            await asyncio.wait_for(task, 5)

    async def publish(self, *trajectories):
        await self.bus.publish(
            Stream.TRAJECTORIES,
            [codec.encode_trajectory(trajectory) for trajectory in trajectories],
        )

    async def publish_policy(self, version):
        await self.bus.publish(
            Stream.POLICY_UPDATES, [codec.encode_weights_manifest(make_manifest(version))]
        )

    async def scored(self):
        entries = await self.bus.tail(Stream.SCORED, "0-0", 100)
        return [codec.decode_scored_trajectory(entry.payload) for entry in entries]

    async def ledger(self):
        entries = await self.bus.tail(Stream.LEDGER, "0-0", 100)
        return [codec.decode_ledger_event(entry.payload) for entry in entries]

    async def until_claimed(self):
        """Wait until the teacher has taken an entry."""
        async with asyncio.timeout(5):
            while not (  # noqa: ASYNC110 - the bus has no event for it
                await self.bus.stream_lag(Stream.TRAJECTORIES, ConsumerGroup.TEACHER)
            ).num_pending:
                await asyncio.sleep(0.005)

    async def until_finished(self, num_entries):
        """Wait until the teacher has acknowledged all it was given."""
        async with asyncio.timeout(5):
            while True:
                lag = await self.bus.stream_lag(Stream.TRAJECTORIES, ConsumerGroup.TEACHER)
                done = len(await self.scored()) + await self.bus.count_dead_letters()
                if not lag.num_undelivered and not lag.num_pending and done >= num_entries:
                    return
                await asyncio.sleep(0.005)


async def test_every_trajectory_comes_out_scored_with_what_the_teacher_saw(chat):
    house = House(chat)
    episodes = [play(chat, episode_index=index, seed=index) for index in range(4)]
    await house.publish_policy(7)
    await house.publish(*episodes)
    async with house.running():
        await house.until_finished(4)
    scored = await house.scored()
    assert [item.trajectory for item in scored] == episodes
    for item in scored:
        expected = [len(t.response_token_ids) for t in item.trajectory.turns]
        assert [len(values) for values in item.score.turn_logprobs] == expected
        assert item.score.teacher_version == 7
        assert item.score.skill_ids == ("general", "clean")
        assert item.score.num_specific_skills == 1
        assert item.score.skill_library_hash == LIBRARY.content_hash
        assert item.score.template_hash == chat.template_hash
        assert (item.score.retrieval, item.score.scorer) == ("task_type", "fake")


async def test_what_cannot_be_decoded_or_contradicts_itself_is_set_aside_and_spares_the_rest(chat):
    house = House(chat)
    good = play(chat, group_id="good")
    elsewhere = dataclasses.replace(play(chat), run_id="another")
    evaluation = dataclasses.replace(play(chat), purpose=Purpose.EVALUATION)
    wrong = play(chat, group_id="wrong")
    wrong = dataclasses.replace(
        wrong, turns=(dataclasses.replace(wrong.turns[0], messages=()), *wrong.turns[1:])
    )
    await house.bus.publish(Stream.TRAJECTORIES, [b"\xff\xff"])
    await house.publish(elsewhere, evaluation, wrong, good)
    async with house.running():
        await house.until_finished(5)
    assert [item.trajectory.group_id for item in await house.scored()] == ["good"]
    reasons = {letter.entry_id: letter.reason for letter in await house.bus.list_dead_letters()}
    for complaint in (
        "bytes are no Trajectory",
        "of run 'another'",
        "purpose evaluation",
        "its 0 messages render to",
    ):
        assert sum(complaint in reason for reason in reasons.values()) == 1
    assert house.metrics.read(DEAD_LETTERS) == 4


async def test_a_group_that_loses_an_episode_is_reported_failed(chat):
    house = House(chat, tokens=64)
    await house.publish(play(chat, group_id="long"))
    async with house.running():
        await house.until_finished(1)
    (event,) = await house.ledger()
    found = (event.group_id, event.outcome, event.num_trajectories, event.stage)
    assert found == ("long", GroupOutcome.FAILED, 4, FailureStage.TEACHER)
    assert "exceed model.max_sequence_tokens 64" in event.reason


async def test_an_unexpected_error_costs_only_the_entry_that_causes_it(chat):
    house = House(chat, FakeScorer(poison=["g0.1.a0"]))
    await house.publish(*(play(chat, episode_index=index) for index in range(4)))
    async with house.running():
        await house.until_finished(4)
    assert [item.trajectory.episode_index for item in await house.scored()] == [0, 2, 3]
    (letter,) = await house.bus.list_dead_letters()
    assert letter.reason == "RuntimeError: kernel panic"


async def test_nothing_is_scored_past_the_lag_bound(chat):
    """Version 1 cannot be read: with max_lag 0 the trajectory waits for version 2."""
    house = House(chat, max_lag=0)
    house.scorer.missing = {1}
    await house.publish_policy(1)
    await house.publish(play(chat))
    async with house.running():
        await house.until_claimed()
        assert house.scorer.num_calls == 0
        await house.publish_policy(2)
        await house.until_finished(1)
    assert [item.score.teacher_version for item in await house.scored()] == [2]


async def test_tokens_of_a_version_not_yet_announced_wait_for_it(chat):
    house = House(chat, max_lag=0)
    await house.publish(play(chat, policy_version=1))
    async with house.running():
        await house.until_claimed()
        await house.publish_policy(1)
        await house.until_finished(1)
    assert [item.score.teacher_version for item in await house.scored()] == [1]


async def test_what_a_dead_peer_held_is_taken_over(chat):
    house = House(chat, limits=dataclasses.replace(LIMITS, lease_s=0.05))
    await house.publish(play(chat))
    held = await house.bus.read(Stream.TRAJECTORIES, ConsumerGroup.TEACHER, "dead", 10)
    assert len(held) == 1
    async with house.running():
        await house.until_finished(1)
    assert house.metrics.read(RECLAIMED_ENTRIES) == 1


async def test_an_entry_that_outlived_too_many_consumers_is_set_aside(chat):
    house = House(chat, limits=dataclasses.replace(LIMITS, lease_s=0.0, max_attempts=3))
    await house.publish(play(chat))
    await house.bus.read(Stream.TRAJECTORIES, ConsumerGroup.TEACHER, "dead", 10)
    for _ in range(2):
        await house.bus.reclaim(Stream.TRAJECTORIES, ConsumerGroup.TEACHER, "dead", 0.0, 10)
    async with house.running():
        await house.until_finished(1)
    (letter,) = await house.bus.list_dead_letters()
    assert "Delivered 4 times" in letter.reason
    assert house.scorer.num_calls == 0


async def test_a_slow_batch_keeps_its_claims(chat):
    class SlowScorer(FakeScorer):
        async def score(self, contexts):
            await asyncio.sleep(0.4)
            return await super().score(contexts)

    house = House(chat, SlowScorer(), limits=dataclasses.replace(LIMITS, lease_s=0.2))
    await house.publish(play(chat))
    async with house.running():
        await asyncio.sleep(0.3)
        assert not await house.bus.reclaim(
            Stream.TRAJECTORIES, ConsumerGroup.TEACHER, "greedy", 0.2, 10
        )
        await house.until_finished(1)


async def test_a_full_stream_delays_scores_and_loses_none(chat):
    house = House(
        chat, bus_limits=BusLimits(max_entries=2, publish_timeout_s=0.02, trim_interval_s=0.0)
    )
    await house.bus.publish(Stream.SCORED, [b"old", b"older"])
    await house.publish(play(chat))
    async with house.running():
        await until(lambda: house.scorer.num_calls == 1)
        await asyncio.sleep(0.1)
        held = await house.bus.read(Stream.SCORED, ConsumerGroup.LEARNER, "learner", 10)
        assert [delivery.payload for delivery in held] == [b"old", b"older"]
        await house.bus.acknowledge(held)
        fresh = await house.bus.read(Stream.SCORED, ConsumerGroup.LEARNER, "learner", 10, block_s=5)
    assert codec.decode_scored_trajectory(fresh[0].payload).score is not None


async def test_a_task_without_a_specific_skill_is_counted_and_warned_of_once(chat, log_events):
    house = House(chat)
    dance = dataclasses.replace(CLEAN, task_type="dance")
    await house.publish(*(play(chat, dance, episode_index=index) for index in range(2)))
    async with house.running():
        await house.until_finished(2)
    assert house.metrics.read(RETRIEVAL_MISSES) == 2
    assert [
        event["task_type"] for event in log_events if event["event"] == "no_specific_skill"
    ] == ["dance"]
    assert [item.score.num_specific_skills for item in await house.scored()] == [0, 0]


async def test_the_metrics_stream_tells_what_was_done(chat):
    house = House(chat)
    await house.publish(play(chat))
    async with house.running():
        await house.until_finished(1)
        stopping = asyncio.Event()
        reporting = asyncio.create_task(house.worker.report(stopping))
        (entry,) = await house.bus.tail(Stream.METRICS, "0-0", 1, block_s=5)
        stopping.set()
        await reporting
    record = codec.decode_metric_record(entry.payload)
    assert (record.service, record.instance, record.policy_version) == ("teacher", "me", 0)
    found = record.values["num_tokens_scored"]
    assert found == (await house.scored())[0].trajectory.num_response_tokens
    assert record.values["tokens_per_s"] > 0
    assert 0 <= record.values["waiting_share"] <= 1


async def test_a_policy_that_is_due_and_corrupt_is_waited_out_and_the_next_one_scores(chat):
    house = House(chat, max_lag=0)
    house.scorer.corrupt = {1}
    await house.publish_policy(1)
    await house.publish(play(chat))
    async with house.running():
        await until(lambda: house.metrics.read(REFUSED_POLICIES) > 0)
        assert await house.scored() == []
        await house.publish_policy(2)
        await house.until_finished(1)
    assert [item.score.teacher_version for item in await house.scored()] == [2]


async def test_of_a_batch_whose_claims_were_lost_in_part_the_rest_is_published_once(chat):
    """Two of four entries go to another teacher during scoring; it alone publishes them."""

    class SlowScorer(FakeScorer):
        gate = asyncio.Event()

        async def score(self, contexts):
            await self.gate.wait()
            return await super().score(contexts)

    house = House(chat, SlowScorer())
    peer = House(chat, bus=house.bus, instance="me too")
    await house.publish(*(play(chat, episode_index=index) for index in range(4)))
    async with house.running():
        await house.until_claimed()
        taken = await house.bus.reclaim(
            Stream.TRAJECTORIES, ConsumerGroup.TEACHER, "me too", 0.0, 2
        )
        house.scorer.gate.set()
        await until(lambda: house.metrics.read(LATE_RESULTS) == 2)
    assert [item.trajectory.episode_index for item in await house.scored()] == [2, 3]
    assert await house.bus.renew(taken) == taken
    async with peer.running():
        await house.until_finished(4)
    assert sorted(item.trajectory.episode_index for item in await house.scored()) == [0, 1, 2, 3]


async def test_an_entry_that_another_teacher_took_is_not_set_aside(chat):
    class SlowlyPoisoned(FakeScorer):
        gate = asyncio.Event()

        async def score(self, contexts):
            await self.gate.wait()
            return await super().score(contexts)

    house = House(chat, SlowlyPoisoned(poison=["g0.0.a0"]))
    await house.publish(play(chat))
    async with house.running():
        await house.until_claimed()
        await house.bus.reclaim(Stream.TRAJECTORIES, ConsumerGroup.TEACHER, "other", 0.0, 1)
        house.scorer.gate.set()
        await until(lambda: house.metrics.read(LATE_RESULTS) == 1)
    assert (await house.bus.count_dead_letters(), await house.ledger()) == (0, [])


async def test_a_teacher_scores_at_once_what_its_earlier_life_held_and_spares_a_silent_peer(
    chat,
):
    house = House(chat)
    episodes = [play(chat, episode_index=index) for index in range(4)]
    await house.publish(*episodes[:3])
    await house.bus.read(Stream.TRAJECTORIES, ConsumerGroup.TEACHER, "me", 2)
    await house.bus.read(Stream.TRAJECTORIES, ConsumerGroup.TEACHER, "silent", 1)
    await house.publish(episodes[3])
    async with house.running():
        await until(lambda: house.metrics.read(SCORED_TRAJECTORIES) == 3)
    assert [item.trajectory.episode_index for item in await house.scored()] == [0, 1, 3]
    assert house.metrics.read(RECLAIMED_ENTRIES) == 2


async def test_an_episode_that_cannot_be_scored_fails_its_group_once(chat):
    group_id = format_group_id(1)
    house = House(chat, FakeScorer(poison=[f"{group_id}.1.a0"]))
    events = [
        LedgerEvent(RUN_ID, group_id, outcome, 4, 0)
        for outcome in (GroupOutcome.ISSUED, GroupOutcome.GENERATED)
    ]
    await house.bus.commit({}, transitions=events)
    await house.publish(*(play(chat, group_id=group_id, episode_index=index) for index in range(4)))
    async with house.running():
        await house.until_finished(4)
    counts = (await house.bus.read_ledger()).counts()
    assert (counts["failed"], counts["buffered"], len(await house.scored())) == (1, 0, 3)


async def learned(house, task_type):
    """Success rate of each skill as any teacher would read it; infinite if never shown."""
    utility = SkillUtility(house.bus, 0.0)
    await utility.choose("g0", task_type, [skill.skill_id for skill in LIBRARY.specific], 1)
    return {
        skill.skill_id: utility.compute_score(task_type, skill.skill_id)
        for skill in LIBRARY.specific
    }


async def test_by_utility_all_episodes_of_a_group_see_one_choice_and_their_ends_are_learned_from(
    chat,
):
    """Two teachers on one bus: g0, shown heat, wins 1 of 4; g1, shown heat-2, fails."""
    house = House(chat, kind="ucb")
    peer = House(chat, kind="ucb", bus=house.bus)
    for group_id in ("g0", "g1"):
        episodes = [
            play(chat, HEAT, group_id=group_id, episode_index=index, seed=index)
            for index in range(4)
        ]
        first = dataclasses.replace(episodes[0], is_success=group_id == "g0")
        await house.publish(first, *episodes[1:2])
        async with house.running():
            await house.until_finished(2)
        await house.publish(*episodes[2:])
        async with peer.running():
            await house.until_finished(4)
    scored = await house.scored()
    assert {(item.trajectory.group_id, item.score.skill_ids) for item in scored} == {
        ("g0", ("general", "heat")),
        ("g1", ("general", "heat-2")),
    }
    assert {item.score.retrieval for item in scored} == {"ucb"}
    assert await learned(house, "heat") == {
        "heat": 0.25,
        "heat-2": 0.0,
        "clean": float("inf"),
        "cool": float("inf"),
    }


async def test_an_episode_that_is_delivered_again_is_learned_from_once(chat):
    house = House(chat, kind="ucb")
    good = dataclasses.replace(play(chat), is_success=True)
    bad = play(chat, episode_index=1)
    for _ in range(3):
        await house.publish(good)
    await house.publish(bad)
    async with house.running():
        await house.until_finished(4)
    assert (await learned(house, "clean"))["clean"] == 0.5


async def test_an_episode_whose_score_was_not_published_is_not_learned_from_and_keeps_its_choice(
    chat,
):
    """The stream of scores is full: choice made, score made, commit refused, as by a crash.

    Another teacher finishes it.
    """
    house = House(chat, kind="ucb", bus_limits=BusLimits(max_entries=1, publish_timeout_s=0.0))
    await house.bus.publish(Stream.SCORED, [b"in the way"])
    await house.publish(dataclasses.replace(play(chat), is_success=True))
    async with house.running():
        await house.until_claimed()
        await until(lambda: house.metrics.read(SCORED_TRAJECTORIES) == 1)
    assert (await learned(house, "clean"))["clean"] == 0.0
    (blocking,) = await house.bus.read(Stream.SCORED, ConsumerGroup.LEARNER, "learner", 1)
    await house.bus.acknowledge([blocking])
    limits = dataclasses.replace(LIMITS, lease_s=0.0)
    heir = House(chat, kind="ucb", bus=house.bus, limits=limits)
    async with heir.running():
        await heir.until_finished(1)
    assert (await house.scored())[0].score.skill_ids == ("general", "clean")
    assert (await learned(house, "clean"))["clean"] == 1.0


async def test_other_kinds_of_retrieval_publish_nothing_to_learn_from(chat):
    house = House(chat)
    await house.publish(play(chat))
    async with house.running():
        await house.until_finished(1)
    assert await house.bus.newest(Stream.SKILL_EVENTS) is None


async def test_skills_left_out_for_length_are_counted_warned_about_and_missing_from_the_score(
    chat, log_events
):
    skills = SkillLibrary(tuple(Skill(f"s{i}", "S", "sink " * 30, ("clean",)) for i in range(3)))
    trajectory = play(chat, num_turns=1)
    whole = ContextBuilder(chat, Retriever(skills, kind="task_type", num_skills=3), 1000).build(
        trajectory
    )
    house = House(chat, library=skills, tokens=whole.num_tokens - 1)
    await house.publish(trajectory)
    async with house.running():
        await house.until_finished(1)
    (scored,) = await house.scored()
    assert (scored.score.skill_ids, scored.score.num_specific_skills) == (("s0", "s1"), 2)
    assert house.metrics.read(DROPPED_SKILLS) == 1
    (warning,) = [event for event in log_events if event["event"] == "skills_dropped"]
    found = (warning["log_level"], warning["trajectory_id"], warning["num_dropped"])
    assert found == ("warning", trajectory.trajectory_id, 1)
