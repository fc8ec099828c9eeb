"""Owns published weights: immutable versions in a directory or an S3 bucket, whole or as what
changed since the one before.

Layout under the store's root, all of it readable without this module:

    {run_id}/v00000012/shard-00000-{checksum}.safetensors  tensors in order, at most `max_shard_bytes` each (or one tensor)
    {run_id}/v00000012/manifest.json                       names every tensor with its dtype, shape and SHA-256

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
import hashlib
import itertools
import json
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import safetensors
import safetensors.torch
import torch
from obstore.exceptions import BaseError
from torch import Tensor

from sdar.contracts.codec import weights_manifest_to_proto
from sdar.contracts.errors import (
    ConfigurationError,
    ConflictError,
    ContractError,
    CorruptionError,
    WeightsUnavailableError,
)
from sdar.contracts.types import ModelIdentity, TensorEntry, WeightsManifest
from sdar.weights.delta import Delta, apply_delta, encode_delta, has_deltas
from sdar.weights.objects import PATH_SEGMENT, open_object_store

FULL_PUBLISH_EVERY = 10
"""Versions of a chain at most. A delta is at most half a version, so a reader that has nothing
fetches at most 5.5 times the weights (1.7 times at the 7.5% that a bfloat16 policy changes with
every twentieth weight), and collecting garbage keeps at most nine versions more than asked for. A
publisher writes a sixth of the bytes then; twice as many would save it another 3%."""

_MANIFEST = "manifest.json"
_VERSION_PATH = re.compile(rf"{PATH_SEGMENT}/v(\d{{8,}})")
_SHARD = re.compile(r"shard-\d{5,}-([0-9a-f]{64})\.safetensors")
_LENGTH_BYTES = 8
"""A safetensors file begins with the length of its header."""


@dataclass(slots=True)
class _Remembered:
    """A version whose tensors are at hand. `tensors` are those that deltas can be against,
    `chain_length` counts it in.
    """

    manifest: WeightsManifest
    tensors: dict[str, Tensor]
    chain_length: int = 0


@dataclass(frozen=True, slots=True)
class _Stored:
    """A tensor as it goes into a shard: its entry, without the shard's name, and the parts by their
    names there.
    """

    entry: TensorEntry
    parts: dict[str, Tensor]

    @property
    def size_bytes(self) -> int:
        return sum(part.nbytes for part in self.parts.values())


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
        self._bases: dict[int, int | None] = {}
        with self._store_errors("Opening"):
            self._store = open_object_store(url, s3_options or {})

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
        base, self._published = self._published, None  # what fails halfway is no base
        deltas = self._encode_deltas(policy_version, tensors, base) if base else {}
        base_version = base.manifest.policy_version if base and deltas else None
        path = _version_path(self._run_id, policy_version)
        entries: list[TensorEntry] = []
        size_bytes = 0
        for index, shard in enumerate(self._split_into_shards(tensors, deltas)):
            shard_name, content = _pack(index, shard)
            with self._store_errors(f"Writing {path}/{shard_name} in"):
                self._store.put(f"{path}/{shard_name}", content)
            entries += [dataclasses.replace(stored.entry, shard=shard_name) for stored in shard]
            size_bytes += sum(stored.size_bytes for stored in shard)
            shard.clear()  # or this shard would stay in memory while the next one is gathered
        described_as = (tuple(entries), size_bytes, model, time.time(), num_updates, base_version)
        manifest = self._publish_manifest(
            WeightsManifest(self._run_id, policy_version, path, *described_as)
        )
        self._remember(manifest, tensors, base)
        return manifest

    def _encode_deltas(
        self, policy_version: int, tensors: Mapping[str, Tensor], base: _Remembered
    ) -> dict[str, Delta]:
        """The deltas to publish this version with; none if it is to be whole."""
        last = base.manifest
        is_chained = (
            base.tensors
            and base.chain_length < FULL_PUBLISH_EVERY
            and last.policy_version < policy_version
        )
        if (
            not is_chained
            or _layout(last) != [_describe(*item) for item in tensors.items()]
            or not self._exists(last)
        ):
            return {}
        deltas: dict[str, Delta] = {}
        stored_bytes, most_bytes = 0, sum(tensor.nbytes for tensor in tensors.values()) // 2
        for name, tensor in tensors.items():
            delta = (
                encode_delta(base.tensors[name], _to_cpu(tensor)) if name in base.tensors else None
            )
            stored_bytes += delta.size_bytes if delta else tensor.nbytes
            if stored_bytes > most_bytes:
                return {}
            if delta:
                deltas[name] = delta
        return deltas

    def _remember(
        self, manifest: WeightsManifest, tensors: Mapping[str, Tensor], base: _Remembered | None
    ) -> None:
        """Keep what the next version may be a delta against, in the memory of what was kept before."""
        if manifest.base_version is None:
            chain_length = 1
        elif base and base.manifest.policy_version == manifest.base_version:
            chain_length = base.chain_length + 1
        else:
            # an earlier process's; how long its chain is does not matter any more
            chain_length = FULL_PUBLISH_EVERY
        old = base.tensors if base and _layout(base.manifest) == _layout(manifest) else {}
        kept: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            if has_deltas(tensor):
                room = old[name] if name in old else torch.empty(tensor.shape, dtype=tensor.dtype)
                kept[name] = room.copy_(tensor.detach())
        self._published = _Remembered(manifest, kept, chain_length)

    def _publish_manifest(self, manifest: WeightsManifest) -> WeightsManifest:
        """The atomic step: the version exists from here on, unless it did before."""
        with self._store_errors(f"Writing {manifest.path}/{_MANIFEST} in"):
            if self._store.create(
                f"{manifest.path}/{_MANIFEST}", _seal(manifest_to_json(manifest))
            ):
                return manifest
        existing = self.fetch_manifest(manifest.policy_version)
        kept = {entry.shard for entry in existing.tensors}
        self._delete(
            [
                f"{manifest.path}/{shard}"
                for shard in {entry.shard for entry in manifest.tensors} - kept
            ]
        )
        if _content(existing) == _content(manifest):
            return existing
        raise ConflictError(
            f"Version {manifest.policy_version} of run {self._run_id} already names other weights "
            f"in {self._url}. "
            "Versions never change: continue after the newest published one, or use another run "
            "id.",
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
        return self._fetch_manifest(self._run_id, policy_version)

    def _fetch_manifest(self, run_id: str, policy_version: int) -> WeightsManifest:
        path = f"{_version_path(run_id, policy_version)}/{_MANIFEST}"
        manifest = manifest_from_json(_unseal(self._get(path), path))
        if (manifest.run_id, manifest.policy_version) != (run_id, policy_version):
            raise CorruptionError(
                f"{path} in {self._url} describes {manifest.path}, version "
                f"{manifest.policy_version}. "
                "Do not move versions by hand."
            )
        return manifest

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
        _check_manifest(manifest)
        at_hand, self._read = (
            self._read,
            None,
        )  # whoever iterates owns it, and what fails halfway is no base
        num_done, kept = 0, dict[str, Tensor]()
        while True:
            try:
                for name, tensor in itertools.islice(
                    self._iter_chain(manifest, at_hand), num_done, None
                ):
                    if has_deltas(tensor):
                        kept[name] = tensor
                    num_done += 1
                    yield name, tensor
                break
            except CorruptionError:
                if at_hand is None:
                    raise
                at_hand = None
        self._read = _Remembered(manifest, kept)

    def _iter_chain(
        self, manifest: WeightsManifest, at_hand: _Remembered | None
    ) -> Iterator[tuple[str, Tensor]]:
        chain = self._fetch_chain(manifest, at_hand)
        bases = at_hand.tensors if at_hand and chain[0].base_version is not None else {}
        for row in zip(*map(self._iter_stored, chain), strict=True):
            entry = row[-1][0]
            # Popped: what is not needed any more makes room for what is new.
            tensor = _apply(row[0][1], bases.pop(entry.name, None), manifest, entry)
            for _, stored in row[1:]:
                tensor = _apply(stored, tensor, manifest, entry)
            _verify(tensor, manifest, entry)
            yield entry.name, tensor

    def _fetch_chain(
        self, manifest: WeightsManifest, at_hand: _Remembered | None
    ) -> list[WeightsManifest]:
        """The versions to put together, oldest first: from a whole one, or from the one after what
        is at hand.
        """
        chain = [manifest]
        while (base_version := chain[0].base_version) is not None:
            if len(chain) == FULL_PUBLISH_EVERY:
                raise CorruptionError(
                    f"Version {manifest.policy_version} ({manifest.path}) is based on {len(chain)} "
                    f"others; {len(chain) - 1} is "
                    "the most that a publisher makes. Publish a whole version."
                )
            is_at_hand = at_hand and (at_hand.manifest.run_id, at_hand.manifest.policy_version) == (
                manifest.run_id,
                base_version,
            )
            base = (
                at_hand.manifest
                if at_hand and is_at_hand
                else self._fetch_manifest(manifest.run_id, base_version)
            )
            if _layout(base) != _layout(manifest):
                raise CorruptionError(
                    f"Version {manifest.policy_version} ({manifest.path}) is a delta on version "
                    f"{base_version}, which has "
                    f"other tensors. {_REMEDY}"
                )
            if is_at_hand:
                break
            chain.insert(0, base)
        return chain

    def _iter_stored(
        self, manifest: WeightsManifest
    ) -> Iterator[tuple[TensorEntry, Tensor | Delta]]:
        """Tensors as they are stored, their headers verified, their elements not yet."""
        for shard_name, group in itertools.groupby(manifest.tensors, key=lambda entry: entry.shard):
            entries = list(group)
            parts = self._fetch_shard(manifest, shard_name, entries)
            for entry in entries:
                try:
                    if entry.is_delta:
                        yield (
                            entry,
                            Delta(
                                parts.pop(f"{entry.name}:gaps"), parts.pop(f"{entry.name}:values")
                            ),
                        )
                    else:
                        yield (
                            entry,
                            parts.pop(entry.name),
                        )  # popping lets the caller free a tensor before the shard is done
                except KeyError:
                    message = f"{_locate(manifest, entry)} is missing from its shard. {_REMEDY}"
                    raise CorruptionError(message, tensor=entry.name) from None

    def list_versions(self) -> list[int]:
        """Published versions, ascending."""
        return _published(self._list_objects())

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
            retire: told all versions of a chain before any of it is deleted; the chain stays where
                it says no. Readers declare what they read at the same place, so that a version is
                either declared or deleted, never both.
        """
        if keep_newest < 1:
            raise ConfigurationError(
                f"keep_newest {keep_newest}: the newest version is always needed. Keep at least 1."
            )
        objects = self._list_objects()
        versions = _published(objects)
        kept = {*versions[-keep_newest:], *in_use}
        if self._published:
            kept.add(self._published.manifest.policy_version)
        chains = [
            chain
            for chain in self._list_chains(versions)
            if kept.isdisjoint(chain) and retire(chain)
        ]
        doomed = [version for chain in chains for version in chain]
        # Manifests go first, newest first: whenever this ends, what still has one has its bases
        # too.
        self._delete(
            [
                f"{_version_path(self._run_id, version)}/{_MANIFEST}"
                for version in sorted(doomed, reverse=True)
            ]
        )
        leftovers = [
            version
            for version in objects
            if versions and version < versions[-1] and version not in versions
        ]
        others = [path for version in (*doomed, *leftovers) for path in objects[version]]
        self._delete([path for path in others if not path.endswith(f"/{_MANIFEST}")])
        return sorted(doomed)

    def _list_chains(self, versions: Sequence[int]) -> list[list[int]]:
        """Versions grouped by the one they all go back to, each group ascending."""
        bases: dict[int, int | None] = {}
        for before, version in zip((None, *versions), versions, strict=False):
            try:
                bases[version] = (
                    self._bases[version]
                    if version in self._bases
                    else self.fetch_manifest(version).base_version
                )
            except CorruptionError:
                bases[version] = before  # which base is lost; rather keep too much
        self._bases = bases
        chains: dict[int, list[int]] = {}
        roots: dict[int, int] = {}
        for version in versions:  # ascending, and a base is older than what is based on it
            base = bases[version]
            roots[version] = roots.get(version if base is None else base, version)
            chains.setdefault(roots[version], []).append(version)
        return list(chains.values())

    def _split_into_shards(
        self, tensors: Mapping[str, Tensor], deltas: Mapping[str, Delta]
    ) -> Iterator[list[_Stored]]:
        shard: list[_Stored] = []
        storages: set[int] = set()
        num_bytes = 0
        for name, source in tensors.items():
            tensor = _to_cpu(source)
            dtype, shape = _describe(name, tensor)[1:]
            entry = TensorEntry(
                name, dtype, shape, "", _compute_sha256(tensor), is_delta=name in deltas
            )
            if delta := deltas.get(name):
                stored = _Stored(
                    entry, {f"{name}:gaps": delta.gaps, f"{name}:values": delta.values}
                )
            elif tensor.untyped_storage().data_ptr() in storages:
                stored = _Stored(
                    entry, {name: tensor.clone()}
                )  # safetensors refuses tensors that share memory
            else:
                stored = _Stored(entry, {name: tensor})
            if shard and num_bytes + stored.size_bytes > self._max_shard_bytes:
                yield shard
                shard, storages, num_bytes = [], set(), 0
            storages.add(tensor.untyped_storage().data_ptr())
            shard.append(stored)
            num_bytes += stored.size_bytes
        if shard:
            yield shard

    def _fetch_shard(
        self, manifest: WeightsManifest, shard_name: str, entries: Sequence[TensorEntry]
    ) -> dict[str, Tensor]:
        path = f"{manifest.path}/{shard_name}"
        content = self._get(path)
        match = _SHARD.fullmatch(shard_name)
        if not match or match[1] != _compute_shard_checksum(content, entries):
            raise CorruptionError(
                f"{_locate(manifest, entries[0])}: the header of its shard {path} does not match "
                "the checksum in its name. "
                f"{_REMEDY}",
                tensor=entries[0].name,
            )
        try:
            tensors: dict[str, Tensor] = safetensors.torch.load(content)
            return tensors
        except safetensors.SafetensorError as error:
            raise CorruptionError(
                f"{_locate(manifest, entries[0])}: its shard {path} cannot be decoded ({error}). "
                f"{_REMEDY}",
                tensor=entries[0].name,
            ) from error

    def _get(self, path: str) -> bytes:
        with self._store_errors(f"Reading {path} from"):
            try:
                return self._store.get(path)
            except FileNotFoundError as error:
                raise WeightsUnavailableError(
                    f"{path} is not in {self._url}: it was never published or has been collected. "
                    "Fetch the newest version."
                ) from error

    def _exists(self, manifest: WeightsManifest) -> bool:
        """Whether a version is in the store as this process published it: somebody may have emptied
        the directory.
        """
        try:
            return self.fetch_manifest(manifest.policy_version) == manifest
        except (WeightsUnavailableError, CorruptionError):
            return False

    def _list_objects(self) -> dict[int, list[str]]:
        """version -> paths of its objects, for everything found under this run."""
        found: dict[int, list[str]] = {}
        with self._store_errors("Listing"):
            for path in self._store.list(self._run_id):
                if match := _VERSION_PATH.match(path):
                    found.setdefault(int(match[1]), []).append(path)
        return found

    def _delete(self, paths: list[str]) -> None:
        with self._store_errors("Deleting from"):
            for path in paths:
                self._store.delete(path)

    @contextmanager
    def _store_errors(self, action: str) -> Iterator[None]:
        try:
            yield
        except (BaseError, OSError) as error:
            raise WeightsUnavailableError(
                f"{action} the weight store {self._url} failed: {str(error).splitlines()[0]}. "
                "Check that it exists, has room and that the credentials may use it.",
                url=self._url,
            ) from error


_REMEDY = "Fetch it again; if it stays, publish a new version."


def manifest_to_json(manifest: WeightsManifest) -> str:
    """Readable JSON, one line a field."""
    return json.dumps(dataclasses.asdict(manifest), indent=1)


def manifest_from_json(text: str) -> WeightsManifest:
    """Inverse of `manifest_to_json`.

    Raises:
        CorruptionError: not a manifest.
    """
    try:
        fields: dict[str, Any] = json.loads(text)
        tensors = tuple(
            TensorEntry(**{**entry, "shape": tuple(entry["shape"])})
            for entry in fields.pop("tensors")
        )
        manifest = WeightsManifest(
            **{**fields, "tensors": tensors, "model": ModelIdentity(**fields.pop("model"))}
        )
        # What cannot be announced is no manifest either: JSON puts any type into any field.
        weights_manifest_to_proto(manifest)
        _check_manifest(manifest)
        return manifest
    except (
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        RecursionError,
        ContractError,
    ) as error:
        raise CorruptionError(
            f"A weights manifest of {len(text)} characters cannot be decoded: {error}. {_REMEDY}"
        ) from error


def _seal(json_object: str) -> bytes:
    """A JSON object with the SHA-256 of all that comes before it as its last field."""
    body = json_object.removesuffix("\n}").encode()
    return body + f',\n "sha256": "{hashlib.sha256(body).hexdigest()}"\n}}\n'.encode()


def _unseal(content: bytes, path: str) -> str:
    """Undo `_seal`. Raises CorruptionError if a byte is not as it was written."""
    json_object = content.rpartition(b',\n "sha256": "')[0] + b"\n}"
    text = json_object.decode(errors="replace")
    if _seal(text) != content:
        raise CorruptionError(
            f"{path}, {len(content)} bytes, does not match the checksum at its end. {_REMEDY}"
        )
    return text


def _pack(index: int, shard: Sequence[_Stored]) -> tuple[str, bytes]:
    """Name and content of a shard. Two publishers of a version never write one shard differently."""
    content = safetensors.torch.save(
        {name: part for one in shard for name, part in one.parts.items()}, metadata={"format": "pt"}
    )
    checksum = _compute_shard_checksum(content, [stored.entry for stored in shard])
    return f"shard-{index:05d}-{checksum}.safetensors", content


def _compute_shard_checksum(content: bytes, entries: Sequence[TensorEntry]) -> str:
    """Over the file's header and the checksums of its tensors; what is in the file is only hashed
    once this way.
    """
    header = content[: _LENGTH_BYTES + int.from_bytes(content[:_LENGTH_BYTES], "little")]
    return hashlib.sha256(header + "".join(entry.sha256 for entry in entries).encode()).hexdigest()


def _apply(
    stored: Tensor | Delta, base: Tensor | None, manifest: WeightsManifest, entry: TensorEntry
) -> Tensor:
    if isinstance(stored, Tensor):
        return stored
    try:
        if base is None:
            raise CorruptionError("It is a delta, and there is nothing to apply it to.")
        return apply_delta(base, stored)
    except CorruptionError as error:
        raise CorruptionError(
            f"{_locate(manifest, entry)}: {error} {_REMEDY}", tensor=entry.name
        ) from error


def _verify(tensor: Tensor, manifest: WeightsManifest, entry: TensorEntry) -> None:
    for what, got, want in (
        ("dtype", _dtype_name(tensor), entry.dtype),
        ("shape", tuple(tensor.shape), entry.shape),
        ("SHA-256", _compute_sha256(tensor), entry.sha256),
    ):
        if got != want:
            base = (
                ""
                if manifest.base_version is None
                else f", put together on version {manifest.base_version},"
            )
            raise CorruptionError(
                f"{_locate(manifest, entry)}{base} has {what} {got}, not {want}. {_REMEDY}",
                tensor=entry.name,
            )


def _locate(manifest: WeightsManifest, entry: TensorEntry) -> str:
    return f"Tensor {entry.name} of version {manifest.policy_version} ({manifest.path})"


def _version_path(run_id: str, policy_version: int) -> str:
    return f"{run_id}/v{policy_version:08d}"


def _published(objects: Mapping[int, Collection[str]]) -> list[int]:
    return sorted(
        version
        for version, paths in objects.items()
        if any(path.endswith(f"/{_MANIFEST}") for path in paths)
    )


def _layout(manifest: WeightsManifest) -> list[tuple[str, str, tuple[int, ...]]]:
    return [(entry.name, entry.dtype, entry.shape) for entry in manifest.tensors]


def _describe(name: str, tensor: Tensor) -> tuple[str, str, tuple[int, ...]]:
    return name, _dtype_name(tensor), tuple(tensor.shape)


def _content(manifest: WeightsManifest) -> tuple[object, ...]:
    """What makes two publications of a version the same, however each was encoded."""
    return (
        _layout(manifest),
        [entry.sha256 for entry in manifest.tensors],
        manifest.model,
        manifest.num_updates,
    )


def _to_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu").contiguous()


def _compute_sha256(tensor: Tensor) -> str:
    """Over the raw bytes, little-endian as every machine that PyTorch supports here stores them."""
    return hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().data).hexdigest()


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _check_names(policy_version: int, tensors: Mapping[str, Tensor]) -> None:
    wrong = [name for name in tensors if not name or ":" in name]
    if wrong or not tensors:
        raise ContractError(
            f"Version {policy_version}: {len(tensors)} tensors, of them with names that cannot be "
            f"stored: {wrong[:3]}. "
            "Publish at least one, and no ':' in a name."
        )


def _check_manifest(manifest: WeightsManifest) -> None:
    """A manifest may have come over the wire; nothing in it may lead out of its version's
    directory, or to itself.
    """
    is_named = _VERSION_PATH.fullmatch(manifest.path) and manifest.path == _version_path(
        manifest.run_id, manifest.policy_version
    )
    wrong = [] if is_named else [manifest.path]
    wrong += [entry.shard for entry in manifest.tensors if not _SHARD.fullmatch(entry.shard)]
    if wrong:
        raise CorruptionError(
            f"Weights manifest of version {manifest.policy_version} names {wrong[0]!r}, which is "
            "no path this store makes. "
            "Use manifests as `publish` returns them."
        )
    if (
        manifest.base_version is not None
        and not 0 <= manifest.base_version < manifest.policy_version
    ):
        raise CorruptionError(
            f"Weights manifest of version {manifest.policy_version} has base version "
            f"{manifest.base_version}; a base is older. "
            "Use manifests as `publish` returns them."
        )
