"""Finds the games in a directory of ALFWorld games: its layout, which count, index and order.

The layout is json_2.1.1's: SPLIT/TASK FOLDER/TRIAL FOLDER/{traj_data.json, game.tw-pddl}. A task's
id is the path of its trial folder from the directory. Generated games come with an index; for
others it is made once and kept in the user's cache. Needs no engine.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from sdar.contracts.errors import ConfigurationError, EnvironmentFailedError
from sdar.process.settings import load_settings

SPLITS = ("train", "valid_seen", "valid_unseen")
TASK_TYPES = (
    "pick_and_place_simple",
    "look_at_obj_in_light",
    "pick_clean_then_place_in_recep",
    "pick_heat_then_place_in_recep",
    "pick_cool_then_place_in_recep",
    "pick_two_obj_and_place",
)
GAME_FILE = "game.tw-pddl"
TRAJECTORY_FILE = "traj_data.json"
INDEX_FILE = "index.json"
# Part of the cached index's name: raise it when the rules for what counts, or the fields of an
# entry, change.
_INDEX_VERSION = 1
_GAME_TEXTS = ("pddl_domain", "grammar", "pddl_problem")
# As upstream: tasks with movable receptacles or slices are no part of the text game.
_UNSUPPORTED = ("movable", "Sliced")
_TASK_RULE = re.compile(r'("task":\s*\[\s*\{\s*"rhs":\s*)("(?:[^"\\]|\\.)*")(?=\s*\}\s*\])')
_GOAL_PREFIX = "Your task is to: "


@dataclass(frozen=True, slots=True)
class GameEntry:
    """One line of an index.

    `num_receptacles` is 0 where it is not known, as of public games.
    """

    task_id: str
    task_type: str
    description: str
    num_receptacles: int = 0

    @property
    def split(self) -> str:
        return self.task_id.partition("/")[0]


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file.

    Raises:
        ConfigurationError: it cannot be read, or is no JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"{path} cannot be read: {error}. Replace it by a sound file.", path=path
        ) from error
    if not isinstance(content, dict):
        raise ConfigurationError(
            f"{path} holds a {type(content).__name__}, expected a JSON object. Replace it.",
            path=path,
        )
    return content


def read_game(path: Path) -> dict[str, Any]:
    """The content of a game.tw-pddl, with its three texts.

    Raises:
        EnvironmentFailedError: the file is no game.
    """
    try:
        content = read_json(path)
        for key in _GAME_TEXTS:
            _require_text(content, key, path)
    except ConfigurationError as error:
        raise EnvironmentFailedError(error.message, path=path) from error
    return content


def _require_text(content: Mapping[str, Any], key: str, path: Path) -> str:
    value = content.get(key)
    if not isinstance(value, str):
        raise ConfigurationError(
            f"{path}: {key!r} is {value!r:.80}, expected a text. Replace the file.", path=path
        )
    return value


def find_goal_template(grammar: str) -> str:
    """The template of a game's task, `Your task is to: put a hot egg in fridge.`

    Raises:
        ValueError: the grammar does not hold exactly one.
    """
    found = _TASK_RULE.findall(grammar)
    if len(found) != 1:
        raise ValueError(
            f'the grammar has {len(found)} rules of the form "task": [{{"rhs": "..."}}], expected 1'
        )
    return str(json.loads(found[0][1]))


def replace_goal_template(grammar: str, template: str) -> str:
    """The grammar with another task."""
    return _TASK_RULE.sub(lambda found: found[1] + json.dumps(template), grammar)


def describe_goal(grammar: str, path: Path) -> str:
    """The task in the engine's words, without `Your task is to: `."""
    try:
        return find_goal_template(grammar).removeprefix(_GOAL_PREFIX)
    except ValueError as error:
        raise ConfigurationError(f"{path}: {error}. Replace the file.", path=path) from error


@lru_cache(maxsize=8)
def load_entries(directory: Path) -> Mapping[str, tuple[GameEntry, ...]]:
    """The games of each split, in an order that never changes.

    Every prefix of a split is balanced over the types.

    Raises:
        ConfigurationError: the directory holds no games, or a file in it is damaged.
    """
    if not any((directory / split).is_dir() for split in SPLITS):
        raise ConfigurationError(
            f"{directory} holds no ALFWorld games: expected one of the folders "
            f"{', '.join(SPLITS)}. Make games with `sdar env generate alfworld DIRECTORY`, or "
            "fetch the public ones with `alfworld-download` and name their json_2.1.1 folder in "
            "the option data_dir.",
            directory=directory,
        )
    index = directory / INDEX_FILE
    entries = read_index(index) if index.exists() else _load_cached_index(directory)
    ordered = {}
    for split in SPLITS:
        ordered[split] = order_by_type(entry for entry in entries if entry.split == split)
    return ordered


def order_by_type(entries: Iterable[GameEntry]) -> tuple[GameEntry, ...]:
    """One game of each type in turn, within a type by a hash of the id.

    By their names games would be sorted by object, which is not balanced.
    """
    by_hash = sorted(entries, key=lambda entry: hashlib.sha256(entry.task_id.encode()).digest())
    by_type: dict[str, list[GameEntry]] = {kind: [] for kind in TASK_TYPES}
    for entry in by_hash:
        if entry.task_type in by_type:
            by_type[entry.task_type].append(entry)

    # None stands in for games of a type that has no more of them.
    in_turn = itertools.chain.from_iterable(itertools.zip_longest(*by_type.values()))
    return tuple(entry for entry in in_turn if entry is not None)


def write_index(path: Path, entries: Sequence[GameEntry]) -> None:
    """Write an index whole or not at all: another process may be doing the same."""
    lines = ",\n".join(json.dumps(asdict(entry)) for entry in entries)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(f'{{"games": [\n{lines}\n]}}\n', encoding="utf-8")
    part.replace(path)


def read_index(path: Path) -> list[GameEntry]:
    games = read_json(path).get("games") or []
    try:
        entries = [GameEntry(**game) for game in games]
    except TypeError as error:
        raise ConfigurationError(
            f"Index {path} has a damaged entry: {error}. Delete the file.", path=path
        ) from error
    for entry in entries:
        is_text = isinstance(entry.task_id, str) and isinstance(entry.description, str)
        if not is_text or entry.split not in SPLITS or entry.task_type not in TASK_TYPES:
            raise ConfigurationError(
                f"Index {path} lists {entry}, of no known split or task type. Delete the file.",
                path=path,
            )
    return entries


def _load_cached_index(directory: Path) -> list[GameEntry]:
    """The index from the user's cache, made now if there is none.

    Its name is a hash of every file's path, size and time, so changed games make a new index.
    """
    games = sorted(_find_games(directory))
    name = f"{_hash_state(directory, games)}.json"
    path = load_settings().cache.expanduser() / "alfworld" / name
    if path.exists():
        return read_index(path)

    read = [_read_entry(directory, game) for game in games]
    entries = [entry for entry in read if entry is not None]
    write_index(path, entries)
    return entries


def _hash_state(directory: Path, games: Iterable[Path]) -> str:
    state = hashlib.sha256(f"{_INDEX_VERSION} {directory.resolve()}".encode())
    for game, name in itertools.product(games, (GAME_FILE, TRAJECTORY_FILE)):
        file = game.with_name(name)
        status = file.stat()
        line = f"{file.relative_to(directory)} {status.st_size} {status.st_mtime_ns}\n"
        state.update(line.encode())
    return state.hexdigest()[:32]


def _find_games(directory: Path) -> Iterator[Path]:
    """The game of every trial folder with both files, less those upstream leaves out by path."""
    for split in SPLITS:
        for folder, _, files in os.walk(directory / split):
            relative = str(Path(folder).relative_to(directory))
            is_left_out = any(word in relative for word in _UNSUPPORTED)
            if {GAME_FILE, TRAJECTORY_FILE} <= set(files) and not is_left_out:
                yield Path(folder) / GAME_FILE


def _read_entry(directory: Path, game: Path) -> GameEntry | None:
    """The entry of a game.

    None for one that upstream skips: of another task type, or not known to be solvable.
    """
    trajectory = game.with_name(TRAJECTORY_FILE)
    task_type = _require_text(read_json(trajectory), "task_type", trajectory)
    content = read_json(game)
    if task_type not in TASK_TYPES or not content.get("solvable"):
        return None
    description = describe_goal(_require_text(content, "grammar", game), game)
    return GameEntry(game.parent.relative_to(directory).as_posix(), task_type, description)
