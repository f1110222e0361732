"""From text to index terms, as Lucene's StandardTokenizer and Anserini's default English analyzer make them.

Pure. A term is a word by the word boundaries of Unicode Standard Annex 29, a run of a South East Asian script, one Han
or Hiragana character, or an emoji; without a possessive `'s`, in lower case, not a stop word, stemmed. Emoji are
those of Unicode 12: later versions took signs such as the stars away, and the terms of old indexes hold them.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final

import regex

from backends.environments.webshop.porter import stem
from backends.environments.webshop.words import STOP_WORDS

MAX_TOKEN: Final = 255
"""Characters of a token; longer ones are cut into pieces, as Lucene does."""

_PIECES_KEPT: Final = 1 << 16
_TIED = r"[\p{WB=Format}\p{WB=Extend}\p{WB=ZWJ}]*"
"""What never stands alone but belongs to the character before it."""
_LETTER = r"[\p{WB=ALetter}\p{WB=Hebrew_Letter}]"
_DIGIT = r"[\p{WB=Numeric}\uFF10-\uFF19]"
_HEBREW = r"\p{WB=Hebrew_Letter}"
_JOINER = rf"(?:\p{{WB=ExtendNumLet}}{_TIED})"
_IN_WORDS = rf"[\p{{WB=MidLetter}}\p{{WB=MidNumLet}}\p{{WB=Single_Quote}}]{_TIED}(?={_LETTER})"
_IN_NUMBERS = rf"[\p{{WB=MidNum}}\p{{WB=MidNumLet}}\p{{WB=Single_Quote}}]{_TIED}(?={_DIGIT})"
_IN_HEBREW = rf"\p{{WB=Single_Quote}}{_TIED}|\p{{WB=Double_Quote}}{_TIED}(?={_HEBREW})"
_RUN = (
    rf"(?:(?:(?:{_HEBREW}{_TIED}(?:{_IN_WORDS}|{_IN_HEBREW})?|{_LETTER}{_TIED}(?:{_IN_WORDS})?"
    rf"|{_DIGIT}{_TIED}(?:{_IN_NUMBERS})?))+|(?:\p{{WB=Katakana}}{_TIED})+)"
)
_WORD = rf"{_JOINER}*{_RUN}(?:{_JOINER}+{_RUN})*{_JOINER}*"

_PICTOGRAPHS = (
    r"\u00A9\u00AE\u203C\u2049\u2122\u2139\u2194-\u2199\u21A9-\u21AA\u231A-\u231B\u2328\u2388\u23CF\u23E9-\u23F3"
    r"\u23F8-\u23FA\u24C2\u25AA-\u25AB\u25B6\u25C0\u25FB-\u25FE\u2600-\u2605\u2607-\u2612\u2614-\u2685\u2690-\u2705"
    r"\u2708-\u2712\u2714\u2716\u271D\u2721\u2728\u2733-\u2734\u2744\u2747\u274C\u274E\u2753-\u2755\u2757\u2763-\u2767"
    r"\u2795-\u2797\u27A1\u27B0\u27BF\u2934-\u2935\u2B05-\u2B07\u2B1B-\u2B1C\u2B50\u2B55\u3030\u303D\u3297\u3299"
    r"\U0001F000-\U0001F0FF\U0001F10D-\U0001F10F\U0001F12F\U0001F16C-\U0001F171\U0001F17E-\U0001F17F\U0001F18E"
    r"\U0001F191-\U0001F19A\U0001F1AD-\U0001F1E5\U0001F201-\U0001F20F\U0001F21A\U0001F22F\U0001F232-\U0001F23A"
    r"\U0001F23C-\U0001F23F\U0001F249-\U0001F3FA\U0001F400-\U0001F53D\U0001F546-\U0001F64F\U0001F680-\U0001F6FF"
    r"\U0001F774-\U0001F77F\U0001F7D5-\U0001F7FF\U0001F80C-\U0001F80F\U0001F848-\U0001F84F\U0001F85A-\U0001F85F"
    r"\U0001F888-\U0001F88F\U0001F8AE-\U0001F8FF\U0001F90C-\U0001F93A\U0001F93C-\U0001F945\U0001F947-\U0001FFFD"
)
"""Extended_Pictographic of Unicode 12."""
_TIED_SIGNS = rf"(?:(?![\uFE0E\uFE0F]){_TIED[:-1]})*"
_MODIFIER = rf"[\U0001F3FB-\U0001F3FF]{_TIED_SIGNS}"
_SIGN = (
    rf"(?:\u200D*(?:\p{{Emoji_Modifier_Base}}{_TIED_SIGNS})?{_MODIFIER}|\u200D*[{_PICTOGRAPHS}]{_TIED_SIGNS}\uFE0F?)"
)
_EMOJI = (
    rf"{_SIGN}(?:[\U000E0020-\U000E007E]+\U000E007F|(?:(?:\u200D|(?<=\u200D)){_SIGN})*)"
    rf"|\p{{Regional_Indicator}}{_TIED}\p{{Regional_Indicator}}{_TIED}"
)
_KEYCAP = rf"[0-9#*]{_TIED_SIGNS}\uFE0F?\u20E3{_TIED_SIGNS}"
_TOKEN = regex.compile(
    rf"{_KEYCAP}|{_WORD}|{_EMOJI}|(?:\p{{LB=Complex_Context}}{_TIED})+|[\p{{Script=Han}}\p{{Script=Hiragana}}]{_TIED}"
)
_POSSESSIVE = ("'s", "\u2019s", "\uff07s")


def terms(text: str) -> list[str]:
    """The terms of a text, in order, repeated as often as they occur."""
    return [term for piece in text.split(" ") for term in _terms(piece)]


@lru_cache(maxsize=_PIECES_KEPT)
def _terms(piece: str) -> tuple[str, ...]:
    """The terms between two blanks, where a term never crosses: the same pieces come again and again."""
    found: list[str] = []
    for token in _TOKEN.findall(piece):
        for start in range(0, len(token), MAX_TOKEN):
            word = token[start : start + MAX_TOKEN].lower()
            if word.endswith(_POSSESSIVE):
                word = word[:-2]
            if word not in STOP_WORDS:
                found.append(stem(word))
    return tuple(found)
