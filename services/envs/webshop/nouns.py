"""Finds the nouns in a product's title: by spaCy where a model is installed, else by a rule.

The score depends on it, so the finder's name is part of the environment's version: scores under
different finders never mix.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any, Protocol

SPACY_MODELS = ("en_core_web_lg", "en_core_web_md", "en_core_web_sm")
"""The published code uses the first."""
NOUN_TAGS = frozenset({"NOUN", "PROPN"})
_NUM_TITLES = 2**16


class NounFinder(Protocol):
    name: str

    def find(self, title: str) -> tuple[str, ...]:
        """The title's nouns and proper nouns in lower case, in order and with repetitions."""
        ...


class SpacyNouns:
    """Nouns by the part-of-speech tags of a spaCy pipeline."""

    def __init__(self, name: str, pipeline: Callable[[str], Iterable[Any]]) -> None:
        self.name = name
        self._pipeline = pipeline
        self.find = lru_cache(maxsize=_NUM_TITLES)(self._tag)

    def _tag(self, title: str) -> tuple[str, ...]:
        tokens = [token for token in self._pipeline(title) if token.pos_ in NOUN_TAGS]
        return tuple(token.text.lower() for token in tokens)


class HeuristicNouns:
    """Every word of letters that is not of another kind by its look.

    Titles are chains of nouns and names; what is taken out are function words, common adjectives
    and units (a list) and words with an ending of adjectives or participles. Numbers and mixtures
    of letters and digits are no nouns.
    """

    name = "heuristic"

    def find(self, title: str) -> tuple[str, ...]:
        nouns = []
        for found in _WORD.findall(title):
            word = found.lower()
            if word not in _OTHER_WORDS and not _ADJECTIVE.fullmatch(word):
                nouns.append(word)
        return tuple(nouns)


_WORD = re.compile(r"(?<![\w])[^\W\d_]{2,}(?![\w])")
_ADJECTIVE = re.compile(r"\w{2,}(?:able|ible|ful|less|ous)|\w{4,}ed")
# Function words, adjectives that shops like, units.
_OTHER_WORDS_TEXT = """
a about above after all also an and any are as at be by can do each every for from get has have if
in into is it its more most no not of off on only or other our out over own per so such than that
the their this to under up very via when which while who will with without you your

adult best big bright casual classic clean clear cold comfy compact cool cute dark deep digital
double dry dual elegant extra fast fine flat free fresh full good great handmade hard heavy high hot
ideal large light long loose low mini modern natural new nice old organic perfect plain portable
premium pure quick real regular rich round safe sharp short simple slim small smart soft solid
special square strong super sweet tall thick thin tight tiny top true ultra unique warm wet wide

cm count fl ft gram grams inch inches kg lb lbs mm ml oz ounce ounces pcs piece pieces
"""
_OTHER_WORDS = frozenset(_OTHER_WORDS_TEXT.split())


@lru_cache
def load_noun_finder() -> NounFinder:
    """spaCy with the best model that is installed, else the rule of thumb."""
    if importlib.util.find_spec("spacy") is not None:
        import spacy

        for model in SPACY_MODELS:
            if spacy.util.is_package(model):
                pipeline = spacy.load(model)
                return SpacyNouns(f"{model}-{pipeline.meta['version']}", pipeline)
    return HeuristicNouns()
