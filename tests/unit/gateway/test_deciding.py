"""Evaluator, admission and the last check of the account, each on a draft of its own."""

from __future__ import annotations

import pytest

from sdar.bus.ledger import LedgerAccount, format_group_id
from sdar.config import RunConfig
from sdar.contracts import codec
from sdar.contracts.errors import RefusedError
from sdar.contracts.types import GroupOutcome, LedgerEvent, TaskGroup
from sdar.in_process.memory_bus import MemoryBus
from services.gateway.account import find_unaccounted
from services.gateway.admission import Admission
from services.gateway.commit import Draft
from services.gateway.evaluator import Evaluator
from services.gateway.policy import NewestPolicy
from services.gateway.tasks import TaskSource

from .fakes import FakeCatalog, build_config, play


class Parts:
    """The parts that decide, on one draft, after a first policy."""

    def __init__(self, config: RunConfig) -> None:
        self.draft = Draft()
        self.policy = NewestPolicy(MemoryBus(config.stream_consumers))
        self.policy.version = 0
        self.tasks = TaskSource(config, FakeCatalog(), "here:1")
        self.evaluator = Evaluator(config, self.tasks, self.policy)
        self.admission = Admission(config, self.tasks, self.policy)

    def take(self) -> list[TaskGroup]:
        """The task groups of the draft so far, which begins anew with its state."""
        groups = [codec.decode_task_group(task) for task in self.draft.tasks]
        self.draft = Draft(self.draft.state)
        return groups


@pytest.fixture
async def parts() -> Parts:
    parts = Parts(build_config())
    await parts.tasks.load(parts.draft.state)
    return parts


def answer(parts: Parts, groups: list[TaskGroup], version: int = 0) -> None:
    for group in groups:
        parts.evaluator.count(parts.draft, play(group, version))


def test_an_evaluation_is_begun_once_for_a_policy(parts: Parts) -> None:
    parts.evaluator.begin_due(parts.draft, is_last=False)
    assert len(parts.take()) == 6  # three held-out tasks, sampled and greedy
    parts.evaluator.begin_due(parts.draft, is_last=True)
    assert parts.take() == []


async def test_one_between_is_due_after_its_interval_and_once_those_before_are_complete() -> None:
    config = build_config(num_updates=20)
    evaluation = config.evaluation.model_copy(update={"every_updates": 5})
    parts = Parts(config.model_copy(update={"evaluation": evaluation}))
    await parts.tasks.load(parts.draft.state)
    parts.evaluator.begin_due(parts.draft, is_last=False)
    first = parts.take()
    parts.policy.version = parts.policy.num_updates = 5
    parts.evaluator.begin_due(parts.draft, is_last=False)
    assert parts.take() == []
    answer(parts, first)
    parts.policy.version = parts.policy.num_updates = 4
    parts.evaluator.begin_due(parts.draft, is_last=False)
    assert parts.take() == []
    parts.policy.version = parts.policy.num_updates = 5
    parts.evaluator.begin_due(parts.draft, is_last=False)
    assert [group.sampling.temperature for group in parts.take()] == [1.0] * 3


def test_evaluations_are_over_when_all_are_complete_and_the_newest_policy_is_among_them(
    parts: Parts,
) -> None:
    parts.evaluator.begin_due(parts.draft, is_last=True)
    groups = parts.take()
    answer(parts, groups[:-1])
    assert not parts.evaluator.is_over(parts.draft)
    answer(parts, groups[-1:])
    assert parts.evaluator.is_over(parts.draft)
    parts.policy.version = 1
    assert not parts.evaluator.is_over(parts.draft)


def test_only_an_episode_that_could_not_be_played_or_is_awaited_is_played_again(
    parts: Parts,
) -> None:
    parts.evaluator.begin_due(parts.draft, is_last=False)
    groups = parts.take()
    failed, played = groups[:2]
    answer(parts, [played])
    event = LedgerEvent("test", failed.group_id, GroupOutcome.FAILED, 1, 0, "no environment")
    parts.evaluator.count_failure(parts.draft, event)
    assert parts.draft.state.evaluations[0].num_episodes == 2
    parts.evaluator.play_again(parts.draft, failed.group_id, codec.encode_task_group(failed))
    assert parts.take() == [failed]
    assert parts.draft.state.evaluations[0].num_episodes == 1
    with pytest.raises(RefusedError, match="it has its result"):
        parts.evaluator.play_again(parts.draft, played.group_id, b"")


def test_what_an_emptied_redis_lost_of_an_evaluation_is_sent_again_and_no_more(
    parts: Parts,
) -> None:
    parts.evaluator.begin_due(parts.draft, is_last=False)
    groups = parts.take()
    answer(parts, groups[:4])
    parts.evaluator.resend_pending(parts.draft)
    assert parts.take() == groups[4:]


def test_every_issued_group_is_sent_out_and_opens_its_account_in_the_same_draft(
    parts: Parts,
) -> None:
    parts.admission.issue_due(parts.draft, LedgerAccount(), num_workers=1)
    issued = [event.group_id for event in parts.draft.transitions]
    assert issued == [format_group_id(number) for number in range(4)]
    assert {event.outcome for event in parts.draft.transitions} == {GroupOutcome.ISSUED}
    assert len(parts.draft.spans) == parts.draft.state.next_group_number == 4
    assert [group.group_id for group in parts.take()] == issued


def test_where_an_environment_is_registered_its_later_groups_are_played(parts: Parts) -> None:
    ledger = LedgerAccount()
    parts.admission.issue_due(parts.draft, ledger, num_workers=1)
    assert {group.environment_address for group in parts.take()} == {"here:1"}
    parts.draft.state.environments["fake"] = "there:2"
    parts.admission.issue_due(parts.draft, ledger, num_workers=1)
    assert {group.environment_address for group in parts.take()} == {"there:2"}


async def test_a_group_has_one_outcome_or_is_open_and_whatever_else_is_named() -> None:
    bus = MemoryBus(build_config().stream_consumers)
    ids = [format_group_id(number) for number in range(4)]
    events = [LedgerEvent("test", group_id, GroupOutcome.ISSUED, 0, 0) for group_id in ids]
    events.append(LedgerEvent("test", ids[0], GroupOutcome.FAILED, 2, 0, "because"))
    events.append(LedgerEvent("test", ids[3], GroupOutcome.FAILED, 2, 0, "because"))
    await bus.commit({}, transitions=events)
    ledger = await bus.read_ledger()
    assert await find_unaccounted(bus, ledger, 4) == []
    assert await find_unaccounted(bus, ledger, 3) == [3], "it was never issued"
    del ledger.open[1]
    assert await find_unaccounted(bus, ledger, 4) == [1], "it is neither open nor closed"
