"""Retrieval by utility: teachers on one bus, in memory or Redis, share what they learned."""

from __future__ import annotations

import asyncio
import itertools
import math
from contextlib import AsyncExitStack

import pytest

from sdar.bus.embedded_redis import EmbeddedRedis
from sdar.bus.redis import RedisBus
from sdar.contracts import codec
from sdar.contracts.streams import Stream
from sdar.contracts.types import SkillChoice, SkillOutcome
from sdar.in_process.memory_bus import MemoryBus
from services.teacher.utility import SkillUtility

SKILLS = ("a", "b", "c", "d")
run_numbers = itertools.count()


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory):
    with EmbeddedRedis(tmp_path_factory.mktemp("redis")) as server:
        yield server.url


@pytest.fixture(params=["memory", "redis"])
async def buses(request):
    """Makes buses of one run, each as another teacher would have it."""
    async with AsyncExitStack() as stack:
        if request.param == "memory":
            memory = MemoryBus({})
            yield lambda: memory
            return
        url, run_id = request.getfixturevalue("redis_url"), f"run-{next(run_numbers)}"

        def build():
            bus = RedisBus(url, run_id, {})
            stack.push_async_callback(bus.close)
            return bus

        yield build


async def report(bus, trajectory_id, skill_ids, is_success, task_type="clean"):
    outcome = SkillOutcome(trajectory_id, task_type, tuple(skill_ids), is_success)
    await bus.publish(Stream.SKILL_EVENTS, [codec.encode_skill_event(outcome)])


async def choose(utility, key, count=1, task_type="clean", skills=SKILLS):
    await utility.choose(key, task_type, skills, count)
    return utility.get_choice(key)


async def test_what_was_never_tried_comes_first_in_the_order_given(buses):
    utility = SkillUtility(buses(), 0.5)
    found = [await choose(utility, f"g{number}", count=2) for number in range(2)]
    assert found == [("a", "b"), ("c", "d")]


async def test_the_score_is_mean_utility_and_a_bonus_for_the_rarely_tried(buses):
    """Two groups got a and b, one c: a succeeded in 1 of 4 episodes, b in 3 of 4, c unknown."""
    bus = buses()
    utility = SkillUtility(bus, 0.5)
    for key, skill_ids in (("g0", "ab"), ("g1", "ab"), ("g2", "c")):
        await choose(utility, key, count=len(skill_ids), skills=skill_ids)
    for number in range(4):
        await report(bus, f"a{number}", "a", number < 1)
        await report(bus, f"b{number}", "b", number < 3)
    await choose(utility, "g0")  # reads what was reported
    bonus = 0.5 * math.sqrt(math.log(3) / 2)
    expected = [0.25 + bonus, 0.75 + bonus, 0.5 * math.sqrt(math.log(3)), math.inf]
    assert [utility.compute_score("clean", skill_id) for skill_id in SKILLS] == pytest.approx(
        expected
    )


async def test_without_exploration_the_best_so_far_is_shown(buses):
    bus = buses()
    utility = SkillUtility(bus, 0.0)
    for number, skill_id in enumerate(SKILLS):
        assert await choose(utility, f"g{number}") == (skill_id,)
        await report(bus, f"g{number}.0", skill_id, skill_id in "bc")
    await report(bus, "g2.1", "c", False)
    assert await choose(utility, "next", count=2) == ("b", "c")


async def test_every_task_type_has_its_own_utility(buses):
    bus = buses()
    utility = SkillUtility(bus, 0.0)
    await choose(utility, "g0", count=4)
    await report(bus, "g0.0", "d", True)
    assert await choose(utility, "g1") == ("d",)
    assert await choose(utility, "h0", task_type="heat") == ("a",)


async def test_teachers_that_choose_for_one_group_at_once_agree_and_count_it_once(buses):
    teachers = [SkillUtility(buses(), 0.5) for _ in range(4)]
    orders = list(itertools.permutations(SKILLS))[:: len(teachers) + 1]
    for number in range(10):
        choosing = [
            choose(teacher, f"g{number}", skills=order)
            for teacher, order in zip(teachers, orders, strict=False)
        ]
        choices = await asyncio.gather(*choosing)
        assert len(set(choices)) == 1
    for teacher in teachers:
        await choose(teacher, "g0")
        expected = [teachers[0].compute_score("clean", skill_id) for skill_id in SKILLS]
        assert [teacher.compute_score("clean", skill_id) for skill_id in SKILLS] == expected


async def test_calls_that_overlap_in_one_teacher_count_every_event_once(buses):
    bus = buses()
    utility = SkillUtility(bus, 0.5)
    await asyncio.gather(*(choose(utility, f"g{number % 5}") for number in range(20)))
    fresh = SkillUtility(bus, 0.5)
    await choose(fresh, "g0")
    scores = [utility.compute_score("clean", skill_id) for skill_id in SKILLS]
    assert scores == [fresh.compute_score("clean", skill_id) for skill_id in SKILLS]
    assert max(scores) == pytest.approx(0.5 * math.sqrt(math.log(5)))


async def test_a_restarted_teacher_keeps_every_choice_and_all_it_learned(buses):
    bus = buses()
    before = SkillUtility(bus, 0.5)
    choices = {f"g{number}": await choose(before, f"g{number}", count=2) for number in range(6)}
    for key, skill_ids in choices.items():
        await report(bus, key, skill_ids, "a" in skill_ids)
    await choose(before, "g0")
    after = SkillUtility(buses(), 0.5)
    assert {key: await choose(after, key, count=2) for key in choices} == choices
    expected = [before.compute_score("clean", s) for s in SKILLS]
    assert [after.compute_score("clean", s) for s in SKILLS] == expected


async def test_a_trajectory_that_is_reported_again_counts_once(buses):
    bus = buses()
    utility = SkillUtility(bus, 0.0)
    await choose(utility, "g0")
    await report(bus, "g0.0", "a", True)
    await report(bus, "g0.1", "a", False)
    for _ in range(3):
        await report(bus, "g0.0", "a", True)
    await choose(utility, "g0")
    assert utility.compute_score("clean", "a") == 0.5


async def test_only_the_newest_events_count_and_what_slides_out_leaves_no_trace(buses):
    """Room for three events: g0's result slides out, so a is untried when g2 chooses."""
    bus = buses()
    utility = SkillUtility(bus, 0.0, max_events=3)
    await choose(utility, "g0")
    await report(bus, "g0.0", "a", True)
    await choose(utility, "g1")
    await report(bus, "g1.0", "b", False)
    await choose(utility, "g2")
    found = [utility.compute_score("clean", skill_id) for skill_id in SKILLS]
    assert found == [0.0, 0.0, math.inf, math.inf]
    assert await choose(utility, "g0") == ("c",)


async def test_an_event_that_cannot_be_read_is_reported_and_passed_over(buses, log_events):
    bus = buses()
    await bus.publish(
        Stream.SKILL_EVENTS,
        [b"\xff\xff", codec.encode_skill_event(SkillChoice("g0", "clean", ("d",)))],
    )
    assert await choose(SkillUtility(bus, 0.5), "g0") == ("d",)
    assert [event["event"] for event in log_events] == ["skill_event_unreadable"]
