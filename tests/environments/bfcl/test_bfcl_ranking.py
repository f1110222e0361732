"""The search of a memory's keys against the package that upstream takes it from: equal to the last bit."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.environments.bfcl.ranking import BM25Plus

WORDS = st.sampled_from(["user", "name", "city", "of", "birth", "a", "2"])
TEXTS = st.lists(st.lists(WORDS, max_size=6), min_size=1, max_size=50).filter(any)


@given(corpus=TEXTS, query=st.lists(WORDS | st.just("elsewhere"), max_size=8))
def test_scores_are_those_of_rank_bm25(corpus: list[list[str]], query: list[str]) -> None:
    reference = pytest.importorskip("rank_bm25", reason="pip install rank-bm25 numpy").BM25Plus(corpus)
    assert BM25Plus(corpus).get_scores(query) == reference.get_scores(query).tolist()


def test_nothing_to_search_in_fails_as_it_does_there() -> None:
    reference = pytest.importorskip("rank_bm25", reason="pip install rank-bm25 numpy")
    for kind in (BM25Plus, reference.BM25Plus):
        with pytest.raises(ZeroDivisionError, match="division by zero"):
            kind([])
