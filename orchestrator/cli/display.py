"""Live progress: a small panel on a terminal, a line every few seconds elsewhere.

The display reads `Orchestrator.progress()` and nothing else; it holds no state of the run, so that it can be slow,
fail to write or be absent without any effect on it.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from typing import TYPE_CHECKING, Final, NamedTuple

from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from orchestrator.cli.output import counts, duration, people, say

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console, RenderableType

    from orchestrator.summary import Progress

LIVE_S: Final = 0.25
READINGS: Final = 20
"""Readings a line where there is no terminal: one every five seconds."""
_WINDOW_S: Final = 10.0


class Speed(NamedTuple):
    """Rates over the last seconds, and what is left at that rate; `eta_s` is None where it cannot be said."""

    episodes: float
    steps: float
    eta_s: float | None


class Speedometer:
    """Turns successive readings into rates over a sliding window; the readings carry their own time."""

    def __init__(self) -> None:
        self._readings: deque[tuple[float, int, int]] = deque()
        self._total = 0

    def read(self, progress: Progress) -> Speed | None:
        """Take in a reading. The first one only starts the window (None), and so does one of another plan.

        The total changes when the plan becomes known: what an earlier life of the run has done is no speed.
        """
        now, readings = progress.elapsed_s, self._readings
        if progress.total != self._total:
            self._total = progress.total
            readings.clear()
        readings.append((now, progress.done, progress.steps))
        while len(readings) > 2 and readings[1][0] <= now - _WINDOW_S:
            readings.popleft()
        since, done, steps = readings[0]
        if now <= since:
            return None
        episodes = (progress.done - done) / (now - since)
        left = progress.total - progress.done
        return Speed(episodes, (progress.steps - steps) / (now - since), left / episodes if episodes > 0 else None)


def plain_line(progress: Progress, speed: Speed | None) -> str:
    """The state of a run in one line; a speed that is not known yet is left out."""
    parts = [
        f"{progress.done:,}/{progress.total:,} episodes ({_share(progress)})",
        *([_rates(speed)] if speed is not None else []),
        f"reward {_reward(progress)}",
        f"running {progress.running:,}",
        f"sandboxes {progress.sandboxes_live}/{progress.sandboxes_target}",
        *([f"failures: {counts(progress.failures)}"] if progress.failures else []),
        *([f"ETA {duration(speed.eta_s)}"] if speed is not None and speed.eta_s is not None else []),
        *_state(progress),
    ]
    return f"{duration(progress.elapsed_s):>7}  {', '.join(parts)}"


def panel(title: str, progress: Progress, speed: Speed | None) -> RenderableType:
    """The state of a run in a few lines, each cut at the terminal's width."""
    done = f"{progress.done:,} of {progress.total:,} episodes ({_share(progress)})"
    eta = f", {duration(speed.eta_s)} left" if speed is not None and speed.eta_s is not None else ""
    lines = [
        f"{done} in {duration(progress.elapsed_s)}{eta}",
        f"speed      {'not known yet' if speed is None else _rates(speed)}",
        f"in flight  {progress.running:,} running, {progress.waiting:,} waiting, {progress.uncommitted:,} to store",
        f"reward     {_reward(progress)}",
        f"outcomes   {counts(progress.outcomes) or 'none yet'}",
        f"failures   {counts(progress.failures) or 'none'}; recovered {progress.recovered:,}",
        f"sandboxes  {progress.sandboxes_live} of {progress.sandboxes_target}",
        *(line.capitalize() for line in _state(progress)),
    ]
    texts = [Text(line, no_wrap=True, overflow="ellipsis") for line in lines]
    head = Text(title, style="bold", no_wrap=True, overflow="ellipsis")
    bar = Table.grid(expand=True)  # a bar alone does not end its line
    bar.add_row(ProgressBar(total=max(progress.total, 1), completed=progress.done))
    return Group(head, bar, *texts)


async def show(title: str, read: Callable[[], Progress]) -> None:
    """Show progress until cancelled: live on a terminal, else a line every few seconds.

    Writing is left to a thread: a terminal that is held (Ctrl-S) or a pipe that nobody empties must not stop the run.
    A terminal that is gone ends the display and nothing else.
    """
    console = people()
    try:
        if console.is_terminal and not console.is_dumb_terminal:
            await _show_live(console, title, read)
        else:
            await _show_plain(read)
    except OSError:
        return


async def _show_live(console: Console, title: str, read: Callable[[], Progress]) -> None:
    speedometer = Speedometer()
    with Live(console=console, auto_refresh=False, transient=True) as live:
        while True:
            progress = read()
            shown = panel(title, progress, speedometer.read(progress))
            await asyncio.to_thread(live.update, shown, refresh=True)
            await asyncio.sleep(LIVE_S)


async def _show_plain(read: Callable[[], Progress]) -> None:
    """Read as often as on a terminal, else the first line could not know the speed since the plan became known."""
    speedometer = Speedometer()
    for reading in itertools.count():
        progress = read()
        speed = speedometer.read(progress)
        if reading and reading % READINGS == 0:
            await asyncio.to_thread(say, plain_line(progress, speed))
        await asyncio.sleep(LIVE_S)


def _rates(speed: Speed) -> str:
    return f"{speed.episodes:,.1f} episodes/s, {speed.steps:,.0f} steps/s"


def _share(progress: Progress) -> str:
    share = f"{progress.done / progress.total if progress.total else 0.0:.0%}"
    return f"{share}, {progress.done_before:,} before the resume" if progress.done_before else share


def _reward(progress: Progress) -> str:
    if not progress.rewarded:
        return "none yet"
    return f"{progress.reward_sum / progress.rewarded:.3f} (mean of {progress.rewarded:,})"


def _state(progress: Progress) -> list[str]:
    state = [f"paused: {progress.paused}"] if progress.paused else []
    return [*state, "draining"] if progress.draining else state
