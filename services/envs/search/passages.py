"""The interface of a retriever: queries in, the best passages out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Passage:
    """One entry of a corpus.

    `contents` is the title in quotes, a line break, and the text, as Search-R1 publishes it.
    """

    passage_id: str
    contents: str

    @property
    def title(self) -> str:
        return self.contents.partition("\n")[0].strip()

    @property
    def text(self) -> str:
        return self.contents.partition("\n")[2].strip()


@dataclass(frozen=True, slots=True)
class Hit:
    """A passage that was found.

    `score` grows with relevance. Only scores of one retriever can be compared.
    """

    passage: Passage
    score: float


class Retriever(Protocol):
    """Ranks a corpus. The same query gives the same hits in the same order, always."""

    def retrieve(self, queries: Sequence[str], topk: int) -> list[list[Hit]]:
        """At most `topk` hits of each query, best first.

        There are fewer where fewer passages have anything to do with the query.
        """
