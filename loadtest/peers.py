"""The ways in which the peers of measurements do things, in the fewest lines that do the same work.

Pickle appears here and nowhere else in this repository: it is what the peer puts on the wire, and
unpickling what a stranger may have written runs the stranger's code. These bytes never leave the
measurement that made them.
"""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import redis

from sdar.contracts.types import Trajectory, Turn

IGNORED_LABEL = -100


class PickleStream:
    """PipelineRL's Redis stream: a pickle and an index per XADD, XREAD COUNT 1, no XACK."""

    def __init__(self, url: str, key: str) -> None:
        self._redis = redis.Redis.from_url(url)
        self._key = key
        self._num_written = 0
        self._last_id = "0"

    def write(self, content: Any) -> None:
        fields: dict[Any, Any] = {"index": self._num_written, "data": pickle.dumps(content)}
        self._redis.xadd(self._key, fields, maxlen=1_000_000, approximate=True)
        self._num_written += 1

    def read(self) -> Any:
        """The next entry; there must be one."""
        reply: Any = self._redis.xread({self._key: self._last_id}, count=1, block=100)
        # One stream was asked for one entry: [(key, [(id, fields)])].
        [(_, [(self._last_id, fields)])] = reply
        return pickle.loads(fields[b"data"])  # noqa: S301  our own bytes, written a moment ago

    def clear(self) -> None:
        self._redis.delete(self._key)
        self._num_written = 0
        self._last_id = "0"

    def close(self) -> None:
        self._redis.close()


def count_pickled_bytes(content: Any) -> int:
    return len(pickle.dumps(content))


def to_training_texts(trajectory: Trajectory) -> list[dict[str, Any]]:
    """A trajectory as PipelineRL holds it: for each model call plain lists with all its prompt."""
    return [_to_training_text(trajectory, turn) for turn in trajectory.turns]


def _to_training_text(trajectory: Trajectory, turn: Turn) -> dict[str, Any]:
    prompt = turn.prompt_token_ids.tolist()
    response = turn.response_token_ids.tolist()
    contents = [message.content for message in turn.messages]
    return {
        "text": "\n".join(contents) + turn.response_text,
        "n_predicted": len(turn.response_text),
        "reward": trajectory.episode_return,
        "logprobs": turn.behavior_logprobs.tolist(),
        "ref_logprobs": [],
        "input_ids": prompt + response,
        "labels": [IGNORED_LABEL] * len(prompt) + response,
        "group_id": trajectory.group_id,
        "finished": True,
        "prompt_tokens": len(prompt),
        "output_tokens": len(response),
        "visual_features": None,
        "metadata": {
            "model_version": trajectory.max_policy_version,
            "rollout_index": trajectory.episode_index,
            "step_index": turn.turn_index,
        },
    }


def copy_durably(source: Path, target: Path) -> None:
    """Copy a file and wait for the disk: the least that handing weights over can cost."""
    shutil.copyfile(source, target)
    descriptor = os.open(target, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
