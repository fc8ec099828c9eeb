"""Records of the wire as plain JSON. Texts in them are data: whoever shows them escapes them."""

from __future__ import annotations

import base64
import dataclasses
import math
from collections.abc import Callable
from typing import Any

from tokenizers import Tokenizer

from sdar.bus.protocol import DeadLetter
from sdar.contracts import codec
from sdar.contracts.errors import SdarError
from sdar.contracts.streams import Stream
from sdar.contracts.types import ScoredTrajectory, Turn

_DESCRIBED = (
    "run_id",
    "group_id",
    "trajectory_id",
    "attempt",
    "episode_index",
    "is_success",
    "duration_s",
)
_DESCRIBED_OF_TEACHER = (
    "teacher_version",
    "skill_ids",
    "num_specific_skills",
    "skill_library_hash",
    "template_hash",
    "retrieval",
    "scorer",
)


def describe_trajectory(
    scored: ScoredTrajectory, tokenizer: Tokenizer | None = None
) -> dict[str, Any]:
    """A trajectory with its score; with a tokenizer its tokens as text too."""
    trajectory = scored.trajectory
    score = scored.score
    described = {name: getattr(trajectory, name) for name in _DESCRIBED}
    described |= {
        "task": dataclasses.asdict(trajectory.task),
        "environment": dataclasses.asdict(trajectory.environment),
        "model": dataclasses.asdict(trajectory.model),
        "sampling": dataclasses.asdict(trajectory.sampling),
        "end": str(trajectory.end),
        "episode_return": trajectory.episode_return,
        "turns": _describe_turns(scored, tokenizer),
    }
    if score is not None:
        described["teacher"] = {name: getattr(score, name) for name in _DESCRIBED_OF_TEACHER}
    return dict(replace_non_finite(described))


def _describe_turns(scored: ScoredTrajectory, tokenizer: Tokenizer | None) -> list[dict[str, Any]]:
    turns = []
    for turn in scored.trajectory.turns:
        described = _describe_turn(turn, tokenizer)
        if scored.score is not None:
            described["teacher_logprobs"] = scored.score.turn_logprobs[turn.turn_index].tolist()
        turns.append(described)
    return turns


def _describe_turn(turn: Turn, tokenizer: Tokenizer | None) -> dict[str, Any]:
    response_ids = turn.response_token_ids.tolist()
    described = {
        "turn_index": turn.turn_index,
        "messages": [dataclasses.asdict(message) for message in turn.messages],
        "response_text": turn.response_text,
        "action": turn.action,
        "is_action_valid": turn.is_action_valid,
        "reward": turn.reward,
        "reward_components": turn.reward_components,
        "stop_reason": str(turn.stop_reason),
        "num_prompt_tokens": len(turn.prompt_token_ids),
        "response_token_ids": response_ids,
        "behavior_logprobs": turn.behavior_logprobs.tolist(),
        "policy_versions": turn.policy_versions.tolist(),
    }
    if tokenizer is not None:
        # One by one, so that each text stands beside its log-prob.
        described["response_tokens"] = [
            tokenizer.decode([token], skip_special_tokens=False) for token in response_ids
        ]
    return described


def describe_letter(letter: DeadLetter) -> dict[str, Any]:
    """A dead letter with its payload, as a record where it can be read, else as base64."""
    # A letter was set aside for a reason: often nobody can read it.
    try:
        payload = replace_non_finite(PAYLOADS[letter.stream](letter.payload))
    except SdarError as error:
        return {
            "payload": None,
            "payload_error": str(error),
            "payload_base64": base64.b64encode(letter.payload).decode(),
        }
    return {"payload": payload, "payload_error": "", "payload_base64": ""}


def replace_non_finite(value: Any) -> Any:
    """The same with null in place of NaN and infinities, which JSON doesn't know."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: replace_non_finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [replace_non_finite(item) for item in value]
    return value


PAYLOADS: dict[Stream, Callable[[bytes], Any]] = {
    Stream.TASKS: lambda payload: dataclasses.asdict(codec.decode_task_group(payload)),
    Stream.TRAJECTORIES: lambda payload: describe_trajectory(
        ScoredTrajectory(codec.decode_trajectory(payload), None)
    ),
    Stream.SCORED: lambda payload: describe_trajectory(codec.decode_scored_trajectory(payload)),
    Stream.EVALUATIONS: lambda payload: describe_trajectory(
        ScoredTrajectory(codec.decode_trajectory(payload), None)
    ),
    Stream.LEDGER: lambda payload: dataclasses.asdict(codec.decode_ledger_event(payload)),
}
"""How an entry of each stream is shown; what is only followed makes no dead letters."""
