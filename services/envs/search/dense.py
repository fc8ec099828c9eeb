"""Search by meaning: an encoder of queries, and a faiss index that the user built of the corpus.

It keeps to the conventions of e5: "query: " before a query ("passage: " before what was indexed),
the mean of the last layer over the text's tokens, length one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModel, AutoTokenizer

from sdar.contracts.errors import ConfigurationError
from services.envs.search.corpus import Corpus, open_corpus
from services.envs.search.passages import Hit

try:
    import faiss
except ImportError as error:
    raise ConfigurationError(
        "A dense index needs faiss. Install it: pip install 'sdar[environments]'."
    ) from error

QUERY_PREFIX = "query: "
PASSAGE_PREFIX = "passage: "
MAX_TOKENS = 256
BATCH_SIZE = 64
"""Texts that go through the encoder at once."""


class Encoder:
    """Texts to vectors of length one. On a GPU if there is one.

    Raises:
        ConfigurationError: the directory holds no model that transformers can load.
    """

    def __init__(self, directory: Path) -> None:
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(
                directory, local_files_only=True, trust_remote_code=False
            )
            model = AutoModel.from_pretrained(
                directory, local_files_only=True, use_safetensors=True, trust_remote_code=False
            )
            self._model = model.to(self._device).eval()
        except (OSError, ValueError) as error:
            raise ConfigurationError(
                f"Encoder {directory} cannot be loaded: {error}. Give a directory with a model."
            ) from error

    @property
    def size(self) -> int:
        """Numbers in a vector."""
        return int(self._model.config.hidden_size)

    def encode(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """[texts, size], each row of length one."""
        if not texts:
            return np.empty((0, self.size), np.float32)
        starts = range(0, len(texts), BATCH_SIZE)
        parts = [self._encode(list(texts[start : start + BATCH_SIZE])) for start in starts]
        return np.concatenate(parts)

    @torch.inference_mode()
    def _encode(self, texts: list[str]) -> npt.NDArray[np.float32]:
        tokens = self._tokenizer(
            texts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        )
        tokens = tokens.to(self._device)
        states = self._model(**tokens).last_hidden_state.float()
        mask = tokens["attention_mask"].unsqueeze(-1)
        # Every text has its begin and end tokens: no sum over nothing.
        means = (states * mask).sum(1) / mask.sum(1)
        return np.asarray(torch.nn.functional.normalize(means, dim=-1).cpu().numpy())


class DenseRetriever:
    """The passages whose vectors are nearest to the query's."""

    def __init__(self, corpus: Corpus, index: faiss.Index, encoder: Encoder) -> None:
        self._corpus = corpus
        self._index = index
        self._encoder = encoder
        # A distance is the smaller the better, a score the greater.
        self._sign = 1.0 if index.metric_type == faiss.METRIC_INNER_PRODUCT else -1.0

    def retrieve(self, queries: Sequence[str], topk: int) -> list[list[Hit]]:
        vectors = self._encoder.encode([QUERY_PREFIX + query for query in queries])
        numbers, places = self._index.search(vectors, min(topk, len(self._corpus)))
        # A row for each query.
        return list(map(self._rank, self._sign * numbers, places))

    def _rank(self, scores: npt.NDArray[np.float32], places: npt.NDArray[np.int64]) -> list[Hit]:
        # An approximate index fills up with places of -1; of equal scores the earlier passage comes
        # first.
        order = [number for number in np.lexsort((places, -scores)) if places[number] >= 0]
        return [Hit(self._corpus[int(places[number])], float(scores[number])) for number in order]


def open_dense_retriever(
    corpus_path: Path, index_path: Path, encoder_directory: Path
) -> DenseRetriever:
    """Load all three, and check that they belong together.

    Raises:
        ConfigurationError: one of them cannot be read, or they differ in their sizes.
    """
    corpus = open_corpus(corpus_path)
    index = _read_index(index_path)
    if index.ntotal != len(corpus):
        raise ConfigurationError(
            f"Index {index_path} has {index.ntotal} vectors for {len(corpus)} passages in "
            f"{corpus_path}. Index this corpus."
        )
    encoder = Encoder(encoder_directory)
    if index.d != encoder.size:
        raise ConfigurationError(
            f"Index {index_path} has vectors of {index.d} numbers, encoder {encoder_directory} "
            f"makes {encoder.size}. Give the encoder that the index was built with."
        )
    return DenseRetriever(corpus, index, encoder)


def _read_index(path: Path) -> faiss.Index:
    try:
        return faiss.read_index(str(path))
    except RuntimeError as error:
        # The lines after the first are faiss' own call stack.
        problem = str(error).splitlines()[0]
        raise ConfigurationError(
            f"Index {path} cannot be read by faiss: {problem}. Give a file faiss wrote."
        ) from error
