"""Owns the decision what is played next. MAIN LOOP: absorb what happened, decide, write it all in
one transaction.

A decision, the groups it issues in the account, the acknowledgement of the events it rests on and
the state it leads to are one commit: a gateway killed anywhere comes back to a consistent cursor,
and no group is issued twice or forgotten. The bus lets only one gateway write: one that comes back
from a pause to find a successor ends.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Mapping

import structlog

from sdar.bus.ledger import CLOSING, LedgerAccount, format_group_id, parse_group_number
from sdar.bus.protocol import BEFORE_FIRST, Bus, Delivery
from sdar.config import RunConfig
from sdar.contracts import codec
from sdar.contracts.errors import (
    CapacityError,
    CorruptionError,
    LeaseLostError,
    RefusedError,
    SdarError,
    UnavailableError,
)
from sdar.contracts.streams import ConsumerGroup, Stream
from sdar.contracts.types import GroupOutcome, LedgerEvent, Purpose, Task, TaskGroup, Trajectory
from sdar.process import tracing
from sdar.process.lifecycle import wait_or_stop
from sdar.process.telemetry import Health
from services.gateway.capacity import compute_capacity

from .environments import (
    EnvironmentCatalog,
    RegisteredEnvironment,
    TrainingOrder,
    check_registration,
)
from .evaluation import Evaluation
from .history import History
from .lengths import EpisodeLengths
from .metrics import UNREADABLE_EVENTS, GatewayMetrics
from .retries import Retries, Retry
from .state import STATE_NAME, GatewayState, RunPhase, Sleep, compute_digest

log = structlog.get_logger()

_POLL_S = 0.2
_MAX_EVENTS = 2000
_RETRY_S = 1.0
_LEAST_HOPELESS_FAILURES = 8
MAX_SHOWN_GAP = 1000
"""Groups of a gap that are named."""


class Scheduler:
    """Turns tasks into groups under the staleness capacity and drives the run from its first
    evaluation to its last.

    Args:
        is_scaled: whether a scaler keeps a sleeping run asleep; without one nobody does, and the
            run is awake.
    """

    def __init__(
        self,
        config: RunConfig,
        bus: Bus,
        catalog: EnvironmentCatalog,
        history: History,
        health: Health,
        *,
        default_address: str,
        metrics: GatewayMetrics | None = None,
        clock: Callable[[], float] = time.time,
        is_scaled: bool = True,
    ) -> None:
        self.config = config
        self.history = history
        self.health = health
        self.state = GatewayState()
        self.ledger = LedgerAccount()
        self.lengths = EpisodeLengths()
        self.policy_version = -1
        self.num_updates = 0
        self.environments: dict[str, RegisteredEnvironment] = {}
        self.detail = "reading where the run stands"
        self._bus = bus
        self._catalog = catalog
        self._default_address = config.environment.address or default_address
        self._metrics = metrics or GatewayMetrics()
        self._clock = clock
        self._is_scaled = is_scaled
        self._consumer = "gateway"
        self._policy_cursor = BEFORE_FIRST
        self._training: TrainingOrder | None = None
        self._heldout: list[Task] = []
        self._retries = Retries(bus)
        self._in_hand: list[Delivery] = []
        self._outbox: list[bytes] = []
        self._issued: list[LedgerEvent] = []
        self._spans: list[tracing.Span] = []
        self._is_changed = False
        self._was_empty = False
        self._confirmations: list[asyncio.Future[None]] = []
        self._asked: list[Callable[[], None]] = []
        self.is_restored = False
        self.woken_at_s = 0.0

    # --- main loop
    # ----------------------------------------------------------------------------------------------

    async def run(self, stopping: asyncio.Event) -> None:
        """Raises SupersededError when another gateway of this run has started, CorruptionError when
        Redis lost what it had.

        The first one stays ended; the second is to be started again, and finds its way from what
        Redis and the learner have.
        """
        await self._bus.claim_role(ConsumerGroup.GATEWAY)
        await self._restore()
        self.is_restored = True
        while not stopping.is_set():
            try:
                await self._turn(stopping)
            except LeaseLostError as error:
                # An event was given away, or a letter is gone: nothing of this turn happened. Begin
                # again from what is saved.
                log.warning("turn_refused", error=str(error))
                await self._retries.forget_gone()
                await self._load()
            self.health.beat()

    async def _turn(self, stopping: asyncio.Event) -> None:
        # Events of evaluations name tasks, and an empty Redis may still be given the state that
        # they belong to.
        is_blind = self.state.phase is RunPhase.STARTING and (
            self._training is None or self._was_empty
        )
        events = [] if is_blind else self._in_hand or await self._read()
        self._in_hand = self._in_hand if is_blind else []
        # Before the manifests: whoever sees the groups of an update trained must see the policy it
        # made.
        self.ledger = await self._bus.read_ledger()
        await self._check_account()
        readable = await self._absorb(events)
        await self._follow()
        if self.state.phase is RunPhase.STARTING:
            await self._try_start(stopping)
        self._decide()
        if self._is_over():
            await self._finish()
        await self._write(readable, stopping)

    async def _read(self) -> list[Delivery]:
        """Events of the ledger, waited for a moment, and finished evaluation episodes that are
        there.
        """
        ledger = await self._bus.read(
            Stream.LEDGER, ConsumerGroup.GATEWAY, self._consumer, _MAX_EVENTS, block_s=_POLL_S
        )
        evaluations = await self._bus.read(
            Stream.EVALUATIONS, ConsumerGroup.GATEWAY, self._consumer, _MAX_EVENTS
        )
        return [*ledger, *evaluations]

    async def _reclaim(self) -> list[Delivery]:
        """What a gateway before this one had read and not yet written down; there is one gateway,
        so nothing is too fresh.
        """
        pending: list[Delivery] = []
        for stream in (Stream.LEDGER, Stream.EVALUATIONS):
            after = BEFORE_FIRST
            while page := await self._bus.reclaim(
                stream, ConsumerGroup.GATEWAY, self._consumer, 0.0, _MAX_EVENTS, after
            ):
                pending.extend(page)
                after = page[-1].entry_id
        return pending

    async def _absorb(self, events: list[Delivery]) -> list[Delivery]:
        """Book events; returns those to be acknowledged. What cannot be read is set aside."""
        readable = []
        for delivery in events:
            try:
                if delivery.stream is Stream.LEDGER:
                    self._book(codec.decode_ledger_event(delivery.payload))
                else:
                    self._count_evaluation(
                        codec.decode_trajectory(delivery.payload, delivery.stream)
                    )
            except SdarError as error:
                log.error(
                    "event_unreadable",
                    stream=delivery.stream,
                    entry_id=delivery.entry_id,
                    error=str(error),
                )
                self._metrics.count(UNREADABLE_EVENTS)
                await self._bus.dead_letter(delivery, str(error))
            else:
                readable.append(delivery)
        return readable

    async def _follow(self) -> None:
        for entry in await self._bus.tail(Stream.POLICY_UPDATES, self._policy_cursor, _MAX_EVENTS):
            self._policy_cursor = entry.entry_id
            try:
                manifest = codec.decode_weights_manifest(entry.payload)
            except SdarError as error:
                log.error("manifest_unreadable", entry_id=entry.entry_id, error=str(error))
                continue
            if manifest.policy_version >= self.policy_version:
                # After a crash that lost updates the versions go on and the number of updates falls
                # back.
                self.policy_version, self.num_updates = (
                    manifest.policy_version,
                    manifest.num_updates,
                )
        await self.history.follow(self._bus)

    def _decide(self) -> None:
        if self.state.phase in (RunPhase.RUNNING, RunPhase.PAUSED, RunPhase.STOPPING):
            self._begin_due_evaluations()
        if self.state.phase is RunPhase.RUNNING:
            self._give_up_if_hopeless()
        if self.state.phase is RunPhase.RUNNING:
            self._issue_groups()
        for retry in self._retries.waiting():
            self._issue_again(retry)

    async def _write(self, events: list[Delivery], stopping: asyncio.Event) -> None:
        """Commit the turn; while the tasks nobody plays leave no room, wait: a restart of this
        process would make none.
        """
        retired = self._retries.taken
        is_due = bool(self._is_changed or self._outbox or events or retired)
        if self._was_empty and self._confirmations:
            num_waiting = len(self._confirmations)
            await self._check_tenure()
            self._confirm(num_waiting)
        while is_due and not self._was_empty:
            self._is_changed = (
                False  # before it is written: a request may change it again meanwhile
            )
            publications = {Stream.TASKS: self._outbox} if self._outbox else {}
            state = {STATE_NAME: self.state.to_bytes()}
            num_waiting, num_asked = len(self._confirmations), len(self._asked)
            try:
                await self._bus.commit(
                    publications,
                    events,
                    state,
                    transitions=self._issued,
                    retired_letters=list(retired),
                )
            except CapacityError as error:
                log.warning("tasks_full", error=str(error))
                self.health.beat()
                if stopping.is_set():
                    return
            else:
                for span in self._spans:
                    span.end()
                self._outbox, self._issued, self._spans, is_due = [], [], [], False
                self._retries.settle()
                del self._asked[:num_asked]
                self._confirm(num_waiting)
        self._metrics.observe_run(
            self.ledger,
            self.state.evaluations,
            ledger_gap=self.ledger_gap,
            phase=self.state.phase,
            policy_version=self.policy_version,
            num_updates=self.num_updates,
            training=self.config.training,
            length_drift=self.lengths.compute_drift(),
        )

    async def _check_account(self) -> None:
        """The account and the cursor change together: a difference means a successor, or a Redis
        that lost writes.
        """
        issued, known = self.ledger.num_issued, self.state.next_group_number
        if self.state.phase is not RunPhase.STARTING and issued != known:
            await self._check_tenure()
            raise CorruptionError(
                f"The account in Redis has {issued} groups, this gateway issued {known}: Redis "
                "lost confirmed writes, or "
                "somebody else wrote. The gateway ends, and begins again with what Redis holds. "
                "Give Redis an append-only file."
            )

    async def _check_tenure(self) -> None:
        """Raises SupersededError if this gateway was followed: any write tells it."""
        await self._bus.save_state(f"{STATE_NAME}_check", b"")

    async def confirm_tenure(self) -> None:
        """Return once the state as of now is written, hence while no other gateway had followed
        this one.

        A gateway that was followed, or whose Redis is away, is never told: give up waiting.
        """
        written = asyncio.get_running_loop().create_future()
        self._confirmations.append(written)
        self._is_changed = True
        await written

    def _confirm(self, number: int) -> None:
        told, self._confirmations = self._confirmations[:number], self._confirmations[number:]
        for written in told:
            if not written.done():
                written.set_result(None)

    # --- starting
    # ----------------------------------------------------------------------------------------------

    async def _restore(self) -> None:
        # A Redis that lost its disk is as empty as a new one; the learner may put a snapshot back
        # before its first policy. Asked before the state is loaded: a snapshot that comes in
        # between must be noticed.
        self.ledger = await self._bus.read_ledger()
        await self._load()
        self._take_up_changes()
        if self.state.phase is RunPhase.FINISHED:
            self.detail = ""
            self.health.mark_ready(
                "finished"
            )  # nothing is left to wait for, and its answers are complete
            return
        if self.state.phase is RunPhase.FAILED and self.state.sleep:
            self.detail = self.state.sleep.reason
            self.health.mark_ready("failed")  # until somebody resumes it
            return
        # Task lists and the policy are asked for again. A pause or a stop outlives the process that
        # was told.
        self.state.phase = RunPhase.STARTING
        self.state.num_failed_in_a_row = 0
        self._was_empty = self.ledger.num_issued == 0

    def _take_up_changes(self) -> None:
        """A finished run of which more updates are wanted now goes on; a stuck or failed one that
        sleeps is tried again under another configuration; and one that nothing scales any more is
        awake."""
        state, target = self.state, self.config.training.num_updates
        if state.sleep and not self._is_scaled:
            self._wake()
        if state.phase is RunPhase.FINISHED:
            if not 0 < state.finished_target < target:
                return
            log.info("run_extended", before=state.finished_target, after=target)
            state.phase, state.is_stop_asked, state.finished_at_s = RunPhase.STARTING, False, 0.0
            self._wake()
        elif (
            state.sleep
            and not state.paused_at_s
            and state.sleep.configuration != compute_digest(self.config)
        ):
            self._wake()

    async def _load(self) -> None:
        """Take the saved state, with what was asked for and not saved yet, and what was read and
        never written down.
        """
        saved = await self._bus.load_state(STATE_NAME)
        self.state = GatewayState() if saved is None else GatewayState.from_bytes(saved)
        if saved is not None:
            log.info(
                "gateway_restored", num_issued=self.state.next_group_number, phase=self.state.phase
            )
        self._outbox, self._issued, self._spans, self._is_changed = [], [], [], False
        for change in self._asked:
            try:
                change()
            except RefusedError as error:
                log.warning("request_lost", error=error.message)
        self._in_hand = await self._reclaim()

    async def _adopt_restored(self) -> None:
        """Begin from the snapshot that the learner may have put into an empty Redis; the tasks in
        its streams were lost.
        """
        await self._restore()
        self._was_empty = False
        self.state.sleep = None  # as of the snapshot; whoever put it back is awake
        for evaluation in self.state.evaluations:
            self._outbox += [
                codec.encode_task_group(self._evaluation_group(evaluation, i))
                for i in evaluation.pending
            ]

    async def _try_start(self, stopping: asyncio.Event) -> None:
        """Become RUNNING once the environment lists its tasks and a first policy is published."""
        if self._training is None:
            try:
                await self._load_tasks()
            except UnavailableError as error:
                self.detail = f"waiting for the environment: {error}"
                log.warning("environment_unavailable", error=str(error))
                await wait_or_stop(stopping, _RETRY_S)
                return
        if self.policy_version < 0:
            self.detail = "waiting for the learner to publish the first policy"
            await wait_or_stop(stopping, _POLL_S)
            return
        if self._was_empty:
            await self._adopt_restored()
        self.detail = ""
        if self.state.phase is not RunPhase.STARTING:
            return
        self.state.started_at_s = self.state.started_at_s or self._clock()
        paused_or_running = RunPhase.PAUSED if self.state.paused_at_s else RunPhase.RUNNING
        self._change_phase(RunPhase.STOPPING if self.state.is_stop_asked else paused_or_running)
        await self._check_account()
        self.health.mark_ready("running")

    async def _load_tasks(self) -> None:
        environment = self.config.environment
        address = self._address(environment.name)
        self.environments[environment.name] = await self._describe(environment.name, address)
        tasks = await self._list_tasks(address, environment.train_split)
        wanted = self.config.evaluation.num_tasks
        self._heldout = await self._list_tasks(address, environment.evaluation_split, wanted)
        if len(self._heldout) < wanted:
            log.warning(
                "evaluation_list_short",
                wanted=wanted,
                got=len(self._heldout),
                split=environment.evaluation_split,
            )
        self._training = TrainingOrder(tasks, self.config.seed)
        log.info("tasks_listed", num_train=len(tasks), num_heldout=len(self._heldout))

    async def _list_tasks(
        self, address: str, split: str, max_tasks: int | None = None
    ) -> list[Task]:
        """Tasks under the name the environment is served by: a class given by its path may call
        itself otherwise.
        """
        name = self.config.environment.name
        tasks = await self._catalog.list_tasks(name, address, split, max_tasks)
        return [
            task if task.environment == name else dataclasses.replace(task, environment=name)
            for task in tasks
        ]

    # --- bookkeeping
    # ----------------------------------------------------------------------------------------------

    def _book(self, event: LedgerEvent) -> None:
        """What the account doesn't hold: reasons, failures in a row, lengths, and evaluations that
        can't be played.
        """
        if parse_group_number(event.group_id) is not None:
            self.state.apply(event)
            self.lengths.apply(event)
            self._metrics.observe_lengths(event)
            if event.outcome in (GroupOutcome.FAILED, GroupOutcome.CANCELLED):
                log.info(
                    "group_closed",
                    group_id=event.group_id,
                    outcome=event.outcome,
                    reason=event.reason,
                )
            return
        evaluation, index = self._find_evaluation(event.group_id)
        if (
            evaluation is not None
            and index in evaluation.pending
            and event.outcome is GroupOutcome.FAILED
        ):
            evaluation.add_failure(index, self._heldout[index].task_type)
            log.warning("evaluation_episode_failed", group_id=event.group_id, reason=event.reason)

    def _count_evaluation(self, trajectory: Trajectory) -> None:
        evaluation, index = self._find_evaluation(trajectory.group_id)
        if evaluation is None or index not in evaluation.pending:
            return
        if not evaluation.is_pinned(trajectory):
            # Sampled across a change of weights: play it again, or the number would be about no
            # policy at all.
            log.warning(
                "evaluation_episode_unpinned",
                group_id=trajectory.group_id,
                wanted=evaluation.policy_version,
            )
            self._outbox.append(codec.encode_task_group(self._evaluation_group(evaluation, index)))
            return
        if evaluation.add(index, trajectory) and evaluation.is_complete:
            summary = evaluation.summary()
            log.info(
                "evaluation_complete",
                **{k: summary[k] for k in ("evaluation_id", "success", "interval", "num_episodes")},
            )

    def _find_evaluation(self, group_id: str) -> tuple[Evaluation | None, int]:
        evaluation_id, _, index = group_id.rpartition("-")
        for evaluation in self.state.evaluations:
            if (
                evaluation.evaluation_id == evaluation_id
                and (found := evaluation.find_index(index)) is not None
            ):
                return evaluation, found
        return None, -1

    # --- deciding
    # ----------------------------------------------------------------------------------------------

    @property
    def is_training_done(self) -> bool:
        """Whether the last update is durable: the learner closes a group only then, and cancels
        what it needs no more.
        """
        return self.num_updates >= self.config.training.num_updates and not self.ledger.open

    def _begin_due_evaluations(self) -> None:
        begun = self.state.evaluations
        is_last = self.is_training_done or (
            self.state.phase is RunPhase.STOPPING and self.ledger.num_running == 0
        )
        if is_last or not begun:
            if not self._is_evaluated(is_greedy=False):
                self._begin_evaluation(is_greedy=False)
            if not self._is_evaluated(is_greedy=True):
                self._begin_evaluation(is_greedy=True)
            return
        every = self.config.evaluation.every_updates
        last = max(evaluation.num_updates for evaluation in begun)
        if (
            every
            and self.num_updates >= last + every
            and all(evaluation.is_complete for evaluation in begun)
        ):
            self._begin_evaluation(is_greedy=False)

    def _is_evaluated(self, *, is_greedy: bool) -> bool:
        """Whether an evaluation of the newest policy was begun. By version: a crash may have lost
        what others had trained.
        """
        return any(
            e.policy_version == self.policy_version and e.is_greedy is is_greedy
            for e in self.state.evaluations
        )

    def _begin_evaluation(self, *, is_greedy: bool) -> None:
        num_tasks = len(self._heldout)
        evaluation = Evaluation.begin(
            self.policy_version, self.num_updates, is_greedy=is_greedy, num_tasks=num_tasks
        )
        self.state.evaluations.append(evaluation)
        self._outbox += [
            codec.encode_task_group(self._evaluation_group(evaluation, i)) for i in range(num_tasks)
        ]
        self._is_changed = True
        log.info("evaluation_begun", evaluation_id=evaluation.evaluation_id, num_tasks=num_tasks)

    def _issue_groups(self) -> None:
        training, ledger = self.config.training, self.ledger
        # Groups that are trained and not yet durable are buffered. A learner that had to begin from
        # an older checkpoint than the account knows (the newest was damaged) has lost the effect of
        # some that count as trained: others replace them.
        num_effective = min(ledger.num_trained, self.num_updates * training.groups_per_update)
        num_accepted = num_effective + ledger.num_buffered
        capacity = compute_capacity(
            max_concurrent_groups=self.max_concurrent_groups,
            max_staleness=training.max_staleness,
            groups_per_update=training.groups_per_update,
            policy_version=self.num_updates,
            num_accepted=num_accepted,
            num_running=ledger.num_running,
        )
        missing = (
            training.num_updates * training.groups_per_update - num_accepted - ledger.num_running
        )
        if self.num_updates < training.num_updates:
            assert self._training is not None, (
                "groups are issued only after the task list was loaded"
            )
            for _ in range(min(capacity, max(0, missing))):
                self._issue(self._training.at(self.state.next_group_number))

    def _issue(self, task: Task) -> str:
        """Open the account of a new training group and send it out; returns its id."""
        group_id = format_group_id(self.state.next_group_number)
        self.state.next_group_number += 1
        group = self._group(group_id, task, self.config.training.group_size, Purpose.TRAIN)
        self._outbox.append(codec.encode_task_group(group))
        self._issued.append(
            LedgerEvent(self.config.name, group_id, GroupOutcome.ISSUED, 0, self.policy_version)
        )
        version = self.policy_version
        span = tracing.open_group(
            group_id, task_id=task.task_id, task_type=task.task_type, policy_version=version
        )
        self._spans.append(span)
        return group_id

    def _issue_again(self, retry: Retry) -> None:
        """Send the work of a dead letter out once more: a training task as a new group, an
        evaluation's task as it was.
        """
        if self.state.phase not in (RunPhase.RUNNING, RunPhase.PAUSED):
            return self._retries.refuse(
                retry,
                RefusedError(f"Run {self.config.name} is {self.state.phase}; it issues nothing."),
            )
        if retry.purpose is Purpose.TRAIN:
            group_id = self._issue(retry.task)
        else:
            group_id = retry.group_id
            evaluation, index = self._find_evaluation(group_id)
            if evaluation is None or not evaluation.reopen(index, self._heldout[index].task_type):
                message = f"No evaluation waits for {group_id}: it has its result, or is none of this run's."
                return self._retries.refuse(retry, RefusedError(message))
            self._outbox.append(retry.payload)
        self._retries.taken[retry.letter_id] = group_id
        log.info(
            "dead_letter_retried",
            letter_id=retry.letter_id,
            of_group=retry.group_id,
            group_id=group_id,
        )

    def _give_up_if_hopeless(self) -> None:
        """A broken environment fails every group: say so rather than issue them for ever."""
        state = self.state
        if state.num_failed_in_a_row >= max(
            _LEAST_HOPELESS_FAILURES, 2 * self.config.training.groups_per_update
        ):
            reason = next(reversed(state.failure_reasons.values()), "")
            self.detail = f"{state.num_failed_in_a_row} groups failed in a row, the last one because: {reason}"
            log.error("run_failed", detail=self.detail)
            self._change_phase(RunPhase.FAILED)

    @property
    def max_concurrent_groups(self) -> int:
        """Groups the living rollout workers can play at once."""
        num_workers = max(self.config.rollout.num_workers, self.history.count_instances("rollout"))
        return num_workers * (
            self.config.rollout.max_concurrent_episodes // self.config.training.group_size
        )

    def _evaluation_group(self, evaluation: Evaluation, index: int) -> TaskGroup:
        return self._group(
            evaluation.group_id(index), self._heldout[index], 1, Purpose.EVALUATION, evaluation
        )

    def _group(
        self,
        group_id: str,
        task: Task,
        size: int,
        purpose: Purpose,
        evaluation: Evaluation | None = None,
    ) -> TaskGroup:
        config = self.config
        return TaskGroup(
            run_id=config.name,
            group_id=group_id,
            task=task,
            group_size=size,
            purpose=purpose,
            admitted_version=self.policy_version
            if evaluation is None
            else evaluation.policy_version,
            sampling=(
                config.train_sampling
                if evaluation is None
                else config.evaluation_sampling(is_greedy=evaluation.is_greedy)
            ),
            max_turns=config.environment.max_turns,
            environment_address=self._address(task.environment),
            evaluation_id="" if evaluation is None else evaluation.evaluation_id,
        )

    def _is_over(self) -> bool:
        if self.state.phase not in (RunPhase.RUNNING, RunPhase.PAUSED, RunPhase.STOPPING):
            return False
        are_all_complete = all(evaluation.is_complete for evaluation in self.state.evaluations)
        is_drained = (
            self.ledger.num_running == 0
            if self.state.phase is RunPhase.STOPPING
            else self.is_training_done
        )
        return is_drained and are_all_complete and self._is_evaluated(is_greedy=True)

    async def _finish(self) -> None:
        """End the run. Each group must have exactly one outcome; only after an early stop may some
        still be buffered.
        """
        closed = Counter(
            [number for outcome in CLOSING for number in await self._bus.list_closed(outcome)]
        )
        may_be_open = self.ledger.open
        numbers = range(self.state.next_group_number)
        gap = [n for n in numbers if closed[n] != 1 and not (closed[n] == 0 and n in may_be_open)]
        gap += sorted(n for n in closed if n >= self.state.next_group_number)
        if gap:
            ids = [format_group_id(number) for number in gap[:MAX_SHOWN_GAP]]
            log.error("ledger_gap", num_groups=len(gap), group_ids=ids, ledger=self.ledger.counts())
        self.state.unaccounted = gap[:MAX_SHOWN_GAP]
        self.state.finished_at_s, self.state.finished_target = (
            self._clock(),
            self.config.training.num_updates,
        )
        self._change_phase(RunPhase.FINISHED)

    @property
    def ledger_gap(self) -> int:
        """Groups that the account cannot explain; anything but 0 is a defect."""
        return max(self.ledger.find_gap(), len(self.state.unaccounted))

    @property
    def progress(self) -> tuple[int, ...]:
        """Changes whenever the run gets on."""
        num_episodes = sum(evaluation.num_episodes for evaluation in self.state.evaluations)
        num_closed = sum(self.ledger.closed.values())
        return (
            self.policy_version,
            self.ledger.num_issued,
            self.ledger.num_generated,
            num_closed,
            num_episodes,
        )

    # --- controls
    # ----------------------------------------------------------------------------------------------

    def pause(self, *, until_restart: bool = False) -> None:
        """Issue no more groups until told to resume, or until this gateway ends; what runs goes on.

        Raises RefusedError unless running.
        """

        def change() -> None:
            self._control(RunPhase.PAUSED, allowed=(RunPhase.RUNNING, RunPhase.PAUSED))
            if not until_restart:
                self.state.paused_at_s = self.state.paused_at_s or self._clock()

        self._ask(change)

    def resume(self) -> None:
        """Issue groups again, also after giving up, and wake a run that sleeps. Raises RefusedError
        if nothing can go on.
        """
        self._ask(self._resume)

    def _resume(self) -> None:
        state = self.state
        if state.phase is RunPhase.FINISHED:
            raise RefusedError(
                f"Run {self.config.name} is finished. Raise training.num_updates to go on with it."
            )
        if state.phase in (RunPhase.STARTING, RunPhase.STOPPING) and not (
            state.sleep or state.paused_at_s
        ):
            raise RefusedError(
                f"Run {self.config.name} is {state.phase}: nothing holds it that could be resumed."
            )
        state.paused_at_s = 0.0
        if state.phase is RunPhase.FAILED:
            self.detail, state.num_failed_in_a_row = "", 0
            self._change_phase(RunPhase.STARTING)  # a gateway that found it failed has no tasks yet
        elif state.phase is RunPhase.PAUSED:
            self._change_phase(RunPhase.RUNNING)
        self._wake()

    def stop(self) -> None:
        """End the run early: issue no more groups, evaluate the newest policy, finish. Raises
        RefusedError before it runs.
        """
        self._ask(self._stop)

    def _stop(self) -> None:
        self._control(
            RunPhase.STOPPING, allowed=(RunPhase.RUNNING, RunPhase.PAUSED, RunPhase.STOPPING)
        )
        self.state.is_stop_asked = True
        self.state.paused_at_s = 0.0
        self._wake()  # the last evaluation has to be played

    @property
    def is_blank(self) -> bool:
        """Whether Redis knew nothing of this run when the gateway started, and still does: the
        first start, or a lost disk.
        """
        return self._was_empty

    def fall_asleep(self, reason: str, sizes: Mapping[str, int]) -> None:
        """Note that the run's workloads are going to be held at zero; `sizes` are what they come
        back to.
        """

        def change() -> None:
            self.state.sleep = Sleep(reason, self._clock(), compute_digest(self.config))
            self.state.sizes = dict(sizes)
            self._is_changed = True

        self._ask(change)
        log.warning("run_asleep", reason=reason, phase=self.state.phase)

    def _wake(self) -> None:
        if self.state.sleep:
            log.info(
                "run_awake",
                phase=self.state.phase,
                slept_s=round(self._clock() - self.state.sleep.since_s),
            )
        self.state.sleep = None
        self.woken_at_s = self._clock()
        self._is_changed = True

    async def retry_dead_letter(self, letter_id: str) -> str:
        """Send the work of a dead letter out again, in the transaction that removes the letter;
        returns the group's id.

        An operator asks for it, so it goes out at once, beyond what admission allows if need be.

        Raises:
            UnknownResourceError: there is no such letter. RefusedError: it holds no work of this
                run that could be done again.
        """
        return await self._retries.ask(letter_id)

    async def register_environment(self, name: str, address: str) -> RegisteredEnvironment:
        """Ask the server at `address` for environment `name` and use it from now on."""
        check_registration(name, address)
        found = await self._describe(name, address)
        self.environments[name] = found

        def change() -> None:
            self.state.environments[name] = address
            self._is_changed = True

        self._ask(change)
        log.info("environment_registered", name=name, address=address, version=found.version)
        return found

    async def _describe(self, name: str, address: str) -> RegisteredEnvironment:
        found = await self._catalog.describe(name, address)
        for split in (
            self.config.environment.train_split,
            self.config.environment.evaluation_split,
        ):
            if name == self.config.environment.name and split not in found.splits:
                raise CorruptionError(
                    f"Environment {name} at {address} has no split {split!r}, it has "
                    f"{sorted(found.splits)}. "
                    "Set environment.train_split and evaluation_split to those."
                )
        return found

    def _address(self, name: str) -> str:
        """Where an environment is: as registered while running, else as this process was told at
        its start.

        Only registrations are remembered: after a restart the run's own environment may listen
        elsewhere.
        """
        return self.state.environments.get(name, self._default_address)

    def _ask(self, change: Callable[[], None]) -> None:
        """Change the state as somebody asks for it; done again if the commit that would have saved
        it is refused.
        """
        change()
        self._asked.append(change)

    def _control(self, phase: RunPhase, allowed: tuple[RunPhase, ...]) -> None:
        if self.state.phase not in allowed:
            raise RefusedError(
                f"Run {self.config.name} is {self.state.phase}; it can become {phase} only from "
                f"{' or '.join(allowed)}."
            )
        self._change_phase(phase)

    def _change_phase(self, phase: RunPhase) -> None:
        if phase is not self.state.phase:
            log.info("run_phase_changed", before=self.state.phase, after=phase)
        self.state.phase = phase
        self._is_changed = True
