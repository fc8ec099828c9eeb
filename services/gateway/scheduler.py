"""The gateway's main loop: read what happened, decide what is played next, commit both as one.

The parts decide and this file says in which order. `commit` holds the draft that they decide in,
`control` the phases, `evaluator` the evaluations, `admission` the training groups, `retries` the
dead letters. The bus lets only one gateway write: one that is superseded ends.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import structlog

from sdar.bus.leases import wait_for_room
from sdar.bus.ledger import LedgerAccount
from sdar.bus.protocol import Bus, Delivery
from sdar.bus.snapshot import RESTORATION
from sdar.config import RunConfig
from sdar.contracts.errors import LeaseLostError, UnavailableError
from sdar.contracts.roles import Role
from sdar.contracts.streams import ConsumerGroup
from sdar.process.lifecycle import wait_or_stop
from sdar.process.telemetry import Health

from .account import build_mismatch_error, find_unaccounted
from .admission import Admission
from .bookkeeping import Bookkeeper
from .capacity import count_waiting_groups
from .commit import Committer
from .control import RunControl
from .environments import EnvironmentCatalog, RegisteredEnvironment, check_registration
from .evaluator import Evaluator
from .history import History
from .inbox import Inbox
from .lengths import EpisodeLengths
from .metrics import GatewayMetrics
from .policy import NewestPolicy
from .retries import Retries
from .state import UNDER_WAY, GatewayState, RunPhase, Standing
from .tasks import TaskSource

log = structlog.get_logger()

_POLL_S = 0.2
"""Between two looks while there is nothing to wait for on the bus."""
_RETRY_S = 1.0
"""Between two calls to an environment that does not answer."""


class Scheduler:
    """Turns tasks into groups, and drives the run from its first evaluation to its last. One class
    because a round's order is its promise: reading, starting, deciding and writing all work on the
    draft in hand, and on what this process knows of where the run stands.

    Args:
        default_address: where the run's environment listens, unless the configuration says it.
        is_scaled: whether a scaler keeps a sleeping run asleep.

    Attributes:
        control: pauses, resumes, stops the run and puts it to sleep.
        policy: the newest one.
        ledger: the account of training groups as of the newest round of the main loop.
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
        self.ledger = LedgerAccount()
        self.lengths = EpisodeLengths()
        self.policy = NewestPolicy(bus)
        self._bus = bus
        self._metrics = GatewayMetrics() if metrics is None else metrics
        self._standing = Standing.UNREAD
        self._inbox = Inbox(bus)
        self._committer = Committer(bus)
        self._tasks = TaskSource(config, catalog, default_address)
        self._evaluator = Evaluator(config, self._tasks, self.policy)
        self._admission = Admission(config, self._tasks, self.policy)
        self._retries = Retries(bus, config.name, self._admission, self._evaluator)
        self._bookkeeper = Bookkeeper(bus, self._evaluator, self.lengths, self._metrics)
        self.control = RunControl(config, self._committer, clock, is_scaled=is_scaled)

    # ---- main loop

    async def run(self, stopping: asyncio.Event) -> None:
        """Go round until `stopping` is set.

        Raises:
            SupersededError: another gateway of this run has started; this one stays ended.
            CorruptionError: Redis lost what it had. Start the gateway again: it finds its way from
                what Redis and the learner have.
        """
        await self._bus.claim_role(ConsumerGroup.GATEWAY)
        await self._restore()
        while not stopping.is_set():
            try:
                await self._go_round(stopping)
            except LeaseLostError as error:
                # An event was given away, or a letter is gone: nothing of this round happened.
                # Begin again from what is saved.
                log.warning("commit_refused", error=str(error))
                await self._retries.forget_gone(self._committer.draft.retried)
                await self._load()
            self.health.beat()

    async def _go_round(self, stopping: asyncio.Event) -> None:
        events = await self._read(stopping)
        # Before the manifests: whoever sees the groups of an update trained must see the policy
        # that it made.
        self.ledger = await self._bus.read_ledger()
        await self._check_account()
        await self._bookkeeper.book(self._committer.draft, events)
        await self.policy.follow()
        await self.history.follow(self._bus)
        # What follows only changes the draft, until it is written.
        if self.state.phase is RunPhase.STARTING:
            await self._try_start(stopping)
        self._decide()
        if self._is_over:
            await self._finish()
        await self._write(stopping)
        self._observe()

    async def _read(self, stopping: asyncio.Event) -> list[Delivery]:
        """Events, unless none can be understood yet.

        Those of evaluations need the task lists, and an empty Redis may still be given the state
        that events belong to.
        """
        has_tasks = self._tasks.training is not None
        if not self.is_blank and (has_tasks or self.state.phase is RunPhase.FINISHED):
            return await self._inbox.read()
        if self.state.phase is RunPhase.FAILED:
            await wait_or_stop(stopping, _POLL_S)  # until somebody resumes the run
        return []

    async def _check_account(self) -> None:
        """Raise if the account and the cursor differ, which only ever change together.

        SupersededError if another gateway wrote, else CorruptionError: Redis lost writes.
        """
        num_in_account = self.ledger.num_issued
        num_issued = self.state.next_group_number
        if self.state.phase is not RunPhase.STARTING and num_in_account != num_issued:
            await self._committer.check_tenure()
            raise build_mismatch_error(num_in_account, num_issued)

    async def _write(self, stopping: asyncio.Event) -> None:
        """Commit the draft if it is due.

        While tasks that nobody plays leave no room it waits: a restart would make no room either.
        """
        if self.is_blank:
            await self._committer.confirm_uncommitted()
        elif self._committer.draft.is_due:
            await wait_for_room(self._commit, stopping, self.health.beat)

    async def _commit(self) -> None:
        written = await self._committer.commit()
        self._retries.settle(written.retried)

    def _observe(self) -> None:
        self._metrics.observe_run(
            self.ledger,
            self.state.evaluations,
            ledger_gap=self.ledger_gap,
            phase=self.state.phase,
            policy_version=self.policy.version,
            num_updates=self.policy.num_updates,
            training=self.config.training,
            length_drift=self.lengths.compute_drift(),
        )

    # ---- starting

    async def _restore(self) -> None:
        # A Redis that lost its disk is as empty as a new one; the learner may put a snapshot back
        # before its first policy. Asked before the state is loaded: a snapshot that comes in
        # between must be noticed.
        self.ledger = await self._bus.read_ledger()
        await self._load()
        self.control.begin()
        phase = self.state.phase
        if phase is RunPhase.STARTING and self.ledger.num_issued == 0:
            self._standing = Standing.BLANK
        else:
            self._standing = Standing.KNOWN
        if phase is not RunPhase.STARTING:
            # Nothing is left to wait for, or only that somebody resumes the run.
            self.health.mark_ready(phase)

    async def _load(self) -> None:
        await self._committer.load()
        await self._inbox.take_over()

    async def _try_start(self, stopping: asyncio.Event) -> None:
        """Start once the environment lists its tasks and a first policy is published."""
        if self._tasks.training is None and not await self._load_tasks(stopping):
            return
        if self.policy.version < 0:
            self.control.detail = "waiting for the learner to publish the first policy"
            await wait_or_stop(stopping, _POLL_S)
            return
        if self.is_blank and not await self._adopt(stopping):
            return
        if self.state.phase is RunPhase.STARTING:
            await self._make_up_for_lost_streams()
            self.control.start()
            await self._check_account()
            self.health.mark_ready("running")

    async def _load_tasks(self, stopping: asyncio.Event) -> bool:
        """Load the task lists; False, after a moment, while the environment does not answer."""
        try:
            await self._tasks.load(self.state)
        except UnavailableError as error:
            self.control.detail = f"waiting for the environment: {error}"
            log.warning("environment_unavailable", error=str(error))
            await wait_or_stop(stopping, _RETRY_S)
            return False
        return True

    async def _adopt(self, stopping: asyncio.Event) -> bool:
        """Begin from the snapshot that the learner may have put into an empty Redis; False while
        the environment does not answer.
        """
        await self._restore()
        # Still blank, so that no event is read yet: the lists were loaded without the snapshot,
        # whose evaluations may be of more tasks.
        self._standing = Standing.BLANK
        if not await self._load_tasks(stopping):
            return False
        self._standing = Standing.KNOWN
        self.control.detail = ""
        return True

    async def _make_up_for_lost_streams(self) -> None:
        """Send the tasks of evaluations again if a snapshot was put back since that was last done:
        by the learner, into a Redis that lost its streams, before this process began or after.
        """
        restoration = (await self._bus.load_state(RESTORATION) or b"").decode()
        if restoration == self.state.restoration:
            return
        self.state.restoration = restoration
        self.state.sleep = None  # as of the snapshot; whoever put it back is awake
        self._evaluator.resend_pending(self._committer.draft)

    # ---- deciding

    def _decide(self) -> None:
        draft = self._committer.draft
        if draft.state.phase in UNDER_WAY:
            self._evaluator.begin_due(draft, is_last=self._is_drained)
            self.control.give_up_if_hopeless(
                num_updates=self.policy.num_updates,
                num_waiting=count_waiting_groups(
                    self.config.training, self.ledger, self.policy.num_updates
                ),
            )
        if draft.state.phase is RunPhase.RUNNING:
            self.control.give_up_if_not_finite(self.history.newest_record(Role.LEARNER))
        if draft.state.phase is RunPhase.RUNNING:
            num_workers = self.history.count_instances("rollout")
            self._admission.issue_due(draft, self.ledger, num_workers)
        self._retries.issue_waiting(draft)

    @property
    def _is_drained(self) -> bool:
        """Whether no policy comes any more.

        Either the last update is durable: the learner closes a group only then, and cancels what it
        needs no more. Or the run was stopped and has no group out.
        """
        if self.state.phase is RunPhase.STOPPING and self.ledger.num_running == 0:
            return True
        is_last_made = self.policy.num_updates >= self.config.training.num_updates
        return is_last_made and not self.ledger.open

    @property
    def _is_over(self) -> bool:
        is_under_way = self.state.phase in UNDER_WAY
        return is_under_way and self._is_drained and self._evaluator.is_over(self._committer.draft)

    async def _finish(self) -> None:
        """End the run. Each group must have exactly one outcome; only after an early stop may some
        still be buffered.
        """
        num_issued = self.state.next_group_number
        self.control.finish(await find_unaccounted(self._bus, self.ledger, num_issued))

    # ---- where it stands

    @property
    def state(self) -> GatewayState:
        """The state in hand: the saved one with what was decided since."""
        return self._committer.draft.state

    @property
    def detail(self) -> str:
        """What a starting run waits for, or why a failed one gave up; empty otherwise."""
        return self.control.detail

    @property
    def environments(self) -> dict[str, RegisteredEnvironment]:
        """The environments that this process knows, by name."""
        return self._tasks.environments

    @property
    def is_restored(self) -> bool:
        """Whether the state in hand is what Redis had when this process started."""
        return self._standing is not Standing.UNREAD

    @property
    def is_blank(self) -> bool:
        """Whether Redis knew nothing of this run when this process started, and still does."""
        return self._standing is Standing.BLANK

    @property
    def ledger_gap(self) -> int:
        """Groups that the account cannot explain; anything but 0 is a defect."""
        return max(self.ledger.find_gap(), len(self.state.unaccounted))

    @property
    def progress(self) -> tuple[int, ...]:
        """Changes whenever the run gets on."""
        return (
            self.policy.version,
            self.ledger.num_issued,
            self.ledger.num_generated,
            sum(self.ledger.closed.values()),
            sum(evaluation.num_episodes for evaluation in self.state.evaluations),
        )

    # ---- what others ask for

    async def confirm_tenure(self) -> None:
        """See `Committer.confirm_tenure`: give up waiting after a while."""
        await self._committer.confirm_tenure()

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
        found = await self._tasks.describe(name, address)

        def change(state: GatewayState) -> None:
            state.environments[name] = address

        self._committer.ask(change)
        log.info("environment_registered", name=name, address=address, version=found.version)
        return found
