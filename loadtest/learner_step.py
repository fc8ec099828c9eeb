"""Measures what distillation costs the learner: a whole update by SDAR against one by GRPO.

Both methods train one model on one batch through the learner's own `Trainer` and DeepSpeed, so only
the loss differs: batching, reference scoring, forward and backward passes, AdamW and the export of
the weights are in both times. GRPO gets its items without teacher scores, as it does in a run.
Times are CPU seconds of this process: one thread that never waits, so on a quiet machine they are
wall time, and on a busy one they stay what they are.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import Iterator, Sequence
from functools import partial

import torch

from loadtest.comparison import Comparison, Measurement, Say, Target, take_turns
from loadtest.workloads import RUN_FILE, SEED, build_household_groups
from sdar.config import RunConfig, load_config
from sdar.contracts.types import ScoredTrajectory, TeacherScore, Trajectory, WeightsManifest
from sdar.model.causal_lm import load_causal_lm
from sdar.model.chat import ChatTokenizer
from services.learner.model import PolicyModel
from services.learner.ranks import stand_alone
from services.learner.update import Trainer
from services.teacher.context import ContextBuilder
from services.teacher.retrieval import Retriever
from services.teacher.scorer import TransformersScorer
from services.teacher.skills import open_skill_library

NUM_PAIRS = 16
NUM_TEACHER_PAIRS = 8
TARGET = Target("at_most", 1.05)

Groups = Sequence[Sequence[Trajectory]]
Items = Sequence[Sequence[ScoredTrajectory]]
Pairs = tuple[tuple[float, float], ...]
Comparisons = tuple[Comparison, ...]


def measure(say: Say) -> Measurement:
    torch.set_num_threads(1)
    config = load_config(RUN_FILE)
    groups = build_household_groups(config.training.groups_per_update, config.training.group_size)
    with _open_trainers(config) as (sdar, grpo), contextlib.closing(_Teacher(config)) as teacher:
        scored = teacher.score(groups)
        bare = list(map(_leave_unscored, groups))
        update_sdar = partial(_time_update, sdar, scored)
        update_grpo = partial(_time_update, grpo, bare)

        say("the update alone")
        alone = take_turns(update_sdar, update_grpo, NUM_PAIRS, say, num_warmups=2)

        say("with the teacher's scoring")
        together = take_turns(
            lambda: teacher.time_scoring(groups) + update_sdar(),
            update_grpo,
            NUM_TEACHER_PAIRS,
            say,
        )
    comparisons = _compare(config, groups, alone, together)
    return Measurement(comparisons, notes=_list_notes(groups))


def _leave_unscored(group: Sequence[Trajectory]) -> list[ScoredTrajectory]:
    return [ScoredTrajectory(trajectory, None) for trajectory in group]


def _list_notes(groups: Groups) -> tuple[str, ...]:
    trajectories = itertools.chain.from_iterable(groups)
    num_tokens = sum(trajectory.num_response_tokens for trajectory in trajectories)
    return (
        f"{num_tokens:,} sampled tokens, model and training section of examples/household.yaml, "
        "one thread, float32. The smallest model is the hardest case: the loss costs the same per "
        "token whatever the model's size.",
        "The teacher is another service and scores while the learner trains. Its row adds both "
        "times, as if they took turns.",
    )


def _compare(config: RunConfig, groups: Groups, alone: Pairs, together: Pairs) -> Comparisons:
    what = f"learner's update, {len(groups)} household groups of {config.training.group_size}"
    return (
        Comparison(f"{what}: SDAR", "GRPO", "CPU s", alone, TARGET),
        Comparison(f"{what}: SDAR with the teacher's scoring", "GRPO", "CPU s", together),
    )


@contextlib.contextmanager
def _open_trainers(config: RunConfig) -> Iterator[tuple[Trainer, Trainer]]:
    """Trainers of both methods on one model."""
    torch.manual_seed(SEED)
    ranks = stand_alone("cpu")
    model = PolicyModel(
        config.model.path,
        dtype=config.model.dtype,
        temperature=config.rollout.temperature,
        training=config.training,
        needs_reference=True,
        ranks=ranks,
    )
    method = config.method.model_copy(update={"name": "grpo"})
    by_grpo = config.model_copy(update={"method": method})
    try:
        yield Trainer(config, model, ranks), Trainer(by_grpo, model, ranks)
    finally:
        model.close()


def _time_update(trainer: Trainer, items: Items) -> float:
    began = time.process_time()
    # The payloads are for other ranks, and there are none.
    trainer.update([(group, ()) for group in items], update_index=0, policy_version=0)
    return time.process_time() - began


class _NoWeights:
    """The teacher keeps its first weights here."""

    def iter_tensors(self, manifest: WeightsManifest) -> Iterator[tuple[str, torch.Tensor]]:
        return iter(())


class _Teacher:
    """What a teacher does with a batch: privileged prompts, then scores."""

    def __init__(self, config: RunConfig) -> None:
        retriever = Retriever(
            open_skill_library(config),
            kind=config.teacher.retrieval,
            num_skills=config.teacher.num_skills,
        )
        self._contexts = ContextBuilder(
            ChatTokenizer(config.model.path), retriever, config.model.max_sequence_tokens
        )
        self._scorer = TransformersScorer(
            load_causal_lm(config.model.path, config.model.dtype),
            _NoWeights(),
            batch_tokens=config.teacher.batch_tokens,
            chunk_tokens=config.training.logprob_chunk_tokens,
        )

    def score(self, groups: Groups) -> list[list[ScoredTrajectory]]:
        trajectories = list(itertools.chain.from_iterable(groups))
        contexts = [self._contexts.build(trajectory) for trajectory in trajectories]
        logprobs = asyncio.run(self._scorer.score(contexts))

        scored = []
        for trajectory, values in zip(trajectories, logprobs, strict=True):
            score = TeacherScore(
                trajectory.trajectory_id, 0, values, (), 1, "", "", "task_type", self._scorer.name
            )
            scored.append(ScoredTrajectory(trajectory, score))

        # The scorer takes all at once; what it scored goes back into the groups it came from.
        rest = iter(scored)
        return [list(itertools.islice(rest, len(group))) for group in groups]

    def time_scoring(self, groups: Groups) -> float:
        began = time.process_time()
        self.score(groups)
        return time.process_time() - began

    def close(self) -> None:
        asyncio.run(self._scorer.stop())
