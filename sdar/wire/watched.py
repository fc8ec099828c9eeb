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
    """What files say, read again whenever one changes. A change that cannot be used is logged and
    what was stays.

    Args:
        parse: makes the value of the files; raises ConfigurationError.
    """

    def __init__(self, paths: Sequence[Path], parse: Callable[[], T]) -> None:
        self._paths, self._parse = paths, parse
        self._stamp = (
            self._find_stamp()
        )  # before the reading: a change in its middle is seen next time
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
            return ()
        return tuple((stat.st_mtime_ns, stat.st_ino, stat.st_size) for stat in stats)


def read_file(path: Path, setting: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigurationError(
            f"{setting} names {path}, which cannot be read: {error.strerror}. Correct it."
        ) from error
