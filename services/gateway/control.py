"""The run's phases, its sleep, and what moves it from one to another."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import starmap

import structlog

from sdar.config import RunConfig
from sdar.contracts.errors import RefusedError
from sdar.contracts.roles import WORKERS
from sdar.contracts.types import FailureStage, MetricRecord

from .commit import Committer
from .history import History
from .state import FailureRow, GatewayState, RunPhase, Sleep, compute_digest

log = structlog.get_logger()

_HOPELESS_SKIPPED_STEPS = 3
"""Optimizer steps skipped in a row. One may be the fault of a group, three are that of the run."""
_HOPELESS_DISPROOFS = 3
"""Times in a row that an engine was wrong with a version that it had installed."""
_LEAST_HOPELESS_FAILURES = 8
"""Groups failed in a row, below which a run with small updates may just have had bad luck."""
_HOPELESS_UPDATES = 4
"""Updates' worth of groups that failed in a row: more than `_HOPELESS_SKIPPED_STEPS`, which end the
run with a reason of their own.
"""
_EXCUSED_FAILURES = 9
"""Failures that each group which still waits to be trained excuses: a run of which more than a
tenth gets through goes on, and one whose every group fails ends all the same, since only so many
may wait.
"""
_REMEDIES = {
    FailureStage.ROLLOUT: (
        "Look at `sdar logs rollout`. A prompt that is refused or too long is a matter of "
        "model.path or model.max_sequence_tokens."
    ),
    FailureStage.ENVIRONMENT: (
        "Look at `sdar logs envs`, and try the environment with `sdar env check`."
    ),
    FailureStage.TEACHER: (
        "Look at `sdar logs teacher`, and at what it refused with `sdar dead-letter list`."
    ),
    FailureStage.LEARNER: (
        "Look at `sdar logs learner`, and at what it refused with `sdar dead-letter list`."
    ),
}
"""What to do about a broken stage, by the stage."""


class RunControl:
    """Changes the phase and the sleep of the state in hand.

    Args:
        is_scaled: whether a scaler keeps a sleeping run asleep; without one nobody does, and the
            run is awake.

    Attributes:
        detail: what a starting run waits for, or why a failed one gave up; empty otherwise.
        woken_at_s: Unix time when the run was last woken by this process; 0 before.
    """

    def __init__(
        self,
        config: RunConfig,
        committer: Committer,
        clock: Callable[[], float],
        *,
        is_scaled: bool,
    ) -> None:
        self.detail = "reading where the run stands"
        self.woken_at_s = 0.0
        self._tried_since_s = clock()
        self._config = config
        self._committer = committer
        self._clock = clock
        self._is_scaled = is_scaled
        self._num_updates = 0

    # ---- what somebody asks for

    def pause(self, *, until_restart: bool = False) -> None:
        """Issue no more groups until somebody resumes, or this gateway ends; what runs goes on.

        Raises RefusedError unless the run is running.
        """

        def change(state: GatewayState) -> None:
            self._require(state, RunPhase.PAUSED, RunPhase.RUNNING, RunPhase.PAUSED)
            self._enter(state, RunPhase.PAUSED)
            if not until_restart:
                state.paused_at_s = state.paused_at_s or self._clock()

        self._committer.ask(change)

    def resume(self) -> None:
        """Issue groups again, also after giving up, and wake a run that sleeps.

        Raises RefusedError if nothing can go on.
        """
        self._committer.ask(self._resume)

    def stop(self) -> None:
        """End the run early: issue no more groups, evaluate the newest policy, finish.

        Raises RefusedError before the run has started.
        """

        def change(state: GatewayState) -> None:
            allowed = (RunPhase.RUNNING, RunPhase.PAUSED, RunPhase.STOPPING)
            self._require(state, RunPhase.STOPPING, *allowed)
            self._enter(state, RunPhase.STOPPING)
            state.is_stop_asked = True
            state.paused_at_s = 0.0
            self._wake(state)  # the last evaluation has to be played

        self._committer.ask(change)

    def fall_asleep(self, reason: str, sizes: Mapping[str, int]) -> None:
        """Note that the run's workloads are going to be held at zero.

        Args:
            sizes: replicas by workload, to which they come back.
        """

        def change(state: GatewayState) -> None:
            state.sleep = Sleep(reason, self._clock(), compute_digest(self._config))
            state.sizes = dict(sizes)

        self._committer.ask(change)
        log.warning("run_asleep", reason=reason, phase=self._state.phase)

    # ---- what the scheduler finds

    def begin(self) -> None:
        """Find the phase in which to go on with a state that was just loaded.

        A finished run stays finished, and a failed one that sleeps stays failed until somebody
        resumes it. Any other starts again: the task lists and the policy are asked for again. A
        pause or a stop outlives the process that took it.
        """
        state = self._state
        self._take_up_configuration(state)
        if state.phase is RunPhase.FINISHED:
            self.detail = ""
        elif state.phase is RunPhase.FAILED and state.sleep:
            self.detail = state.sleep.reason
        else:
            state.phase = RunPhase.STARTING
            _count_anew(state)

    def start(self) -> None:
        """Leave STARTING for what was asked for last."""
        state = self._state
        self.detail = ""
        state.started_at_s = state.started_at_s or self._clock()
        if state.is_stop_asked:
            self._change_phase(RunPhase.STOPPING)
        elif state.paused_at_s:
            self._change_phase(RunPhase.PAUSED)
        else:
            self._change_phase(RunPhase.RUNNING)

    def give_up_if_hopeless(self, *, num_updates: int, num_waiting: int) -> None:
        """A stage that is broken fails every group: fail, rather than issue them for ever.

        Args:
            num_updates: optimizer updates in the newest policy.
            num_waiting: groups that were played and that no update holds yet.
        """
        state = self._state
        # Its groups are booked as trained only once a checkpoint holds them, which may be many
        # updates later.
        if num_updates > self._num_updates and state.failed_training.num_failed:
            state.failed_training.clear()
            self._committer.draft.is_changed = True
        self._num_updates = num_updates
        num_groups = _HOPELESS_UPDATES * self._config.training.groups_per_update
        most = max(_LEAST_HOPELESS_FAILURES, num_groups)
        most_training = most + _EXCUSED_FAILURES * num_waiting
        if state.phase is RunPhase.RUNNING and state.failed_training.num_failed >= most_training:
            self._give_up("groups", "none was trained or skipped", state.failed_training)
        elif state.failed_evaluation.num_failed >= most:
            self._give_up("evaluation episodes", "none was played", state.failed_evaluation)

    def _give_up(self, what: str, otherwise: str, row: FailureRow) -> None:
        self._give_up_because(
            f"{row.num_failed} {what} failed in a row and {otherwise} in between. "
            f"{' '.join(starmap(_explain, row.reasons.items()))}"
        )

    def give_up_if_not_finite(self, newest: MetricRecord | None) -> None:
        """Steps that are skipped one after another train nothing: fail, and say why.

        Args:
            newest: the learner's newest record. What it said before this try is not held against
                the run: somebody who resumes it, or a restart of this process, is a new try.
        """
        if newest is None or newest.at_s < self._tried_since_s:
            return
        num_skipped = newest.values.get("num_skipped_steps_in_a_row", 0.0)
        if num_skipped >= _HOPELESS_SKIPPED_STEPS:
            self._give_up_because(
                f"The learner skipped {num_skipped:.0f} optimizer steps in a row: a loss or the "
                "gradient norm was no finite number, and the weights were left as they were. Lower "
                "training.learning_rate or mend the rewards, and resume the run."
            )

    def give_up_if_disproven(self, history: History) -> None:
        """An engine that computes something else than the learner samples nothing to train on:
        fail, and say which.

        What was said before this try is not held against the run.
        """
        for role in WORKERS:
            newest = history.newest_by_instance(role, self._tried_since_s)
            for instance, values in newest.items():
                num_disproofs = values.get("num_disproofs", 0.0)
                if num_disproofs >= _HOPELESS_DISPROOFS:
                    self._give_up_because(
                        f"{num_disproofs:.0f} times in a row, the log-probs of {instance} were not "
                        "the learner's after it had installed a policy version, and it went back "
                        "to the one before. Its log has the figures. Its engine does not compute "
                        "this model as transformers does, or installs its weights wrongly: use "
                        "another version of the engine, or another model."
                    )

    def _give_up_because(self, detail: str) -> None:
        self.detail = detail
        log.error("run_failed", detail=detail)
        self._change_phase(RunPhase.FAILED)

    def finish(self, unaccounted: list[int]) -> None:
        """End the run, with the numbers of the groups that its last check found wanting."""
        state = self._state
        state.unaccounted = unaccounted
        state.finished_at_s = self._clock()
        state.finished_target = self._config.training.num_updates
        self._change_phase(RunPhase.FINISHED)

    # ---- how

    @property
    def _state(self) -> GatewayState:
        return self._committer.draft.state

    def _take_up_configuration(self, state: GatewayState) -> None:
        """Let a changed configuration take effect on the state that the run was left in.

        A finished run of which more updates are wanted now goes on. One that sleeps as stuck or
        failed is tried again under another configuration. One that nothing scales any more wakes.
        """
        target = self._config.training.num_updates
        digest = compute_digest(self._config)
        if state.sleep and not self._is_scaled:
            self._wake_in_draft()
        if state.phase is RunPhase.FINISHED:
            if 0 < state.finished_target < target:
                log.info("run_extended", before=state.finished_target, after=target)
                state.phase = RunPhase.STARTING
                state.is_stop_asked = False
                state.finished_at_s = 0.0
                self._wake_in_draft()
        elif state.sleep and not state.paused_at_s and state.sleep.configuration != digest:
            self._wake_in_draft()

    # Requests change the state that they are given: a refused commit has them done again on
    # another.
    def _resume(self, state: GatewayState) -> None:
        name = self._config.name
        if state.phase is RunPhase.FINISHED:
            raise RefusedError(
                f"Run {name} is finished. Raise training.num_updates to go on with it."
            )
        is_held = bool(state.sleep or state.paused_at_s)
        if state.phase in (RunPhase.STARTING, RunPhase.STOPPING) and not is_held:
            raise RefusedError(
                f"Run {name} is {state.phase}: nothing holds it that could be resumed."
            )
        state.paused_at_s = 0.0
        if state.phase is RunPhase.FAILED:
            self._tried_since_s = self._clock()
            self.detail = ""
            _count_anew(state)
            # A gateway that found the run failed has no tasks yet.
            self._enter(state, RunPhase.STARTING)
        elif state.phase is RunPhase.PAUSED:
            self._enter(state, RunPhase.RUNNING)
        self._wake(state)

    def _wake_in_draft(self) -> None:
        self._wake(self._state)
        self._committer.draft.is_changed = True

    def _wake(self, state: GatewayState) -> None:
        if state.sleep:
            slept_s = round(self._clock() - state.sleep.since_s)
            log.info("run_awake", phase=state.phase, slept_s=slept_s)
        state.sleep = None
        self.woken_at_s = self._clock()

    def _require(self, state: GatewayState, wanted: RunPhase, *allowed: RunPhase) -> None:
        if state.phase not in allowed:
            raise RefusedError(
                f"Run {self._config.name} is {state.phase}; it can become {wanted} only from "
                f"{' or '.join(allowed)}."
            )

    def _change_phase(self, phase: RunPhase) -> None:
        self._enter(self._state, phase)
        self._committer.draft.is_changed = True

    def _enter(self, state: GatewayState, phase: RunPhase) -> None:
        if phase is not state.phase:
            log.info("run_phase_changed", before=state.phase, after=phase)
        state.phase = phase


def _count_anew(state: GatewayState) -> None:
    state.failed_training.clear()
    state.failed_evaluation.clear()


def _explain(stage: str, reason: str) -> str:
    """What broke, why, and what to do. The stage is a text of the wire: it may be none we know."""
    remedy = next((text for known, text in _REMEDIES.items() if known == stage), "")
    return f"Stage {stage or 'unknown'}: {reason.rstrip('.')}. {remedy}".rstrip()
