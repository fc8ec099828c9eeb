"""Files that may change while a process runs (certificates, tokens), read again when next used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

import structlog

from sdar.contracts.errors import ConfigurationError

T = TypeVar("T")

log = structlog.get_logger()


class Watched(Generic[T]):
    """The content of files, read again whenever one of them changes.

    A change that cannot be used is logged, and the earlier content stays in use.

    Args:
        parse: makes the value of the files; raises ConfigurationError.
    """

    def __init__(self, paths: Sequence[Path], parse: Callable[[], T]) -> None:
        self._paths = paths
        self._parse = parse
        # Before the reading: a change in its middle is seen next time.
        self._stamp = self._find_stamp()
        self._value = parse()

    def get(self) -> T:
        stamp = self._find_stamp()
        if stamp != self._stamp:
            self._stamp = stamp
            try:
                self._value = self._parse()
            except ConfigurationError as error:
                log.error("changed_files_refused", error=error.message)
        return self._value

    def _find_stamp(self) -> tuple[tuple[int, int, int], ...]:
        try:
            stats = [path.stat() for path in self._paths]
        except OSError:
            # A file is being replaced. The stamp differs again once it is back.
            return ()
        return tuple((stat.st_mtime_ns, stat.st_ino, stat.st_size) for stat in stats)


def read_file(path: Path, setting: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigurationError(
            f"{setting} names {path}, which cannot be read: {error.strerror}. Correct it."
        ) from error
