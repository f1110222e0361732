"""What orchestration costs: CPU of the orchestrator a step, beside a bare loop that exchanges the same bodies.

BFCL's multi_turn_base (and multi_turn_long_context as a row of its own), replay policy, 2 sandboxes, N episodes at once
held for 10 N episodes. Each measurement is a fresh process (`bench.engine_run`, `bench.bare_run`); the two sides and
the two durabilities take turns, so that a noisy machine disturbs all alike: compare within one run of this benchmark.

- `cpu_us_per_step`: the orchestrator's process, all threads, policy included, from first admission to last durable
  commit, with `durability="episode"`. `bare_us_per_step`: the bare loop's process. Both are medians over the rounds;
  `_min` is beside them. `ratio_to_bare` is the median of the rounds' own ratios.
- `journal_us_per_step`: what `durability="step"` adds, the median of the rounds' differences at 1,000 (with their
  spread): runs that follow each other, the order turned around every round.
- `growth`: the cost at 10,000 divided by that at 1,000.

To falsify it: the two sides must have made the same number of steps and earned every reward, else it is an error; a
run that did not hold N at once says so (`held`); `call_us_per_step` in the rounds is measured outside of the run.
"""

from __future__ import annotations

import shutil
from statistics import median
from typing import TYPE_CHECKING, Any, Final

from bench.values import Report
from bench.workers import work as worker
from orchestrator.errors import RunFailed

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from bench.values import Row, Say, Sizes

SPLIT: Final = "multi_turn_base"
LONG: Final = "multi_turn_long_context"
LEVELS: Final = (128, 1000, 10_000)
SANDBOXES: Final = 2
EPISODES_A_PLACE: Final = 10
AT_LEAST: Final = 5000
"""Fewer episodes than this are over before the figure settles; who asks for fewer gets one round of each level."""
REFERENCE: Final = 1000
"""The level that is compared with others, and that the journal is measured at."""
ROUNDS: Final = {(SPLIT, 128): 3, (SPLIT, 1000): 4, (SPLIT, 10_000): 1, (LONG, 1000): 1}
_HELD: Final = 0.9


async def overhead(sizes: Sizes, work: Path, say: Say) -> Report:
    """Measure all levels. Raises RunFailed where a measurement is none."""
    rounds: list[Row] = []
    for number, split, concurrency in _turns(once=sizes.episodes is not None and sizes.episodes < AT_LEAST):
        pair = _Pair(sizes, work, split, concurrency, number)
        rounds += await pair.measure(say)
    return Report(_result(rounds), rounds, {"split": SPLIT, "sandboxes": SANDBOXES})


def _turns(*, once: bool) -> list[tuple[int, str, int]]:
    """Round by round; the levels that are measured once lie between the rounds of the others."""
    turns = [(number, *level) for level in ROUNDS for number in range(1 if once else ROUNDS[level])]
    middle = max(ROUNDS.values()) // 2
    return sorted(turns, key=lambda turn: turn[0] if ROUNDS[turn[1:]] > 1 else middle)


class _Pair:
    """One round of one level: the orchestrator and the bare loop, one after the other."""

    def __init__(self, sizes: Sizes, work: Path, split: str, concurrency: int, number: int) -> None:
        wanted = max(EPISODES_A_PLACE * concurrency, AT_LEAST)
        self.episodes = min(wanted, sizes.episodes or wanted)
        self.number = number
        self.split = split
        self.concurrency = concurrency
        self._common: dict[str, Any] = {
            "split": split,
            "concurrency": concurrency,
            "episodes": self.episodes,
            "sandboxes": SANDBOXES,
            "seed": sizes.seed,
        }
        self._work = work

    async def measure(self, say: Say) -> list[Row]:
        """The rows of all sides, which must have done the same work."""
        durabilities = ["episode", "step"] if (self.split, self.concurrency) == (SPLIT, REFERENCE) else ["episode"]
        sides = [*durabilities, "bare"]
        rows = [await self._side(side) for side in (reversed(sides) if self.number % 2 else sides)]
        if len({(row["episodes"], row["steps"]) for row in rows}) != 1:
            raise RunFailed(f"the sides of {self.split} at {self.concurrency} did different work: {rows}")
        say(f"{self.split} {self.concurrency:>6,} round {self.number + 1}: {_line(rows)}")
        return rows

    async def _side(self, side: str) -> Row:
        if side == "bare":
            row = await worker("bench.bare_run", **self._common)
        else:
            out = self._work / "run"
            row = await worker("bench.engine_run", out=str(out), durability=side, **self._common)
            shutil.rmtree(out)
            row["held"] = row["running_median"] is not None and row["running_median"] >= _HELD * self.concurrency
        return {"side": side, "round": self.number, **row}


def _line(rows: Sequence[Row]) -> str:
    parts = [f"{row['side']} {row.get('cpu_us_per_step') or row['bare_us_per_step']:.1f} us" for row in rows]
    held = all(row.get("held", True) for row in rows)
    return f"{', '.join(sorted(parts))} a step{'' if held else ' (too few episodes to hold this many at once)'}"


def _result(rounds: Sequence[Row]) -> dict[str, Any]:
    base = [row for row in rounds if row["split"] == SPLIT]
    cpu = _levels(base, "episode", "cpu_us_per_step", median)
    return {
        "cpu_us_per_step": cpu,
        "bare_us_per_step": _levels(base, "bare", "bare_us_per_step", median),
        "journal_us_per_step": median(_journal(base)),
        "journal_us_spread": [min(_journal(base)), max(_journal(base))],
        "ratio_to_bare": {str(level): median(_ratios(base, level)) for level in LEVELS},
        "growth": cpu["10000"] / cpu[str(REFERENCE)],
        "cpu_us_per_step_min": _levels(base, "episode", "cpu_us_per_step", min),
        "bare_us_per_step_min": _levels(base, "bare", "bare_us_per_step", min),
        "sandbox_us_per_step": _levels(base, "episode", "sandbox_us_per_step", median),
        "steps_per_s": _levels(base, "episode", "steps_per_s", median),
        "held": {str(level): all(_values(base, level, "episode", "held")) for level in LEVELS},
        "long_context": _long([row for row in rounds if row["split"] == LONG]),
    }


def _long(rows: Sequence[Row]) -> dict[str, Any]:
    return {
        "cpu_us_per_step": _values(rows, REFERENCE, "episode", "cpu_us_per_step")[0],
        "bare_us_per_step": _values(rows, REFERENCE, "bare", "bare_us_per_step")[0],
        "sandbox_us_per_step": _values(rows, REFERENCE, "episode", "sandbox_us_per_step")[0],
    }


def _levels(rows: Sequence[Row], side: str, name: str, of: Callable[[list[float]], float]) -> dict[str, float]:
    return {str(level): of(_values(rows, level, side, name)) for level in LEVELS}


def _values(rows: Sequence[Row], level: int, side: str, name: str) -> list[Any]:
    """One figure of one side at one level, in the order of the rounds."""
    chosen = [row for row in rows if row["concurrency"] == level and row["side"] == side]
    return [row[name] for row in sorted(chosen, key=lambda row: row["round"])]


def _ratios(rows: Sequence[Row], level: int) -> list[float]:
    ours = _values(rows, level, "episode", "cpu_us_per_step")
    return [a / b for a, b in zip(ours, _values(rows, level, "bare", "bare_us_per_step"), strict=True)]


def _journal(rows: Sequence[Row]) -> list[float]:
    """What the journal adds, round by round."""
    step, episode = (_values(rows, REFERENCE, side, "cpu_us_per_step") for side in ("step", "episode"))
    return [a - b for a, b in zip(step, episode, strict=True)]
