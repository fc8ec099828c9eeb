"""Tensors of a version as the shards that hold them: split, packed, decoded and verified.

A shard's name has the SHA-256 of its header and of its tensors' checksums, so every byte is covered
and no decoder sees a header that was not verified.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from sdar.contracts.errors import CorruptionError
from sdar.contracts.types import TensorEntry, WeightsManifest
from sdar.weights.delta import Delta, apply_delta
from sdar.weights.manifests import REMEDY, SHARD_NAME, locate

_LENGTH_BYTES = 8
"""A safetensors file begins with the length of its header."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as it goes into a shard: its entry, without the shard's name, and the parts by their
    names there.
    """

    entry: TensorEntry
    parts: dict[str, Tensor]

    @property
    def size_bytes(self) -> int:
        return sum(part.nbytes for part in self.parts.values())


def split_into_shards(
    tensors: Mapping[str, Tensor], deltas: Mapping[str, Delta], max_shard_bytes: int
) -> Iterator[list[StoredTensor]]:
    """The tensors in order, in lists of at most `max_shard_bytes`; a larger one gets its own."""
    shard: list[StoredTensor] = []
    storages: set[int] = set()
    num_bytes = 0
    for name, source in tensors.items():
        tensor = to_cpu(source)
        storage = tensor.untyped_storage().data_ptr()
        stored = _store_tensor(name, tensor, deltas.get(name), is_shared=storage in storages)
        if shard and num_bytes + stored.size_bytes > max_shard_bytes:
            yield shard
            shard = []
            storages = set()
            num_bytes = 0
        storages.add(storage)
        shard.append(stored)
        num_bytes += stored.size_bytes
    if shard:
        yield shard


def _store_tensor(
    name: str, tensor: Tensor, delta: Delta | None, *, is_shared: bool
) -> StoredTensor:
    _, dtype, shape = describe_tensor(name, tensor)
    checksum = _compute_sha256(tensor)
    entry = TensorEntry(name, dtype, shape, "", checksum, is_delta=delta is not None)
    if delta is not None:
        return StoredTensor(entry, {f"{name}:gaps": delta.gaps, f"{name}:values": delta.values})
    # safetensors refuses tensors that share memory.
    return StoredTensor(entry, {name: tensor.clone() if is_shared else tensor})


def pack_shard(index: int, shard: Sequence[StoredTensor]) -> tuple[str, bytes]:
    """Name and content of a shard; two publishers of a version never write one differently."""
    parts: dict[str, Tensor] = {}
    for stored in shard:
        parts |= stored.parts
    content = safetensors.torch.save(parts, metadata={"format": "pt"})
    checksum = _compute_shard_checksum(content, [stored.entry for stored in shard])
    return f"shard-{index:05d}-{checksum}.safetensors", content


def _compute_shard_checksum(content: bytes, entries: Sequence[TensorEntry]) -> str:
    """Over the file's header and the checksums of its tensors; what is in the file is only hashed
    once this way.
    """
    header = content[: _LENGTH_BYTES + int.from_bytes(content[:_LENGTH_BYTES], "little")]
    checksums = "".join(entry.sha256 for entry in entries)
    return hashlib.sha256(header + checksums.encode()).hexdigest()


def unpack_shard(
    content: bytes, manifest: WeightsManifest, shard_name: str, entries: Sequence[TensorEntry]
) -> dict[str, Tensor]:
    """The parts of a shard by name, its header verified, their elements not yet.

    Raises:
        CorruptionError: the header does not match the checksum in the shard's name.
    """
    path = f"{manifest.path}/{shard_name}"
    match = SHARD_NAME.fullmatch(shard_name)
    if not match or match[1] != _compute_shard_checksum(content, entries):
        raise CorruptionError(
            f"{locate(manifest, entries[0])}: the header of its shard {path} does not match "
            f"the checksum in its name. {REMEDY}",
            tensor=entries[0].name,
        )
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load(content)
        return tensors
    except safetensors.SafetensorError as error:
        raise CorruptionError(
            f"{locate(manifest, entries[0])}: its shard {path} cannot be decoded ({error}). "
            f"{REMEDY}",
            tensor=entries[0].name,
        ) from error


def _pop_delta(parts: dict[str, Tensor], name: str) -> Delta:
    return Delta(parts.pop(f"{name}:gaps"), parts.pop(f"{name}:values"))


def iter_parts(
    parts: dict[str, Tensor], manifest: WeightsManifest, entries: Sequence[TensorEntry]
) -> Iterator[tuple[TensorEntry, Tensor | Delta]]:
    """What is stored of each tensor. Popped, so that the caller can free one before the shard is
    done.
    """
    for entry in entries:
        try:
            if entry.is_delta:
                yield entry, _pop_delta(parts, entry.name)
            else:
                yield entry, parts.pop(entry.name)
        except KeyError:
            message = f"{locate(manifest, entry)} is missing from its shard. {REMEDY}"
            raise CorruptionError(message, tensor=entry.name) from None


def apply_stored(
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
            f"{locate(manifest, entry)}: {error} {REMEDY}", tensor=entry.name
        ) from error


def verify_tensor(tensor: Tensor, manifest: WeightsManifest, entry: TensorEntry) -> None:
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
                f"{locate(manifest, entry)}{base} has {what} {got}, not {want}. {REMEDY}",
                tensor=entry.name,
            )


def describe_tensor(name: str, tensor: Tensor) -> tuple[str, str, tuple[int, ...]]:
    return name, _dtype_name(tensor), tuple(tensor.shape)


def to_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu").contiguous()


def _compute_sha256(tensor: Tensor) -> str:
    """Over the raw bytes, little-endian as every machine that PyTorch supports here stores them."""
    return hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().data).hexdigest()


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
