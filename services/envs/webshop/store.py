"""The prepared catalogue on disk: products, goals and search index, shared by all processes.

It is built once for each content, and lies in the user's cache directory under the hash of what it
was made of. A worker holds little beside the goals: products are decoded when a page shows them,
and the search index is memory-mapped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import mmap
import shutil
import tempfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from sdar.contracts.errors import ConfigurationError
from services.envs.webshop.catalogue import (
    HUMAN_FILE,
    PRODUCT_FILES,
    Product,
    Review,
    SourceFiles,
    find_source_files,
    iterate_products,
)
from services.envs.webshop.goals import Goal, GoalReader, shuffle_goals
from services.envs.webshop.search import SearchIndex, build_index, describe_for_search

FORMAT = "webshop 1"
"""Part of the hash. Raise it whenever the same files would be prepared differently."""
_NUM_DECODED = 4096
"""Products kept decoded by a process: some 25 MB, and most pages show what others have shown."""


@lru_cache
def open_catalogue(
    directory: Path, cache: Path, is_small: bool, is_human: bool | None
) -> PreparedCatalogue:
    """The catalogue of a data directory, prepared now if no process has done so before.

    Args:
        is_human: goals by the instructions that people wrote, or by synthetic ones. With None, the
            former where the full catalogue has them: of the published thousand products people
            wrote about ten only, though their file lies beside these as well.

    Raises:
        ConfigurationError: no catalogue there, a malformed one, or a cache that cannot be written.
    """
    files = find_source_files(directory, is_small)
    if is_human and files.human is None:
        raise ConfigurationError(
            f"{directory} holds no {HUMAN_FILE}. Download it, or set the option goals to synthetic."
        )
    if is_human is None:
        is_human = files.human is not None and files.products.name == PRODUCT_FILES[0]
    return _open_prepared(files, is_human, cache / "webshop")


def _open_prepared(files: SourceFiles, is_human: bool, place: Path) -> PreparedCatalogue:
    try:
        digest = _compute_digest(files, is_human, place)
        prepared = place / digest
        if not prepared.exists():
            _prepare(files, is_human, prepared)
    except OSError as error:
        raise ConfigurationError(
            f"The catalogue cannot be prepared in {place}: {error}. Point SDAR_CACHE at a writable "
            "directory."
        ) from error
    return PreparedCatalogue(prepared, digest)


class PreparedCatalogue:
    """Read access to what was prepared.

    `digest` names its content: equal digests mean equal products, goals and order.
    """

    def __init__(self, directory: Path, digest: str) -> None:
        self.digest = digest
        self.index = SearchIndex(directory / "index")
        goals = json.loads((directory / "goals.json").read_text(encoding="utf-8"))
        self.goals = tuple(
            Goal(
                **{
                    **goal,
                    "attributes": tuple(goal["attributes"]),
                    "options": tuple(goal["options"]),
                }
            )
            for goal in goals
        )
        self._offsets = np.load(directory / "offsets.npy", mmap_mode="r", allow_pickle=False)
        with (directory / "products.jsonl").open("rb") as file:
            self._products = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.get_product = lru_cache(maxsize=_NUM_DECODED)(self._decode_product)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def _decode_product(self, number: int) -> Product:
        """The product of a number that the search index answers with."""
        start, end = self._offsets[number : number + 2].tolist()
        fields = json.loads(self._products[start:end])
        fields["options"] = {name: tuple(values) for name, values in fields["options"].items()}
        fields["reviews"] = tuple(Review(*review) for review in fields["reviews"])
        return Product(
            **{
                **fields,
                "bullets": tuple(fields["bullets"]),
                "attributes": tuple(fields["attributes"]),
            }
        )


def _compute_digest(files: SourceFiles, is_human: bool, place: Path) -> str:
    digest = hashlib.sha256(f"{FORMAT} human={is_human}".encode())
    for path in files.present:
        digest.update(bytes.fromhex(_hash_file(path, place)))
    return digest.hexdigest()[:16]


def _hash_file(path: Path, place: Path) -> str:
    """The hash of a file's content.

    It is kept under the file's path, size and time, since every worker asks for it and five
    gigabytes take seconds.
    """
    status = path.stat()
    state = hashlib.sha256(f"{path} {status.st_size} {status.st_mtime_ns}".encode()).hexdigest()
    known = place / f"{state[:32]}.sha256"
    if known.is_file():
        return known.read_text()
    with path.open("rb") as file:
        content = hashlib.file_digest(file, "sha256").hexdigest()
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=place, delete=False) as part:
        part.write(content)
    # Renamed, so that no other worker reads half of it.
    Path(part.name).replace(known)
    return content


def _prepare(files: SourceFiles, is_human: bool, prepared: Path) -> None:
    """Build beside the final place and rename: another process sees all of it or nothing."""
    prepared.parent.mkdir(parents=True, exist_ok=True)
    with _hold_lock(prepared.with_suffix(".lock")):
        # By whoever held the lock while this process waited for it.
        if prepared.exists():
            return
        for left_behind in prepared.parent.glob(f"{prepared.name}-*"):
            # By a process that was killed: whoever holds the lock is the only one at work.
            shutil.rmtree(left_behind, ignore_errors=True)
        building = Path(tempfile.mkdtemp(prefix=f"{prepared.name}-", dir=prepared.parent))
        try:
            _write(files, is_human, building)
            building.rename(prepared)
        finally:
            shutil.rmtree(building, ignore_errors=True)


def _list_fields(record: Product | Goal) -> dict[str, Any]:
    """What `dataclasses.asdict` gives, less its copies, which would take most of the time."""
    return {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}


@contextlib.contextmanager
def _hold_lock(path: Path) -> Iterator[None]:
    """Let one of the workers that start together prepare, while the others wait.

    The lock ends with the process that holds it, however that ends.
    """
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _write(files: SourceFiles, is_human: bool, directory: Path) -> None:
    reader = GoalReader(files, is_human)
    goals: list[Goal] = []
    offsets = [0]

    # One pass over the file: as the index takes a product's text, the product itself is written
    # and its goals are read.
    def iterate_texts() -> Iterator[str]:
        with (directory / "products.jsonl").open("wb") as file:
            for product in iterate_products(files):
                goals.extend(reader.iterate_goals(product))
                line = json.dumps(_list_fields(product)).encode() + b"\n"
                offsets.append(offsets[-1] + file.write(line))
                yield describe_for_search(product)

        if not goals:
            raise ConfigurationError(
                f"{files.products.parent}: no product has an instruction, so there is no task. Add "
                "some."
            )

    build_index(iterate_texts(), directory / "index")
    np.save(directory / "offsets.npy", np.array(offsets, np.int64), allow_pickle=False)
    content = json.dumps([_list_fields(goal) for goal in shuffle_goals(goals)])
    (directory / "goals.json").write_text(content, encoding="utf-8")
