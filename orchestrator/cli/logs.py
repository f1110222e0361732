"""The log of a run: held back until the run directory is ours, then written to its `logs/rollout.log`.

What the orchestrator reports as events becomes lines here; the level says how much of it is kept. The first failure of
each kind is also said on stderr at once: a run whose model server is down must not look like a slow one.
"""

from __future__ import annotations

import logging
import logging.handlers
import sys
from typing import TYPE_CHECKING, Final, Self, assert_never

from orchestrator.cli.output import printable, say
from orchestrator.events import (
    DeliveryWaits,
    Draining,
    EpisodeEnded,
    EpisodeRecovering,
    EpisodeRetried,
    SandboxEnded,
    SandboxLeft,
    SandboxStarted,
    ShardEnded,
    ShardStarted,
    ShardWaits,
)

if TYPE_CHECKING:
    from pathlib import Path

    from orchestrator.events import Event
    from orchestrator.types import Failure, FailureKind

_FORMAT: Final = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"
_OURS: Final = ("rollout", "orchestrator", "backends", "policies")
_HELD: Final = 1000
"""Records held back before there is a file."""

log: Final = logging.getLogger("rollout")


class RunLog:
    """A context: while it is open, what the project logs goes to the file, and to stderr where asked for."""

    def __init__(self, level: str, *, stderr: bool) -> None:
        self._level = level.upper()
        self._held = logging.handlers.MemoryHandler(_HELD, flushLevel=logging.CRITICAL + 1, flushOnClose=False)
        self._handlers: list[logging.Handler] = [self._held]
        self.file: Path | None = None
        """Where it is written, once the run's directory is ours."""
        self._known: set[FailureKind] | None = None if stderr else set()
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
        self.file = path

    def record(self, event: Event) -> None:
        """Write an event to the log; the listener of a run. The first failure of each kind is said on stderr too."""
        match event:
            case SandboxStarted(sandbox, seconds):
                log.info("sandbox %s answers after %.2f s", sandbox, seconds)
            case SandboxEnded(sandbox, failure, sessions):
                log.warning("sandbox %s is lost with %d episodes on it: %s", sandbox, sessions, _said(failure))
                self._tell(f"sandbox {sandbox} is lost and its episodes are rebuilt", failure)
            case SandboxLeft(sandbox):
                log.error("sandbox %s did not end in time and is left behind; see `rollout doctor`", sandbox)
            case ShardStarted(slot, node):
                log.info("shard %d takes episodes: %s", slot, printable(node))
            case ShardEnded(slot, failure, episodes):
                log.warning("shard %d is lost with %d episodes on it: %s", slot, episodes, _said(failure))
                self._tell(f"shard {slot} is lost and its episodes go on elsewhere", failure)
            case ShardWaits(slot, why):
                log.warning("shard %d: %s", slot, printable(why))
                if self._known is not None:
                    say(f"shard {slot}: {printable(why)}")
            case EpisodeRecovering(key, attempt, failure, suspect):
                also = ", a suspect" if suspect else ""
                log.info("episode %s attempt %d is replayed%s: %s", key, attempt, also, _said(failure))
            case EpisodeRetried(key, attempt, failure):
                log.warning("episode %s attempt %d failed: %s", key, attempt, _said(failure))
                self._tell(f"episode {key} failed", failure)
            case EpisodeEnded(key, outcome, stop_reason, reward, failure):
                level = logging.DEBUG if failure is None else logging.WARNING
                why = "" if failure is None else f": {_said(failure)}"
                log.log(level, "episode %s %s (%s), reward %s%s", key, outcome, stop_reason, reward, why)
                if failure is not None:
                    self._tell(f"episode {key} {outcome}", failure)
            case DeliveryWaits(queue, seconds):
                log.warning("queue %s has not accepted a group for %.0f s", queue, seconds)
            case Draining():
                log.info("draining")
            case _:
                assert_never(event)

    def _tell(self, what: str, failure: Failure) -> None:
        if self._known is not None and failure.kind not in self._known:
            self._known.add(failure.kind)
            say(f"{what}: {_said(failure)} (the log has every further {failure.kind})")


def _formatted(handler: logging.Handler) -> logging.Handler:
    handler.setFormatter(logging.Formatter(_FORMAT))
    return handler


def _said(failure: Failure) -> str:
    return f"{failure.kind} at {failure.stage}: {printable(failure.message)}"
