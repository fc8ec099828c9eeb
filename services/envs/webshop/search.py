"""The shop's search: BM25 with the constants and text analysis of the published Lucene index."""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable
from pathlib import Path

import bm25s
import numpy as np
import Stemmer

from services.envs.webshop.catalogue import Product

K1 = 0.9
B = 0.4
MAX_QUERY_TERMS = 1024
"""Lucene refuses longer queries; here the rest is left out."""
# What Lucene's English analysis drops.
_STOP_WORDS_TEXT = """
a an and are as at be but by for if in into is it no not of on or such that the their then there
these they this to was will with
"""
STOP_WORDS = frozenset(_STOP_WORDS_TEXT.split())
# Letters and digits, joined by an apostrophe or a point between them ("6.76", "l'eau"): close to
# Unicode's word boundaries.
_WORD = re.compile(r"[^\W_]+(?:['\u2019.][^\W_]+)*")
_POSSESSIVES = ("'s", "\u2019s")
_NO_TERM = -1
"""Number of a stop word."""


class TextAnalysis:
    """Makes search terms of a text.

    Words are in lower case, without possessives and stop words, and cut to Porter's stems.
    """

    def __init__(self) -> None:
        self._stemmer = Stemmer.Stemmer("porter")

    def list_terms(self, text: str) -> list[str]:
        words = []
        for found in _WORD.findall(text.lower()):
            word = found[:-2] if found.endswith(_POSSESSIVES) else found
            if word not in STOP_WORDS:
                words.append(word)
        return list(self._stemmer.stemWords(words))


def describe_for_search(product: Product) -> str:
    """The text that is searched: title, description, first bullet and options, as published."""
    options = [f"{name}: {', '.join(values)}" for name, values in product.options.items()]
    parts = [product.name, product.description, *product.bullets[:1], ", and ".join(options)]
    return " ".join(parts)


def build_index(texts: Iterable[str], directory: Path) -> None:
    """Index the texts, in order, into a directory."""
    numbers = _TermNumbers()
    documents = [numbers.list_of(text) for text in texts]
    index = bm25s.BM25(k1=K1, b=B, method="lucene")
    index.index((documents, numbers.vocabulary), create_empty_token=False, show_progress=False)
    index.save(str(directory), show_progress=False)


class _TermNumbers(dict[str, int]):
    """The number of every word's term.

    A catalogue of a million products repeats its words, and each is analysed once.
    """

    def __init__(self) -> None:
        self.vocabulary: dict[str, int] = {}
        self._analysis = TextAnalysis()

    def __missing__(self, word: str) -> int:
        terms = self._analysis.list_terms(word)
        number = _NO_TERM
        if terms:
            number = self.vocabulary.setdefault(terms[0], len(self.vocabulary))
        self[word] = number
        return number

    def list_of(self, text: str) -> array[int]:
        """The numbers of a text's terms, in four bytes each."""
        numbers = [self[word] for word in _WORD.findall(text.lower())]
        return array("i", [number for number in numbers if number != _NO_TERM])


class SearchIndex:
    """An index on disk. Its arrays are memory-mapped: a machine's worker processes share them."""

    def __init__(self, directory: Path) -> None:
        self._analysis = TextAnalysis()
        self._index = bm25s.BM25.load(str(directory), mmap=True, show_progress=False)

    def search(self, query: str, limit: int) -> tuple[int, ...]:
        """Numbers of the best documents that share a term with the query, best first.

        Equal scores are ordered by number, so that the answer is the same on every machine.
        """
        vocabulary = self._index.vocab_dict
        terms = [term for term in self._analysis.list_terms(query) if term in vocabulary]
        terms = terms[:MAX_QUERY_TERMS]
        if not terms:
            return ()

        scores = self._index.get_scores(terms)
        found = np.flatnonzero(scores > 0)
        if len(found) > limit:
            # Everything down to the last place's score, so that the order below also settles who
            # takes the last place.
            last = np.partition(scores[found], -limit)[-limit]
            found = found[scores[found] >= last]
        order = np.lexsort((found, -scores[found]))
        return tuple(found[order][:limit].tolist())
