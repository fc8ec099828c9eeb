"""Owns published weights: one immutable version per directory of an object store, local or S3.

Layout under the store's root, all of it readable without this module:

    {run_id}/v00000012/shard-00000-{hash}.safetensors     tensors in order, at most `max_shard_bytes` each (or one tensor)
    {run_id}/v00000012/manifest.json                      names every tensor with its dtype, shape and SHA-256

Shards are named after their content and written first, the manifest last and only if there is none: a version exists when its
manifest does, and never changes. All calls block; callers on an event loop use `asyncio.to_thread`. It never keeps more than
one shard in memory and knows no model.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import obstore
import safetensors
import safetensors.torch
import torch
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import LocalStore, S3Store
from torch import Tensor

from sdar.contracts.codec import weights_manifest_to_proto
from sdar.contracts.errors import ConfigurationError, ConflictError, ContractError, CorruptionError, WeightsUnavailableError
from sdar.contracts.types import ModelIdentity, TensorEntry, WeightsManifest

_MANIFEST = "manifest.json"
_SEGMENT = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_VERSION_PATH = re.compile(rf"{_SEGMENT}/v(\d{{8,}})")
_SHARD = re.compile(r"shard-\d{5,}-[0-9a-f]{16}\.safetensors")
_CLIENT_OPTIONS = {
    "connect_timeout": timedelta(seconds=10),
    "read_timeout": timedelta(seconds=60),
    "timeout": timedelta(minutes=15),
}
_RETRY = {"max_retries": 6, "retry_timeout": timedelta(seconds=60)}


class WeightStore:
    """The versions of one run's weights.

    Args:
        url: a directory, file:///directory or s3://bucket/prefix. Credentials and endpoint of S3 come from the usual AWS_*
            variables or roles.
        run_id: whose versions `publish`, `fetch_manifest` and the rest mean. `iter_tensors` reads any run's in this store.
        max_shard_bytes: bound on a shard, hence on the memory that publishing and reading take on top of the weights. A larger
            tensor gets a shard of its own.
        s3_options: overrides of obstore's S3 configuration, such as `endpoint` and `allow_http`.
    """

    def __init__(
        self,
        url: str,
        run_id: str,
        max_shard_bytes: int = 256 << 20,
        s3_options: Mapping[str, str | bool] | None = None,
    ) -> None:
        if not re.fullmatch(_SEGMENT, run_id):
            raise ConfigurationError(f"Run id {run_id!r} cannot name a directory. Use letters, digits, '.', '_' and '-'.")
        if max_shard_bytes < 1:
            raise ConfigurationError(f"max_shard_bytes {max_shard_bytes} must be at least 1.")
        self._url = url
        self._run_id = run_id
        self._max_shard_bytes = max_shard_bytes
        with self._store_errors("Opening"):
            self._store = _open_store(url, s3_options or {})

    def publish(
        self,
        policy_version: int,
        tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
        model: ModelIdentity,
        *,
        num_updates: int = 0,
    ) -> WeightsManifest:
        """Store a version. Publishing the same content again returns what is there.

        Args:
            tensors: by name, on any device; pairs are consumed one by one, so they may be gathered lazily.
            num_updates: optimizer updates that these weights have seen.

        Raises:
            ConflictError: the version exists with other content.
            WeightsUnavailableError: the store cannot be written.
        """
        path = self._version_path(policy_version)
        entries: list[TensorEntry] = []
        size_bytes = 0
        for index, shard in enumerate(self._split_into_shards(tensors)):
            described = _describe_shard(index, shard)
            entries += described
            size_bytes += sum(_count_bytes(tensor) for tensor in shard.values())
            shard_path = f"{path}/{described[0].shard}"
            with self._store_errors(f"Writing {shard_path} in"):
                obstore.put(self._store, shard_path, safetensors.torch.save(shard, metadata={"format": "pt"}))
            shard.clear()  # or this shard would stay in memory while the next one is gathered
        manifest = WeightsManifest(
            self._run_id, policy_version, path, tuple(entries), size_bytes, model, time.time(), num_updates
        )
        _check_names(manifest)
        return self._publish_manifest(manifest)

    def _publish_manifest(self, manifest: WeightsManifest) -> WeightsManifest:
        """The atomic step: the version exists from here on, unless it did before."""
        with self._store_errors(f"Writing {manifest.path}/{_MANIFEST} in"):
            try:
                content = manifest_to_json(manifest).encode()
                obstore.put(self._store, f"{manifest.path}/{_MANIFEST}", content, mode="create", use_multipart=False)
            except AlreadyExistsError:
                pass
            else:
                return manifest
        existing = self.fetch_manifest(manifest.policy_version)
        if _content(existing) == _content(manifest):
            return existing
        kept = {entry.shard for entry in existing.tensors}
        self._delete([f"{manifest.path}/{shard}" for shard in {entry.shard for entry in manifest.tensors} - kept])
        raise ConflictError(
            f"Version {manifest.policy_version} of run {self._run_id} already names other weights in {self._url}. "
            "Versions never change: continue after the newest published one, or use another run id.",
            policy_version=manifest.policy_version,
        )

    def fetch_manifest(self, policy_version: int | None = None) -> WeightsManifest:
        """The manifest of a version, of the newest one for None.

        Raises:
            WeightsUnavailableError: there is no such version, or the store cannot be read.
            CorruptionError: its manifest cannot be decoded.
        """
        if policy_version is None:
            versions = self.list_versions()
            if not versions:
                raise WeightsUnavailableError(f"Run {self._run_id} has no weights in {self._url} yet. Start its learner first.")
            policy_version = versions[-1]
        path = self._version_path(policy_version)
        content = self._get(f"{path}/{_MANIFEST}")
        manifest = manifest_from_json(content.decode(errors="replace"))
        if (manifest.path, manifest.policy_version) != (path, policy_version):
            raise CorruptionError(
                f"{path}/{_MANIFEST} in {self._url} describes {manifest.path}, version {manifest.policy_version}. "
                "Do not move versions by hand."
            )
        return manifest

    def iter_tensors(self, manifest: WeightsManifest) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of a version on the CPU, in the manifest's order, each checked before it is handed out.

        Raises:
            CorruptionError: a tensor is missing, or has another dtype, shape or checksum than the manifest says.
            WeightsUnavailableError: a shard cannot be read; its version may have been collected.
            ContractError: the manifest points outside the store.
        """
        _check_paths(manifest)
        shard_name, shard = "", dict[str, Tensor]()
        for entry in manifest.tensors:
            if entry.shard != shard_name:
                shard.clear()
                shard_name, shard = entry.shard, self._fetch_shard(manifest, entry)
            if entry.name not in shard:
                raise CorruptionError(f"{_locate(manifest, entry)} is missing from its shard. {_REMEDY}", tensor=entry.name)
            # Popping lets the caller free a tensor before the shard is done.
            tensor = shard.pop(entry.name)
            _verify(tensor, manifest, entry)
            yield entry.name, tensor

    def list_versions(self) -> list[int]:
        """Published versions, ascending."""
        return sorted(version for version, paths in self._list_objects().items() if any(p.endswith(_MANIFEST) for p in paths))

    def collect_garbage(self, keep_newest: int, in_use: Collection[int] = ()) -> list[int]:
        """Delete versions except the newest `keep_newest` and those `in_use`; returns the deleted ones.

        What a crashed publisher left behind goes too, once a newer version exists.
        """
        if keep_newest < 1:
            raise ConfigurationError(f"keep_newest {keep_newest}: the newest version is always needed. Keep at least 1.")
        objects = self._list_objects()
        versions = sorted(version for version, paths in objects.items() if any(p.endswith(_MANIFEST) for p in paths))
        kept = {*versions[-keep_newest:], *in_use}
        doomed = [version for version in sorted(objects) if version not in kept and versions and version < versions[-1]]
        for version in doomed:
            # The manifest goes first: a version without one does not exist, so no reader starts on half of it.
            self._delete([path for path in objects[version] if path.endswith(_MANIFEST)])
            self._delete([path for path in objects[version] if not path.endswith(_MANIFEST)])
        return [version for version in doomed if version in versions]

    def _version_path(self, policy_version: int) -> str:
        return f"{self._run_id}/v{policy_version:08d}"

    def _split_into_shards(self, tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
        shard: dict[str, Tensor] = {}
        storages: set[int] = set()
        num_bytes = 0
        for name, source in tensors.items() if isinstance(tensors, Mapping) else tensors:
            tensor = source.detach().to("cpu").contiguous()
            if shard and num_bytes + _count_bytes(tensor) > self._max_shard_bytes:
                yield shard
                shard, storages, num_bytes = {}, set(), 0
            if tensor.untyped_storage().data_ptr() in storages:
                tensor = tensor.clone()  # safetensors refuses tensors that share memory, as tied embeddings do
            storages.add(tensor.untyped_storage().data_ptr())
            shard[name] = tensor
            num_bytes += _count_bytes(tensor)
        if shard:
            yield shard

    def _fetch_shard(self, manifest: WeightsManifest, entry: TensorEntry) -> dict[str, Tensor]:
        content = self._get(f"{manifest.path}/{entry.shard}")
        try:
            tensors: dict[str, Tensor] = safetensors.torch.load(content)
            return tensors
        except safetensors.SafetensorError as error:
            raise CorruptionError(
                f"{_locate(manifest, entry)}: its shard {entry.shard} cannot be decoded ({error}). {_REMEDY}", tensor=entry.name
            ) from error

    def _get(self, path: str) -> bytes:
        with self._store_errors(f"Reading {path} from"):
            try:
                return bytes(obstore.get(self._store, path).bytes())
            except FileNotFoundError as error:
                raise WeightsUnavailableError(
                    f"{path} is not in {self._url}: it was never published or has been collected. Fetch the newest version."
                ) from error

    def _list_objects(self) -> dict[int, list[str]]:
        """version -> paths of its objects, for everything found under this run."""
        found: dict[int, list[str]] = {}
        with self._store_errors("Listing"):
            for batch in obstore.list(self._store, f"{self._run_id}/"):
                for item in batch:
                    if match := _VERSION_PATH.match(item["path"]):
                        found.setdefault(int(match[1]), []).append(item["path"])
        return found

    def _delete(self, paths: list[str]) -> None:
        with self._store_errors("Deleting from"):
            for path in paths:
                try:
                    obstore.delete(self._store, path)
                except FileNotFoundError:
                    continue  # somebody else collects too

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
        tensors = tuple(TensorEntry(**{**entry, "shape": tuple(entry["shape"])}) for entry in fields.pop("tensors"))
        manifest = WeightsManifest(**{**fields, "tensors": tensors, "model": ModelIdentity(**fields.pop("model"))})
        _check_paths(manifest)
        # What cannot be announced is no manifest either: JSON puts any type into any field.
        weights_manifest_to_proto(manifest)
        return manifest
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, ContractError) as error:
        raise CorruptionError(f"A weights manifest of {len(text)} characters cannot be decoded: {error}. {_REMEDY}") from error


def _open_store(url: str, s3_options: Mapping[str, Any]) -> LocalStore | S3Store:
    parts = urlsplit(url)
    if parts.scheme == "s3" and parts.netloc:
        prefix = parts.path.strip("/") or None
        return S3Store(parts.netloc, prefix=prefix, client_options=_CLIENT_OPTIONS, retry_config=_RETRY, **s3_options)
    if parts.scheme == "file" and not parts.netloc and parts.path:
        return LocalStore(prefix=Path(unquote(parts.path)), mkdir=True)
    if "://" not in url and url:
        return LocalStore(prefix=Path(url).absolute(), mkdir=True)
    raise ConfigurationError(f"Weight store {url!r} is not usable. Give a directory, file:///directory or s3://bucket/prefix.")


def _content(manifest: WeightsManifest) -> tuple[object, ...]:
    """What makes two publications of a version the same."""
    return manifest.tensors, manifest.model, manifest.num_updates


def _describe_shard(index: int, shard: Mapping[str, Tensor]) -> list[TensorEntry]:
    """The shard's entries. Its name hashes them: two publishers of a version never write one shard differently."""
    described = [(name, _dtype_name(tensor), tuple(tensor.shape), _compute_sha256(tensor)) for name, tensor in shard.items()]
    shard_name = f"shard-{index:05d}-{hashlib.sha256(repr(described).encode()).hexdigest()[:16]}.safetensors"
    return [TensorEntry(name, dtype, shape, shard_name, sha256) for name, dtype, shape, sha256 in described]


def _verify(tensor: Tensor, manifest: WeightsManifest, entry: TensorEntry) -> None:
    for what, got, want in (
        ("dtype", _dtype_name(tensor), entry.dtype),
        ("shape", tuple(tensor.shape), entry.shape),
        ("SHA-256", _compute_sha256(tensor), entry.sha256),
    ):
        if got != want:
            raise CorruptionError(f"{_locate(manifest, entry)} has {what} {got}, not {want}. {_REMEDY}", tensor=entry.name)


def _locate(manifest: WeightsManifest, entry: TensorEntry) -> str:
    return f"Tensor {entry.name} of version {manifest.policy_version} ({manifest.path})"


def _compute_sha256(tensor: Tensor) -> str:
    """Over the raw bytes, little-endian as every machine that PyTorch supports here stores them."""
    return hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().data).hexdigest()


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _count_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _check_names(manifest: WeightsManifest) -> None:
    names = {entry.name for entry in manifest.tensors}
    if not names or len(names) != len(manifest.tensors):
        raise ContractError(
            f"Version {manifest.policy_version}: {len(manifest.tensors)} tensors with {len(names)} distinct names. "
            "Publish at least one tensor and each once."
        )


def _check_paths(manifest: WeightsManifest) -> None:
    """A manifest may have come over the wire; nothing in it may lead out of its version's directory."""
    wrong = [] if _VERSION_PATH.fullmatch(manifest.path) else [manifest.path]
    wrong += [entry.shard for entry in manifest.tensors if not _SHARD.fullmatch(entry.shard)]
    if wrong:
        raise ContractError(
            f"Weights manifest of version {manifest.policy_version} names {wrong[0]!r}, which is no path this store makes. "
            "Use manifests as `publish` returns them."
        )
