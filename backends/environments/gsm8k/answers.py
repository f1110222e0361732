"""Reading the final number of an answer, in three styles, and comparing it with the gold one. Pure, never raises.

- `strict`: the number behind `#### `, as the data set's own solutions end (openai/grade-school-math, `extract_answer`).
  Where there are several, the last counts.
- `flexible`: the last number anywhere (verl's `flexible`, lm-evaluation-harness's `flexible-extract`).
- `boxed`: what the last `\\boxed{...}` holds, being a number (the convention of R1 and of MATH).

Numbers are compared by value: 18, $18 and 18.00 are equal, as 1,234 and 1234 are. (Upstream compares text, by which
18.00 is wrong.) A gold number that merely occurs in the answer earns nothing.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Final

STYLES: Final = ("strict", "flexible", "boxed")
_DIGITS: Final = 64
"""A longer number is nobody's answer here."""
_NUMBER = r"[-+]?\$?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?:\.\d+)?"
_STRICT = re.compile(rf"####[ \t]*({_NUMBER})")
_FLEXIBLE = re.compile(r"[-+]?\$?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|[-+]?\$?\.\d+")
_WHOLE = re.compile(rf"{_NUMBER}\.?")
_FRACTION = re.compile(r"([-+]?)\\[dt]?frac\{(\d+)\}\{(\d+)\}")
_WORDS = re.compile(r"\\(?:text|mathrm|mbox|textbf)\s*\{[^{}]*\}")
_NOISE = re.compile(r"\\[!,;: ]|\\left|\\right|\\%|\\circ|[\s$%^{}]")
_BOX: Final = "\\boxed{"


def extract(text: str, style: str) -> Fraction | None:
    """The final number of `text` as `style` finds it; None where there is none."""
    if style == "boxed":
        return _boxed(text)
    found = _STRICT.findall(text) if style == "strict" else _joined(text)
    return number(found[-1]) if found else None


def number(text: str) -> Fraction | None:
    """What a numeral is worth: digits, perhaps with a sign, a dollar, grouping commas, decimals."""
    if not _WHOLE.fullmatch(text):
        return None
    plain = text.replace(",", "").replace("$", "").removesuffix(".")
    if len(plain) > _DIGITS or not any(character.isdigit() for character in plain):
        return None
    return Fraction(plain)


def _joined(text: str) -> list[str]:
    """Every numeral. A sign that follows a numeral is an operator: the result of `3-2` ends in 2."""
    found: list[str] = []
    end = -1
    for match in _FLEXIBLE.finditer(text):
        word = match.group()
        found.append(word[1:] if word[0] in "+-" and match.start() == end else word)
        end = match.end()
    return found


def _boxed(text: str) -> Fraction | None:
    start = text.rfind(_BOX)
    if start < 0:
        return None
    depth, begin = 1, start + len(_BOX)
    for end in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if not depth:
            return _latex(text[begin:end])
    return None


def _latex(body: str) -> Fraction | None:
    """A number as mathematicians set it: units in \\text, thin spaces, a percent sign, a fraction."""
    bare = _WORDS.sub("", body).strip()
    if (fraction := _FRACTION.fullmatch(bare)) is not None:
        sign, above, below = fraction.groups()
        if len(above) + len(below) > _DIGITS or not int(below):
            return None
        return Fraction(int(above), int(below)) * (-1 if sign == "-" else 1)
    return number(_NOISE.sub("", bare.replace("{,}", ",")))
