"""Conducts a run from the command line: installs, starts, shows progress, obeys signals, reports.

The first SIGINT or SIGTERM drains, the second cancels; while the run is being prepared there is nothing to drain, and
the first one cancels. The third ends the process as it stands, whatever holds it. The summary is printed when the run's
directory is closed, so that what it says is on disk.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import signal
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from orchestrator.cli.build import absolute, ensure_ready, orchestrator
from orchestrator.cli.display import show
from orchestrator.cli.exits import CANCELLED, FAILED, OK, UNFINISHED
from orchestrator.cli.logs import RunLog
from orchestrator.cli.output import OutputLost, counts, emit_json, printable, say
from orchestrator.cli.summary import print_summary
from orchestrator.errors import RolloutError, RunFailed, UsageError
from orchestrator.run import Run
from orchestrator.rundir import RunDirectory
from orchestrator.types import REWARDED

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import FrameType

    from orchestrator.cli.config import RunConfig
    from orchestrator.facade import Orchestrator
    from orchestrator.summary import Summary

ENOUGH: Final = 3
"""Signals that end the process at once."""
_SHOW_CURSOR: Final = "\x1b[?25h\n"
"""The live display hides it."""


def conduct(config: RunConfig, *, resume: bool, install: bool, json: bool, verbose: bool) -> int:
    """Run to the end, a drain or a cancellation; the exit code. Raises RolloutError for what `main` reports."""
    config = absolute(config)
    out = config.out or Path("runs") / f"{config.env}-{datetime.now().astimezone():%Y%m%d-%H%M%S}"
    fresh = not out.exists()
    with RunLog(config.log_level, stderr=verbose) as log:
        try:
            summary, cancelled = asyncio.run(_conduct(config, out, log, resume=resume, install=install))
        except asyncio.CancelledError:
            begun = RunDirectory(out).store.exists()
            say(f"cancelled: `rollout resume {out}` goes on" if begun else "cancelled before the run had begun")
            return CANCELLED
        except UsageError:
            if fresh and not RunDirectory(out).store.exists():
                shutil.rmtree(out, ignore_errors=True)  # only what this very call had made
            raise
        except RolloutError:
            raise
        except Exception as error:  # a defect of ours: its traceback is for the log, which says where
            if log.file is None:
                raise
            logging.getLogger("rollout").exception("the run ended on an internal error")
            raise RunFailed(_defect(error, out, log.file)) from None
    report(summary, out, json=json)
    if summary["state"] == "finished":
        return finished(summary, out)
    say(f"{'cancelled' if cancelled else 'drained'} before the end: `rollout resume {out}` goes on")
    return CANCELLED if cancelled else UNFINISHED


def _defect(error: Exception, out: Path, log: Path) -> str:
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    said = f"internal error, {type(error).__name__}: {error}; its traceback is in {log}"
    return f"{said}; what was stored is kept: `rollout resume {out}` goes on"


def finished(summary: Mapping[str, Any], out: Path) -> int:
    """The exit code of a run that collected all it was to: a failure where not one episode could be played."""
    if summary["outcomes"].keys() & {outcome.value for outcome in REWARDED}:
        return OK
    failures = counts(summary["failures"] or summary["outcomes"])
    say(
        f"not one episode could be played ({failures}){_first_failure(out)}; see {out}/logs/rollout.log, then collect "
        "into another directory"
    )
    return FAILED


def _first_failure(out: Path) -> str:
    with Run.open(out) as run:
        first = next((trajectory.failure for trajectory in run.episodes() if trajectory.failure is not None), None)
    return "" if first is None else f"; the first failed at {first.stage}: {printable(first.message)}"


def report(summary: Mapping[str, Any], out: Path, *, json: bool) -> None:
    """Print the summary of the run in `out` as the last thing on stdout. Raises OutputLost, which says where it is."""
    try:
        if json:
            emit_json(summary)
        else:
            print_summary(summary)
    except OutputLost as error:
        raise OutputLost(f"{error}; nothing of the run is lost: `rollout status {out} --json` prints it") from None


class Interrupts:
    """What signals do; `orch` is set while there is a run to drain.

    The loop drains and cancels. Signals are counted outside of it, so that a third one works although a policy holds
    the loop, or will not be cancelled.
    """

    def __init__(self, task: asyncio.Task[Any], out: Path) -> None:
        self.orch: Orchestrator | None = None
        self.cancelled = False
        self._task = task
        self._out = out
        self._arrived = self._obeyed = 0

    def install(self) -> None:
        """Take over SIGINT and SIGTERM."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.obey)
            signal.signal(number, self.arrive)  # the loop is woken as before; what is replaced did nothing
            signal.siginterrupt(number, False)

    def arrive(self, number: int, frame: FrameType | None) -> None:
        """Called at once, between any two instructions of the program."""
        self._arrived += 1
        if self._arrived < ENOUGH:
            return
        shown = _SHOW_CURSOR if os.isatty(2) else ""
        with suppress(OSError):
            os.write(
                2, f"{shown}ended at once; what was stored is kept: `rollout resume {self._out}` goes on\n".encode()
            )
        os._exit(CANCELLED)

    def obey(self) -> None:
        """Called by the loop, once a signal."""
        self._obeyed += 1
        if self.orch is None or not self.orch.progress().total:
            if self._obeyed == 1:
                say("cancelling: the run has not begun, there is nothing to drain")
                self._task.cancel()
        elif self._obeyed == 1:
            say("draining: running episodes are finished, no new ones begin; interrupt again to cancel them")
            self.orch.drain()
        else:
            self.cancelled = True
            say("cancelling: running episodes are given up, what is done is being stored; a third one ends all at once")
            self.orch.cancel()


async def _conduct(
    config: RunConfig, out: Path, log: RunLog, *, resume: bool, install: bool
) -> tuple[dict[str, Any], bool]:
    """The summary, and whether the run was cancelled."""
    task = asyncio.current_task()
    assert task is not None
    interrupts = Interrupts(task, out)
    interrupts.install()
    await ensure_ready(config, install=install)
    async with orchestrator(config, out, resume=resume, listener=log.record) as orch:
        log.attach(out / "logs" / "rollout.log")
        interrupts.orch = orch
        summary = await _run_and_show(orch, config)
    return summary.as_dict(), interrupts.cancelled


async def _run_and_show(orch: Orchestrator, config: RunConfig) -> Summary:
    title = f"{config.env} {config.split or '(default split)'}, {config.policy.kind}"
    outcome: Summary | RolloutError
    async with asyncio.TaskGroup() as tasks:
        display = tasks.create_task(show(title, orch.progress), name="display")
        try:
            outcome = await orch.run(**_plan(config))
        except RolloutError as error:
            outcome = error  # raised outside of the group, which would wrap it
        finally:
            display.cancel()
    if isinstance(outcome, RolloutError):
        raise outcome
    return outcome


def _plan(config: RunConfig) -> dict[str, Any]:
    """What is to be collected. A resumed run has it in its store, unless it died before it was there."""
    return {
        "split": config.split,
        "tasks": list(config.task_id) or None,
        "group_size": config.group_size,
        "episodes": config.episodes,
    }
