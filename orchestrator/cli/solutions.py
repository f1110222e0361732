"""Solutions for `replay` where somebody else's server grades: a file of them, or those of the published reference.

The file has one JSON object a line, `{"task": ID, "actions": [assistant message, ...]}`; messages are OpenAI's, with or
without tool calls. `reference` stands for the known answers of the BFCL release that AgentScope's published service
grades by, which differ from those of this machine's newer release in a third of its tasks.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import orjson

from orchestrator.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

REFERENCE: Final = "reference"
_CATEGORIES: Final = ("multi_turn_base", "multi_turn_long_context", "multi_turn_miss_func", "multi_turn_miss_param")


def read(source: str) -> Mapping[str, Sequence[bytes]]:
    """Task -> actions. Raises UsageError, with the line of a file that is none; Unavailable without the reference."""
    if source == REFERENCE:
        return _of_reference()
    try:
        lines = Path(source).read_bytes().splitlines()
    except OSError as error:
        raise UsageError(f"cannot read the solutions {source}: {error.strerror}") from None
    found: dict[str, list[bytes]] = {}
    for number, line in enumerate(lines, 1):
        if line.strip():
            task, actions = _read(line, f"{source}:{number}")
            if task in found:
                raise UsageError(f"{source}:{number}: the task {task} stands there already; keep one of its lines")
            found[task] = actions
    if not found:
        raise UsageError(f"{source} holds no solution; one a line: {_SHAPE}")
    return found


_SHAPE: Final = '{"task": ID, "actions": [assistant message, ...]}'


def _read(line: bytes, place: str) -> tuple[str, list[bytes]]:
    try:
        value: Any = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise UsageError(f"{place}: not JSON ({error}); a line is {_SHAPE}") from None
    match value:
        case {"task": str(task), "actions": [*actions]} if actions and all(map(_is_message, actions)):
            return task, [orjson.dumps(action) for action in actions]
    raise UsageError(f"{place}: a line is {_SHAPE}")


def _is_message(action: object) -> bool:
    return isinstance(action, dict) and action.get("role") == "assistant"


def _of_reference() -> Mapping[str, Sequence[bytes]]:
    from bench.reference import found
    from bench.reference_answers import answers

    installed = found()
    return {task: known for category in _CATEGORIES for task, known in answers(installed, category).items()}
