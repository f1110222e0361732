"""Known answers as actions: what the replay policy plays.

Multi-turn: the ground truth, one call a message; a turn of more calls than upstream's limit of steps puts several into
each message; plain text ends every turn. Single-turn: a call for each possible answer, with the values that upstream's
checker looks for first; plain text where no function fits; one call that fits its schema where any will do. Memory:
plain text ends every turn of the conversations, and the question is answered from the data, not from the memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import orjson

from backends.environments.bfcl import data, upstream
from backends.environments.bfcl.literals import source_literal
from backends.environments.bfcl.tasks import MemoryTask, MultiTurnTask
from backends.environments.bfcl.world import Recorded

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from backends.environments.bfcl.tasks import SingleTurnTask, Task

    Json = dict[str, Any]

_TURN_IS_OVER = orjson.dumps({"role": "assistant", "content": "Done."})
_NOTHING_FITS = orjson.dumps({"role": "assistant", "content": "None of the functions can do this."})


def actions(task: Task) -> list[bytes]:
    """The actions that play a task to its end."""
    if isinstance(task, MultiTurnTask):
        return [action for index, calls in enumerate(task.truth) for action in _turn(index, calls)]
    if isinstance(task, MemoryTask):
        return [*(_TURN_IS_OVER for turns in task.conversations[:-1] for _ in turns), _answer(task)]
    kind = task.category.removeprefix("live_")
    if kind == "irrelevance":
        return [_NOTHING_FITS]
    if kind == "relevance":
        function = task.tools[0]["function"]
        return [_message([Recorded(function["name"], orjson.dumps(_fitting(function["parameters"])))], "call_0")]
    return [_message(_possible_calls(task), "call_0")]


def _answer(task: MemoryTask) -> bytes:
    """The first possible answer, in the form that upstream's system message asks for."""
    answer = {"answer": data.answer(task.id)[0], "context": "It was said in a conversation."}
    return orjson.dumps({"role": "assistant", "content": str(answer)})


def _turn(index: int, calls: Sequence[Recorded]) -> list[bytes]:
    together = -(-len(calls) // (upstream.step_limit() - 1)) or 1
    steps = [calls[start : start + together] for start in range(0, len(calls), together)]
    return [*(_message(step, f"call_{index}_{number}") for number, step in enumerate(steps)), _TURN_IS_OVER]


def _message(calls: Sequence[Recorded], prefix: str) -> bytes:
    entries = [
        {
            "id": f"{prefix}_{number}",
            "type": "function",
            "function": {"name": call.name, "arguments": _as_text(call.arguments)},
        }
        for number, call in enumerate(calls)
    ]
    return orjson.dumps({"role": "assistant", "content": None, "tool_calls": entries})


def _as_text(arguments: str | bytes) -> str:
    return arguments if isinstance(arguments, str) else arguments.decode()


def _possible_calls(task: SingleTurnTask) -> list[Recorded]:
    documents = {document["name"]: document for document in data.entry(task.id)["function"]}
    return [
        Recorded(name.replace(".", "_"), orjson.dumps(_possible_arguments(task, documents.get(name, {}), values)))
        for possible in data.answer(task.id)
        for name, values in possible.items()
    ]


def _possible_arguments(task: SingleTurnTask, document: Json, possible: Mapping[str, list[Any]]) -> Json:
    """One value for each parameter that may not be left out."""
    schema = document.get("parameters", {})
    required = schema.get("required", ())
    return {
        name: source_literal(task.category, schema.get("properties", {}).get(name, {}), _chosen(_first(values)))
        for name, values in possible.items()
        if name in required or "" not in values
        if values
    }


def _first(values: Sequence[Any]) -> Any:
    """The first value listed, "" (may be left out) last."""
    return next((value for value in values if value != ""), "")


def _chosen(value: Any) -> Any:
    """A possible value with the choices inside it made. An object, or one in a list, lists what each field may hold."""
    if isinstance(value, dict):
        return {key: _first(choices) for key, choices in value.items() if "" not in choices}
    if isinstance(value, list):
        return [_chosen(element) if isinstance(element, dict) else element for element in value]
    return value


def _fitting(schema: Json) -> Any:
    """Some value that fits a JSON Schema of upstream's tools."""
    if schema.get("enum"):
        return schema["enum"][0]
    match schema.get("type"):
        case "object":
            properties = schema.get("properties", {})
            return {name: _fitting(properties[name]) for name in schema.get("required", ()) if name in properties}
        case "array":
            return [_fitting(schema.get("items", {}))]
        case "integer":
            return 1
        case "number":
            return 1.0
        case "boolean":
            return True
        case _:
            return "text"
