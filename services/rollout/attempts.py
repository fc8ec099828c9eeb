"""One attempt at a task group: played, then published, failed, set aside, or begun once more.

However it ends, the group is acknowledged in the transaction that says so. When another attempt has
the lease by then, the bus refuses everything that this one brings.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import structlog

from sdar.bus.leases import Leases, wait_for_room
from sdar.bus.protocol import Bus, Delivery, Publications
from sdar.contracts import codec
from sdar.contracts.errors import (
    BusUnavailableError,
    EngineFailedError,
    LeaseLostError,
    SdarError,
    UnavailableError,
    WeightsUnavailableError,
)
from sdar.contracts.streams import Stream
from sdar.contracts.types import (
    FailureStage,
    GroupOutcome,
    LedgerEvent,
    Purpose,
    TaskGroup,
    Trajectory,
)
from sdar.process import tracing
from services.rollout.engine import Engine
from services.rollout.environment_client import EnvironmentDirectory
from services.rollout.episode import Attempt, EpisodeRules, EpisodeSlots, blame, play_group
from services.rollout.metrics import (
    DEAD_LETTERS,
    FAILED_GROUPS,
    LATE_RESULTS,
    REPEATED_TOKENS,
    RETRIED_GROUPS,
    RolloutMetrics,
)
from services.rollout.policy import ServedPolicy
from services.rollout.skill_client import SkillSource

log = structlog.get_logger()

_LONGEST_RETRY_S = 10.0
"""Bound of the doubling pause, before it is varied by chance."""


@dataclass(slots=True, eq=False)
class AttemptInHand:
    """An attempt at a group.

    Attributes:
        num_episodes: how many it plays.
        is_waiting: it failed and the next attempt will replace it.
        is_ending: its end is being committed; the commit finds out whether the lease was lost.
    """

    delivery: Delivery
    num_episodes: int = 0
    is_waiting: bool = False
    is_ending: bool = False
    task: asyncio.Task[None] = field(init=False)

    @property
    def is_over(self) -> bool:
        """Whether its lease may be gone without being lost.

        So it is when the attempt is published already, or the next one has replaced it.
        """
        return bool(self.is_ending or self.is_waiting or self.task.done() or self.task.cancelling())


class GroupPlayer:
    """Plays groups for one worker, and sees each attempt to its end.

    Args:
        environments: clients by the address a group names.
        leases: the worker's, on `tasks`.
        begin: starts on the next attempt at a group whose environment failed.
        max_attempts: a group whose environment fails at the last of them is failed; one that is
            delivered once more is set aside.
        retry_delay_s: pause before the second attempt, see `RolloutLimits`.
        skills: what the student sees of skills; none for all methods but skill_grpo.
    """

    def __init__(
        self,
        bus: Bus,
        engine: Engine,
        environments: EnvironmentDirectory,
        rules: EpisodeRules,
        *,
        run_id: str,
        leases: Leases,
        policy: ServedPolicy,
        slots: EpisodeSlots,
        metrics: RolloutMetrics,
        begin: Callable[[Delivery], None],
        max_attempts: int,
        retry_delay_s: float,
        skills: SkillSource | None,
    ) -> None:
        self._bus = bus
        self._engine = engine
        self._environments = environments
        self._rules = rules
        self._run_id = run_id
        self._leases = leases
        self._policy = policy
        self._slots = slots
        self._metrics = metrics
        self._begin = begin
        self._max_attempts = max_attempts
        self._retry_delay_s = retry_delay_s
        self._skills = skills

    async def play(self, group: TaskGroup, hand: AttemptInHand) -> None:
        """One attempt, seen to its end: in the ledger, in the next attempt, or with the service."""
        attempt = Attempt(hand.delivery.num_deliveries - 1)
        is_published = False
        try:
            is_published = await self._play_and_publish(group, hand, attempt)
        except LeaseLostError as error:
            # Another attempt at the group is under way: nothing of this one may get in beside it.
            log.warning(
                "late_result_refused",
                group_id=group.group_id,
                attempt=attempt.number,
                error=str(error),
            )
            self._metrics.count(LATE_RESULTS)
        finally:
            # Counted for a cancelled attempt too: what it sampled is sampled once more.
            if not is_published:
                self._metrics.count(REPEATED_TOKENS, attempt.num_sampled_tokens)

    async def _play_and_publish(
        self, group: TaskGroup, hand: AttemptInHand, attempt: Attempt
    ) -> bool:
        """Whether the attempt's trajectories got in; if not, the group's end is dealt with."""
        # A group whose attempts ended without a word probably kills the workers that play it. One
        # whose environment fails never comes here: its last attempt gives it up.
        if attempt.number >= self._max_attempts:
            reason = (
                f"Delivered {attempt.number + 1} times without an end. "
                "Look for what kills its workers."
            )
            await self._set_aside(group, hand, reason)
            return False
        trajectories = await self._try(group, hand, attempt)
        if trajectories:
            await self._publish(group, trajectories, hand)
        return bool(trajectories)

    async def _try(
        self, group: TaskGroup, hand: AttemptInHand, attempt: Attempt
    ) -> list[Trajectory]:
        """Play the group; empty if it failed and that has been dealt with."""
        try:
            with _trace(group, attempt):
                return await self._play_episodes(group, attempt)
        # The order matters: BusUnavailableError and WeightsUnavailableError are UnavailableErrors.
        except (EngineFailedError, BusUnavailableError):
            # The service's own parts failed: it ends, and the group goes to another worker.
            raise
        except WeightsUnavailableError as error:
            # An evaluation's version is gone, and no other attempt brings it back.
            await self._give_up(group, hand, error)
        except UnavailableError as error:
            # The environment's, or the engine's as it stops.
            if not self._engine.is_alive:
                raise
            await self._try_again(group, hand, error)
        except SdarError as error:
            await self._give_up(group, hand, error)
        except Exception as error:
            # The worker's boundary: one group must not end the others.
            log.exception("group_broke_worker", group_id=group.group_id)
            await self._set_aside(
                group, hand, f"Playing it raised {type(error).__name__}: {error}."
            )
        return []

    async def _play_episodes(self, group: TaskGroup, attempt: Attempt) -> list[Trajectory]:
        is_evaluation = group.purpose is Purpose.EVALUATION
        skill_text = ""
        if self._skills:
            with blame(FailureStage.TEACHER):
                skill_text = await self._skills.retrieve(group.task, group.group_id)
        version = group.admitted_version
        # Training takes any version from the admitted one on, also a newer one in mid-episode. An
        # evaluation is about one version, which the engine is held at.
        if not is_evaluation:
            await self._policy.reached(version)
        pinned = self._policy.pinned(version) if is_evaluation else contextlib.nullcontext()
        async with pinned:
            return await play_group(
                group,
                attempt,
                engine=self._engine,
                environment=self._environments.get(group.environment_address),
                rules=self._rules,
                skill_text=skill_text,
                slots=self._slots,
            )

    async def _try_again(
        self, group: TaskGroup, hand: AttemptInHand, error: UnavailableError
    ) -> None:
        """Begin the next attempt after a pause; give the group up if there is none left."""
        num_attempts = hand.delivery.num_deliveries
        if num_attempts >= self._max_attempts:
            return await self._give_up(
                group, hand, error, f"Given up after {num_attempts} attempts: "
            )
        longest_s = min(_LONGEST_RETRY_S, self._retry_delay_s * 2 ** (num_attempts - 1))
        # By chance: the groups of an environment that failed must not all come back at once.
        delay_s = longest_s * random.uniform(0.5, 1.5)
        log.warning(
            "group_retried",
            group_id=group.group_id,
            attempt=num_attempts - 1,
            retry_in_s=round(delay_s, 2),
            error=str(error),
        )
        self._metrics.count(RETRIED_GROUPS)
        # The lease is kept over the pause; only the episodes' room is free for others.
        hand.is_waiting = True
        await asyncio.sleep(delay_s)
        if (again := await self._leases.begin_again(hand.delivery)) is not None:
            self._begin(again)

    async def _publish(
        self, group: TaskGroup, trajectories: list[Trajectory], hand: AttemptInHand
    ) -> None:
        payloads = [codec.encode_trajectory(trajectory) for trajectory in trajectories]
        # Only training groups have an account: an evaluation is nothing that a step consumes.
        if group.purpose is Purpose.EVALUATION:
            await self._commit({Stream.EVALUATIONS: payloads}, hand)
        else:
            event = self._describe_success(group, trajectories)
            await self._commit({Stream.TRAJECTORIES: payloads}, hand, event)
        # After the commit: what was refused was not played, as far as anybody else is concerned.
        self._metrics.observe_group(trajectories)
        _log_played(group, trajectories, hand)

    def _describe_success(
        self, group: TaskGroup, trajectories: Sequence[Trajectory]
    ) -> LedgerEvent:
        return LedgerEvent(
            self._run_id,
            group.group_id,
            GroupOutcome.GENERATED,
            len(trajectories),
            _find_newest(trajectories),
            episode_turns=tuple(len(trajectory.turns) for trajectory in trajectories),
        )

    async def _give_up(
        self, group: TaskGroup, hand: AttemptInHand, error: SdarError, preface: str = ""
    ) -> None:
        """Close the group's account.

        For a group of an evaluation as well: the gateway must not wait for what will never come.
        """
        reason = preface + error.message
        log.error(
            "group_failed", group_id=group.group_id, purpose=group.purpose.value, reason=reason
        )
        stage = error.stage or FailureStage.ROLLOUT
        await self._commit({}, hand, self._describe_failure(group, reason, stage))
        self._metrics.count(FAILED_GROUPS, purpose=group.purpose)

    async def _set_aside(self, group: TaskGroup, hand: AttemptInHand, reason: str) -> None:
        log.error(
            "dead_letter", entry_id=hand.delivery.entry_id, group_id=group.group_id, reason=reason
        )
        hand.is_ending = True
        failure = self._describe_failure(group, reason, FailureStage.ROLLOUT)
        await self._bus.dead_letter(hand.delivery, reason, [failure])
        self._metrics.count(DEAD_LETTERS)

    async def refuse(self, hand: AttemptInHand, reason: str) -> None:
        """Set aside an entry that can't be read, hence names no group."""
        log.error("dead_letter", entry_id=hand.delivery.entry_id, reason=reason)
        hand.is_ending = True
        try:
            await self._bus.dead_letter(hand.delivery, reason)
        except LeaseLostError as error:
            log.warning("late_result_refused", entry_id=hand.delivery.entry_id, error=str(error))
        else:
            self._metrics.count(DEAD_LETTERS)

    def _describe_failure(self, group: TaskGroup, reason: str, stage: str) -> LedgerEvent:
        return LedgerEvent(
            self._run_id,
            group.group_id,
            GroupOutcome.FAILED,
            0,
            self._engine.policy_version,
            reason,
            stage=stage,
        )

    async def _commit(
        self, publications: Publications, hand: AttemptInHand, *transitions: LedgerEvent
    ) -> None:
        """Publish, acknowledge and book in one transaction: a crash before it only repeats work."""
        # From here on a lease that looks lost may be one that this commit has just ended.
        hand.is_ending = True
        await wait_for_room(
            lambda: self._bus.commit(publications, [hand.delivery], transitions=transitions)
        )


def _trace(group: TaskGroup, attempt: Attempt) -> tracing.Span:
    """The span of an attempt. Traces follow training groups to the update; others have none."""
    if group.purpose is Purpose.EVALUATION:
        return tracing.NOTHING
    return tracing.group_span(
        "rollout.attempt", group.group_id, attempt=attempt.number, group_size=group.group_size
    )


def _find_newest(trajectories: Sequence[Trajectory]) -> int:
    return max(trajectory.max_policy_version for trajectory in trajectories)


def _log_played(group: TaskGroup, trajectories: Sequence[Trajectory], hand: AttemptInHand) -> None:
    num_successes = sum(trajectory.is_success for trajectory in trajectories)
    num_tokens = sum(trajectory.num_response_tokens for trajectory in trajectories)
    log.info(
        "group_played",
        group_id=group.group_id,
        attempt=hand.delivery.num_deliveries - 1,
        purpose=group.purpose.value,
        num_episodes=len(trajectories),
        num_successes=num_successes,
        num_tokens=num_tokens,
        policy_version=_find_newest(trajectories),
    )
