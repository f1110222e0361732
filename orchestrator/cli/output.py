"""What the command writes: results on stdout, everything for people on stderr, hostile text made harmless.

A reader that went away (a closed pipe) never ends a run: what is said to people is then dropped.
"""

from __future__ import annotations

import sys
import unicodedata
from typing import TYPE_CHECKING, Final

import orjson
from rich.console import Console

if TYPE_CHECKING:
    from collections.abc import Mapping

_HIDDEN: Final = {"Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp"}
"""Unicode categories that move the cursor, reverse the text or show nothing."""


class PatientConsole(Console):
    """A console that goes quiet when nobody reads it any more."""

    def on_broken_pipe(self) -> None:
        """Called by rich; the default ends the process."""
        self.quiet = True


def people() -> PatientConsole:
    """A console on stderr. Text is taken as it is: no markup, no highlighting, no emoji codes."""
    return PatientConsole(stderr=True, markup=False, highlight=False, emoji=False)


def results() -> PatientConsole:
    """A console on stdout, for what was asked for. When stdout is not a terminal lines are not wrapped."""
    console = PatientConsole(markup=False, highlight=False, emoji=False)
    if not console.is_terminal:
        console.soft_wrap = True
    return console


def say(text: str) -> None:
    """One line for people, on stderr."""
    write_line(sys.stderr, text)


def emit_json(value: Mapping[str, object]) -> None:
    """One JSON object as stdout's next and last line."""
    write_line(sys.stdout, orjson.dumps(value, option=orjson.OPT_NON_STR_KEYS).decode())


def write_line(stream: object, text: str) -> None:
    """Write and flush a line; a closed pipe is no error."""
    try:
        stream.write(f"{text}\n")  # type: ignore[attr-defined]
        stream.flush()  # type: ignore[attr-defined]
    except BrokenPipeError:
        pass


def printable(text: str) -> str:
    """Show control, bidirectional and invisible characters as escapes; keep newlines and tabs."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        char if char in "\n\t" or unicodedata.category(char) not in _HIDDEN else _escape(char) for char in text
    )


def _escape(char: str) -> str:
    code = ord(char)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def duration(seconds: float) -> str:
    """`4.2 s`, `3:07` (minutes) or `2:03:07` (hours)."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def counts(values: Mapping[str, int]) -> str:
    """`completed 398, truncated 2`; only what is not zero."""
    return ", ".join(f"{name} {count:,}" for name, count in values.items() if count)
