"""Published BM25 and text analysis, one order everywhere, only documents that share a term."""

from __future__ import annotations

import math

import pytest

from services.envs.webshop.search import MAX_QUERY_TERMS, SearchIndex, TextAnalysis, build_index

TEXTS = [
    "red running shoes",
    "blue running shoes for runners",
    "a lamp",
    "red lamp with a red shade and a red cable",
    "running shoes red",
    "shoe",
]


@pytest.fixture
def index(tmp_path):
    build_index(TEXTS, tmp_path / "index")
    return SearchIndex(tmp_path / "index")


def compute_bm25(query):
    """Lucene's formula written out, k1 0.9 and b 0.4: {document: score} of those above zero."""
    analysis = TextAnalysis()
    documents = [analysis.list_terms(text) for text in TEXTS]
    mean = sum(map(len, documents)) / len(documents)
    scores = {}
    for number, document in enumerate(documents):
        score = 0.0
        for term in analysis.list_terms(query):
            frequency, holding = document.count(term), sum(term in other for other in documents)
            idf = math.log(1 + (len(documents) - holding + 0.5) / (holding + 0.5))
            score += idf * frequency / (frequency + 0.9 * (1 - 0.4 + 0.4 * len(document) / mean))
        if score:
            scores[number] = score
    return scores


@pytest.mark.parametrize(
    "query",
    ["red", "red shoes", "running", "red red lamp", "runners shade", "blue lamp shoes cable"],
)
def test_documents_are_ranked_by_the_formula(index, query):
    scores = compute_bm25(query)
    expected = sorted(scores, key=lambda number: (-round(scores[number], 5), number))
    assert list(index.search(query, limit=50)) == expected


def test_documents_of_equal_score_keep_their_order_also_at_the_limit(index):
    assert index.search("red running shoes", 50)[:2] == (0, 4)
    assert index.search("red running shoes", 1) == (0,)


def test_what_shares_no_term_is_never_found(index):
    assert index.search("lamp", 50) == (2, 3)
    assert index.search("shade", 50) == (3,)


@pytest.mark.parametrize("query", ["", "   ", "the of and", "zebra", "\x00\ud800", "?!"])
def test_a_query_without_known_words_finds_nothing(index, query):
    assert index.search(query, 50) == ()


def test_an_enormous_query_is_cut(index):
    found = index.search("red " * MAX_QUERY_TERMS + "lamp " * 1_000, 50)
    assert found == index.search("red " * MAX_QUERY_TERMS, 50)
    assert 2 not in found


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("The Runner's running shoes", ["runner", "run", "shoe"]),
        ("6.76 fl-oz of L'Eau", ["6.76", "fl", "oz", "l'eau"]),
        ("size: M, x_large", ["size", "m", "x", "larg"]),
        ("men\u2019s caf\u00e9", ["men", "caf\u00e9"]),
        ("", []),
    ],
)
def test_text_becomes_lower_case_stems_without_stop_words(text, terms):
    assert TextAnalysis().list_terms(text) == terms


def test_a_word_is_analysed_once_however_often_a_catalogue_says_it(tmp_path, monkeypatch):
    """1.2 million products take minutes, and three times as long with every word."""
    analysed = []
    list_terms = TextAnalysis.list_terms
    monkeypatch.setattr(
        TextAnalysis,
        "list_terms",
        lambda self, text: analysed.append(text) or list_terms(self, text),
    )
    build_index(["the runner's shoes", "The shoes, the SHOES"] * 100, tmp_path / "index")
    assert sorted(analysed) == ["runner's", "shoes", "the"]
    assert SearchIndex(tmp_path / "index").search("shoe of a runner", 3) == (0, 2, 4)


def test_a_single_document_can_be_searched(tmp_path):
    build_index(["lamp"], tmp_path / "index")
    assert SearchIndex(tmp_path / "index").search("lamps", 50) == (0,)
