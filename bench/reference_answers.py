"""The reference's own known answers as actions: what plays its tasks to a reward of 1.0.

BFCL changes answers between releases (67 of 200 in `multi_turn_base` between 2025.9.18 and 2026.3.23), so a service
must be played with those of the release that it grades by. One call a message; plain text ends a turn.
"""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING, Any

import orjson

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from bench.reference import Reference

_TURN_IS_OVER = orjson.dumps({"role": "assistant", "content": "Done."})


def answers(installed: Reference, category: str) -> dict[str, list[bytes]]:
    """Task -> actions, of every task of a multi-turn category. Reads and parses files: tens of milliseconds."""
    box = installed.root / "training_box" / "bfcl"
    known = {line["id"]: line for line in _lines(box / "data" / "possible_answer" / f"BFCL_v4_{category}.json")}
    entries = _lines(box / "multi_turn" / "multi_turn_processed.jsonl")
    return {
        entry["id"]: list(_actions(known[entry["id"]]["ground_truth"], _parameters(entry["function"])))
        for entry in entries
        if entry["id"] in known
    }


def _lines(path: Any) -> list[dict[str, Any]]:
    return [orjson.loads(line) for line in path.read_bytes().splitlines() if line.strip()]


def _parameters(functions: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Each function's parameters in order: answers may give them by position."""
    return {function["name"]: list(function["parameters"].get("properties", {})) for function in functions}


def _actions(turns: Sequence[Sequence[str]], parameters: Mapping[str, Sequence[str]]) -> Iterator[bytes]:
    for turn, calls in enumerate(turns):
        for number, call in enumerate(calls):
            yield _message(call, f"call_{turn}_{number}", parameters)
        yield _TURN_IS_OVER


def _message(source: str, name: str, parameters: Mapping[str, Sequence[str]]) -> bytes:
    call = ast.parse(source, mode="eval").body
    assert isinstance(call, ast.Call)
    function = ast.unparse(call.func)
    arguments = dict(zip(parameters.get(function, ()), map(ast.literal_eval, call.args), strict=False))
    arguments |= {keyword.arg or "": ast.literal_eval(keyword.value) for keyword in call.keywords}
    body = {"name": function, "arguments": orjson.dumps(arguments).decode()}
    calls = [{"id": name, "type": "function", "function": body}]
    return orjson.dumps({"role": "assistant", "content": None, "tool_calls": calls})
