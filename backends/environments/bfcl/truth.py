"""The ground truth's calls: Python source of plain calls, parsed and never evaluated."""

from __future__ import annotations

import ast
from functools import lru_cache
from typing import TYPE_CHECKING

import orjson

from backends.environments.bfcl import data
from backends.environments.bfcl.world import Recorded, methods

if TYPE_CHECKING:
    from collections.abc import Sequence


@lru_cache(maxsize=1024)
def calls(task: str, simulators: tuple[str, ...]) -> Sequence[Sequence[Recorded]]:
    """The calls of a multi-turn task, per turn; none where the user asks for what cannot be done."""
    return [[parse(source, simulators) for source in turn] for turn in data.answer(task)]


def parse(source: str, simulators: tuple[str, ...]) -> Recorded:
    """Read `name(literal, ..., parameter=literal, ...)`; the method's signature gives positional arguments their names.

    Raises ValueError (or SyntaxError) for anything else.
    """
    call = ast.parse(source, mode="eval").body
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
        raise ValueError(f"not a plain call: {source!r}")
    parameters: Sequence[str] = methods(simulators)[call.func.id].parameters
    arguments = dict(zip(parameters, map(ast.literal_eval, call.args), strict=False))
    for keyword in call.keywords:
        if keyword.arg is None:
            raise ValueError(f"not a plain call: {source!r}")
        arguments[keyword.arg] = ast.literal_eval(keyword.value)
    return Recorded(call.func.id, orjson.dumps(arguments))
