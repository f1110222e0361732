"""Porter's stemmer in the variant that Lucene uses: `bli` and `logi` are suffixes too, short words stay as they are.

Pure. The algorithm is M. F. Porter, "An algorithm for suffix stripping", 1980, with the two later changes that its
author published. `m` below is the paper's measure: how often vowels are followed by consonants.
"""

from __future__ import annotations

from typing import Final

_DERIVED: Final = (
    ("ational", "ate"), ("tional", "tion"), ("enci", "ence"), ("anci", "ance"), ("izer", "ize"), ("bli", "ble"),
    ("alli", "al"), ("entli", "ent"), ("eli", "e"), ("ousli", "ous"), ("ization", "ize"), ("ation", "ate"),
    ("ator", "ate"), ("alism", "al"), ("iveness", "ive"), ("fulness", "ful"), ("ousness", "ous"), ("aliti", "al"),
    ("iviti", "ive"), ("biliti", "ble"), ("logi", "log"),
)  # fmt: skip
_COMPOUND: Final = (
    ("icate", "ic"), ("ative", ""), ("alize", "al"), ("iciti", "ic"), ("ical", "ic"), ("ful", ""), ("ness", ""),
)  # fmt: skip
_PLAIN: Final = (
    "al", "ance", "ence", "er", "ic", "able", "ible", "ant", "ement", "ment", "ent", "sion", "tion", "ou", "ism",
    "ate", "iti", "ous", "ive", "ize",
)  # fmt: skip
"""The last suffixes to go, where m > 1; of `sion` and `tion` only `ion`."""


def stem(word: str) -> str:
    """The stem of a lower-case word."""
    if len(word) <= 2:
        return word
    word = _past(_plural(word))
    if word.endswith("y") and _vowel_in(word[:-1]):
        word = word[:-1] + "i"
    word = _replaced(word, _DERIVED)
    word = _replaced(word, _COMPOUND)
    return _ending(_stripped(word))


def _consonants(word: str) -> list[bool]:
    """Whether each letter is a consonant; a `y` is one at the start and after a vowel."""
    kinds: list[bool] = []
    for letter in word:
        if letter == "y":
            kinds.append(not kinds or not kinds[-1])
        else:
            kinds.append(letter not in "aeiou")
    return kinds


def _m(word: str) -> int:
    kinds = _consonants(word)
    return sum(kinds[place] and not kinds[place - 1] for place in range(1, len(kinds)))


def _vowel_in(word: str) -> bool:
    return not all(_consonants(word))


def _doubled(word: str) -> bool:
    return len(word) > 1 and word[-1] == word[-2] and _consonants(word)[-1]


def _short(word: str) -> bool:
    """Whether a word ends in consonant, vowel, consonant, the last not w, x or y: as `hop` does."""
    return len(word) > 2 and _consonants(word)[-3:] == [True, False, True] and word[-1] not in "wxy"


def _plural(word: str) -> str:
    if word.endswith(("sses", "ies")):
        return word[:-2]
    return word[:-1] if word.endswith("s") and word[-2] != "s" else word


def _past(word: str) -> str:
    if word.endswith("eed"):
        return word[:-1] if _m(word[:-3]) > 0 else word
    root = word[:-2] if word.endswith("ed") else word[:-3] if word.endswith("ing") else word
    if root is word or not _vowel_in(root):
        return word
    if root.endswith(("at", "bl", "iz")):
        return root + "e"
    if _doubled(root):
        return root if root[-1] in "lsz" else root[:-1]
    return root + "e" if _m(root) == 1 and _short(root) else root


def _replaced(word: str, suffixes: tuple[tuple[str, str], ...]) -> str:
    """The first suffix that fits decides, also where the measure then forbids it."""
    for suffix, other in suffixes:
        if word.endswith(suffix):
            root = word[: -len(suffix)]
            return root + other if _m(root) > 0 else word
    return word


def _stripped(word: str) -> str:
    for suffix in _PLAIN:
        if word.endswith(suffix):
            root = word[: -len(suffix)] + (suffix[0] if suffix in ("sion", "tion") else "")
            return root if _m(root) > 1 else word
    return word


def _ending(word: str) -> str:
    if word.endswith("e"):
        measure = _m(word[:-1])
        if measure > 1 or (measure == 1 and not _short(word[:-1])):
            word = word[:-1]
    return word[:-1] if word.endswith("ll") and _m(word[:-1]) > 1 else word
