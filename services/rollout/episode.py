"""How episodes are played: sample, step, repeat, until the environment or a limit ends one.

The episodes of a task group are played at once. Nothing here knows a stream or a worker: the same
functions serve the rollout service and a single process that experiments.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections import Counter
from collections.abc import Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from sdar.contracts.errors import InvalidInputError, SdarError
from sdar.contracts.types import (
    EpisodeEnd,
    FailureStage,
    ModelIdentity,
    TaskGroup,
    Trajectory,
    Turn,
)
from sdar.model.chat import ChatTokenizer
from sdar.process import tracing
from services.rollout.engine import Engine, Generation
from services.rollout.environment_client import EnvironmentClient, Session, StepOutcome
from services.rollout.prompting import (
    EpisodeSetting,
    Prompt,
    PromptStyle,
    PromptStyleFactory,
    asks_for_thoughts,
    complete_response,
)

INVALID_ACTION = "invalid_action"
"""Name of the reward component that holds the penalty."""


class TextSource(StrEnum):
    """Who wrote a text that stands in prompts."""

    INSTRUCTIONS = "instructions"
    TASK = "task"
    SKILLS = "skills"
    OBSERVATION = "observation"
    ACTION = "action"


@dataclass(slots=True)
class EpisodeClock:
    """Where the time of all episodes went so far, in episode-seconds.

    Also how many prompts were short of earlier turns, and how many texts of control tokens were
    read, by source.
    """

    engine_s: float = 0.0
    environment_s: float = 0.0
    num_shortened_prompts: int = 0
    num_control_texts: Counter[TextSource] = field(default_factory=Counter)

    @contextlib.contextmanager
    def sampling(self) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            self.engine_s += time.monotonic() - started

    @contextlib.contextmanager
    def stepping(self) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            self.environment_s += time.monotonic() - started


@contextlib.contextmanager
def blame(stage: FailureStage) -> Iterator[None]:
    """Note on an error of the calls within whose it is."""
    try:
        yield
    except SdarError as error:
        error.stage = stage
        raise


class EpisodeSlots:
    """Bounds how many episodes run at once, over all groups."""

    def __init__(self, max_episodes: int) -> None:
        self.num_running = 0
        self._free = asyncio.Semaphore(max_episodes)

    async def __aenter__(self) -> None:
        await self._free.acquire()
        self.num_running += 1

    async def __aexit__(self, *exc_info: object) -> None:
        self.num_running -= 1
        self._free.release()


@dataclass(slots=True)
class Attempt:
    """One try at a task group.

    Attributes:
        number: from 0, and never given twice for a group.
        num_sampled_tokens: tokens sampled in it so far, whatever becomes of them.
    """

    number: int
    num_sampled_tokens: int = 0


@dataclass(frozen=True, slots=True)
class EpisodeRules:
    """What all episodes of a worker have in common.

    Attributes:
        invalid_action_penalty: subtracted once from an episode with any invalid action, in the turn
            of the first one; 0 where the learner applies it turn by turn.
        max_sequence_tokens: longest prompt plus response of a turn.
        shows_actions: whether prompts say how an action is written and which are admissible.
    """

    tokenizer: ChatTokenizer
    build_prompts: PromptStyleFactory
    model: ModelIdentity
    max_sequence_tokens: int
    invalid_action_penalty: float
    shows_actions: bool = True
    clock: EpisodeClock = field(default_factory=EpisodeClock)

    def count_setting(self, setting: EpisodeSetting) -> None:
        """Count texts of control tokens in what an episode's prompts begin with."""
        self.count_texts(TextSource.INSTRUCTIONS, setting.instructions, setting.action_format)
        self.count_texts(TextSource.TASK, setting.task_description)
        self.count_texts(TextSource.SKILLS, setting.skill_text)

    def count_texts(self, source: TextSource, *texts: str) -> None:
        """Count texts of control tokens where they come in, once, however often they are shown."""
        self.clock.num_control_texts[source] += self.tokenizer.count_controls(texts)


async def play_group(
    group: TaskGroup,
    attempt: Attempt,
    *,
    engine: Engine,
    environment: EnvironmentClient,
    rules: EpisodeRules,
    skill_text: str = "",
    slots: EpisodeSlots | None = None,
) -> list[Trajectory]:
    """Play all episodes of a group at once, each once.

    The first that fails ends the others; all sessions are closed.

    Args:
        attempt: which try at the group this is; no session of another one is continued.
        skill_text: what the student sees of skills; empty for all methods but skill_grpo.
        slots: an episode begins when one is free; none means at once.

    Raises:
        EnvironmentFailedError, UnavailableError: an environment failed, or is away; another attempt
            may go well.
        InvalidInputError: the task is unknown, or its first observation leaves no room for a
            response.
        UnavailableError, EngineFailedError: from the engine.
    """

    async def play(episode_index: int) -> Trajectory:
        trajectory_id = _name_trajectory(group, episode_index, attempt)
        async with slots or contextlib.nullcontext():
            with tracing.span("rollout.episode", trajectory_id=trajectory_id) as span:
                trajectory = await play_episode(
                    group,
                    episode_index,
                    attempt,
                    engine=engine,
                    environment=environment,
                    rules=rules,
                    skill_text=skill_text,
                )
                span.set(
                    num_turns=len(trajectory.turns),
                    is_success=trajectory.is_success,
                    end=trajectory.end.value,
                )
                return trajectory

    return await _gather_or_cancel([play(index) for index in range(group.group_size)])


async def _gather_or_cancel(
    episodes: Sequence[Coroutine[object, object, Trajectory]],
) -> list[Trajectory]:
    tasks = [asyncio.ensure_future(episode) for episode in episodes]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        # Awaited, for each closes its session as it ends. A TaskGroup would wrap the first error
        # in an ExceptionGroup, and callers tell errors apart.
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


async def play_episode(
    group: TaskGroup,
    episode_index: int,
    attempt: Attempt,
    *,
    engine: Engine,
    environment: EnvironmentClient,
    rules: EpisodeRules,
    skill_text: str = "",
) -> Trajectory:
    """Play one episode of a group, once. The session is closed however it ends.

    Raises: as `play_group`.
    """
    started = time.monotonic()
    trajectory_id = _name_trajectory(group, episode_index, attempt)
    with _asking_environment(rules.clock), tracing.span("environment.open"):
        profile = await environment.describe(group.task.environment)
        session = await environment.open_session(group.task, f"{group.run_id}.{trajectory_id}")
    try:
        action_format = profile.action_format if rules.shows_actions else ""
        setting = EpisodeSetting(
            profile.instructions, action_format, group.task.description, skill_text
        )
        rules.count_setting(setting)
        wants_thoughts = asks_for_thoughts(profile.instructions, profile.action_format)
        play = _Play(group, attempt, session, engine, environment, rules, wants_thoughts)
        turns, last = await play.play_turns(rules.build_prompts(setting))
    finally:
        # Shielded: a cancelled episode gives its place back all the same.
        await asyncio.shield(asyncio.ensure_future(environment.close_session(session.session_id)))
    return Trajectory(
        run_id=group.run_id,
        group_id=group.group_id,
        trajectory_id=trajectory_id,
        attempt=attempt.number,
        episode_index=episode_index,
        group_size=group.group_size,
        task=group.task,
        purpose=group.purpose,
        environment=profile.identity,
        model=rules.model,
        sampling=group.sampling,
        turns=_penalize(turns, rules.invalid_action_penalty),
        end=EpisodeEnd.TERMINATED if last.is_terminated else EpisodeEnd.TRUNCATED,
        is_success=last.is_success,
        evaluation_id=group.evaluation_id,
        duration_s=time.monotonic() - started,
    )


@contextlib.contextmanager
def _asking_environment(clock: EpisodeClock) -> Iterator[None]:
    with clock.stepping(), blame(FailureStage.ENVIRONMENT):
        yield


def _name_trajectory(group: TaskGroup, episode_index: int, attempt: Attempt) -> str:
    return f"{group.group_id}.{episode_index}.a{attempt.number}"


@dataclass(frozen=True, slots=True)
class _Play:
    """An episode that has begun, and what its turns need."""

    group: TaskGroup
    attempt: Attempt
    session: Session
    engine: Engine
    environment: EnvironmentClient
    rules: EpisodeRules
    wants_thoughts: bool

    async def play_turns(self, prompts: PromptStyle) -> tuple[list[Turn], StepOutcome]:
        """All turns and the last answer of the environment."""
        turns: list[Turn] = []
        shown = (self.session.observation, *self.session.admissible_actions)
        self.rules.count_texts(TextSource.OBSERVATION, *shown)
        actions = self._list_shown(self.session.admissible_actions)
        prompt = prompts.begin(self.session.observation, actions)
        self._check_first(prompt)
        while True:
            generation = await self._sample(len(turns), prompt)
            text = self._read_response(prompt, generation)
            outcome = await self._step(len(turns), text)
            turns.append(_build_turn(len(turns), prompt, generation, text, outcome))
            if _is_over(outcome) or len(turns) == self.group.max_turns:
                return turns, outcome
            prompt = self._extend(prompts, generation, outcome)
            # The next response would not fit. What was played counts, as a truncated episode.
            if len(prompt.token_ids) > self._max_prompt_tokens:
                return turns, outcome

    def _read_response(self, prompt: Prompt, generation: Generation) -> str:
        """What the environment gets, and what is recorded; the token ids stay as sampled."""
        tokenizer = self.rules.tokenizer
        text = tokenizer.decode_response(generation.response_token_ids)
        return complete_response(tokenizer, prompt, text, wants_thoughts=self.wants_thoughts)

    def _list_shown(self, admissible_actions: Sequence[str]) -> Sequence[str]:
        return admissible_actions if self.rules.shows_actions else ()

    @property
    def _max_prompt_tokens(self) -> int:
        """Longest prompt that leaves room for a whole response."""
        return self.rules.max_sequence_tokens - self.group.sampling.max_response_tokens

    def _check_first(self, prompt: Prompt) -> None:
        """Raises InvalidInputError for a first prompt that leaves no room: no attempt can help."""
        if len(prompt.token_ids) > self._max_prompt_tokens:
            raise InvalidInputError(
                f"The first prompt of task {self.group.task.task_id} has {len(prompt.token_ids)} "
                f"tokens; model.max_sequence_tokens {self.rules.max_sequence_tokens} less a "
                f"response leaves {self._max_prompt_tokens}. Raise it, or shorten the observation."
            )

    async def _sample(self, turn: int, prompt: Prompt) -> Generation:
        with self.rules.clock.sampling(), tracing.span("rollout.generate", turn=turn) as span:
            generation = await self.engine.generate(prompt.token_ids, self.group.sampling)
            versions = sorted({int(version) for version in generation.policy_versions})
            span.set(
                num_prompt_tokens=len(prompt.token_ids),
                num_tokens=len(generation.logprobs),
                policy_versions=versions,
            )
        # At once, before anything can fail: they are counted as repeated if the attempt does.
        self.attempt.num_sampled_tokens += len(generation.response_token_ids)
        return generation

    async def _step(self, turn: int, text: str) -> StepOutcome:
        clock = self.rules.clock
        with _asking_environment(clock), tracing.span("environment.step", turn=turn) as span:
            outcome = await self.environment.step(self.session.session_id, turn, text)
            span.set(is_action_valid=outcome.is_action_valid, is_over=_is_over(outcome))
        shown = (outcome.observation, *outcome.admissible_actions)
        self.rules.count_texts(TextSource.OBSERVATION, *shown)
        self.rules.count_texts(TextSource.ACTION, outcome.action)
        return outcome

    def _extend(self, prompts: PromptStyle, generation: Generation, outcome: StepOutcome) -> Prompt:
        prompt = prompts.extend(
            generation.response_token_ids,
            generation.stop_reason,
            outcome.action,
            outcome.observation,
            self._list_shown(outcome.admissible_actions),
        )
        self.rules.clock.num_shortened_prompts += prompt.num_missing_turns > 0
        return prompt


def _is_over(outcome: StepOutcome) -> bool:
    return outcome.is_terminated or outcome.is_truncated


def _build_turn(
    index: int, prompt: Prompt, generation: Generation, text: str, outcome: StepOutcome
) -> Turn:
    return Turn(
        turn_index=index,
        prompt_token_ids=prompt.token_ids,
        messages=prompt.messages,
        extends_previous=prompt.extends_previous,
        response_token_ids=generation.response_token_ids,
        behavior_logprobs=generation.logprobs,
        policy_versions=generation.policy_versions,
        response_text=text,
        stop_reason=generation.stop_reason,
        action=outcome.action,
        is_action_valid=outcome.is_action_valid,
        reward=outcome.reward,
        reward_components=outcome.reward_components,
    )


def _penalize(turns: list[Turn], penalty: float) -> tuple[Turn, ...]:
    """Take the penalty from the turn of the first invalid action, if there is one."""
    first = next((turn for turn in turns if not turn.is_action_valid), None)
    if first is None or penalty == 0:
        return tuple(turns)
    penalized = dataclasses.replace(
        first,
        reward=first.reward - penalty,
        reward_components={**first.reward_components, INVALID_ACTION: -penalty},
    )
    return tuple(penalized if turn is first else turn for turn in turns)
