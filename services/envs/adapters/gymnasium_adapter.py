"""Any Gymnasium environment as a text environment: numbers become text, text becomes actions."""

from __future__ import annotations

import difflib
import inspect
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from sdar.contracts.errors import ConfigurationError
from sdar.environments.base import Observation, StepResult
from services.envs.adapters.seeded import (
    SeededEnvironment,
    find_action,
    format_facts,
    format_value,
    parse_json,
)

DEFAULT_MAX_TURNS = 200
"""For environments that register no limit of their own."""
MAX_LISTED_ACTIONS = 64
MAX_LISTED_CHARACTERS = 128
MAX_NUMBERS = 1024
"""Numbers of an observation that are still written out."""
NUM_DECIMALS = 4
"""In numbers of observations: the last digits of floats differ between machines."""

_COLOURS = ("black", "red", "green", "yellow", "blue", "magenta", "cyan", "white")
# A text between a terminal's code for a colour and the code that ends it.
_COLOURED = re.compile(
    r"\x1b\[(?:\d*;)*?[34](?P<colour>[0-7])(?:;\d*)*m(?P<text>.*?)\x1b\[0m", re.DOTALL
)
# From the first of these headings of a docstring on it speaks to programmers.
_NOT_FOR_PLAYERS = re.compile(
    r"^#+ (?:Arguments|Information|References|Version History)\b.*", re.DOTALL | re.MULTILINE
)


class GymnasiumEnvironment(SeededEnvironment):
    """Any registered Gymnasium environment whose actions can be written down.

    Rewards are the environment's. An action outside its space is invalid: it uses a turn and does
    not reach the environment. Solved means, in this order: what info["is_success"] says; a return
    of at least the registered reward threshold; an end by the environment's own rule with a
    positive last reward.

    Args:
        id: as `gymnasium.make` takes it, also `module:Id-v0` for a module that registers it.
        num_tasks: of the train split; a task is a seed.
        max_turns: 0 for the environment's own limit, or 200 where it has none.
    """

    name = "gymnasium"

    def __init__(self, *, id: str, num_tasks: int = 1000, max_turns: int = 0) -> None:
        if type(max_turns) is not int or max_turns < 0:
            raise ConfigurationError(
                f"Option max_turns of gymnasium is {max_turns!r}, expected an integer of at least "
                "0."
            )
        self._facts = _inspect(str(id))
        super().__init__(num_tasks=num_tasks, game=self._facts.id)
        self.version = f"2/{self._facts.id}/gymnasium-{gymnasium.__version__}"
        self.instructions = self._facts.instructions
        written = describe_space(self._facts.action_space)
        self.action_format = f"{written}, alone or in <action> tags."
        self.max_turns = max_turns or self._facts.max_turns
        self._env: gymnasium.Env[Any, Any] | None = None
        self._return = 0.0
        self._admissible_actions: tuple[str, ...] = ()

    def reset(self, task_id: str, seed: int) -> Observation:
        seed = self.compute_seed(task_id, seed)
        self.close()
        self._env = self._facts.make()
        self._return = 0.0
        seen, info = self._env.reset(seed=seed)
        return self._observe(seen, info)

    def step(self, text: str) -> StepResult:
        written = find_action(text)
        action = parse_action(self._facts.action_space, written)
        if action is None:
            return self._refuse(written)

        # Converted: environments return numpy's numbers and truths as well as Python's.
        seen, given, terminated, truncated, info = self._playing().step(action)
        reward = float(given)
        is_terminated = bool(terminated)
        is_over = is_terminated or bool(truncated)
        self._return += reward
        return StepResult(
            observation=self._observe(seen, info),
            reward=reward,
            terminated=is_terminated,
            truncated=is_over and not is_terminated,
            action=written,
            is_success=is_over and self._is_solved(reward, is_terminated, info),
            reward_components={"return": self._return} if is_over else {},
        )

    def close(self) -> None:
        if self._env is not None:
            self._env.close()
            self._env = None

    def _playing(self) -> gymnasium.Env[Any, Any]:
        if self._env is None:
            raise RuntimeError("An environment is stepped between reset and close.")
        return self._env

    def _refuse(self, written: str) -> StepResult:
        wanted = f"{self.action_format[0].lower()}{self.action_format[1:]}"
        text = f"That is no action here. Answer with {wanted}"
        return StepResult(
            Observation(text, self._admissible_actions), action=written, is_action_valid=False
        )

    def _observe(self, seen: Any, info: dict[str, Any]) -> Observation:
        parts = []
        if self._facts.has_text_rendering:
            parts.append(_name_colours(str(self._playing().render())).strip("\n"))
        if self._facts.is_observation_written:
            parts.append(format_value(to_plain(seen)))
        self._admissible_actions = _list_actions(self._facts.action_space, info.get("action_mask"))
        return Observation(
            "\n\n".join(parts), self._admissible_actions, format_facts(to_plain(info))
        )

    def _is_solved(self, reward: float, terminated: bool, info: dict[str, Any]) -> bool:
        if "is_success" in info:
            return bool(info["is_success"])
        if self._facts.reward_threshold is not None:
            return self._return >= self._facts.reward_threshold
        return terminated and reward > 0


@dataclass(frozen=True, slots=True)
class _Facts:
    """What is known of an environment before it is played; found once in a process."""

    id: str
    action_space: spaces.Space[Any]
    has_text_rendering: bool
    is_observation_written: bool
    instructions: str
    max_turns: int
    reward_threshold: float | None

    def make(self) -> gymnasium.Env[Any, Any]:
        return gymnasium.make(
            self.id,
            render_mode="ansi" if self.has_text_rendering else None,
            disable_env_checker=True,
        )


@lru_cache
def _inspect(id: str) -> _Facts:
    try:
        env = gymnasium.make(id, disable_env_checker=True)
    except gymnasium.error.UnregisteredEnv as error:
        known = "that `gymnasium.pprint_registry()` lists"
        nearest = difflib.get_close_matches(id, gymnasium.registry, n=5, cutoff=0.5)
        if nearest:
            known = f"of {', '.join(nearest)}"
        raise ConfigurationError(
            f"Gymnasium has no {id!r}. Use one {known}, or module:Id-v0 for a module that "
            "registers it."
        ) from error
    except (gymnasium.error.Error, ImportError) as error:
        raise ConfigurationError(
            f"Gymnasium cannot make {id!r}. Take another id, or install what it needs: {error}"
        ) from error
    try:
        return _collect_facts(env)
    finally:
        env.close()


def _collect_facts(env: gymnasium.Env[Any, Any]) -> _Facts:
    spec = env.spec
    if spec is None:
        raise ConfigurationError(
            f"{env} has no spec. Make it by gymnasium.make, or register its class."
        )
    # For its error only: an environment whose actions cannot be written is refused now.
    describe_space(env.action_space)

    render_modes = env.metadata.get("render_modes") or ()
    has_text_rendering = "ansi" in render_modes
    num_numbers = _count_numbers(env.observation_space)
    is_observation_written = num_numbers <= MAX_NUMBERS
    if not has_text_rendering and not is_observation_written:
        raise ConfigurationError(
            f"{spec.id} shows {num_numbers:,} numbers, at most {MAX_NUMBERS:,} can be written as "
            "text. Give it an ansi rendering or a wrapper with a smaller observation."
        )

    text = inspect.cleandoc(type(env.unwrapped).__doc__ or "")
    return _Facts(
        id=spec.id,
        action_space=env.action_space,
        has_text_rendering=has_text_rendering,
        is_observation_written=is_observation_written,
        instructions=_NOT_FOR_PLAYERS.sub("", text).strip(),
        max_turns=spec.max_episode_steps or DEFAULT_MAX_TURNS,
        reward_threshold=spec.reward_threshold,
    )


def describe_space(space: spaces.Space[Any]) -> str:
    """What to write for an action of a space, without a full stop.

    Raises:
        ConfigurationError: its actions cannot be written.
    """
    match space:
        case spaces.Discrete():
            return f"An integer of {space.start} to {space.start + space.n - 1}"
        case spaces.Text():
            characters = "its characters"
            if len(space.character_set) <= MAX_LISTED_CHARACTERS:
                characters = f"the characters {''.join(sorted(space.character_set))}"
            return f"A text of {space.min_length} to {space.max_length} of {characters}"
        case spaces.Box() | spaces.MultiDiscrete() | spaces.MultiBinary():
            kind = "integers" if np.issubdtype(space.dtype, np.integer) else "numbers"
            return f"A JSON list of {kind} of shape {list(space.shape)}{_describe_bounds(space)}"
        case spaces.Dict():
            parts = [f"{key}: {describe_space(part)}" for key, part in space.items()]
            return f"A JSON object ({'; '.join(parts)})"
        case spaces.Tuple():
            return f"A JSON list ({'; '.join(map(describe_space, space))})"
    raise ConfigurationError(
        f"Actions of {type(space).__name__} cannot be written as text. Use an environment with "
        "Discrete, MultiDiscrete, MultiBinary, Box, Text, Dict or Tuple actions, or wrap its "
        "actions."
    )


def _describe_bounds(space: spaces.Space[Any]) -> str:
    match space:
        case spaces.Box():
            return f", at least {_write_bound(space.low)}, at most {_write_bound(space.high)}"
        case spaces.MultiDiscrete():
            last = space.start + space.nvec - 1
            return f", at least {_write_bound(space.start)}, at most {_write_bound(last)}"
    return ", each 0 or 1"


def _write_bound(bound: np.ndarray) -> str:
    """One number where the bound is the same everywhere."""
    is_one = bound.size > 0 and np.all(bound == bound.flat[0])
    return str(to_plain(bound.flat[0] if is_one else bound))


def parse_action(space: spaces.Space[Any], written: str) -> Any:
    """The action that a text writes, None if it is not one of the space."""
    action = written if isinstance(space, spaces.Text) else _to_member(space, parse_json(written))
    if action is None or not space.contains(action):
        return None
    return action


def _to_member(space: spaces.Space[Any], value: Any) -> Any:
    """The value of a JSON text in the types of a space, None if it cannot be one.

    Whether it is a member is for the space itself to judge.
    """
    match space:
        case spaces.Discrete():
            is_whole = type(value) is int and space.start <= value < space.start + space.n
            return np.int64(value) if is_whole else None
        case spaces.Text():
            return value if isinstance(value, str) else None
        case spaces.Dict():
            if not isinstance(value, dict) or value.keys() != space.keys():
                return None
            return {key: _to_member(part, value[key]) for key, part in space.items()}
        case spaces.Tuple():
            if not isinstance(value, list) or len(value) != len(space):
                return None
            return tuple(map(_to_member, space, value))
    return _to_array(space, value)


def _to_array(space: spaces.Space[Any], value: Any) -> np.ndarray | None:
    try:
        array = np.asarray(value)
    except ValueError:
        # A ragged list.
        return None
    # Integers with and without a sign, and floats.
    if array.dtype.kind not in "iuf" or array.shape != space.shape:
        return None

    dtype = np.dtype(space.dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        converted = array.astype(dtype)
    # A fraction for an integer, or a number out of its range, would be played as another number.
    is_exact = dtype.kind == "f" or np.array_equal(converted, array)
    if not is_exact or not np.all(np.isfinite(converted)):
        return None
    return converted


def to_plain(value: Any) -> Any:
    """An observation as JSON holds it, floats rounded."""
    match value:
        case np.ndarray() | np.generic():
            return to_plain(value.tolist())
        case bool() | int() | str() | None:
            return value
        case float():
            # Adding zero makes -0.0 zero.
            return round(value, NUM_DECIMALS) + 0.0
        case dict():
            return {str(key): to_plain(part) for key, part in value.items()}
        case list() | tuple():
            return [to_plain(part) for part in value]
    return str(value)


def _count_numbers(space: spaces.Space[Any]) -> int:
    match space:
        case spaces.Dict():
            return sum(map(_count_numbers, space.values()))
        case spaces.Tuple():
            return sum(map(_count_numbers, space))
        case spaces.Box() | spaces.MultiDiscrete() | spaces.MultiBinary():
            return int(np.prod(space.shape))
    return 1


def _list_actions(space: spaces.Space[Any], mask: Any) -> tuple[str, ...]:
    """The actions of a small Discrete space, those of the mask where the environment gives one."""
    if not isinstance(space, spaces.Discrete) or space.n > MAX_LISTED_ACTIONS:
        return ()
    indices = [index for index in range(space.n) if mask is None or mask[index]]
    return tuple(str(space.start + index) for index in indices)


def _name_colours(text: str) -> str:
    """Terminal colours as tags: in a rendering they often are the only sign of who is where."""
    return _COLOURED.sub(_write_tag, text)


def _write_tag(found: re.Match[str]) -> str:
    colour = _COLOURS[int(found["colour"])]
    return f"<{colour}>{found['text']}</{colour}>"
