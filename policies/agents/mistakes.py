"""Plausible mistakes: how an imperfect agent gets a known tool call wrong.

A spoilt call is always different from the right one and always a well-formed call: its `arguments` are the JSON text
of an object. What goes wrong follows from the random generator alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import orjson

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence

OTHER_FUNCTION_SHARE = 0.15
"""Share of mistakes that call another function; the rest get an argument wrong."""
DROPPED_KEY_SHARE = 0.2
"""Share of wrong arguments that are left out."""


def spoil(call: dict[str, Any], functions: Sequence[str], rng: random.Random) -> dict[str, Any]:
    """A wrong version of an OpenAI tool call; `functions` are names that may be called instead."""
    function = call["function"]
    arguments = _arguments(function)
    others = [name for name in functions if name != function["name"]]
    if others and (not arguments or rng.random() < OTHER_FUNCTION_SHARE):
        return {**call, "function": {**function, "name": rng.choice(others)}}
    wrong = _spoil_object(arguments, rng) if arguments else {"option": True}
    return {**call, "function": {**function, "arguments": orjson.dumps(wrong).decode()}}


def _arguments(function: dict[str, Any]) -> dict[str, Any]:
    try:
        arguments = orjson.loads(function.get("arguments") or "{}")
    except orjson.JSONDecodeError:
        return {}
    return arguments if isinstance(arguments, dict) else {}


def _spoil_object(value: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    key = rng.choice(list(value))
    if rng.random() < DROPPED_KEY_SHARE:
        return {name: kept for name, kept in value.items() if name != key}
    return {**value, key: _spoil_value(value[key], rng)}


def _spoil_value(value: object, rng: random.Random) -> object:
    match value:
        case bool():
            return not value
        case int():
            return value + rng.choice((-1, 1)) if abs(value) < 2**53 else 0
        case float():
            return value + rng.choice((-1.0, 1.0)) if abs(value) < 2**53 else 0.5
        case str():
            return _spoil_text(value, rng)
        case [*items] if items:
            place = rng.randrange(len(items))
            return items[:place] + items[place + 1 :]
        case dict() if value:
            return _spoil_object(value, rng)
        case _:
            return "unknown"


def _spoil_text(text: str, rng: random.Random) -> str:
    if len(text) < 2:
        return text + "x"
    place = rng.randrange(len(text))
    return text[:place] + text[place + 1 :]
