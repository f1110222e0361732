"""The log of a run: held back until the run directory is ours, then written to its `logs/rollout.log`."""

from __future__ import annotations

import logging
import logging.handlers
import sys
from typing import TYPE_CHECKING, Final, Self

if TYPE_CHECKING:
    from pathlib import Path

_FORMAT: Final = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"
_OURS: Final = ("orchestrator", "backends", "policies", "bench")
_HELD: Final = 1000
"""Records held back before there is a file."""


class RunLog:
    """A context: while it is open, what the project logs goes to the file, and to stderr where asked for."""

    def __init__(self, level: str, *, stderr: bool) -> None:
        self._level = level.upper()
        self._held = logging.handlers.MemoryHandler(_HELD, flushLevel=logging.CRITICAL + 1, flushOnClose=False)
        self._handlers: list[logging.Handler] = [self._held]
        if stderr:
            self._handlers.append(_formatted(logging.StreamHandler(sys.stderr)))

    def __enter__(self) -> Self:
        for name in _OURS:
            logger = logging.getLogger(name)
            logger.setLevel(self._level)
            for handler in self._handlers:
                logger.addHandler(handler)
        return self

    def __exit__(self, *exc: object) -> None:
        for name in _OURS:
            for handler in self._handlers:
                logging.getLogger(name).removeHandler(handler)
        for handler in self._handlers:
            handler.close()

    def attach(self, path: Path) -> None:
        """Write to `path` from now on, what was held back first."""
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _formatted(logging.FileHandler(path, encoding="utf-8"))
        self._held.setTarget(file)
        self._held.flush()
        for name in _OURS:
            logging.getLogger(name).removeHandler(self._held)
            logging.getLogger(name).addHandler(file)
        self._handlers.append(file)


def _formatted(handler: logging.Handler) -> logging.Handler:
    handler.setFormatter(logging.Formatter(_FORMAT))
    return handler
