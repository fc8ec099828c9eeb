"""Which old versions are deleted, and in which order: by chains, a whole version with its deltas.

Manifests go first, newest first: whenever a collection ends, what still has one has its bases too.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from sdar.contracts.errors import CorruptionError
from sdar.weights.manifests import MANIFEST, format_version_path
from sdar.weights.version_objects import VersionObjects, list_published


class GarbageCollector:
    """Deletes versions of one run."""

    def __init__(self, objects: VersionObjects, run_id: str) -> None:
        self._objects = objects
        self._run_id = run_id
        self._bases: dict[int, int | None] = {}

    def collect(
        self,
        keep_newest: int,
        in_use: Collection[int],
        retire: Callable[[Sequence[int]], bool],
    ) -> list[int]:
        """Delete what may go, see `WeightStore.collect_garbage`; returns the deleted versions."""
        objects = self._objects.list_versions()
        versions = list_published(objects)
        kept = {*versions[-keep_newest:], *in_use}
        doomed: list[int] = []
        for chain in self._list_chains(versions):
            # `retire` is asked last: what it has marked can't be unmarked, and must be deleted.
            if kept.isdisjoint(chain) and retire(chain):
                doomed += chain
        doomed.sort()
        self._delete_manifests(doomed)
        self._delete_others(objects, [*doomed, *_list_leftovers(objects, versions)])
        return doomed

    def _delete_manifests(self, doomed: Sequence[int]) -> None:
        """Newest first: a crash in between never leaves a delta whose base has no manifest."""
        paths = [format_version_path(self._run_id, version) for version in reversed(doomed)]
        self._objects.delete([f"{path}/{MANIFEST}" for path in paths])

    def _delete_others(self, objects: Mapping[int, Sequence[str]], versions: Sequence[int]) -> None:
        others: list[str] = []
        for version in versions:
            others += objects[version]
        self._objects.delete([path for path in others if not path.endswith(f"/{MANIFEST}")])

    def _list_chains(self, versions: Sequence[int]) -> list[list[int]]:
        """Versions grouped by the one they all go back to, each group ascending."""
        # Kept from one collection to the next: each manifest is fetched once.
        self._bases = self._find_bases(versions)
        chains: dict[int, list[int]] = {}
        roots: dict[int, int] = {}
        for version in versions:  # ascending, and a base is older than what is based on it
            base = self._bases[version]
            roots[version] = roots.get(version if base is None else base, version)
            chains.setdefault(roots[version], []).append(version)
        return list(chains.values())

    def _find_bases(self, versions: Sequence[int]) -> dict[int, int | None]:
        """Version -> the one it is a delta on, None for a whole one."""
        bases: dict[int, int | None] = {}
        before: int | None = None
        for version in versions:
            if version in self._bases:
                bases[version] = self._bases[version]
            else:
                bases[version] = self._fetch_base(version, before)
            before = version
        return bases

    def _fetch_base(self, version: int, before: int | None) -> int | None:
        try:
            return self._objects.fetch_manifest(self._run_id, version).base_version
        except CorruptionError:
            # Which version it is based on is lost. As part of the chain before it, it goes no
            # sooner than that one: rather keep too much.
            return before


def _list_leftovers(objects: Mapping[int, Sequence[str]], versions: Sequence[int]) -> list[int]:
    """Versions without a manifest, which a crashed publisher or collector left behind.

    One that is newer than all published ones is left alone: it may be being published.
    """
    newest = max(versions, default=0)
    return [version for version in objects if version not in versions and version < newest]
