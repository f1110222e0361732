"""One run that is disturbed: its orchestrator killed and resumed, or its sandboxes killed and stopped under it.

A trial plays a workload in a directory of its own, lets a consumer acknowledge its groups all the while, and judges
what is left against the undisturbed run. Where in a life a kill falls is drawn from the seed over the time that the
life is expected to take, its start included; where it fell is read from the store afterwards.
"""

from __future__ import annotations

import asyncio
import math
import os
import signal
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from backends.trainers.durable import DurableQueue
from bench import processes
from bench.answers import repeated
from bench.verdict import Evidence, Verdict, fingerprint, judge
from orchestrator import Run
from orchestrator.errors import RolloutError, RunFailed, first_error
from orchestrator.rundir import RunDirectory
from orchestrator.store import holds_run

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from pathlib import Path
    from random import Random

    from bench.answers import LoggedCall
    from bench.lives import Life, Ward
    from bench.values import Row
    from bench.workloads import Workload
    from orchestrator.types import EpisodeKey

SLOWER: Final = 1.06
FASTER: Final = 0.8
"""How the pace changes with a life that was killed, and with one that was over first: one life in five escapes."""
LEAST_REST: Final = 0.3
"""Of a run: the last episodes take longer than their number says."""
CONSUMED_S: Final = 60.0
"""What the consumer gets to catch up with a finished run."""
CONSUMER: Final = "bench"
PAUSE_S: Final = (0.1, 0.6)
"""Between two disturbances of sandboxes."""
STEP_TIMEOUT_S: Final = 2.0
"""How soon a stopped sandbox is noticed; the default would only make the benchmark longer."""


@dataclass(slots=True)
class Pace:
    """How long lives take, in units of the undisturbed run's time, which a busy machine makes a poor guess."""

    factor: float = 1.0

    def draw(self, rng: Random, expected_s: float) -> float:
        """When to kill, in seconds from a life's start."""
        return rng.uniform(0, self.factor * expected_s)

    def learn(self, *, escaped: bool) -> None:
        """Whether the life was over before its kill."""
        self.factor *= FASTER if escaped else SLOWER


@dataclass(slots=True)
class Trial:
    """What one run went through and came to."""

    workload: str
    kills: list[Row] = field(default_factory=list)
    sandbox_kills: list[Row] = field(default_factory=list)
    lives: int = 0
    verdict: Verdict = field(default_factory=Verdict)
    model_calls: int = 0
    model_calls_repeated: int = 0
    """Answered more than 0.2 s before a kill and asked again."""
    repeated_after_s: list[float] = field(default_factory=list)
    """For each call made again: how long before the kill its answer had left; negative where it left behind it."""

    @property
    def clean(self) -> bool:
        """Whether nothing went wrong."""
        return self.verdict.clean and not self.model_calls_repeated

    def as_row(self) -> Row:
        """For the JSON file."""
        verdict = self.verdict
        return {name: getattr(self, name) for name in self.__slots__ if name != "verdict"} | {
            name: getattr(verdict, name) for name in verdict.__slots__
        }


async def killed(workload: Workload, out: Path, ward: Ward, rng: Random, most: int, pace: Pace) -> Trial:
    """Kill the orchestrator up to `most` times, resume it each time, judge. Raises RunFailed where a life fails."""

    async def lives(trial: Trial) -> None:
        while not await _one_life(trial, workload, out, ward, rng, most, pace):
            pass

    return await _trial(workload, out, lives)


async def disturbed(workload: Workload, out: Path, ward: Ward, rng: Random, most: int) -> Trial:
    """Kill and stop up to `most` of the run's sandboxes, in turns, and judge. Raises RunFailed where the run fails."""

    async def one_life(trial: Trial) -> None:
        more = ("--sandboxes", "3", "--step-timeout", str(STEP_TIMEOUT_S))
        trial.lives += 1
        async with ward.life([*_collect(workload, out), *more]) as life:
            while len(trial.sandbox_kills) < most and not await life.last(rng.uniform(*PAUSE_S)):
                _disturb(trial, life, rng)
            await life.finish()

    return await _trial(workload, out, one_life)


async def _trial(workload: Workload, out: Path, play: Callable[[Trial], Awaitable[None]]) -> Trial:
    trial = Trial(workload.name)
    before = len(workload.calls())
    consumed: list[EpisodeKey] = []
    try:
        async with asyncio.TaskGroup() as tasks:
            consumer = tasks.create_task(_consume(out, consumed), name="consumer")
            await play(trial)
            await asyncio.wait({consumer}, timeout=CONSUMED_S)
            consumer.cancel()  # what it was not given by now counts as lost
    except* RolloutError as errors:
        raise first_error(errors) from None
    trial.verdict = await asyncio.to_thread(_judge, workload, out, consumed)
    _count_calls(trial, workload.calls()[before:])
    return trial


def _count_calls(trial: Trial, calls: Sequence[LoggedCall]) -> None:
    kills = [kill["at"] for kill in trial.kills]
    trial.model_calls = len(calls)
    trial.model_calls_repeated = len(repeated(calls, kills))
    answered = {(call.digest, call.seed): call for call in reversed(calls)}
    trial.repeated_after_s = sorted(
        _until_kill(answered[call.digest, call.seed], kills) for call in repeated(calls, [])
    )


def _until_kill(call: LoggedCall, kills: Sequence[float]) -> float:
    return min((kill - call.t for kill in kills if kill >= min(call.asked, call.t)), default=math.inf)


async def _one_life(
    trial: Trial, workload: Workload, out: Path, ward: Ward, rng: Random, most: int, pace: Pace
) -> bool:
    """Begin or resume, and kill; whether the run has come to its end instead."""
    stored = await asyncio.to_thread(_stored, out)
    rest = max(LEAST_REST, 1 - stored / len(workload.expected))
    after = pace.draw(rng, workload.starting_s + workload.running_s * rest)
    begun = holds_run(RunDirectory(out).store)
    arguments = ["resume", str(out)] if begun else _collect(workload, out)
    trial.lives += 1
    began = time.monotonic()
    async with ward.life(arguments) as life:
        if len(trial.kills) >= most:
            await life.finish()
            return True
        escaped = await life.last(after)
        pace.learn(escaped=escaped)
        if escaped:
            return True
        after = time.monotonic() - began
        at = await life.kill()
    if at is None:
        return False
    stored = await asyncio.to_thread(_stored, out)
    trial.kills.append({"at": at, "after_s": after, "stored": stored, "of": len(workload.expected)})
    return False


def _collect(workload: Workload, out: Path) -> list[str]:
    return [*workload.arguments, "--consumer", CONSUMER, "--out", str(out)]


def _disturb(trial: Trial, life: Life, rng: Random) -> None:
    """Kill one of the run's sandboxes, or stop it so that it hangs."""
    servers = sorted(processes.servers(life.pid))
    if not servers:
        return  # all of them are being replaced
    server, number = rng.choice(servers), rng.choice((signal.SIGKILL, signal.SIGSTOP))
    try:
        os.kill(server, number)
    except ProcessLookupError:
        return
    trial.sandbox_kills.append({"at": time.time(), "signal": number.name})


async def _consume(out: Path, consumed: list[EpisodeKey]) -> None:
    async with DurableQueue(out, CONSUMER) as queue:
        async for group in queue:
            consumed += [trajectory.key for trajectory in group.trajectories]


def _stored(out: Path) -> int:
    """How many episodes are durable."""
    if not holds_run(RunDirectory(out).store):
        return 0
    with Run.open(out) as run:
        return run.totals().episodes


def _judge(workload: Workload, out: Path, consumed: Sequence[EpisodeKey]) -> Verdict:
    with Run.open(out) as run:
        if run.state != "finished":
            raise RunFailed(f"the run in {out} ended without being finished")
        stored = [(trajectory.key, fingerprint(trajectory)) for trajectory in run.episodes()]
        outbox = [trajectory.key for group in run.groups() for trajectory in group.trajectories]
        evidence = Evidence(stored, outbox, consumed, run.totals().duplicates)
    return judge(workload.expected, evidence)
