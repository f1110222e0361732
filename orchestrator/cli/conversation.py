"""A recorded episode as text for the terminal: who said what, which calls were made, what came back, what it earned.

Everything shown comes from sandboxes and models, so control characters are made visible and long texts are cut.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import orjson
from rich.text import Text

from orchestrator.cli.output import printable

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

CUT: Final = 1200
"""Characters of one text that are shown unless all are asked for."""
_STYLES: Final = {"system": "dim", "user": "bold cyan", "assistant": "bold green", "tool": "bold yellow"}


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
