"""Turns trajectories into scored ones, by the rules on skills, prompt length and lag."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import numpy as np
import structlog

from sdar.bus.protocol import Publications
from sdar.contracts import codec
from sdar.contracts.errors import ContractError, CorruptionError, SdarError
from sdar.contracts.streams import Stream
from sdar.contracts.types import ScoredTrajectory, SkillOutcome, Task, TeacherScore, Trajectory
from sdar.process import tracing
from services.teacher.context import ContextBuilder, PrivilegedContext
from services.teacher.metrics import (
    CONTEXT_TOKENS,
    DROPPED_SKILLS,
    RETRIEVAL_MISSES,
    SCORED_TOKENS,
    SCORED_TRAJECTORIES,
    SCORING_SECONDS,
    SWAPPED_CONTEXTS,
    TeacherMetrics,
)
from services.teacher.policy import ScoringPolicy
from services.teacher.retrieval import Retrieval
from services.teacher.scorer import Scorer, TurnLogProbs

log = structlog.get_logger()


class Teacher:
    """Retrieves skills, builds privileged prompts, keeps its weights within the lag bound, scores.

    Calls may overlap; they queue.
    """

    def __init__(
        self,
        contexts: ContextBuilder,
        scorer: Scorer,
        policy: ScoringPolicy,
        metrics: TeacherMetrics,
        max_lag: int,
    ) -> None:
        self.contexts = contexts
        self.metrics = metrics
        self._scorer = scorer
        self._policy = policy
        self._max_lag = max_lag
        self._turnstile = asyncio.Lock()
        self._reported_misses: set[str] = set()

    @property
    def teacher_version(self) -> int:
        return self._scorer.teacher_version

    async def catch_up(self) -> None:
        """Load a newer policy if one is due; see `ScoringPolicy.catch_up` for what it raises."""
        async with self._turnstile:
            await self._policy.catch_up()
            self.metrics.observe_version(self._scorer.teacher_version, self._policy.lag)

    async def keep_pins(self, stopping: asyncio.Event) -> None:
        """Keep the version that scores from being deleted, until stopped."""
        await self._policy.pins.keep(stopping)

    async def retrieve(self, task: Task, key: str) -> Retrieval:
        """The skills for a task, for a student that may see them; misses are counted and logged."""
        await self.contexts.retriever.prepare(task, key)
        # In a thread: a sentence model may have to read the task first.
        retrieval = await asyncio.to_thread(self.contexts.retriever.retrieve, task, key)
        self._note_retrieval(task, retrieval)
        return retrieval

    def list_outcomes(self, scored: Sequence[ScoredTrajectory]) -> Publications:
        """What the next choices of skills learn from these episodes.

        To be published together with their scores.
        """
        # Where the kind does not learn, nobody would read the stream.
        if not self.contexts.retriever.learns:
            return {}
        outcomes = [
            _describe_outcome(item.trajectory, item.score)
            for item in scored
            if item.score is not None
        ]
        return {Stream.SKILL_EVENTS: [codec.encode_skill_event(outcome) for outcome in outcomes]}

    async def score(
        self, trajectories: Sequence[Trajectory], min_teacher_version: int = 0
    ) -> list[ScoredTrajectory | SdarError]:
        """Score each trajectory, in order. One that cannot be scored yields its error instead.

        All scores come from one policy version: at least `min_teacher_version`, at most `max_lag`
        behind the newest published policy and behind the newest that sampled any of these tokens.

        Raises:
            StaleError: that version has not been published yet.
            UnavailableError: it cannot be loaded, or the bus is away.
        """
        # A tokenizer serves one thread at a time, so prompts are built inside the turnstile too.
        async with self._turnstile:
            built = await self._build_contexts(trajectories)
            contexts = [context for context in built if isinstance(context, PrivilegedContext)]
            versions = [context.trajectory.max_policy_version for context in contexts]
            sampled_by = max(versions, default=0)
            # The lag bound holds against what sampled the tokens as well as against the newest.
            await self._policy.catch_up(max(min_teacher_version, sampled_by - self._max_lag))
            version = self._scorer.teacher_version
            self.metrics.observe_version(version, self._policy.lag)
            logprobs = await self._compute_logprobs(contexts)
        pairs = zip(contexts, logprobs, strict=True)
        scored = iter([self._attach(*pair, version) for pair in pairs])
        # Each in the place of its trajectory, between those that could not be scored.
        return [
            next(scored) if isinstance(context, PrivilegedContext) else context for context in built
        ]

    async def _build_contexts(
        self, trajectories: Sequence[Trajectory]
    ) -> list[PrivilegedContext | SdarError]:
        began_s = time.time()
        tasks = {trajectory.group_id: trajectory.task for trajectory in trajectories}
        for group_id, task in tasks.items():
            await self.contexts.retriever.prepare(task, group_id)
        # In a thread: rendering takes long enough to keep the event loop from its health checks.
        built = await asyncio.to_thread(
            lambda: [self._build(trajectory) for trajectory in trajectories]
        )
        _trace_retrieval(built, began_s)
        return built

    async def _compute_logprobs(self, contexts: Sequence[PrivilegedContext]) -> list[TurnLogProbs]:
        started_at = time.monotonic()
        began_s = time.time()
        logprobs = await self._scorer.score(contexts)
        self.metrics.observe(SCORING_SECONDS, time.monotonic() - started_at)
        _trace_scores(contexts, began_s, self._scorer.teacher_version)
        return logprobs

    def _build(self, trajectory: Trajectory) -> PrivilegedContext | SdarError:
        try:
            context = self.contexts.build(trajectory)
            self._scorer.check(context)
        except ContractError as error:
            return error
        return context

    def _attach(
        self, context: PrivilegedContext, logprobs: TurnLogProbs, version: int
    ) -> ScoredTrajectory | SdarError:
        trajectory = context.trajectory
        retrieval = context.retrieval
        if not all(np.isfinite(values).all() for values in logprobs):
            return _build_divergence_error(trajectory, version)
        self._count(context)
        score = TeacherScore(
            trajectory_id=trajectory.trajectory_id,
            teacher_version=version,
            turn_logprobs=logprobs,
            skill_ids=retrieval.skill_ids,
            num_specific_skills=len(retrieval.specific),
            skill_library_hash=self.contexts.retriever.skill_library.content_hash,
            template_hash=self.contexts.chat.template_hash,
            retrieval=retrieval.label,
            scorer=self._scorer.name,
        )
        return ScoredTrajectory(trajectory, score)

    def _count(self, context: PrivilegedContext) -> None:
        trajectory = context.trajectory
        self.metrics.count(SCORED_TRAJECTORIES)
        self.metrics.count(SCORED_TOKENS, trajectory.num_response_tokens)
        self.metrics.count(CONTEXT_TOKENS, context.num_tokens)
        if context.num_dropped_skills:
            self.metrics.count(DROPPED_SKILLS, context.num_dropped_skills)
            log.warning(
                "skills_dropped",
                trajectory_id=trajectory.trajectory_id,
                num_dropped=context.num_dropped_skills,
                fix="raise model.max_sequence_tokens or shorten the skills",
            )
        self._note_retrieval(trajectory.task, context.retrieval)

    def _note_retrieval(self, task: Task, retrieval: Retrieval) -> None:
        """Count misses and swaps; warn of a miss once for each task type.

        A teacher without a specific skill teaches little, and nothing else would show it.
        """
        self.metrics.count(SWAPPED_CONTEXTS, retrieval.is_swapped)
        self.metrics.count(RETRIEVAL_MISSES, retrieval.is_miss)
        if retrieval.is_miss and task.task_type not in self._reported_misses:
            self._reported_misses.add(task.task_type)
            log.warning(
                "no_specific_skill",
                task_type=task.task_type,
                task_id=task.task_id,
                known_task_types=list(self.contexts.retriever.skill_library.task_types),
                fix=(
                    "add a skill for this task type, or correct the task type the environment "
                    "reports"
                ),
            )


def _trace_retrieval(built: Sequence[PrivilegedContext | SdarError], began_s: float) -> None:
    for context in built:
        if not isinstance(context, PrivilegedContext):
            continue
        tracing.record(
            "teacher.retrieve",
            context.trajectory.group_id,
            began_s,
            trajectory_id=context.trajectory.trajectory_id,
            retrieval=context.retrieval.label,
            num_skills=len(context.retrieval.skills),
            num_specific_skills=len(context.retrieval.specific),
        )


def _trace_scores(contexts: Sequence[PrivilegedContext], began_s: float, version: int) -> None:
    """The forward passes of the whole batch, in the trace of each episode in it."""
    for context in contexts:
        tracing.record(
            "teacher.score",
            context.trajectory.group_id,
            began_s,
            trajectory_id=context.trajectory.trajectory_id,
            teacher_version=version,
            num_tokens=context.trajectory.num_response_tokens,
            num_context_tokens=context.num_tokens,
            batch_size=len(contexts),
        )


def _build_divergence_error(trajectory: Trajectory, version: int) -> CorruptionError:
    return CorruptionError(
        f"Trajectory {trajectory.trajectory_id}: the teacher's log-probs under policy version "
        f"{version} are not all finite. Look at that version's training: its weights diverged.",
        trajectory_id=trajectory.trajectory_id,
        teacher_version=version,
    )


def _describe_outcome(trajectory: Trajectory, score: TeacherScore) -> SkillOutcome:
    """How an episode ended, and the specific skills that were really shown for it."""
    # General skills, which every task gets, come first and are left out.
    shown = score.skill_ids[len(score.skill_ids) - score.num_specific_skills :]
    return SkillOutcome(
        trajectory.trajectory_id, trajectory.task.task_type, shown, trajectory.is_success
    )
