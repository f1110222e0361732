"""A calculator for agents: + - * / and brackets on exact fractions. Nothing is evaluated by Python.

Bounds: an expression of MAX_EXPRESSION characters, results of MAX_DIGITS digits; so the work is bounded too.
"""

from __future__ import annotations

import ast
from fractions import Fraction
from typing import Final

MAX_EXPRESSION: Final = 256
MAX_DIGITS: Final = 40
_PLACES: Final = 10
_SIGNS: Final = str.maketrans({",": "", "$": "", "x": "*", "\N{MULTIPLICATION SIGN}": "*", "\N{DIVISION SIGN}": "/"})
_TOO_LARGE: Final = 10**MAX_DIGITS


def calculate(expression: str) -> str:
    """The result as people write it, or a sentence that begins with `error:`. Never raises."""
    if len(expression) > MAX_EXPRESSION:
        return f"error: the expression has {len(expression)} characters, at most {MAX_EXPRESSION} are taken"
    text = expression.translate(_SIGNS).strip()
    try:
        return _shown(_value(ast.parse(text, mode="eval").body))
    except ZeroDivisionError:
        return "error: division by zero"
    except OverflowError:
        return f"error: the result has more than {MAX_DIGITS} digits"
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return "error: only numbers, + - * / and brackets are understood"


def _value(node: ast.expr) -> Fraction:
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return _bounded(Fraction(repr(value)))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _value(operand)
        case ast.BinOp(left=left, op=operator, right=right):
            return _bounded(_applied(operator, _value(left), _value(right)))
        case _:
            raise ValueError


def _applied(operator: ast.operator, left: Fraction, right: Fraction) -> Fraction:
    match operator:
        case ast.Add():
            return left + right
        case ast.Sub():
            return left - right
        case ast.Mult():
            return left * right
        case ast.Div():
            return left / right
        case _:
            raise ValueError


def _bounded(value: Fraction) -> Fraction:
    if max(abs(value.numerator), value.denominator) >= _TOO_LARGE:
        raise OverflowError
    return value


def _shown(value: Fraction) -> str:
    if value.denominator == 1:
        return str(value.numerator)
    scaled = round(value * 10**_PLACES)
    whole, rest = divmod(abs(scaled), 10**_PLACES)
    decimals = f"{rest:0{_PLACES}d}".rstrip("0")
    return f"{'-' if scaled < 0 else ''}{whole}{'.' + decimals if decimals else ''}"
