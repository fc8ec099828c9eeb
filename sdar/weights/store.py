"""Published weights: immutable versions in a directory or an S3 bucket, whole or as what changed.

Layout under the store's root, all of it readable without this module:

    {run_id}/v00000012/shard-00000-{checksum}.safetensors
        tensors in order, at most `max_shard_bytes` each (or one tensor)
    {run_id}/v00000012/manifest.json
        names every tensor with its dtype, shape and SHA-256

Shards are written first, the manifest last and only if there is none: a version exists when its
manifest does, is on the disk when `publish` returns, and never changes.

**Deltas.** A version whose changes are at most half of it is published as them
(`sdar.weights.delta`): its manifest names a `base_version`, a tensor with `is_delta` is two in its
shard, `{name}:gaps` and `{name}:values`, the others are whole. A version that stands alone and
those based on it, in a row, are a chain; after `FULL_PUBLISH_EVERY` versions a new one begins. A
store object remembers, on the CPU, the tensors of 16-bit types that it published last and those
that it read last: one copy of the weights in a process that does either, nothing where they are
float32. A publisher without a base publishes whole; a reader without one fetches the chain. A
damaged version costs those after it up to the next whole one.

**Checksums.** Each tensor that is handed out matches the SHA-256 of the whole tensor in its
manifest, however it came about. A shard's name has the SHA-256 of its header and of its tensors'
checksums, and a manifest ends in its own. So every byte is covered, each is hashed once, and no
decoder sees a header that was not verified.

All calls block; callers on an event loop use `asyncio.to_thread`. Beside what it remembers it keeps
in memory one shard of each version of a chain when it reads, one shard and the deltas when it
publishes. It knows no model.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sdar.contracts.errors import (
    ConfigurationError,
    ConflictError,
    ContractError,
    CorruptionError,
    WeightsUnavailableError,
)
from sdar.contracts.types import ModelIdentity, TensorEntry, WeightsManifest
from sdar.weights.delta import Delta, encode_delta, has_deltas
from sdar.weights.garbage import GarbageCollector
from sdar.weights.manifests import (
    MANIFEST,
    REMEDY,
    check_manifest,
    describe_content,
    format_version_path,
    list_layout,
    manifest_to_json,
    seal_manifest,
)
from sdar.weights.objects import PATH_SEGMENT
from sdar.weights.shards import (
    apply_stored,
    describe_tensor,
    iter_parts,
    pack_shard,
    split_into_shards,
    to_cpu,
    unpack_shard,
    verify_tensor,
)
from sdar.weights.version_objects import VersionObjects, list_published

FULL_PUBLISH_EVERY = 10
"""Versions of a chain at most. A delta is at most half a version, so a reader that has nothing
fetches at most 5.5 times the weights (1.7 times at the 7.5% that a bfloat16 policy changes with
every twentieth weight), and collecting garbage keeps at most nine versions more than asked for. A
publisher writes a sixth of the bytes then; twice as many would save it another 3%."""


@dataclass(slots=True)
class _Remembered:
    """A version whose tensors are at hand.

    Attributes:
        tensors: those that deltas can be against.
        chain_length: versions of its chain so far, this one included.
    """

    manifest: WeightsManifest
    tensors: dict[str, Tensor]
    chain_length: int = 0


class WeightStore:
    """The versions of one run's weights. One thread publishes, one reads.

    Args:
        url: a directory, file:///directory or s3://bucket/prefix. Credentials and endpoint of S3
            come from the usual AWS_* variables or roles.
        run_id: whose versions `publish`, `fetch_manifest` and the rest mean. `iter_tensors` reads
            any run's in this store.
        max_shard_bytes: bound on a shard, hence on the memory that publishing and reading take on
            top of the weights. A larger tensor gets a shard of its own.
        s3_options: overrides of obstore's S3 configuration, such as `endpoint` and `allow_http`.
    """

    def __init__(
        self,
        url: str,
        run_id: str,
        max_shard_bytes: int = 256 << 20,
        s3_options: Mapping[str, str | bool] | None = None,
    ) -> None:
        if not re.fullmatch(PATH_SEGMENT, run_id):
            raise ConfigurationError(
                f"Run id {run_id!r} cannot name a directory. Use letters, digits, '.', '_' and '-'."
            )
        if max_shard_bytes < 1:
            raise ConfigurationError(f"max_shard_bytes {max_shard_bytes} must be at least 1.")
        self._url = url
        self._run_id = run_id
        self._max_shard_bytes = max_shard_bytes
        self._published: _Remembered | None = None
        self._read: _Remembered | None = None
        self._objects = VersionObjects(url, run_id, s3_options or {})
        self._garbage = GarbageCollector(self._objects, run_id)

    def publish(
        self,
        policy_version: int,
        tensors: Mapping[str, Tensor],
        model: ModelIdentity,
        *,
        num_updates: int = 0,
    ) -> WeightsManifest:
        """Store a version, whole or as a delta. Publishing the same content again returns what is
        there.

        Args:
            tensors: by name, on any device.
            num_updates: optimizer updates that these weights have seen.

        Raises:
            ConflictError: the version exists with other content.
            WeightsUnavailableError: the store cannot be written.
        """
        _check_names(policy_version, tensors)
        base = self._published
        self._published = None  # What fails halfway is no base.
        deltas: dict[str, Delta] = {}
        if base and self._may_continue(base, policy_version, tensors):
            deltas = _encode_deltas(tensors, base.tensors)
        base_version = base.manifest.policy_version if base and deltas else None
        path = format_version_path(self._run_id, policy_version)
        # Shards first, the manifest last: a crash in between leaves no version, only leftovers.
        entries, size_bytes = self._write_shards(path, tensors, deltas)
        described_as = (entries, size_bytes, model, time.time(), num_updates, base_version)
        manifest = self._publish_manifest(
            WeightsManifest(self._run_id, policy_version, path, *described_as)
        )
        self._remember(manifest, tensors, base)
        return manifest

    def _may_continue(
        self, base: _Remembered, policy_version: int, tensors: Mapping[str, Tensor]
    ) -> bool:
        """Whether a version may be a delta on the one that was published last."""
        last = base.manifest
        if not base.tensors or base.chain_length >= FULL_PUBLISH_EVERY:
            return False
        if last.policy_version >= policy_version:
            return False
        layout = [describe_tensor(*item) for item in tensors.items()]
        # The store is asked last, for that is a request: its content may have been emptied.
        return list_layout(last) == layout and self._objects.holds(last)

    def _write_shards(
        self, path: str, tensors: Mapping[str, Tensor], deltas: Mapping[str, Delta]
    ) -> tuple[tuple[TensorEntry, ...], int]:
        """Write what a version stores below `path`; its tensors' entries, and the bytes written."""
        entries: list[TensorEntry] = []
        size_bytes = 0
        for index, shard in enumerate(split_into_shards(tensors, deltas, self._max_shard_bytes)):
            shard_name, content = pack_shard(index, shard)
            self._objects.put(f"{path}/{shard_name}", content)
            entries += [dataclasses.replace(stored.entry, shard=shard_name) for stored in shard]
            size_bytes += sum(stored.size_bytes for stored in shard)
            # Or this shard would stay in memory while the next one is gathered.
            shard.clear()
        return tuple(entries), size_bytes

    def _remember(
        self, manifest: WeightsManifest, tensors: Mapping[str, Tensor], base: _Remembered | None
    ) -> None:
        """Keep what the next version may be a delta against, in the memory of the one before."""
        if manifest.base_version is None:
            chain_length = 1
        elif base and base.manifest.policy_version == manifest.base_version:
            chain_length = base.chain_length + 1
        else:
            # An earlier process's; how long its chain is does not matter any more.
            chain_length = FULL_PUBLISH_EVERY
        old = base.tensors if base and list_layout(base.manifest) == list_layout(manifest) else {}
        kept: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            if has_deltas(tensor):
                # Copied: the learner goes on changing its own tensors in place.
                room = old[name] if name in old else torch.empty(tensor.shape, dtype=tensor.dtype)
                kept[name] = room.copy_(tensor.detach())
        self._published = _Remembered(manifest, kept, chain_length)

    def _publish_manifest(self, manifest: WeightsManifest) -> WeightsManifest:
        """The atomic step: the version exists from here on, unless it did before."""
        sealed = seal_manifest(manifest_to_json(manifest))
        if self._objects.create(f"{manifest.path}/{MANIFEST}", sealed):
            return manifest
        existing = self.fetch_manifest(manifest.policy_version)
        # The version was published before, perhaps in another encoding. What this call has written
        # and that one does not name would otherwise stay for good.
        kept = {entry.shard for entry in existing.tensors}
        written = {entry.shard for entry in manifest.tensors}
        self._objects.delete([f"{manifest.path}/{shard}" for shard in written - kept])
        if describe_content(existing) == describe_content(manifest):
            return existing
        raise ConflictError(
            f"Version {manifest.policy_version} of run {self._run_id} already names other weights "
            f"in {self._url}. Versions never change: continue after the newest published one, or "
            "use another run id.",
            policy_version=manifest.policy_version,
        )

    def fetch_manifest(self, policy_version: int | None = None) -> WeightsManifest:
        """The manifest of a version, of the newest one for None.

        Raises:
            WeightsUnavailableError: there is no such version, or the store cannot be read.
            CorruptionError: its manifest is damaged.
        """
        if policy_version is None:
            versions = self.list_versions()
            if not versions:
                raise WeightsUnavailableError(
                    f"Run {self._run_id} has no weights in {self._url} yet. Start its learner "
                    "first."
                )
            policy_version = versions[-1]
        return self._objects.fetch_manifest(self._run_id, policy_version)

    def iter_tensors(self, manifest: WeightsManifest) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of a version on the CPU, in the manifest's order, whole and checked before
        it is handed out.

        A delta is applied to the base that was read last, and to the one in the store when that is
        another or does not fit.

        Raises:
            CorruptionError: a tensor is missing, or has another dtype, shape or checksum than the
                manifest says; or the manifest or its chain of bases is none that `publish` makes,
                such as one that points outside the store.
            WeightsUnavailableError: a shard or a base cannot be read; it may have been collected.
        """
        check_manifest(manifest)
        # Whoever iterates owns what is at hand, and what fails halfway is no base.
        at_hand = self._read
        self._read = None
        num_done = 0
        kept: dict[str, Tensor] = {}
        while True:
            try:
                tensors = self._iter_chain(manifest, at_hand)
                for name, tensor in itertools.islice(tensors, num_done, None):
                    if has_deltas(tensor):
                        kept[name] = tensor
                    num_done += 1
                    yield name, tensor
                break
            except CorruptionError:
                # What is at hand may be the damaged part: once more from the store alone, without
                # handing out again what was handed out and checked.
                if at_hand is None:
                    raise
                at_hand = None
        self._read = _Remembered(manifest, kept)

    def _iter_chain(
        self, manifest: WeightsManifest, at_hand: _Remembered | None
    ) -> Iterator[tuple[str, Tensor]]:
        chain = self._fetch_chain(manifest, at_hand)
        # A chain that begins with a whole version needs nothing of what is at hand.
        bases = at_hand.tensors if at_hand and chain[0].base_version is not None else {}
        # A row is one tensor as each version of the chain stores it, oldest first. All versions
        # are read side by side, so that only one shard of each is in memory.
        for row in zip(*map(self._iter_stored, chain), strict=True):
            entry = row[-1][0]
            # Popped: what is not needed any more makes room for what is new.
            tensor = apply_stored(row[0][1], bases.pop(entry.name, None), manifest, entry)
            for _, stored in row[1:]:
                tensor = apply_stored(stored, tensor, manifest, entry)
            verify_tensor(tensor, manifest, entry)
            yield entry.name, tensor

    def _fetch_chain(
        self, manifest: WeightsManifest, at_hand: _Remembered | None
    ) -> list[WeightsManifest]:
        """The versions to put together, oldest first: from a whole one, or from the one after what
        is at hand.
        """
        chain = [manifest]
        while (base_version := chain[0].base_version) is not None:
            # A manifest that points too far back would have its reader fetch without end.
            if len(chain) == FULL_PUBLISH_EVERY:
                raise CorruptionError(
                    f"Version {manifest.policy_version} ({manifest.path}) is based on {len(chain)} "
                    f"others; {len(chain) - 1} is the most that a publisher makes. Publish a whole "
                    "version."
                )
            if at_hand and _identify(at_hand.manifest) == (manifest.run_id, base_version):
                _check_layout(manifest, at_hand.manifest)
                break
            base = self._objects.fetch_manifest(manifest.run_id, base_version)
            _check_layout(manifest, base)
            chain.insert(0, base)
        return chain

    def _iter_stored(
        self, manifest: WeightsManifest
    ) -> Iterator[tuple[TensorEntry, Tensor | Delta]]:
        """Tensors as they are stored, their headers verified, their elements not yet."""
        for shard_name, group in itertools.groupby(manifest.tensors, key=lambda entry: entry.shard):
            entries = list(group)
            content = self._objects.get(f"{manifest.path}/{shard_name}")
            parts = unpack_shard(content, manifest, shard_name, entries)
            del content  # The parts are all that is needed of it.
            yield from iter_parts(parts, manifest, entries)

    def list_versions(self) -> list[int]:
        """Published versions, ascending."""
        return list_published(self._objects.list_versions())

    def collect_garbage(
        self,
        keep_newest: int,
        in_use: Collection[int] = (),
        retire: Callable[[Sequence[int]], bool] = lambda versions: True,
    ) -> list[int]:
        """Delete chains that hold none of the newest `keep_newest` versions and none `in_use`;
        returns the deleted versions.

        What a crashed publisher or collector left behind goes too, once a newer version exists.

        Args:
            retire: called with all versions of a chain before any of it is deleted; the chain
                stays where it returns False. Readers declare what they read at the same place, so
                that a version is either declared or deleted, never both.
        """
        if keep_newest < 1:
            raise ConfigurationError(
                f"keep_newest {keep_newest}: the newest version is always needed. Keep at least 1."
            )
        kept = set(in_use)
        # The next version may be a delta on what was published last.
        if self._published:
            kept.add(self._published.manifest.policy_version)
        return self._garbage.collect(keep_newest, kept, retire)


def _check_names(policy_version: int, tensors: Mapping[str, Tensor]) -> None:
    wrong = [name for name in tensors if not name or ":" in name]
    if wrong or not tensors:
        raise ContractError(
            f"Version {policy_version}: {len(tensors)} tensors, of them with names that cannot be "
            f"stored: {wrong[:3]}. Publish at least one, and no ':' in a name."
        )


def _encode_deltas(tensors: Mapping[str, Tensor], bases: Mapping[str, Tensor]) -> dict[str, Delta]:
    """The deltas to publish these tensors with; none if they take more than half of the bytes."""
    deltas: dict[str, Delta] = {}
    stored_bytes = 0
    most_bytes = sum(tensor.nbytes for tensor in tensors.values()) // 2
    for name, tensor in tensors.items():
        delta = encode_delta(bases[name], to_cpu(tensor)) if name in bases else None
        stored_bytes += delta.size_bytes if delta else tensor.nbytes
        # As soon as it is certain: the rest need not be compared.
        if stored_bytes > most_bytes:
            return {}
        if delta:
            deltas[name] = delta
    return deltas


def _identify(manifest: WeightsManifest) -> tuple[str, int]:
    return manifest.run_id, manifest.policy_version


def _check_layout(manifest: WeightsManifest, base: WeightsManifest) -> None:
    if list_layout(base) != list_layout(manifest):
        raise CorruptionError(
            f"Version {manifest.policy_version} ({manifest.path}) is a delta on version "
            f"{base.policy_version}, which has other tensors. {REMEDY}"
        )
