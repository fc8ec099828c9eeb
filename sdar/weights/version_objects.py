"""The objects of one run's versions in a store: every failure of the store is one error by name."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager

from obstore.exceptions import BaseError

from sdar.contracts.errors import CorruptionError, WeightsUnavailableError
from sdar.contracts.types import WeightsManifest
from sdar.weights.manifests import (
    MANIFEST,
    VERSION_PATH,
    format_version_path,
    manifest_from_json,
    unseal_manifest,
)
from sdar.weights.objects import open_object_store


class VersionObjects:
    """Manifests and shards by path.

    Every method raises WeightsUnavailableError when the store cannot do what it is asked.
    """

    def __init__(self, url: str, run_id: str, s3_options: Mapping[str, str | bool]) -> None:
        self._url = url
        self._run_id = run_id
        with self._errors("Opening"):
            self.store = open_object_store(url, s3_options)

    def put(self, path: str, content: bytes) -> None:
        with self._errors(f"Writing {path} in"):
            self.store.put(path, content)

    def create(self, path: str, content: bytes) -> bool:
        """Write an object if there is none; returns whether there was none."""
        with self._errors(f"Writing {path} in"):
            return self.store.create(path, content)

    def get(self, path: str) -> bytes:
        with self._errors(f"Reading {path} from"):
            # FileNotFoundError is an OSError: caught here, before it becomes "the store failed".
            try:
                return self.store.get(path)
            except FileNotFoundError as error:
                raise WeightsUnavailableError(
                    f"{path} is not in {self._url}: it was never published or has been collected. "
                    "Fetch the newest version."
                ) from error

    def delete(self, paths: Iterable[str]) -> None:
        """Delete objects one after the other, in this order; harmless for those that are gone."""
        with self._errors("Deleting from"):
            for path in paths:
                self.store.delete(path)

    def list_versions(self) -> dict[int, list[str]]:
        """version -> paths of its objects, for everything found under this run."""
        found: dict[int, list[str]] = {}
        with self._errors("Listing"):
            for path in self.store.list(self._run_id):
                # Other things may stand under the run's name; they are nobody's version.
                if match := VERSION_PATH.match(path):
                    found.setdefault(int(match[1]), []).append(path)
        return found

    def fetch_manifest(self, run_id: str, policy_version: int) -> WeightsManifest:
        """The manifest of any run's version in this store.

        Raises:
            CorruptionError: it is damaged, or of another version.
        """
        path = f"{format_version_path(run_id, policy_version)}/{MANIFEST}"
        manifest = manifest_from_json(unseal_manifest(self.get(path), path))
        if (manifest.run_id, manifest.policy_version) != (run_id, policy_version):
            raise CorruptionError(
                f"{path} in {self._url} describes {manifest.path}, version "
                f"{manifest.policy_version}. Do not move versions by hand."
            )
        return manifest

    def holds(self, manifest: WeightsManifest) -> bool:
        """Whether a version is in the store as this process published it.

        Somebody may have emptied the directory.
        """
        try:
            return self.fetch_manifest(self._run_id, manifest.policy_version) == manifest
        except (WeightsUnavailableError, CorruptionError):
            return False

    @contextmanager
    def _errors(self, action: str) -> Iterator[None]:
        try:
            yield
        except (BaseError, OSError) as error:
            raise WeightsUnavailableError(
                f"{action} the weight store {self._url} failed: {str(error).splitlines()[0]}. "
                "Check that it exists, has room and that the credentials may use it.",
                url=self._url,
            ) from error


def list_published(objects: Mapping[int, Collection[str]]) -> list[int]:
    """Versions that have a manifest, ascending; `objects` as `list_versions` returns them."""
    return sorted(version for version, paths in objects.items() if _has_manifest(paths))


def _has_manifest(paths: Iterable[str]) -> bool:
    return any(path.endswith(f"/{MANIFEST}") for path in paths)
