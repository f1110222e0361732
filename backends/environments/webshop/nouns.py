"""The nouns of a product's name, which decide whether a purchase is of the kind that was asked for.

WebShop asks spaCy's small English model. That model is not on the package index: where it is installed beside this
environment it is used, else a plain reading of the name: every word that is no number, no measure, no function word
and none of the adjectives, participles and adverbs that shops put into names. `METHOD` says which of the two it is.
"""

from __future__ import annotations

import re
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final

from backends.environments.webshop.words import NO_NOUNS, NOUNS

if TYPE_CHECKING:
    from collections.abc import Callable

MODEL: Final = "en_core_web_sm"

_NAMES_KEPT: Final = 1 << 16
_WORD = re.compile(r"[^\W\d_]+(?:['\u2019-][^\W\d_]+)*")
_NO_NOUN_ENDINGS: Final = ("able", "ible", "ed", "ful", "less", "ly", "ous", "proof")
_LONG: Final = 6
"""Letters from which on an ending tells: table, cable, jelly and sled are nouns."""


@lru_cache(maxsize=_NAMES_KEPT)
def nouns(name: str) -> tuple[str, ...]:
    """The nouns of a name, lower case, in order, repeated as they occur."""
    return _READER(name)


def _plain(name: str) -> tuple[str, ...]:
    words = (word.lower() for word in _WORD.findall(name))
    return tuple(word for word in words if len(word) > 1 and not _other(word))


def _other(word: str) -> bool:
    if word in NO_NOUNS:
        return True
    if len(word) < _LONG or word in NOUNS:
        return False
    return word.endswith(_NO_NOUN_ENDINGS)


def _reader() -> tuple[str, Callable[[str], tuple[str, ...]]]:
    if find_spec("spacy") is None or find_spec(MODEL) is None:
        return "heuristic", _plain
    tagger: Any = import_module("spacy").load(MODEL, exclude=["ner", "lemmatizer"])

    def tagged(name: str) -> tuple[str, ...]:
        return tuple(token.text.lower() for token in tagger(name) if token.pos_ in ("NOUN", "PROPN"))

    return MODEL, tagged


METHOD, _READER = _reader()
