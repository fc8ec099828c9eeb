"""A draft and its commit on a real in-memory bus."""

from __future__ import annotations

import asyncio

import pytest

from sdar.bus.protocol import BusLimits
from sdar.contracts import codec
from sdar.contracts.errors import CapacityError, LeaseLostError, RefusedError
from sdar.contracts.streams import ConsumerGroup, Stream
from sdar.contracts.types import GroupOutcome, LedgerEvent
from sdar.in_process.memory_bus import MemoryBus
from services.gateway.commit import Committer
from services.gateway.state import STATE_NAME, GatewayState, RunPhase

from .fakes import build_config
from .test_scheduler import group_named


@pytest.fixture
def bus() -> MemoryBus:
    return MemoryBus(build_config().stream_consumers)


def issue(committer: Committer, number: int) -> None:
    group_id = f"group-{number:08d}"
    committer.draft.state.next_group_number = number + 1
    committer.draft.publish(group_named(group_id))
    committer.draft.transitions.append(LedgerEvent("test", group_id, GroupOutcome.ISSUED, 0, 0))


def pause(state: GatewayState) -> None:
    state.phase = RunPhase.PAUSED


async def load_saved(bus: MemoryBus) -> GatewayState:
    saved = await bus.load_state(STATE_NAME)
    assert saved is not None
    return GatewayState.from_bytes(saved)


def test_a_draft_without_a_decision_an_event_or_a_changed_state_is_not_due(bus: MemoryBus) -> None:
    committer = Committer(bus)
    assert not committer.draft.is_due
    committer.ask(pause)
    assert committer.draft.is_due


async def test_tasks_their_accounts_and_the_state_they_lead_to_are_one_commit(
    bus: MemoryBus,
) -> None:
    committer = Committer(bus)
    issue(committer, 0)
    await committer.commit()
    tasks = await bus.read(Stream.TASKS, ConsumerGroup.ROLLOUT, "r", 10)
    assert [codec.decode_task_group(task.payload).group_id for task in tasks] == ["group-00000000"]
    assert (await bus.read_ledger()).num_issued == 1
    assert (await load_saved(bus)).next_group_number == 1
    assert not committer.draft.is_due


async def test_of_a_draft_that_rests_on_an_event_given_away_nothing_happens(
    bus: MemoryBus,
) -> None:
    await bus.publish(Stream.EVALUATIONS, [b"one"])
    events = await bus.read(Stream.EVALUATIONS, ConsumerGroup.GATEWAY, "gateway", 10)
    await bus.reclaim(Stream.EVALUATIONS, ConsumerGroup.GATEWAY, "another", 0.0, 10)
    committer = Committer(bus)
    committer.draft.events += events
    issue(committer, 0)
    with pytest.raises(LeaseLostError):
        await committer.commit()
    assert (await bus.read_ledger()).num_issued == 0
    assert (await bus.stream_lag(Stream.TASKS, ConsumerGroup.ROLLOUT)).num_undelivered == 0
    await committer.load()
    assert committer.draft.state.next_group_number == 0
    assert not committer.draft.is_due


async def test_what_was_asked_for_is_done_again_with_a_loaded_state_until_a_commit_holds_it(
    bus: MemoryBus,
) -> None:
    committer = Committer(bus)
    committer.ask(pause)
    await committer.load()
    assert committer.draft.state.phase is RunPhase.PAUSED
    assert committer.draft.is_due
    await committer.commit()
    await bus.save_state(STATE_NAME, GatewayState(phase=RunPhase.RUNNING).to_bytes())
    await committer.load()
    assert committer.draft.state.phase is RunPhase.RUNNING


async def test_what_the_loaded_state_does_not_allow_any_more_is_lost_and_spares_the_rest(
    bus: MemoryBus,
) -> None:
    def stop_once(state: GatewayState) -> None:
        if state.is_stop_asked:
            raise RefusedError("It is stopped.")
        state.is_stop_asked = True

    committer = Committer(bus)
    committer.ask(stop_once)
    committer.ask(pause)
    await bus.save_state(STATE_NAME, GatewayState(is_stop_asked=True).to_bytes())
    await committer.load()
    assert committer.draft.state.phase is RunPhase.PAUSED


async def test_a_draft_that_finds_no_room_stays_in_hand_and_takes_requests_meanwhile() -> None:
    limits = BusLimits(max_entries=1, publish_timeout_s=0.01)
    bus = MemoryBus(build_config().stream_consumers, limits)
    committer = Committer(bus)
    issue(committer, 0)
    await committer.commit()
    issue(committer, 1)
    with pytest.raises(CapacityError):
        await committer.commit()
    committer.ask(pause)
    await bus.acknowledge(await bus.read(Stream.TASKS, ConsumerGroup.ROLLOUT, "r", 1))
    await committer.commit()
    saved = await load_saved(bus)
    assert (saved.next_group_number, saved.phase) == (2, RunPhase.PAUSED)


async def test_a_request_while_a_commit_is_under_way_is_saved_by_the_next_one() -> None:
    limits = BusLimits(max_entries=1, publish_timeout_s=30)
    bus = MemoryBus(build_config().stream_consumers, limits)
    committer = Committer(bus)
    issue(committer, 0)
    await committer.commit()
    issue(committer, 1)
    committing = asyncio.create_task(committer.commit())
    await asyncio.sleep(0)
    committer.ask(pause)
    confirming = asyncio.create_task(committer.confirm_tenure())
    await bus.acknowledge(await bus.read(Stream.TASKS, ConsumerGroup.ROLLOUT, "r", 1))
    await committing
    assert (await load_saved(bus)).phase is RunPhase.STARTING
    assert not confirming.done()
    assert committer.draft.is_due
    await committer.commit()
    await confirming
    assert (await load_saved(bus)).phase is RunPhase.PAUSED


async def test_who_waits_for_a_confirmation_is_answered_without_a_state_where_none_may_be_written(
    bus: MemoryBus,
) -> None:
    committer = Committer(bus)
    confirming = asyncio.create_task(committer.confirm_tenure())
    await asyncio.sleep(0)
    await committer.confirm_uncommitted()
    await confirming
    assert await bus.load_state(STATE_NAME) is None
