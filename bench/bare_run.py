"""Worker: the same bodies exchanged with the same sandbox servers by a bare loop; what that cost.

`python -m bench.bare_run JSON`. What is left of a run without scheduling, recording, store, journal and delivery, and
what no orchestrator on this wire could save: as many coroutines as episodes run at once, each opening, stepping,
grading and closing one episode after another. Actions and opening bodies are computed before the measurement, the
garbage collector is set as the engine sets it, and the connection is `bench.bare_link`. Rewards are counted: a loop
that left something out would not get them.
"""

from __future__ import annotations

import asyncio
import gc
import time
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple
from uuid import uuid4

import orjson

from backends.server.wire import Op
from bench.bare_link import BareBackend, BareLink
from bench.workers import serve
from orchestrator.errors import RunFailed, first_error
from orchestrator.planning import Plan
from orchestrator.seeds import environment_seed
from orchestrator.types import EpisodeKey, RunId

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from bench.values import Row

STEP_TIMEOUT_S = 30.0


class Script(NamedTuple):
    """An episode as bytes: what opens it, and its actions."""

    opening: bytes
    actions: Sequence[bytes]


@dataclass(slots=True)
class Tally:
    """What was done."""

    episodes: int = 0
    steps: int = 0
    calls: int = 0
    solved: int = 0
    observed_bytes: int = 0


async def measure(*, split: str, concurrency: int, episodes: int, sandboxes: int, seed: int) -> Row:
    """Exchange it all and return the row."""
    backend = BareBackend("bfcl")
    label = RunId(
        f"bare-{uuid4().hex[:12]}"
    )  # its own: a backend ends servers that an earlier one left under its label
    backend.configure(run=label, with_solutions=True, logs=None, call_limit_s=STEP_TIMEOUT_S)
    async with backend:
        links = [await backend.create() for _ in range(sandboxes)]
        scripts = await _scripts(links[0], split, episodes, seed)
        for link in links[1:]:
            await _scripts(link, split, 1, seed)  # so that every server has loaded its data before the measurement
        tally = Tally()
        gc.collect()
        gc.freeze()
        gc.set_threshold(100_000, 50, 100)
        cpu, wall, theirs = time.process_time(), time.monotonic(), backend.cpu_seconds()
        queue = iter(scripts)
        try:
            async with asyncio.TaskGroup() as tasks:
                for number in range(min(concurrency, episodes)):
                    tasks.create_task(_play(links[number % sandboxes], queue, tally), name=f"bare-{number}")
        except* RunFailed as errors:
            raise first_error(errors) from None
        cpu, wall = time.process_time() - cpu, time.monotonic() - wall
        theirs = backend.cpu_seconds() - theirs
    if tally.solved != episodes:
        raise RunFailed(f"{tally.solved} of {episodes} rewards are 1.0: this is no measurement")
    return {
        "split": split,
        "concurrency": concurrency,
        "episodes": tally.episodes,
        "steps": tally.steps,
        "wall_s": wall,
        "steps_per_s": tally.steps / wall,
        "bare_us_per_step": cpu / tally.steps * 1e6,
        "bare_us_per_call": cpu / tally.calls * 1e6,
        "sandbox_us_per_step": theirs / tally.steps * 1e6,
        "observed_bytes_per_step": tally.observed_bytes / tally.steps,
    }


async def _scripts(link: BareLink, split: str, episodes: int, seed: int) -> list[Script]:
    """The episodes that a run with the same arguments would play, in its order, with the same bodies."""
    listed, _, _ = await link.call(Op.TASKS, 0, 0, orjson.dumps({"split": split}))
    tasks: list[str] = orjson.loads(listed)["tasks"]
    solutions: dict[str, list[bytes]] = {}
    for task in islice(tasks, episodes):
        body, _, _ = await link.call(Op.SOLUTION, 0, 0, orjson.dumps({"task": task}))
        solutions[task] = [action.encode() for action in orjson.loads(body)]
    keys = (EpisodeKey(spec.task, spec.group, 0) for spec in Plan(tasks, episodes, 1).specs())
    return [Script(_opening(key, seed), solutions[key.task]) for key in keys]


def _opening(key: EpisodeKey, seed: int) -> bytes:
    seed = environment_seed(seed, key)
    return orjson.dumps({"task": key.task, "seed": seed, "step_timeout_s": STEP_TIMEOUT_S, "options": {}})


async def _play(link: BareLink, scripts: Iterator[Script], tally: Tally) -> None:
    """One coroutine of the loop: episode after episode until there are no more."""
    call = link.call
    for opening, actions in scripts:
        session = link.session()
        body, _, done = await call(Op.OPEN, session, 0, opening)
        received = len(body)
        for turn, action in enumerate(actions, 1):
            body, _, done = await call(Op.STEP, session, turn, action)
            received += len(body)
        _, reward, _ = await call(Op.EVALUATE, session, len(actions) + 1, b"")
        link.post(Op.CLOSE, session, len(actions) + 2)
        tally.episodes += 1
        tally.steps += len(actions)
        tally.calls += len(actions) + 3
        tally.solved += done and reward == 1.0
        tally.observed_bytes += received


if __name__ == "__main__":
    serve(measure)
