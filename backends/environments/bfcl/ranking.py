"""BM25+ over the keys of a memory, to the last bit what the package `rank_bm25` computes with numpy.

Upstream's key-value memory searches with that package's class of this name. Keys are few and short, so plain Python
floats, combined in the same order, serve as well and spare a sandbox numpy.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

_K1: Final = 1.5
_B: Final = 0.75
_DELTA: Final = 1


class BM25Plus:
    """An index of tokenised texts (Lv and Zhai 2011, "Lower-Bounding Term Frequency Normalization")."""

    __slots__ = ("_counts", "_norms", "_weights")

    def __init__(self, corpus: Sequence[Sequence[str]]) -> None:
        """Raises ZeroDivisionError for an empty corpus, or one of empty texts, whose average length nobody knows."""
        average = sum(map(len, corpus)) / len(corpus)
        self._counts = [Counter(text) for text in corpus]
        self._norms = [_K1 * (1 - _B + _B * len(text) / average) for text in corpus]
        holding = Counter(word for counts in self._counts for word in counts)
        self._weights = {word: math.log((len(corpus) + 1) / count) for word, count in holding.items()}

    def get_scores(self, query: Sequence[str]) -> list[float]:
        """A score for each text, in the corpus's order; a word of the query counts as often as it stands there."""
        scores = [0.0] * len(self._counts)
        for word in query:
            weight = self._weights.get(word)
            if weight is None:
                continue
            for number, (counts, norm) in enumerate(zip(self._counts, self._norms, strict=True)):
                count = counts[word]
                scores[number] += weight * (_DELTA + (count * (_K1 + 1)) / (norm + count))
        return scores
