"""A recorded episode as text for the terminal: who said what, which calls were made, what came back, what it earned.

Everything shown comes from sandboxes and models, so control characters are made visible and long texts are cut.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import orjson
from rich.text import Text

from orchestrator.cli.output import duration, printable

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from orchestrator.run import Turn
    from orchestrator.types import Trajectory

CUT: Final = 1200
"""Characters of one text that are shown unless all are asked for."""
_STYLES: Final = {"system": "dim", "user": "bold cyan", "assistant": "bold green", "tool": "bold yellow"}


def conversation(
    trajectory: Trajectory, turns: Sequence[Turn], toolsets: Mapping[str, bytes], *, full: bool
) -> Iterator[Text]:
    """A whole episode: its result, each turn, the grade's details."""
    yield from result(trajectory)
    for turn in turns:
        if turn.new_conversation:
            yield Text("a new conversation: the agent is shown nothing of what stands above", style="dim")
        if turn.tools is not None:
            yield Text(_tool_names(toolsets.get(turn.tools), full=full), style="dim")
        if turn.tools_added:
            yield Text(f"tools added: {_names(turn.tools_added)}", style="dim")
        for place, body in enumerate(turn.messages):
            note = f"reward {turn.reward:g}" if turn.reward and place == 0 else ""
            yield from message(body, note=note, full=full)
        if turn.action is not None:
            yield from message(turn.action, note=_effort(turn), full=full)
    if trajectory.details != b"{}":
        yield Text("grade", style="bold magenta")
        yield indented(trajectory.details.decode(errors="replace"), full=full)


def result(trajectory: Trajectory) -> Iterator[Text]:
    """How the episode ended."""
    reward = "none" if trajectory.reward is None else f"{trajectory.reward:g}"
    yield Text(printable(str(trajectory.key)), style="bold")
    yield Text(
        f"{trajectory.outcome} ({trajectory.stop_reason}), reward {reward}, {trajectory.steps} steps in "
        f"{duration(trajectory.finished - trajectory.started)}, attempt {trajectory.attempt}"
        + (f", replayed in {trajectory.incarnations} sandboxes" if trajectory.recovered else "")
    )
    if trajectory.failure is not None:
        failure = trajectory.failure
        yield Text(f"failed at {failure.stage}, {failure.kind}: {printable(failure.message)}", style="red")


def _effort(turn: Turn) -> str:
    number, generation = f"action {turn.number + 1}", turn.generation
    if generation is None:
        return number
    tokens = f"{generation.prompt_tokens:,} + {generation.completion_tokens:,} tokens"
    return f"{number}: {printable(generation.model)}, {tokens}, {generation.latency_s:.2f} s"


def _tool_names(body: bytes | None, *, full: bool) -> str:
    if body is None:
        return "tools: a set that is not stored"
    tools = orjson.loads(body)
    return f"tools: {_names(tools)}" if full else f"tools: {len(tools)} (--full names them)"


def _names(tools: object) -> str:
    found = [
        str(tool["function"].get("name"))
        for tool in (tools if isinstance(tools, list) else ())
        if isinstance(tool, dict) and isinstance(tool.get("function"), dict)
    ]
    return printable(", ".join(found)) or "none"


def message(body: Mapping[str, Any], *, note: str = "", full: bool = False) -> Iterator[Text]:
    """One OpenAI message: a heading with the role, its text, its calls. Malformed parts are shown as they are."""
    role = str(body.get("role", "?"))
    heading = Text(printable(role), style=_STYLES.get(role, "bold"))
    heading.append(f"  {note}" if note else "", style="dim")
    yield heading
    content = body.get("content")
    if content:
        text = content if isinstance(content, str) else orjson.dumps(content).decode()
        yield indented(text, full=full)
    calls = body.get("tool_calls")
    for call in calls if isinstance(calls, list) else ():
        yield indented(spelled(call), full=full, style="green")


def spelled(call: object) -> str:
    """A tool call as `name(key=value, ...)`; anything else as its JSON."""
    match call:
        case {"function": {"name": str(name), "arguments": str(arguments)}}:
            try:
                values = orjson.loads(arguments)
            except orjson.JSONDecodeError:
                return f"{name}({arguments})"
            if isinstance(values, dict):
                return f"{name}({', '.join(f'{key}={orjson.dumps(value).decode()}' for key, value in values.items())})"
            return f"{name}({arguments})"
        case _:
            return orjson.dumps(call).decode()


def indented(text: str, *, full: bool, style: str = "") -> Text:
    """A text two columns in, cut unless `full`."""
    more = 0 if full else len(text) - CUT
    shown = printable(text if more <= 0 else text[:CUT])
    tail = f"\n  ... {more:,} characters more: --full shows all" if more > 0 else ""
    return Text("  " + shown.replace("\n", "\n  ") + tail, style=style)
