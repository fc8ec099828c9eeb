"""Groups of short episodes for the learner, a run configuration, and a trainer that only counts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from sdar.bus.ledger import format_group_id
from sdar.config import RunConfig
from sdar.contracts import codec
from sdar.contracts.streams import ConsumerGroup, Stream
from sdar.contracts.types import (
    EnvironmentIdentity,
    EpisodeEnd,
    GroupOutcome,
    LedgerEvent,
    ModelIdentity,
    Purpose,
    SamplingParameters,
    ScoredTrajectory,
    StopReason,
    Task,
    TeacherScore,
    Trajectory,
    Turn,
)
from sdar.in_process.memory_bus import MemoryBus
from services.learner.update import UpdateResult

RUN = "test"
VOCABULARY = 64
MODEL_PATH = Path(__file__).parents[3] / "examples" / "models" / "household-tiny"


def make_config(method="sdar", model_path=MODEL_PATH, **training):
    return RunConfig.model_validate(
        {
            "name": RUN,
            "model": {"path": model_path, "dtype": "float32"},
            "environment": {"name": "household"},
            "method": {"name": method, "distillation_weight": 1.0},
            "teacher": {"max_lag": 1},
            "training": {
                "num_updates": 3,
                "groups_per_update": 2,
                "group_size": 2,
                "max_staleness": 2,
                "learning_rate": 1e-3,
                "checkpoint_every": 2,
                **training,
            },
        }
    )


def make_item(
    group_id,
    index,
    *,
    reward=0.0,
    version=0,
    attempt=0,
    group_size=2,
    has_score=True,
    teacher_version=None,
    num_turns=2,
    seed=None,
    run_id=RUN,
    purpose=Purpose.TRAIN,
    largest_token=VOCABULARY,
):
    """An episode of random tokens; its second and later turns extend the one before."""
    rng = np.random.default_rng([index, attempt, *group_id.encode()] if seed is None else seed)
    turns = make_turns(rng, num_turns, reward, version, largest_token)
    trajectory = Trajectory(
        run_id=run_id,
        group_id=group_id,
        trajectory_id=f"{group_id}.{index}.a{attempt}",
        attempt=attempt,
        episode_index=index,
        group_size=group_size,
        task=Task("household", "train", group_id, "heat" if reward else "cool", "heat the egg", 0),
        purpose=purpose,
        environment=EnvironmentIdentity("household", "1"),
        model=ModelIdentity("tiny", "f"),
        sampling=SamplingParameters(1.0, 1.0, 8),
        turns=tuple(turns),
        end=EpisodeEnd.TERMINATED,
        is_success=reward > 0,
    )
    if not has_score:
        return ScoredTrajectory(trajectory, None)
    logprobs = tuple(-rng.exponential(2.0, len(turn.response_token_ids)) for turn in turns)
    lag = version if teacher_version is None else teacher_version
    return ScoredTrajectory(
        trajectory,
        TeacherScore(
            trajectory.trajectory_id, lag, logprobs, ("s",), 1, "h", "t", "task_type", "x"
        ),
    )


def make_turns(rng, num_turns, reward, version, largest_token):
    turns, context = [], []
    for turn_index in range(num_turns):
        prompt = context + rng.integers(3, largest_token, 6).tolist()
        response = rng.integers(3, largest_token, int(rng.integers(2, 6))).tolist()
        context = prompt + response
        turn = Turn(
            turn_index=turn_index,
            prompt_token_ids=prompt,
            messages=(),
            extends_previous=turn_index > 0,
            response_token_ids=response,
            behavior_logprobs=-rng.exponential(2.0, len(response)),
            policy_versions=[version] * len(response),
            response_text="",
            stop_reason=StopReason.END_OF_TURN,
            action="",
            is_action_valid=True,
            reward=reward if turn_index == num_turns - 1 else 0.0,
        )
        turns.append(turn)
    return turns


def make_group(group_id, rewards=(0.0, 1.0), **item):
    return [
        make_item(group_id, i, reward=reward, group_size=len(rewards), **item)
        for i, reward in enumerate(rewards)
    ]


def make_bus(config):
    return MemoryBus(config.stream_consumers)


async def send(bus, *items):
    """Publish items on the learner's stream: `scored`, or `trajectories` if they have no score."""
    for item in items:
        if item.score is None:
            await bus.publish(Stream.TRAJECTORIES, [codec.encode_trajectory(item.trajectory)])
        else:
            await bus.publish(Stream.SCORED, [codec.encode_scored_trajectory(item)])


async def issue(bus, numbers, make=make_group, **item):
    """Groups as they reach the learner: with an account, on its stream. Returns their ids."""
    group_ids = [format_group_id(number) for number in numbers]
    for outcome in (GroupOutcome.ISSUED, GroupOutcome.GENERATED):
        await bus.commit(
            {}, transitions=[LedgerEvent(RUN, group_id, outcome, 2, 0) for group_id in group_ids]
        )
    await send(bus, *[episode for group_id in group_ids for episode in make(group_id, **item)])
    return group_ids


async def read_account(bus):
    """The account's numbers that are not 0; it must have no gap."""
    account = await bus.read_ledger()
    assert account.find_gap() == 0
    return {name: count for name, count in account.counts().items() if count}


async def read_journal(bus):
    """All ledger events not read before, in order."""
    entries = await bus.read(Stream.LEDGER, ConsumerGroup.GATEWAY, "gateway", 1000)
    await bus.acknowledge(entries)
    return [codec.decode_ledger_event(entry.payload) for entry in entries]


async def read_ledger(bus):
    """(group id, outcome) of all events not read before, in order."""
    return [(event.group_id, str(event.outcome)) for event in await read_journal(bus)]


async def count_pending(bus, stream=Stream.SCORED):
    return (await bus.stream_lag(stream, ConsumerGroup.LEARNER)).num_pending


class CountingModel:
    vocabulary_size = VOCABULARY


class CountingTrainer:
    """Weights are the number of updates done; remembers which groups each update saw.

    Steps of groups whose ids are in `poisoned` are skipped, each group having a step of its own.
    """

    poisoned: tuple[str, ...] = ()

    def __init__(self, num_updates=0):
        self.model = CountingModel()
        self.weights = torch.tensor([float(num_updates)])
        self.batches = []

    def update(self, groups, *, update_index, policy_version):
        self.batches.append([items[0].trajectory.group_id for items, _ in groups])
        skipped = [group_id in self.poisoned for group_id in self.batches[-1]]
        refused = frozenset(place for place, is_skipped in enumerate(skipped) if is_skipped)
        if all(skipped):
            return UpdateResult({}, {}, tuple(skipped), refused)
        self.weights = self.weights + 1
        measured = {"loss": 0.0, "gate_mean": 0.5, "teacher_gap_abs": 0.0}
        return UpdateResult(measured, self.export(), tuple(skipped), refused)

    def export(self):
        return {"w": self.weights.clone()}

    def save(self, directory):
        (directory / "weights.safetensors").write_bytes(self.weights.numpy().tobytes())

    def stop(self): ...
