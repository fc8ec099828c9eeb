"""A corpus on disk: JSON lines as Search-R1 publishes them, checked once, then mapped.

A corpus of millions of passages takes no memory of its own: the file is mapped, and so is the table
of where its lines begin.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sdar.contracts.errors import ConfigurationError
from services.envs.search.passages import Passage

_SHOWN_CHARACTERS = 60
"""Of a wrong value, in an error."""
_EXPECTED = 'expected {"id": "17", "contents": "\\"Title\\"\\ntext"}'


def require_corpus(path: Path) -> None:
    """Raises ConfigurationError: there is no such file, or nothing in it."""
    if not path.is_file():
        problem = "does not exist"
    elif not path.stat().st_size:
        problem = "is empty"
    else:
        return
    raise ConfigurationError(
        f"Corpus {path} {problem}. Give a file of JSON lines with id and contents, or make one: "
        "sdar env generate search DIRECTORY."
    )


def iterate_corpus(path: Path) -> Iterator[tuple[int, Passage]]:
    """Every passage with the byte at which its line begins; blank lines are none.

    Raises:
        ConfigurationError: a line that is no passage.
    """
    require_corpus(path)
    offset = 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield offset, parse_passage(line, path, number)
            offset += len(line)


def parse_passage(line: bytes, path: Path, number: int) -> Passage:
    """The passage of one line.

    Raises:
        ConfigurationError: not JSON, not an object, no id, or no contents.
    """
    try:
        entry: Any = json.loads(line)
    except ValueError as error:
        raise _build_line_error(path, number, f" is not JSON ({error})") from error
    if not isinstance(entry, dict):
        raise _build_line_error(path, number, f" is {_show(entry)}")

    passage_id = entry.get("id")
    contents = entry.get("contents")
    # A bool is an int to Python, and no id.
    is_id = isinstance(passage_id, str | int) and not isinstance(passage_id, bool)
    if not is_id or passage_id == "":
        raise _build_line_error(path, number, f": id is {_show(passage_id)}")
    if not isinstance(contents, str) or not contents.strip():
        raise _build_line_error(path, number, f": contents is {_show(contents)}")
    return Passage(str(passage_id), contents)


def _build_line_error(path: Path, number: int, problem: str) -> ConfigurationError:
    return ConfigurationError(f"Corpus {path} line {number}{problem}; {_EXPECTED}. Correct it.")


class Corpus:
    """Passages by their place in the file.

    `offsets` are the bytes at which their lines begin, in order.
    """

    def __init__(self, path: Path, offsets: npt.NDArray[np.int64]) -> None:
        self._path = path
        self._offsets = offsets
        with path.open("rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int) -> Passage:
        # The offsets were made when the file was checked; a line that is no passage now was changed
        # since, and raises.
        start = int(self._offsets[index])
        end = self._bytes.find(b"\n", start)
        if end < 0:
            # The last line may do without a line break.
            end = len(self._bytes)
        return parse_passage(self._bytes[start:end], self._path, index + 1)


def open_corpus(path: Path) -> Corpus:
    """The corpus, every line checked. Raises ConfigurationError."""
    offsets = [offset for offset, _ in iterate_corpus(path)]
    return Corpus(path, np.array(offsets, dtype=np.int64))


def _show(value: object) -> str:
    shown = json.dumps(value, ensure_ascii=False)
    if len(shown) <= _SHOWN_CHARACTERS:
        return shown
    return f"{shown[:_SHOWN_CHARACTERS]}..."
