"""Search by words: a BM25 index of a corpus, built once and mapped by every process."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

import bm25s
import numpy as np
import numpy.typing as npt
import Stemmer
from bm25s.stopwords import STOPWORDS_EN

from sdar.contracts.errors import ConfigurationError
from sdar.process.settings import load_settings
from services.envs.search.corpus import Corpus, iterate_corpus, require_corpus
from services.envs.search.passages import Hit

K1, B = 0.9, 0.4
"""What Lucene-based retrievers of this benchmark use."""
# Part of an index's name: raise it when the same corpus would be indexed differently.
_LAYOUT = "2"
_OFFSETS = "offsets.npy"
_WORD = re.compile(r"\b\w\w+\b")
_STOP_WORDS = frozenset(STOPWORDS_EN)


class LexicalRetriever:
    """BM25 with Porter stems and English stop words. Of equal scores the earlier passage comes
    first; a passage that shares no word with the query is never found."""

    def __init__(self, corpus: Corpus, index: bm25s.BM25) -> None:
        self._corpus = corpus
        self._index = index
        self._stemmer = Stemmer.Stemmer("porter")
        # The stemmer keeps a buffer: two threads in it at once corrupt each other's stems.
        self._lock = threading.Lock()

    def retrieve(self, queries: Sequence[str], topk: int) -> list[list[Hit]]:
        return [self._retrieve_one(query, topk) for query in queries]

    def _retrieve_one(self, query: str, topk: int) -> list[Hit]:
        with self._lock:
            stems = self._stemmer.stemWords(split_words(query))
        tokens = self._index.get_tokens_ids(stems)
        if not tokens:
            return []
        scores = self._index.get_scores_from_ids(tokens)
        return [Hit(self._corpus[int(place)], float(scores[place])) for place in rank(scores, topk)]


def split_words(text: str) -> list[str]:
    """Words of two letters and more in lower case, without stop words.

    The index's library does the same, and shows progress bars meanwhile.
    """
    return [word for word in _WORD.findall(text.lower()) if word not in _STOP_WORDS]


def rank(scores: npt.NDArray[np.float32], topk: int) -> npt.NDArray[np.int64]:
    """Places of the `topk` greatest positive scores, greatest first, equal ones in their order."""
    found = np.flatnonzero(scores > 0)
    if len(found) > topk:
        # All that reach the last place's score, so that the stable order below settles a tie.
        least = np.partition(scores[found], -topk)[-topk]
        found = found[scores[found] >= least]
    return found[np.argsort(-scores[found], kind="stable")][:topk]


def open_lexical_retriever(corpus_path: Path, cache: Path | None = None) -> LexicalRetriever:
    """The retriever of a corpus, one for the process. A corpus that changed is indexed anew.

    Args:
        cache: where indexes are kept, search/ in $SDAR_CACHE by default.

    Raises:
        ConfigurationError: no corpus there, or a line of it is no passage.
    """
    require_corpus(corpus_path)
    corpus_path = corpus_path.resolve()
    state = corpus_path.stat()
    return _open(
        corpus_path,
        cache or load_settings().cache.expanduser() / "search",
        state.st_size,
        state.st_mtime_ns,
    )


@functools.lru_cache(maxsize=4)
def _open(corpus_path: Path, cache: Path, size_bytes: int, modified_ns: int) -> LexicalRetriever:
    # By content: a corpus that is copied, or made again, finds its index.
    with corpus_path.open("rb") as file:
        content = hashlib.file_digest(file, "sha256").hexdigest()
    recipe = f"{_LAYOUT} {bm25s.__version__} {K1} {B} {content}"
    directory = cache / hashlib.sha256(recipe.encode()).hexdigest()[:24]
    if not directory.exists():
        _build(corpus_path, directory)
    offsets = np.load(directory / _OFFSETS, mmap_mode="r", allow_pickle=False)
    index = bm25s.BM25.load(directory, mmap=True, show_progress=False)
    # The same mapped bytes as plain arrays: numpy's own class for mapped ones takes longer to slice
    # than a query to rank.
    index.scores = {
        name: np.asarray(part) if isinstance(part, np.memmap) else part
        for name, part in index.scores.items()
    }
    return LexicalRetriever(Corpus(corpus_path, offsets), index)


def _build(corpus_path: Path, directory: Path) -> None:
    """Write the index beside its place, then move it there whole.

    Another process may do so at the same time; both write the same.
    """
    offsets, index = _index(corpus_path)
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=".building-", dir=directory.parent))
    except OSError as error:
        raise ConfigurationError(
            f"No index can be kept in {directory.parent}: {error}. Make it writable."
        ) from error
    try:
        index.save(building, show_progress=False)
        np.save(building / _OFFSETS, np.array(offsets, dtype=np.int64), allow_pickle=False)
        # A rename onto a full directory fails: somebody else was faster.
        with contextlib.suppress(OSError):
            os.rename(building, directory)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _index(corpus_path: Path) -> tuple[list[int], bm25s.BM25]:
    """Where each passage's line begins, and the index of their words by number."""
    offsets: list[int] = []
    documents: list[list[int]] = []
    stems = _Stems()
    vocabulary: dict[str, int] = {}
    for offset, passage in iterate_corpus(corpus_path):
        offsets.append(offset)
        words = split_words(passage.contents)
        documents.append([vocabulary.setdefault(stems[word], len(vocabulary)) for word in words])
    if not vocabulary:
        raise ConfigurationError(
            f"Corpus {corpus_path} holds no word that can be searched for. Give passages of text."
        )
    index = bm25s.BM25(method="lucene", k1=K1, b=B)
    index.index((documents, vocabulary), show_progress=False)
    return offsets, index


class _Stems(dict[str, str]):
    """The stem of every word met so far: a corpus repeats its words."""

    def __init__(self) -> None:
        self._stemmer = Stemmer.Stemmer("porter")

    def __missing__(self, word: str) -> str:
        stem: str = self._stemmer.stemWord(word)
        self[word] = stem
        return stem
