"""What the command writes: results on stdout, everything for people on stderr, hostile text made harmless.

A reader that went away (a closed pipe) never ends a run. What is said to people on stderr is dropped where it cannot be
written; what was asked for on stdout is never lost in silence: a full or closed stdout raises OutputLost.
"""

from __future__ import annotations

import sys
import unicodedata
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, TextIO

import orjson
from rich.console import Console

from orchestrator.errors import RolloutError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_HIDDEN: Final = {"Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp"}
"""Unicode categories that move the cursor, reverse the text or show nothing."""


class OutputLost(RolloutError):
    """What was asked for cannot be written to stdout."""


class PatientConsole(Console):
    """A console that goes quiet when nobody reads it any more."""

    def on_broken_pipe(self) -> None:
        """Called by rich; the default ends the process."""
        self.quiet = True


class ResultsConsole(PatientConsole):
    """A console whose text is what was asked for."""

    def print(self, *objects: Any, **options: Any) -> None:
        """As rich's. Raises OutputLost where stdout is full or closed."""
        with asked_for():
            super().print(*objects, **options)


def people() -> PatientConsole:
    """A console on stderr. Text is taken as it is: no markup, no highlighting, no emoji codes."""
    return PatientConsole(stderr=True, markup=False, highlight=False, emoji=False)


def results() -> ResultsConsole:
    """A console on stdout, for what was asked for. When stdout is not a terminal lines are not wrapped."""
    console = ResultsConsole(markup=False, highlight=False, emoji=False)
    if not console.is_terminal:
        console.soft_wrap = True
    return console


@contextmanager
def asked_for() -> Iterator[TextIO]:
    """Stdout, flushed at the block's end; a reader who went away is no error. Raises OutputLost where it is lost."""
    stream: TextIO | None = sys.stdout  # None where the command was started with it closed
    if stream is None:
        raise OutputLost("cannot write to stdout: it is closed")
    try:
        yield stream
        stream.flush()
    except BrokenPipeError:
        pass
    except OSError as error:
        raise OutputLost(f"cannot write to stdout: {error.strerror or error}") from None


def say(text: str) -> None:
    """One line for people, on stderr; dropped where it cannot be written."""
    stream: TextIO | None = sys.stderr
    if stream is None:
        return
    try:
        stream.write(f"{text}\n")
        stream.flush()
    except OSError:
        pass


def emit_json(value: Mapping[str, object]) -> None:
    """One JSON object as stdout's next and last line. Raises OutputLost."""
    with asked_for() as stdout:
        stdout.write(f"{orjson.dumps(value, option=orjson.OPT_NON_STR_KEYS).decode()}\n")


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
