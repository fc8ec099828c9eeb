"""Owns search by words: a BM25 index of a corpus, built once, kept on disk and mapped into every process that searches it."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import bm25s
import numpy as np
import numpy.typing as npt
import Stemmer

from sdar.contracts.errors import ConfigurationError
from services.envs.search.corpus import Corpus, iterate_corpus, require_corpus
from services.envs.search.passages import Hit

K1, B = 0.9, 0.4
"""What Lucene-based retrievers of this benchmark use."""
_LAYOUT = "1"
_OFFSETS = "offsets.npy"


class LexicalRetriever:
    """BM25 with Porter stems and English stop words. Of equal scores the earlier passage comes first; a passage that shares no
    word with the query is never found."""

    def __init__(self, corpus: Corpus, index: bm25s.BM25) -> None:
        self._corpus = corpus
        self._index = index
        self._stemmer = Stemmer.Stemmer("porter")
        # The stemmer keeps a buffer: two threads in it at once corrupt each other's stems.
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._corpus)

    def retrieve(self, queries: Sequence[str], topk: int) -> list[list[Hit]]:
        return [self._retrieve_one(query, topk) for query in queries]

    def _retrieve_one(self, query: str, topk: int) -> list[Hit]:
        with self._lock:
            (words,) = _tokenize([query], self._stemmer, return_ids=False)
        tokens = self._index.get_tokens_ids(words)
        if not tokens:
            return []
        scores = self._index.get_scores_from_ids(tokens)
        return [Hit(self._corpus[int(place)], float(scores[place])) for place in rank(scores, topk)]


def rank(scores: npt.NDArray[np.float32], topk: int) -> npt.NDArray[np.int64]:
    """Places of the `topk` greatest positive scores, greatest first, equal ones in their order."""
    found = np.flatnonzero(scores > 0)
    if len(found) > topk:
        least = np.partition(scores[found], -topk)[-topk]
        found = found[scores[found] >= least]
    return found[np.argsort(-scores[found], kind="stable")][:topk]


def open_lexical_retriever(corpus_path: Path, cache: Path | None = None) -> LexicalRetriever:
    """The retriever of a corpus, shared by all of this process; a corpus that changed is indexed anew.

    Args:
        cache: where indexes are kept, ~/.cache/sdar/search by default.

    Raises:
        ConfigurationError: no corpus there, or a line of it is no passage.
    """
    require_corpus(corpus_path)
    corpus_path = corpus_path.resolve()
    state = corpus_path.stat()
    return _open(corpus_path, cache or Path.home() / ".cache" / "sdar" / "search", state.st_size, state.st_mtime_ns)


@functools.lru_cache(maxsize=4)
def _open(corpus_path: Path, cache: Path, size_bytes: int, modified_ns: int) -> LexicalRetriever:
    recipe = f"{_LAYOUT} {bm25s.__version__} {K1} {B} {corpus_path} {size_bytes} {modified_ns}"
    directory = cache / hashlib.sha256(recipe.encode()).hexdigest()[:24]
    if not directory.exists():
        _build(corpus_path, directory)
    offsets = np.load(directory / _OFFSETS, mmap_mode="r", allow_pickle=False)
    index = bm25s.BM25.load(directory, mmap=True, show_progress=False)
    return LexicalRetriever(Corpus(corpus_path, offsets), index)


def _build(corpus_path: Path, directory: Path) -> None:
    """Write the index beside its place, then move it there whole: whoever builds it at the same time builds the same."""
    offsets: list[int] = []

    def iterate_contents() -> Iterator[str]:
        for offset, passage in iterate_corpus(corpus_path):
            offsets.append(offset)
            yield passage.contents

    tokens = _tokenize(iterate_contents(), Stemmer.Stemmer("porter"), return_ids=True)
    if not tokens.vocab:
        raise ConfigurationError(f"Corpus {corpus_path} holds no word that can be searched for. Give passages of text.")
    index = bm25s.BM25(method="lucene", k1=K1, b=B)
    index.index(tokens, show_progress=False)
    directory.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=".building-", dir=directory.parent))
    try:
        index.save(building, show_progress=False)
        np.save(building / _OFFSETS, np.array(offsets, dtype=np.int64), allow_pickle=False)
        # A rename onto a full directory fails: somebody else was faster.
        with contextlib.suppress(OSError):
            os.rename(building, directory)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _tokenize(texts, stemmer, *, return_ids):  # type: ignore[no-untyped-def]  # as loosely typed as what it wraps
    return bm25s.tokenize(texts, stopwords="en", stemmer=stemmer, return_ids=return_ids, show_progress=False)
