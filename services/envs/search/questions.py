"""Question sets in Parquet files, as Search-R1 and its relatives publish them.

Read of each row: `data_source`, `reward_model.ground_truth.target`, and the question, from the
first of `env_kwargs.question`, `extra_info.question`, `question`, or the last user message of
`prompt` (what follows its last "Question:").
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sdar.contracts.errors import ConfigurationError
from sdar.contracts.types import Task

# Columns, by the names that lead to them.
_SOURCE = ("data_source",)
_TARGET = ("reward_model", "ground_truth", "target")
_QUESTIONS = (("env_kwargs", "question"), ("extra_info", "question"), ("question",))
_PROMPT = ("prompt",)
_TAG = "searchR1_"
"""Some preparations write it before the data source's name."""


class QuestionSet(Sequence[Task]):
    """The tasks of one split, made when they are asked for: 170,000 questions stay a few columns.

    Rows are interleaved by data source, so that every prefix is as balanced as it can be; a task's
    id is its row in the file.
    """

    def __init__(
        self,
        environment: str,
        split: str,
        sources: Sequence[str],
        questions: pa.Array,
        targets: pa.Array,
    ) -> None:
        self._environment = environment
        self._split = split
        self._sources = sources
        self._questions = questions
        self._targets = targets
        self._order = _interleave(sources)

    def __len__(self) -> int:
        return len(self._sources)

    @overload
    def __getitem__(self, index: int) -> Task: ...
    @overload
    def __getitem__(self, index: slice) -> list[Task]: ...
    def __getitem__(self, index: int | slice) -> Task | list[Task]:
        if isinstance(index, slice):
            return [self._task(int(row)) for row in self._order[index]]
        return self._task(int(self._order[index]))

    def __iter__(self) -> Iterator[Task]:
        return (self._task(int(row)) for row in self._order)

    def find(self, task_id: str) -> tuple[Task, tuple[str, ...]] | None:
        """The task of an id and the answers that are right, None if it is no id of this split."""
        split, _, digits = task_id.rpartition("-")
        # Their number first: Python takes long to read an integer of a million digits.
        is_number = digits.isascii() and digits.isdigit() and len(digits) <= len(str(len(self)))
        if split != self._split or not is_number:
            return None
        row = int(digits)
        # Compared as text again: "007" is another id than "7".
        if row >= len(self) or str(row) != digits:
            return None
        return self._task(row), tuple(self._targets[row].as_py())

    def _task(self, row: int) -> Task:
        return Task(
            environment=self._environment,
            split=self._split,
            task_id=f"{self._split}-{row}",
            task_type=self._sources[row],
            description=self._questions[row].as_py(),
            seed=0,
        )


def open_questions(environment: str, split: str, path: Path) -> QuestionSet:
    """The questions of a file, read once a process.

    Raises:
        ConfigurationError: not Parquet, a column is missing, or a row cannot be used.
    """
    state = path.stat()
    return _open(environment, split, path.resolve(), state.st_size, state.st_mtime_ns)


@functools.lru_cache(maxsize=8)
def _open(
    environment: str, split: str, path: Path, size_bytes: int, modified_ns: int
) -> QuestionSet:
    # Size and time are arguments so that a file that changed is read again.
    question_column, sources, questions, targets = _read_columns(path)
    if question_column == _PROMPT:
        questions = pa.array(list(map(_read_prompt, questions.to_pylist())), pa.string())
    # Some preparations write a single right answer as a text, not as a list of one.
    if _is_text(targets.type):
        lists = list(map(_to_list, targets.to_pylist()))
        targets = pa.array(lists, pa.list_(pa.string()))

    _check_texts(sources, path, _SOURCE)
    _check_texts(questions, path, question_column)
    _check_targets(targets, path)

    # One object per name, not per row.
    names = {name: name.removeprefix(_TAG) for name in pc.unique(sources).to_pylist()}
    own_sources = [names[source] for source in sources.to_pylist()]
    return QuestionSet(environment, split, own_sources, questions, targets)


def _to_list(target: str | None) -> list[str] | None:
    return None if target is None else [target]


def _read_columns(path: Path) -> tuple[Sequence[str], pa.Array, pa.Array, pa.Array]:
    """Name of the question's column; data sources, questions and right answers as they stand."""
    try:
        with pq.ParquetFile(path) as file:
            question_column = _find_question_column(file, path)
            sources = _read_column(file, path, _SOURCE)
            questions = _read_column(file, path, question_column)
            return question_column, sources, questions, _read_column(file, path, _TARGET)
    except (pa.ArrowException, OSError) as error:
        raise ConfigurationError(
            f"{path} cannot be read as Parquet: {error}. Fetch or generate it again."
        ) from error


def _find_question_column(file: pq.ParquetFile, path: Path) -> Sequence[str]:
    columns = (*_QUESTIONS, _PROMPT)
    for names in columns:
        if _has(file.schema_arrow, names):
            return names
    raise ConfigurationError(
        f"{path} has no question: none of {', '.join(map('.'.join, columns))}. Its columns are "
        f"{', '.join(file.schema_arrow.names)}."
    )


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _interleave(sources: Sequence[str]) -> npt.NDArray[np.int64]:
    """Row numbers in rounds of one row per source: sources by name, each in its own order."""
    rounds = np.empty(len(sources), dtype=np.int64)
    seen: dict[str, int] = defaultdict(int)
    for row, source in enumerate(sources):
        rounds[row] = seen[source]
        seen[source] += 1

    places = {name: place for place, name in enumerate(sorted(set(sources)))}
    by_name = np.array([places[source] for source in sources], dtype=np.int64)
    # By round, and within a round by the source's name: the last key of lexsort is the first.
    order: npt.NDArray[np.int64] = np.lexsort((by_name, rounds))
    return order


def _has(schema: pa.Schema, names: Sequence[str]) -> bool:
    fields: Any = schema
    for name in names:
        is_struct = isinstance(fields, pa.StructType | pa.Schema)
        if not is_struct or fields.get_field_index(name) < 0:
            return False
        fields = fields.field(name).type
    return True


def _read_column(file: pq.ParquetFile, path: Path, names: Sequence[str]) -> pa.Array:
    if not _has(file.schema_arrow, names):
        raise ConfigurationError(
            f"{path} has no column {'.'.join(names)}. Its columns are "
            f"{', '.join(file.schema_arrow.names)}. Give a question set as Search-R1 publishes it."
        )
    # The file names a field within a struct by its path, and returns the outermost struct.
    column = file.read(columns=[".".join(names)]).column(names[0])
    for name in names[1:]:
        column = pc.struct_field(column, name)
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def _read_prompt(messages: Any) -> str | None:
    """The question of a chat prompt, None if it has none."""
    last = None
    for message in messages or ():
        if message and message.get("role") == "user":
            last = message.get("content")
    if not last:
        return None
    _, _, question = last.rpartition("Question:")
    return str(question).strip()


def _check_texts(column: pa.Array, path: Path, names: Sequence[str]) -> None:
    if not _is_text(column.type):
        raise ConfigurationError(
            f"{path} column {'.'.join(names)} holds {column.type}, expected text."
        )
    is_bad = pc.fill_null(pc.equal(pc.utf8_trim_whitespace(column), ""), True)
    _refuse_first(is_bad, column, path, names, "expected a text that is not empty")


def _check_targets(column: pa.Array, path: Path) -> None:
    is_list = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
    if not is_list or not _is_text(column.type.value_type):
        raise ConfigurationError(
            f"{path} column {'.'.join(_TARGET)} holds {column.type}, expected lists of texts."
        )
    is_bad = pc.fill_null(pc.equal(pc.list_value_length(column), 0), True)
    _refuse_first(is_bad, column, path, _TARGET, "expected a list of right answers")

    # No list is null or empty from here on: the parents of the null elements are the bad rows.
    missing = pc.list_parent_indices(column).filter(pc.is_null(pc.list_flatten(column)))
    is_bad = pa.array(np.isin(np.arange(len(column)), missing.to_numpy(zero_copy_only=False)))
    _refuse_first(is_bad, column, path, _TARGET, "expected texts only")


def _refuse_first(
    is_bad: pa.Array, column: pa.Array, path: Path, names: Sequence[str], expected: str
) -> None:
    row = pc.index(is_bad, True).as_py()
    if row >= 0:
        raise ConfigurationError(
            f"{path} row {row}, column {'.'.join(names)}: {column[row].as_py()!r}, {expected}. "
            "Correct or remove the row."
        )
