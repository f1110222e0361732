"""Search: terms as Lucene makes them, and the golden rankings of the real catalogue."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.environments.webshop.analysis import MAX_TOKEN, _terms, terms
from backends.environments.webshop.index import Index, _one_byte
from backends.environments.webshop.porter import stem

if TYPE_CHECKING:
    from pathlib import Path

    from backends.environments.webshop.shop import Shop

STEMS = {
    "caresses": "caress", "ponies": "poni", "ties": "ti", "caress": "caress", "cats": "cat", "feed": "feed",
    "agreed": "agre", "plastered": "plaster", "bled": "bled", "motoring": "motor", "sing": "sing",
    "conflated": "conflat", "troubled": "troubl", "sized": "size", "hopping": "hop", "tanned": "tan",
    "falling": "fall", "hissing": "hiss", "fizzed": "fizz", "failing": "fail", "filing": "file", "happy": "happi",
    "sky": "sky", "relational": "relat", "conditional": "condit", "rational": "ration", "valenci": "valenc",
    "digitizer": "digit", "conformabli": "conform", "radicalli": "radic", "differentli": "differ", "vileli": "vile",
    "analogousli": "analog", "vietnamization": "vietnam", "predication": "predic", "operator": "oper",
    "feudalism": "feudal", "decisiveness": "decis", "hopefulness": "hope", "callousness": "callous",
    "formaliti": "formal", "sensitiviti": "sensit", "sensibiliti": "sensibl", "triplicate": "triplic",
    "formative": "form", "formalize": "formal", "electriciti": "electr", "electrical": "electr", "hopeful": "hope",
    "goodness": "good", "revival": "reviv", "allowance": "allow", "inference": "infer", "airliner": "airlin",
    "gyroscopic": "gyroscop", "adjustable": "adjust", "defensible": "defens", "irritant": "irrit",
    "replacement": "replac", "adjustment": "adjust", "dependent": "depend", "adoption": "adopt",
    "homologou": "homolog", "communism": "commun", "activate": "activ", "angulariti": "angular",
    "homologous": "homolog", "effective": "effect", "bowdlerize": "bowdler", "probate": "probat", "rate": "rate",
    "cease": "ceas", "controll": "control", "roll": "roll", "trekking": "trek", "bli": "bli", "logi": "logi",
    "archaeologi": "archaeolog", "is": "is", "y": "y",
}  # fmt: skip


@pytest.mark.parametrize(("word", "expected"), STEMS.items())
def test_stems_are_porters(word: str, expected: str) -> None:
    assert stem(word) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The women's shoes", ["women", "shoe"]),
        ("can't o\u2019neil\u2019s", ["can't", "o\u2019neil"]),
        ("12.5 oz 1,000 3/4 50x60 1.", ["12.5", "oz", "1,000", "3", "4", "50x60", "1"]),
        ("1\u20442 cup", ["1\u20442", "cup"]),
        ("usb-c wi_fi _x_ a:b a:1", ["usb", "c", "wi_fi", "_x_", "a:b", "1"]),
        ("www.shop.com me@shop.com", ["www.shop.com", "me", "shop.com"]),
        ("\u65e5\u672c \u3072\u3089", ["\u65e5", "\u672c", "\u3072", "\u3089"]),
        ("\u30ab\u30bf\u30ab\u30ca a", ["\u30ab\u30bf\u30ab\u30ca"]),
        ("\u0e44\u0e17\u0e22", ["\u0e44\u0e17\u0e22"]),
        ("\u2605great\u2605 \u261e \u2661", ["\u2605", "great", "\u2605", "\u261e", "\u2661"]),
        ("\U0001f469\u200d\U0001f467", ["\U0001f469\u200d\U0001f467"]),
        ("\u2764\ufe0f\u200d\U0001f525 \u2122", ["\u2764\ufe0f\u200d\U0001f525", "\u2122"]),
        ("\U0001f1e9\U0001f1ea 5\ufe0f\u20e3", ["\U0001f1e9\U0001f1ea", "5\ufe0f\u20e3"]),
        ("caf\u00e9 cafe\u0301", ["caf\u00e9", "cafe\u0301"]),
        ("", []),
        ("- / . ' \u2044", []),
    ],
)  # fmt: skip
def test_terms(text: str, expected: list[str]) -> None:
    assert terms(text) == expected


def test_long_words_are_cut() -> None:
    assert [len(term) for term in terms("x" * (2 * MAX_TOKEN + 3))] == [MAX_TOKEN, MAX_TOKEN, 3]


@given(st.text(), st.text(alphabet="a1'.,:_ \u0301\u200d\ufe0f\U0001f525\U0001f469\U0001f1e9\u05d0\u30ab\u0e44\u20e3"))
def test_no_term_crosses_a_blank(one: str, other: str) -> None:
    """Read piece by piece, a text has the terms that it has as a whole."""
    text = f"{one} {other}"
    assert terms(text) == list(_terms.__wrapped__(text))


def test_lengths_keep_four_bits() -> None:
    assert [_one_byte(length) for length in (0, 23, 39, 40, 41, 42, 55, 56, 59, 60)] == [
        0, 23, 39, 40, 40, 42, 54, 56, 56, 60,
    ]  # fmt: skip


def test_a_score_is_bm25() -> None:
    """Seen through the ranking: two documents tie exactly when their scores do, and then the name decides."""
    index = Index(["red shoes", "red hat hat", "blue shoes", ""], ["d", "c", "b", "a"])
    assert index.top("shoes", 10) == (2, 0)
    assert index.top("hat", 10) == (1,)
    assert index.top("red shoes", 10) == (0, 2, 1)
    assert index.top("green", 10) == ()
    assert index.top("shoes", 1) == (2,)
    where, divisor, rarity = index._postings["hat"]
    assert where.tolist() == [1]
    assert rarity == np.float32(math.log(1 + (3 - 1 + 0.5) / 1.5))
    assert divisor[0] == pytest.approx(1 + 2 / (0.9 * (0.6 + 0.4 * 3 / (7 / 3))), rel=1e-6)


def test_a_repeated_word_counts_twice() -> None:
    index = Index(["red thing", "blue thing", "blue thing"], ["a", "b", "c"])
    assert index.top("red blue", 3)[0] == 0
    assert index.top("red blue blue blue", 3)[0] == 1


def test_rankings_are_upstreams(data: Path, real_shop: Shop) -> None:
    """2,000 instructions of people over 1,000 products: the same 50 products in the same order as Anserini gives."""
    instructions = json.loads((data / "human_goals.json").read_text(encoding="utf-8"))
    lines = (data / "bm25_top50.jsonl").read_text(encoding="utf-8").splitlines()
    golden = [json.loads(line) for line in lines]
    assert len(golden) == 2000
    found = [
        [real_shop.products[place].asin for place in real_shop.search(instructions[entry["q"]])] for entry in golden
    ]
    assert [entry["q"] for entry, top in zip(golden, found, strict=True) if top != entry["top"]] == []
