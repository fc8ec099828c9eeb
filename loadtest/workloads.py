"""Inputs of measurements: episodes of the household's demo, and some of a large model's lengths.

Everything is drawn from a seed; two calls with the same arguments give the same trajectories.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from loadtest.page import ROOT
from sdar.contracts.types import (
    ChatMessage,
    EnvironmentIdentity,
    EpisodeEnd,
    ModelIdentity,
    Purpose,
    SamplingParameters,
    StopReason,
    Task,
    Trajectory,
    Turn,
)
from sdar.model.chat import ChatTokenizer
from services.envs.household import HouseholdEnvironment
from services.envs.household.demonstrations import list_demonstration
from services.envs.household.game import HouseholdGame, parse_task_id

SEED = 0
RUN_ID = "bench"
MODEL_PATH = ROOT / "examples" / "models" / "household-tiny"
RUN_FILE = ROOT / "examples" / "household.yaml"


@dataclass(frozen=True, slots=True)
class Script:
    """What an expert saw and did: `observations` begins before `actions` and is as long."""

    task: Task
    observations: tuple[str, ...]
    actions: tuple[str, ...]


def record_scripts(num_tasks: int) -> list[Script]:
    """The expert's game in each of the first training tasks: 2 to 6 turns."""
    scripts = []
    for task in HouseholdEnvironment().list_tasks("train")[:num_tasks]:
        parsed = parse_task_id(task.task_id)
        if parsed is None:
            raise ValueError(f"The household does not know its own task {task.task_id}.")

        game = HouseholdGame(parsed)
        actions = list_demonstration(parsed, parsed.procedure)
        observations = [game.first_observation, *map(game.act, actions)]
        # The last observation ends the episode, and nobody answers it.
        scripts.append(Script(task, tuple(observations[:-1]), tuple(actions)))
    return scripts


def build_household_groups(
    num_groups: int, group_size: int, model_path: Path = MODEL_PATH
) -> list[list[Trajectory]]:
    """Groups with the token counts of the demo's batches; a random half of episodes succeeds."""
    chat = ChatTokenizer(model_path)
    rng = np.random.default_rng(SEED)

    groups: list[list[Trajectory]] = []
    for number, script in enumerate(record_scripts(num_groups)):
        group_id = f"group-{number}"
        group = [
            _play_script(chat, script, group_id, index, group_size, rng)
            for index in range(group_size)
        ]
        groups.append(group)
    return groups


def _play_script(
    chat: ChatTokenizer,
    script: Script,
    group_id: str,
    index: int,
    group_size: int,
    rng: np.random.Generator,
) -> Trajectory:
    turns: list[Turn] = []
    context = np.empty(0, np.int32)
    reward = float(rng.integers(2))
    pairs = zip(script.observations, script.actions, strict=True)
    for number, (observation, action) in enumerate(pairs):
        messages = (ChatMessage("user", observation),)
        if turns:
            delta = chat.render_delta(messages, ended_by=chat.stops.closing_id)
        else:
            delta = chat.render_fresh(messages)
        prompt = np.concatenate([context, delta])

        tokens = chat.tokenizer.encode(action, add_special_tokens=False)
        response = np.array([*tokens, chat.stops.closing_id], np.int32)

        is_last = number == len(script.actions) - 1
        reward_of_turn = reward if is_last else 0.0
        turns.append(_build_turn(number, prompt, response, messages, action, reward_of_turn, rng))
        context = np.concatenate([prompt, response])
    return _build_trajectory(script.task, group_id, index, group_size, turns)


@dataclass(frozen=True, slots=True)
class AgentShape:
    """Token counts of an episode.

    The defaults are those of a household benchmark in text (ALFWorld: at most 50 steps, each
    listing the admissible actions) played by a model that reasons before it acts.
    """

    num_turns: int = 20
    num_first_tokens: int = 400
    num_observation_tokens: int = 100
    num_response_tokens: int = 120
    vocabulary_size: int = 151_936
    characters_per_token: int = 4


def build_agent_groups(
    num_groups: int, group_size: int, shape: AgentShape
) -> list[list[Trajectory]]:
    """Groups of episodes of a large model's lengths, of random tokens and text."""
    rng = np.random.default_rng(SEED)

    def draw_group(group_id: str) -> list[Trajectory]:
        return [_draw_episode(group_id, i, group_size, shape, rng) for i in range(group_size)]

    return [draw_group(f"group-{number}") for number in range(num_groups)]


def _draw_episode(
    group_id: str, index: int, group_size: int, shape: AgentShape, rng: np.random.Generator
) -> Trajectory:
    turns: list[Turn] = []
    context = np.empty(0, np.int32)
    for number in range(shape.num_turns):
        num_new = shape.num_observation_tokens if turns else shape.num_first_tokens
        prompt = np.concatenate([context, _draw_tokens(num_new, shape, rng)])
        # Responses differ in length, as a model's do.
        least = shape.num_response_tokens // 2
        most = 3 * shape.num_response_tokens // 2
        response = _draw_tokens(int(rng.integers(least, most)), shape, rng)
        messages = (ChatMessage("user", _draw_text(num_new, shape, rng)),)
        text = _draw_text(len(response), shape, rng)
        turns.append(_build_turn(number, prompt, response, messages, text, 0.0, rng))
        context = np.concatenate([prompt, response])
    task = Task("agent", "train", group_id, "heat", "put a heated mug in the cabinet .", number)
    return _build_trajectory(task, group_id, index, group_size, turns)


def _draw_tokens(count: int, shape: AgentShape, rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, shape.vocabulary_size, count, dtype=np.int32)


def _draw_text(num_tokens: int, shape: AgentShape, rng: np.random.Generator) -> str:
    num_letters = num_tokens * shape.characters_per_token
    letters = rng.integers(ord("a"), ord("z") + 1, num_letters, dtype=np.uint8)
    return letters.tobytes().decode("ascii")


def _build_turn(
    number: int,
    prompt: np.ndarray,
    response: np.ndarray,
    messages: tuple[ChatMessage, ...],
    text: str,
    reward: float,
    rng: np.random.Generator,
) -> Turn:
    return Turn(
        turn_index=number,
        prompt_token_ids=prompt,
        messages=messages,
        extends_previous=number > 0,
        response_token_ids=response,
        behavior_logprobs=-rng.exponential(0.5, len(response)).astype(np.float32),
        policy_versions=np.zeros(len(response), np.int32),
        response_text=text,
        stop_reason=StopReason.END_OF_TURN,
        action=text,
        is_action_valid=True,
        reward=reward,
        reward_components={"success": reward},
    )


def _build_trajectory(
    task: Task, group_id: str, index: int, group_size: int, turns: Sequence[Turn]
) -> Trajectory:
    return Trajectory(
        run_id=RUN_ID,
        group_id=group_id,
        trajectory_id=f"{group_id}.{index}.a0",
        attempt=0,
        episode_index=index,
        group_size=group_size,
        task=task,
        purpose=Purpose.TRAIN,
        environment=EnvironmentIdentity("household", "1"),
        model=ModelIdentity("bench", "0" * 16),
        sampling=SamplingParameters(1.0, 1.0, 512),
        turns=tuple(turns),
        end=EpisodeEnd.TERMINATED,
        is_success=turns[-1].reward > 0,
        duration_s=1.0,
    )
