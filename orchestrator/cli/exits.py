"""The exit codes of `rollout`."""

from __future__ import annotations

from typing import Final

OK: Final = 0
"""Done."""
FAILED: Final = 1
"""The run or the command failed, or its result could not be written to stdout."""
USAGE: Final = 2
"""Used wrongly: the message says what to do."""
UNFINISHED: Final = 3
"""Drained on a signal before the end: `rollout resume DIR` goes on."""
CANCELLED: Final = 130
"""Cancelled by a second signal, or before the run had begun; ended by a third."""
