"""BM25 over short documents, number for number as Lucene computes it, ties broken by name.

Owns the postings of one catalogue; never changed after it is built, so that all sessions share it. Document lengths
are rounded to Lucene's one-byte form and every term's score is taken in 32-bit floats, added up in 64: that is what
decides the order of close hits. Parameters k1 = 0.9, b = 0.4 are Anserini's.
"""

from __future__ import annotations

import math
from array import array
from collections import Counter
from functools import lru_cache
from typing import TYPE_CHECKING, Final

import numpy as np

from backends.environments.webshop.analysis import terms

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

K1: Final = np.float32(0.9)
B: Final = np.float32(0.4)
_EXACT_LENGTHS: Final = 24
_CACHED_QUERIES: Final = 4096


class Index:
    """Ranks documents, given as texts with distinct names; a document's number is its place among them."""

    def __init__(self, documents: Iterable[str], names: Sequence[str]) -> None:
        postings: dict[str, tuple[array[int], array[int]]] = {}
        lengths = array("q")
        for number, text in enumerate(documents):
            counts = Counter(terms(text))
            lengths.append(counts.total())
            for term, count in counts.items():
                numbers, frequencies = postings.setdefault(term, (array("i"), array("i")))
                numbers.append(number)
                frequencies.append(count)
        self._size = len(lengths)
        self._order = np.empty(self._size, dtype=np.int64)
        self._order[sorted(range(self._size), key=names.__getitem__)] = np.arange(self._size)
        norms = _norms(np.array(lengths, dtype=np.int64))
        filled = sum(length > 0 for length in lengths)
        self._postings = {term: _posting(*postings.pop(term), norms, filled) for term in list(postings)}
        self.top = lru_cache(maxsize=_CACHED_QUERIES)(self._top)
        """`top(query, count)`: the numbers of the best documents, best first. Recent answers are kept."""

    def _top(self, query: str, count: int) -> tuple[int, ...]:
        scores = np.zeros(self._size, dtype=np.float64)
        for term, repeats in Counter(terms(query)).items():
            if (posting := self._postings.get(term)) is not None:
                where, divisor, rarity = posting
                weight = np.float32(repeats) * rarity
                scores[where] += weight - weight / divisor
        rounded = scores.astype(np.float32)
        found = np.flatnonzero(rounded)
        if len(found) > count:
            limit = np.partition(rounded[found], len(found) - count)[len(found) - count]
            found = found[rounded[found] >= limit]
        ranked = found[np.lexsort((self._order[found], -rounded[found]))]
        return tuple(ranked[:count].tolist())


def _posting(
    numbers: array[int], frequencies: array[int], norms: NDArray[np.float32], documents: int
) -> tuple[NDArray[np.int32], NDArray[np.float32], np.float32]:
    """Where a term stands, what divides its weight in each of these documents, and the weight."""
    where = np.array(numbers, dtype=np.int32)
    divisor = np.float32(1) + np.array(frequencies, dtype=np.float32) * norms[where]
    rarity = math.log(1 + (documents - len(where) + 0.5) / (len(where) + 0.5))
    return where, divisor, np.float32(rarity)


def _norms(lengths: NDArray[np.int64]) -> NDArray[np.float32]:
    average = np.float32(lengths.sum() / max(1, np.count_nonzero(lengths)))
    rounded = np.array([_one_byte(length) for length in lengths.tolist()], dtype=np.float32)
    divided: NDArray[np.float32] = np.float32(1) / (K1 * ((np.float32(1) - B) + B * rounded / average))
    return divided


def _one_byte(length: int) -> int:
    """A length as it comes back from Lucene's one-byte form: exact up to 40, then with four significant bits."""
    beyond = length - _EXACT_LENGTHS
    if beyond < 16:
        return length
    shift = beyond.bit_length() - 4
    return _EXACT_LENGTHS + (beyond >> shift << shift)
