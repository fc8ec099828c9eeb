"""Bytes under names, in a directory or in an S3 bucket: durable, and never outside the root.

It knows nothing of what the bytes mean. All calls block.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import unquote, urlsplit

import obstore
from obstore.exceptions import AlreadyExistsError
from obstore.store import S3Store

from sdar.contracts.errors import ConfigurationError, CorruptionError

if TYPE_CHECKING:  # their names exist in its types only
    from obstore.store import ClientConfig, RetryConfig

PATH_SEGMENT = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_CLIENT_OPTIONS: ClientConfig = {
    "connect_timeout": timedelta(seconds=10),
    "read_timeout": timedelta(seconds=60),
    "timeout": timedelta(minutes=15),
}
_RETRY: RetryConfig = {"max_retries": 6, "retry_timeout": timedelta(seconds=60)}


class ObjectStore(Protocol):
    """Objects by path, such as `run/v00000001/manifest.json`.

    Errors are OSError's or obstore's, but for those named.
    """

    def put(self, path: str, content: bytes) -> None:
        """Write an object, in place of any there was. Readers see it whole or not at all.

        It survives the loss of power once an object was created beside it.
        """

    def create(self, path: str, content: bytes) -> bool:
        """As `put`, but only if there is none, and durable; returns whether there was none.
        Of several callers one succeeds.
        """

    def get(self, path: str) -> bytes:
        """Raises FileNotFoundError."""

    def list(self, prefix: str) -> list[str]:
        """Every path below a directory, also what a crashed writer left there."""

    def delete(self, path: str) -> None:
        """Harmless if it is gone."""


def open_object_store(url: str, s3_options: Mapping[str, str | bool]) -> ObjectStore:
    """The store at a directory, file:///directory or s3://bucket/prefix.

    Raises:
        ConfigurationError: the address is none of these.
    """
    parts = urlsplit(url)
    if parts.scheme == "s3" and parts.netloc:
        return BucketStore(parts.netloc, parts.path.strip("/"), s3_options)
    if parts.scheme == "file" and not parts.netloc and parts.path:
        return DirectoryStore(Path(unquote(parts.path)))
    if "://" not in url and url:
        return DirectoryStore(Path(url).absolute())
    raise ConfigurationError(
        f"Weight store {url!r} is not usable. Give a directory, file:///directory or "
        "s3://bucket/prefix."
    )


class DirectoryStore:
    """Objects are files, whose bytes are on the disk before their name appears.

    `create` also waits until the directories that lead there are on the disk.
    """

    def __init__(self, root: Path) -> None:
        root.mkdir(parents=True, exist_ok=True)
        self._root = root.resolve()

    def put(self, path: str, content: bytes) -> None:
        target, partial = self._write_partial(path, content)
        partial.replace(target)

    def create(self, path: str, content: bytes) -> bool:
        target, partial = self._write_partial(path, content)
        try:
            # A link, for it fails where the name exists; a rename would replace what is there.
            os.link(partial, target)
        except FileExistsError:
            return False
        finally:
            partial.unlink()
        # A file's bytes are on the disk, its name is not until its directory is. This also covers
        # what `put` wrote beside it before.
        self._sync_directories(target)
        return True

    def get(self, path: str) -> bytes:
        # `_locate` has checked the directories; O_NOFOLLOW refuses a link in the file's own place.
        with open(os.open(self._locate(path), os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
            return file.read()

    def list(self, prefix: str) -> list[str]:
        # `_locate` takes files only: the name is there to have the directory checked.
        walk = os.walk(self._locate(f"{prefix}/.all").parent)
        return [
            Path(directory, name).relative_to(self._root).as_posix()
            for directory, _, names in walk
            for name in names
        ]

    def delete(self, path: str) -> None:
        target = self._locate(path)
        target.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # others are still in it
            target.parent.rmdir()

    def _write_partial(self, path: str, content: bytes) -> tuple[Path, Path]:
        target = self._locate(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        # In the same directory, for a link or a rename can't cross file systems. The name is one
        # that no reader asks for, and no two writers share it.
        partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}.partial")
        try:
            with partial.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        return target, partial

    def _sync_directories(self, target: Path) -> None:
        # Up to the root: each directory may be new, and its name stands in the one above.
        for directory in target.parents:
            handle = os.open(directory, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
            if directory == self._root:
                return

    def _locate(self, path: str) -> Path:
        """The file of an object; neither dots nor a link planted in the store lead out of it."""
        directory, _, name = path.rpartition("/")
        parent = self._root / directory
        if (
            name in ("", ".", "..")
            or parent.resolve() != parent
            or not parent.is_relative_to(self._root)
        ):
            raise CorruptionError(
                f"{path} leads out of {self._root}. If somebody has put a link there, remove it."
            )
        return parent / name


class BucketStore:
    """Objects of an S3 bucket, which promises durability and whole objects itself.

    What a writer leaves behind that dies inside a multipart upload is not listed; a lifecycle rule
    of the bucket removes it.
    """

    def __init__(self, bucket: str, prefix: str, options: Mapping[str, str | bool]) -> None:
        arguments: dict[str, Any] = dict(options)
        self._store = S3Store(
            bucket,
            prefix=prefix or None,
            client_options=_CLIENT_OPTIONS,
            retry_config=_RETRY,
            **arguments,
        )

    def put(self, path: str, content: bytes) -> None:
        obstore.put(self._store, path, content)

    def create(self, path: str, content: bytes) -> bool:
        try:
            # In one part: the condition that there is none holds for a single request only.
            obstore.put(self._store, path, content, mode="create", use_multipart=False)
        except AlreadyExistsError:
            return False
        return True

    def get(self, path: str) -> bytes:
        return bytes(obstore.get(self._store, path).bytes())

    def list(self, prefix: str) -> list[str]:
        return [item["path"] for batch in obstore.list(self._store, f"{prefix}/") for item in batch]

    def delete(self, path: str) -> None:
        try:
            obstore.delete(self._store, path)
        except FileNotFoundError:
            return
