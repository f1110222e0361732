"""The live display: what it says of a reading, how fast it thinks the run is, and that it fits the terminal."""

from __future__ import annotations

from dataclasses import replace
from io import StringIO
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from orchestrator.cli import display
from orchestrator.cli.display import Speed, Speedometer, panel, plain_line
from orchestrator.summary import Progress

if TYPE_CHECKING:
    from collections.abc import Iterator

START = Progress(
    total=100, done=0, running=8, waiting=92, uncommitted=0, steps=0, rewarded=0, reward_sum=0.0, outcomes={},
    failures={}, recovered=0, sandboxes_live=1, sandboxes_target=2, elapsed_s=0.0, draining=False, paused=None,
)  # fmt: skip
LATER = replace(
    START, done=40, steps=400, rewarded=40, reward_sum=30.0, outcomes={"completed": 39, "truncated": 1},
    failures={"sandbox_lost": 2}, recovered=2, sandboxes_live=2, elapsed_s=4.0,
)  # fmt: skip


def test_speed_is_over_the_window_and_tells_what_is_left() -> None:
    meter = Speedometer()
    assert meter.read(START) is None
    assert meter.read(LATER) == Speed(10.0, 100.0, 6.0)
    stalled = [meter.read(replace(LATER, elapsed_s=float(second))) for second in range(5, 16)]
    assert stalled[-1] == Speed(0.0, 0.0, None)


def test_what_an_earlier_life_has_done_is_no_speed() -> None:
    meter = Speedometer()
    meter.read(replace(START, total=0, elapsed_s=3.0))
    assert meter.read(replace(START, done=90, elapsed_s=0.1)) is None
    assert meter.read(replace(START, done=95, steps=50, elapsed_s=1.1)) == Speed(5.0, 50.0, 1.0)


def test_a_plain_line_says_all() -> None:
    line = plain_line(replace(LATER, draining=True, paused="the consumer is behind"), Speed(10.0, 100.0, 6.0))
    assert line == (
        "  4.0 s  40/100 episodes (40%), 10.0 episodes/s, 100 steps/s, reward 0.750 (mean of 40), running 8, "
        "sandboxes 2/2, failures: sandbox_lost 2, ETA 6.0 s, paused: the consumer is behind, draining"
    )


def test_what_is_not_known_is_not_said() -> None:
    assert "/s" not in plain_line(START, None)
    console = Console(file=StringIO(), width=80)
    console.print(panel("toy", START, None))
    assert isinstance(console.file, StringIO)
    assert "speed      not known yet" in console.file.getvalue()
    assert "0.0 episodes/s, 0 steps/s" in plain_line(START, Speed(0.0, 0.0, None))


def test_what_earlier_lives_have_done_is_told_apart() -> None:
    resumed = replace(LATER, done=90, uncommitted=10)
    assert resumed.done_before == 60
    assert "90/100 episodes (90%, 60 before the resume)" in plain_line(resumed, None)
    assert "(mean of 40)" in plain_line(resumed, None)
    assert LATER.done_before == 0


@given(st.integers(20, 120), st.integers(0, 10**9), st.integers(0, 10**6))
def test_the_panel_fits_any_terminal(width: int, done: int, seconds: int) -> None:
    progress = replace(LATER, total=10**9, done=done, elapsed_s=float(seconds), paused="a reason " * 20)
    console = Console(file=StringIO(), width=width, force_terminal=True, color_system=None)
    console.print(panel("a title that is rather long " * 5, progress, Speed(1e6, 1e9, 1e7)))
    assert isinstance(console.file, StringIO)
    lines = console.file.getvalue().splitlines()
    assert len(lines) == 10
    assert max(map(len, lines)) <= width


def test_the_panel_says_what_the_line_says() -> None:
    console = Console(file=StringIO(), width=80)
    console.print(panel("toy", LATER, Speed(10.0, 100.0, 6.0)))
    assert isinstance(console.file, StringIO)
    shown = console.file.getvalue()
    for part in ("40 of 100 episodes (40%) in 4.0 s, 6.0 s left", "completed 39, truncated 1", "sandbox_lost 2;"):
        assert part in shown


async def test_where_there_is_no_terminal_a_line_is_written_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(display, "LIVE_S", 0.0)
    unplanned = replace(START, total=0, elapsed_s=3.0, paused="starting")
    seconds = [
        replace(LATER, done=done, uncommitted=40 - done, elapsed_s=done / 10) for done in range(1, 2 * display.READINGS)
    ]
    readings: Iterator[Progress] = iter([unplanned, START, *seconds])
    with pytest.raises(RuntimeError, match="StopIteration"):
        await display.show("toy", lambda: next(readings))
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" episodes")[0].split()[-1] for line in lines] == ["19/100", "39/100"]
    assert all("10.0 episodes/s" in line for line in lines), "the first line knows the speed"
