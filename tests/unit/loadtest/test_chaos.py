from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from loadtest.chaos import checks
from loadtest.chaos.faults import ENVS, KILLS, REDIS, SERVICES, Fault, FaultKind, build_schedule
from loadtest.chaos.logs import LogEvent, LogFollower, parse_line
from loadtest.chaos.observer import Sample, read_gauges
from loadtest.chaos.proxy import Link
from loadtest.chaos.recovery import Injury
from loadtest.chaos.report import count_repeated_tokens, summarize_recoveries
from loadtest.chaos.run import MemorySample
from sdar.bus.ledger import CLOSING, LedgerAccount, format_group_id
from sdar.contracts.types import GroupOutcome, MetricRecord

ROLLOUTS = ["rollout-0", "rollout-1"]


# ---- the schedule


def test_a_seed_names_one_schedule():
    assert build_schedule(1, 10.0, 2, 30.0) == build_schedule(1, 10.0, 2, 30.0)
    assert build_schedule(1, 10.0, 2, 30.0) != build_schedule(2, 10.0, 2, 30.0)


def test_ten_minutes_kill_every_service_and_at_least_fifty_times_in_all():
    for seed in range(20):
        schedule = build_schedule(seed, 10.0, 2, 30.0)
        kills = Counter(fault.target for fault in schedule if fault.kind in KILLS)
        assert sum(fault.num_kills for fault in schedule) >= 50
        assert min(kills[name] for name in (*SERVICES, *ROLLOUTS)) >= 4
        assert {fault.kind for fault in schedule} == set(FaultKind)
        assert [fault.duration_s for fault in schedule if fault.kind is FaultKind.OUTAGE] == [60.0]


def test_a_short_run_kills_every_service_pauses_one_and_severs_one():
    kinds: dict[FaultKind, set[str]] = {kind: set() for kind in FaultKind}
    for fault in build_schedule(0, 1.0, 2, 30.0):
        kinds[fault.kind].add(fault.target)
    assert kinds[FaultKind.KILL] == {*SERVICES, *ROLLOUTS}
    assert kinds[FaultKind.PAUSE]
    assert kinds[FaultKind.SEVER]


def test_a_worker_is_paused_for_longer_than_its_lease():
    pauses = [
        f.duration_s
        for f in build_schedule(0, 10.0, 2, 30.0)
        if f.kind is FaultKind.PAUSE and f.target in ROLLOUTS
    ]
    assert min(pauses) < 10.0
    assert max(pauses) > 30.0


def test_faults_come_in_order_within_the_minutes_and_before_the_last_updates():
    schedule = build_schedule(3, 10.0, 2, 30.0)
    expected = sorted(fault.at_s for fault in schedule)
    assert [fault.at_s for fault in schedule] == expected
    assert schedule[-1].at_s < 600.0
    assert schedule[-1].at_progress < 0.95


# ---- what is seen


def test_a_log_line_that_a_kill_cut_short_hides_neither_itself_nor_the_next():
    line = b'{"event": "one", "timestamp": "2026-01-01T00:00:00Z"}'
    event = parse_line(b'{"event": "cut sh' + line, "learner")
    assert event is not None
    assert (event.service, event.name, event.at_s) == ("learner", "one", 1767225600.0)
    assert parse_line(b"Triton not available", "learner") is None
    assert parse_line(b'{"event": "cut sh', "learner") is None


def test_a_log_is_read_on_where_it_was_left_also_in_the_middle_of_a_line(tmp_path: Path):
    path = tmp_path / "log"
    follower = LogFollower(path, "teacher")
    assert list(follower.read()) == []
    path.write_bytes(
        b'{"event": "one", "timestamp": "2026-01-01T00:00:00Z"}\n{"event": "two", "time'
    )
    assert [event.name for event in follower.read()] == ["one"]
    with path.open("ab") as file:
        file.write(b'stamp": "2026-01-01T00:00:00Z"}\n')
    assert [event.name for event in follower.read()] == ["two"]


def sampled(at_s: float, num_tokens: float) -> MetricRecord:
    return MetricRecord(
        "run", "rollout", "rollout-0", 0, at_s, {"num_tokens_generated": num_tokens}
    )


def played(at_s: float, num_tokens: int) -> LogEvent:
    return LogEvent("rollout-0", "group_played", at_s, {"num_tokens": num_tokens})


def test_tokens_are_repeated_that_a_life_had_sampled_and_not_published():
    records = [sampled(1.0, 100.0), sampled(3.0, 200.0), sampled(10.0, 50.0), sampled(12.0, 80.0)]
    events = [played(0.5, 90), played(2.5, 60), played(9.0, 50), played(11.5, 30)]
    assert count_repeated_tokens(records, events) == 50.0
    assert count_repeated_tokens([], []) == 0.0


def test_prometheus_values_are_summed_over_their_labels():
    lines = [
        "# TYPE a counter",
        'a_total{environment="x"} 2',
        'a_total{environment="y"} 3',
        "# TYPE b gauge",
        "b 1",
    ]
    page = "\n".join(lines) + "\n"
    assert read_gauges(page)["a_total"] == 5
    assert read_gauges(page)["b"] == 1


def hit(kind: FaultKind, target: str, over_s: float | None = 10.0) -> Injury:
    return Injury(Fault(0.0, 0.0, kind, target), began_s=5.0, over_s=over_s)


def test_a_target_has_resumed_with_its_first_sign_once_it_is_ready():
    injury = hit(FaultKind.KILL, "learner")
    injury.see_sign(11.0)
    assert injury.resumed_s is None, "a sign of what was on its way before"
    injury.see_ready(9.0)
    assert injury.ready_s is None, "an answer from before the fault"
    injury.see_ready(12.0)
    injury.see_sign(15.0)
    assert (injury.ready_after_s, injury.resumed_after_s) == (2.0, 5.0)


def test_nothing_counts_before_the_fault_is_over():
    injury = hit(FaultKind.PAUSE, "learner", over_s=None)
    injury.see_ready(12.0)
    injury.see_sign(13.0)
    assert (injury.ready_after_s, injury.resumed_after_s) == (None, None)


def test_a_rollout_worker_whose_engine_was_killed_has_resumed_only_with_another_engine():
    injury = hit(FaultKind.KILL_CHILD, "rollout-0")
    injury.see_ready(11.0)
    injury.see_sign(12.0)
    assert injury.resumed_s is None
    injury.see_engine(30.0, 17.5)
    injury.see_ready(31.0)
    injury.see_sign(32.0)
    found = (injury.ready_after_s, injury.resumed_after_s, injury.engine_start_s)
    assert found == (21.0, 22.0, 17.5)


def test_the_table_has_a_row_for_each_service_with_its_faults_by_kind_and_both_times():
    injuries = [
        hit(FaultKind.KILL, "rollout-0"),
        hit(FaultKind.SEVER, "rollout-1"),
        hit(FaultKind.KILL, REDIS),
    ]
    for number, injury in enumerate(injuries, start=1):
        injury.see_engine(10.5, 1.0)
        injury.see_ready(10.0 + number)
        injury.see_sign(10.0 + 2 * number)
    redis, rollout = summarize_recoveries(injuries)
    found = (redis.service, redis.faults, redis.ready_max_s, redis.resumed_p50_s)
    assert found == (REDIS, {"kill": 1}, 3.0, 6.0)
    found = (rollout.faults, rollout.ready_p50_s, rollout.resumed_max_s)
    assert found == ({"kill": 1, "sever": 1}, 1.5, 4.0)


# ---- planted violations


def closed(**numbers: list[int]) -> dict[GroupOutcome, list[int]]:
    return {outcome: numbers.get(outcome.value, []) for outcome in CLOSING}


def account_of(outcomes: dict[GroupOutcome, list[int]], num_issued: int) -> LedgerAccount:
    counts = {outcome: len(numbers) for outcome, numbers in outcomes.items()}
    return LedgerAccount(num_issued=num_issued, num_generated=num_issued, closed=counts)


def test_an_account_in_which_every_group_is_closed_once_is_sound():
    outcomes = closed(trained=[0, 1, 3], stale=[2])
    assert checks.check_closed(account_of(outcomes, 4), outcomes).is_kept


def test_a_lost_group_is_found():
    outcomes = closed(trained=[0, 1], stale=[3])
    check = checks.check_closed(account_of(outcomes, 4), outcomes)
    assert not check.is_kept
    assert "lost: 2" in check.evidence


def test_a_group_closed_by_two_outcomes_is_found():
    outcomes = closed(trained=[0, 1], failed=[1])
    check = checks.check_closed(account_of(outcomes, 2), outcomes)
    assert not check.is_kept
    assert "closed twice: 1" in check.evidence


def test_a_group_that_is_still_open_is_found():
    outcomes = closed(trained=[0])
    account = dataclasses.replace(account_of(outcomes, 1), num_issued=2, open={1: False})
    assert not checks.check_closed(account, outcomes).is_kept


UPDATES = [[format_group_id(0), format_group_id(1)], [format_group_id(2), format_group_id(3)]]


def test_steps_that_name_the_ledgers_groups_once_each_are_sound():
    assert checks.check_trained(UPDATES, [0, 1, 2, 3], 2, 2).is_kept


@pytest.mark.parametrize(
    ("updates", "trained", "found"),
    [
        (
            [UPDATES[0], [format_group_id(2), format_group_id(1)]],
            [0, 1, 2],
            "trained twice: group-00000001",
        ),
        (UPDATES, [0, 1, 2], "in one of both only: group-00000003"),
        (UPDATES, [0, 1, 2, 3, 4], "in one of both only: group-00000004"),
        ([UPDATES[0], UPDATES[1][:1]], [0, 1, 2], "steps of another size: 1"),
    ],
)
def test_a_group_trained_twice_or_booked_otherwise_than_trained_is_found(
    updates: list[list[str]], trained: list[int], found: str
):
    check = checks.check_trained(updates, trained, 2, 2)
    assert not check.is_kept
    assert found in check.evidence


def test_a_lost_update_is_found():
    assert not checks.check_trained(UPDATES[:1], [0, 1], 2, 2).is_kept


def sample(at_s: float, gap: int = 0, **counts: int) -> Sample:
    return Sample(at_s, dict.fromkeys(LedgerAccount().counts(), 0) | counts, gap, 1 << 20)


def test_a_gap_in_one_sample_and_a_number_that_shrinks_are_found():
    sound = [sample(1.0, issued=1), sample(2.0, issued=2, trained=1)]
    assert checks.check_samples(sound, 0).is_kept
    assert not checks.check_samples([*sound, sample(3.0, gap=1, issued=2, trained=1)], 0).is_kept
    assert not checks.check_samples([*sound, sample(3.0, issued=2)], 0).is_kept
    assert not checks.check_samples([], 5).is_kept


def test_an_orphan_of_any_kind_is_found():
    assert checks.check_nothing_left(0, [], [], []).is_kept
    for left in (
        (1, [], [], []),
        (0, ["17 python"], [], []),
        (0, [], ["update-00000003.partial"], []),
        (0, [], [], ["envs"]),
    ):
        assert not checks.check_nothing_left(*left).is_kept


def life(service: str, pid: int, megabytes: list[float]) -> list[MemorySample]:
    return [
        MemorySample(service, pid, 2.0 * index, int(value * 2**20), num_signs=5 * index)
        for index, value in enumerate(megabytes)
    ]


def test_memory_that_grows_within_a_life_is_found_and_a_start_that_grows_is_not():
    starting = [100.0 + 100.0 * index for index in range(5)]
    steady = life("teacher", 1, [*starting, *[600.0] * 30])
    assert checks.check_memory(steady).is_kept
    leaking = life("learner", 2, [*starting, *[600.0 + 10.0 * index for index in range(30)]])
    check = checks.check_memory([*steady, *leaking])
    assert not check.is_kept
    assert "learner from" in check.evidence


def test_an_engines_warm_up_is_counted_in_groups_not_in_seconds():
    warming = [1200.0 + 10.0 * index for index in range(30)]
    assert checks.check_memory(
        [*life("rollout-0", 1, [*warming, *[1500.0] * 12]), *life("envs", 2, [100.0] * 30)]
    ).is_kept
    leaking = [1200.0 + 10.0 * index for index in range(60)]
    assert not checks.check_memory(life("rollout-0", 1, leaking)).is_kept


def test_memory_is_compared_within_one_life_alone():
    assert checks.check_memory(
        [*life("envs", 1, [100.0] * 30), *life("envs", 2, [500.0] * 30)]
    ).is_kept


def test_a_run_without_a_life_long_enough_to_judge_says_so():
    assert not checks.check_memory(life("envs", 1, [100.0] * 3)).is_kept


def test_a_service_that_was_never_killed_or_did_not_come_back_is_found():
    injuries = [hit(FaultKind.KILL, name) for name in (*SERVICES, *ROLLOUTS)]
    for injury in injuries:
        injury.see_engine(11.0, 1.0)
        injury.see_ready(12.0)
    assert checks.check_faults(injuries, len(injuries), 2).is_kept
    assert checks.check_recovered(injuries).is_kept
    assert not checks.check_faults(injuries[1:], len(injuries) - 1, 2).is_kept
    assert not checks.check_faults(injuries, len(injuries) + 1, 2).is_kept
    assert not checks.check_recovered([*injuries, hit(FaultKind.PAUSE, ENVS)]).is_kept


def test_a_slow_return_of_a_rollout_worker_is_found():
    injury = hit(FaultKind.KILL, "rollout-0")
    injury.see_engine(11.0, 20.0)
    injury.see_ready(59.0)
    assert checks.check_rollout_recovery([injury]).is_kept
    late = hit(FaultKind.KILL, "rollout-0")
    late.see_engine(11.0, 20.0)
    late.see_ready(61.0)
    assert not checks.check_rollout_recovery([injury, late]).is_kept


def test_a_group_taken_from_a_healthy_worker_is_found():
    injury = dataclasses.replace(hit(FaultKind.KILL, "rollout-0"), held_entries=("1-0", "1-1"))
    assert checks.check_regenerated(["1-1"], [injury]).is_kept
    assert not checks.check_regenerated(["1-1", "2-0"], [injury]).is_kept


def test_too_much_memory_in_redis_is_found():
    full = dataclasses.replace(sample(1.0), redis_bytes=checks.MAX_REDIS_BYTES + 1)
    assert checks.check_redis_memory([sample(1.0)]).is_kept
    assert not checks.check_redis_memory([sample(1.0), full]).is_kept


def test_a_run_that_stops_short_is_found():
    assert checks.check_end("finished", 10, 10).is_kept
    assert not checks.check_end("running", 10, 10).is_kept
    assert not checks.check_end("finished", 9, 10).is_kept


# ---- links


@contextlib.asynccontextmanager
async def echoing() -> AsyncIterator[Link]:
    """An open link to a server that says everything back."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while chunk := await reader.read(100):
                writer.write(chunk)
                await writer.drain()
        writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    link = Link(server.sockets[0].getsockname()[1])
    await link.open()
    try:
        yield link
    finally:
        await link.close()
        server.close()


async def say(link: Link, text: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", link.port)
    writer.write(text)
    assert await asyncio.wait_for(reader.readexactly(len(text)), 5.0) == text
    return reader, writer


async def test_a_severed_link_cuts_its_connections_and_lets_new_ones_through():
    async with echoing() as link:
        reader, writer = await say(link, b"before")
        assert await link.sever() == 1
        with contextlib.suppress(ConnectionError):
            assert await asyncio.wait_for(reader.read(), 5.0) == b""
        writer.close()
        _, writer = await say(link, b"after")
        writer.close()
        assert link.num_connections == 2


async def test_a_closed_link_refuses_connections_until_it_opens_on_the_same_port():
    async with echoing() as link:
        port = link.port
        await link.close()
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", port)
        await link.open()
        assert link.port == port
        _, writer = await say(link, b"again")
        writer.close()


async def test_a_slow_link_holds_back_what_it_carries():
    async with echoing() as link:
        link.delay_s = 0.05
        began = asyncio.get_running_loop().time()
        _, writer = await say(link, b"slow")
        assert asyncio.get_running_loop().time() - began >= 0.1
        writer.close()


async def test_a_target_that_is_away_looks_like_one_that_hangs_up():
    async with echoing() as link:
        lonely = Link(target_port=1)
        await lonely.open()
        reader, writer = await asyncio.open_connection("127.0.0.1", lonely.port)
        with contextlib.suppress(ConnectionError):
            assert await asyncio.wait_for(reader.read(), 5.0) == b""
        writer.close()
        await lonely.close()
        assert link.num_connections == 0
