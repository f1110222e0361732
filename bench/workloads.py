"""The two kinds of run that are killed, and what each comes to when nobody disturbs it.

`replay`: solutions with seeded mistakes, in groups of 4; nothing calls a model. `chat`: the chat policy on a slow fake
endpoint in a process of its own, which outlives every kill, answers with the known solutions and logs each answer.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import orjson

from bench.answers import LoggedCall, read_log, repeated, write_answers
from bench.endpoint import endpoint_process
from bench.endpoint_server import EndpointOptions
from bench.verdict import fingerprint
from orchestrator import Run
from orchestrator.errors import RunFailed

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence
    from pathlib import Path

    from bench.lives import Ward
    from bench.verdict import Fingerprint
    from orchestrator.types import EpisodeKey

SPLIT: Final = "multi_turn_base"
SKILL: Final = "0.7"
LATENCY_S: Final = 0.2
JITTER_S: Final = 0.1


@dataclass(frozen=True, slots=True)
class Workload:
    """One kind of run. `starting_s` and `running_s` are of the undisturbed one: kills are drawn from them."""

    name: str
    arguments: Sequence[str]
    """Of `rollout collect`, without the directory and the consumer."""
    expected: Mapping[EpisodeKey, Fingerprint]
    starting_s: float
    running_s: float
    log: Path | None = None
    """The endpoint's."""

    def calls(self) -> list[LoggedCall]:
        """The model calls answered so far, of all runs."""
        return read_log(self.log) if self.log is not None else []


def replay_arguments(episodes: int, seed: int) -> list[str]:
    """A replay run of about this many episodes."""
    whole = ("--policy", "replay", "--skill", SKILL, "--group-size", "4", "--concurrency", "256")
    return [*_common(seed), *whole, "--episodes", str(-(-episodes // 4) * 4)]


async def replay_workload(ward: Ward, folder: Path, episodes: int, seed: int) -> Workload:
    """Run it undisturbed. Raises RunFailed."""
    return await _undisturbed("replay", replay_arguments(episodes, seed), ward, folder / "replay")


@asynccontextmanager
async def chat_workload(ward: Ward, folder: Path, episodes: int, seed: int) -> AsyncIterator[Workload]:
    """Start the endpoint, run undisturbed, and keep the endpoint. Raises RunFailed, also where a call was repeated."""
    source = folder / "answers"
    # Without mistakes: two tasks that begin alike must not be answered in two ways.
    async with ward.life([*_common(seed), "--policy", "replay", "--out", str(source)]) as life:
        await life.finish()
    answers, log = folder / "answers.jsonl", folder / "calls.jsonl"
    await asyncio.to_thread(_write_answers, source, answers)
    options = EndpointOptions(answers=answers, log=log, latency_s=LATENCY_S, jitter_s=JITTER_S, seed=seed)
    async with endpoint_process(options) as endpoint:
        model = ("--policy", "chat", "--model", "fake", "--base-url", endpoint.url)
        whole = ("--group-size", "2", "--concurrency", str(max(2, episodes // 2)))
        arguments = [*_common(seed), *model, *whole, "--episodes", str(-(-episodes // 2) * 2)]
        workload = await _undisturbed("chat", arguments, ward, folder / "chat", log)
        if repeated(workload.calls(), []):
            raise RunFailed("an undisturbed run has repeated model calls: the log cannot tell what a kill repeats")
        yield workload


def _common(seed: int) -> list[str]:
    return ["collect", "--env", "bfcl", "--split", SPLIT, "--seed", str(seed), "--no-install", "--json"]


def _write_answers(source: Path, target: Path) -> None:
    with Run.open(source) as run:
        write_answers(target, [run.to_openai(trajectory)["messages"] for trajectory in run.episodes()])


async def _undisturbed(name: str, arguments: Sequence[str], ward: Ward, out: Path, log: Path | None = None) -> Workload:
    output = out.with_suffix(".json")
    began = time.monotonic()
    async with ward.life([*arguments, "--out", str(out)], output) as life:
        await life.finish()
    whole_s = time.monotonic() - began
    running_s = orjson.loads(output.read_bytes().splitlines()[-1])["wall_s"]
    return Workload(name, arguments, await asyncio.to_thread(_read, out), max(whole_s - running_s, 0.0), running_s, log)


def _read(out: Path) -> dict[EpisodeKey, Fingerprint]:
    with Run.open(out) as run:
        return {trajectory.key: fingerprint(trajectory) for trajectory in run.episodes()}
