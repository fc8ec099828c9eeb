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
        # Tied weights, such as an embedding and the output layer, are one storage by two names.
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
    # safetensors refuses tensors that share memory within one file.
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
    """Over the file's header and the checksums of its tensors.

    This way the tensors' bytes are hashed only once, for their own checksums.
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
    place = f"{manifest.path}/{shard_name}"
    first = entries[0]
    match = SHARD_NAME.fullmatch(shard_name)
    # Before it is decoded: the decoder must not see a header that nobody has vouched for.
    if not match or match[1] != _compute_shard_checksum(content, entries):
        message = f"the header of its shard {place} does not match the checksum in its name."
        raise _build_error(manifest, first, message)
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load(content)
        return tensors
    except safetensors.SafetensorError as error:
        message = f"its shard {place} cannot be decoded ({error})."
        raise _build_error(manifest, first, message) from error


def _build_error(manifest: WeightsManifest, entry: TensorEntry, problem: str) -> CorruptionError:
    message = f"{locate(manifest, entry)}: {problem} {REMEDY}"
    return CorruptionError(message, tensor=entry.name)


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
    """The tensor that is stored: itself, or `base` with the changes of a delta.

    Raises:
        CorruptionError: a delta without a base, or one that does not fit it.
    """
    if isinstance(stored, Tensor):
        return stored
    try:
        if base is None:
            raise CorruptionError("It is a delta, and there is nothing to apply it to.")
        return apply_delta(base, stored)
    except CorruptionError as error:
        raise _build_error(manifest, entry, str(error)) from error


def verify_tensor(tensor: Tensor, manifest: WeightsManifest, entry: TensorEntry) -> None:
    """Raises CorruptionError for a tensor that is not the one its entry describes."""
    # The checksum last: it is the only one that takes time.
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
