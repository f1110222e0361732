"""The reference beside this project: BFCL episodes a second, and memory a live episode, each alone in turns.

- `speed_ratio` = our episodes/s divided by the reference's, the smaller one of `multi_turn_base` and
  `multi_turn_long_context`. The reference is driven by a bare client that plays its own known answers, `AT_ONCE`
  episodes at a time (a creation keeps a core busy); ours is a whole run with recording and durable delivery.
- `memory_ratio` = our proportional set size a live episode, divided by the reference's; the larger one of both splits.
  Each is the growth over the state with no episode open, divided by the episodes held open.

The reference's tasks are spread evenly over the split, of which ours plays the whole; steps an episode stand beside
both. To falsify it: `rounds` holds every measurement, and the rewards, which must be 1.0 for all of ours and are
counted for the reference (some of its tasks are graded 0.0 whatever is answered).
"""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack
from itertools import chain
from typing import TYPE_CHECKING, Any, Final
from uuid import uuid4

from backends.agentscope.http import Channel
from backends.sandboxes.remote.messages import as_text
from bench.processes import need_linux, pss_kib
from bench.reference import env_service, reference, session_members
from bench.reference_answers import answers
from bench.values import Report
from bench.workers import work as worker

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from bench.reference import Reference, Service
    from bench.values import Row, Say, Sizes

SPLITS: Final = ("multi_turn_base", "multi_turn_long_context")
THEIRS: Final = 16
"""Episodes that the reference plays of each split; ours plays OURS times as many."""
OURS: Final = 200
AT_ONCE: Final = 2
HELD: Final = 8
_REQUEST_S: Final = 120.0


async def agentscope(sizes: Sizes, work: Path, say: Say) -> Report:
    """Measure it. Raises Unavailable where the reference cannot be installed, RunFailed where a side fails."""
    need_linux("agentscope")
    installed = await reference(say)
    episodes = sizes.episodes or THEIRS
    rounds: list[Row] = []
    for split in SPLITS:
        theirs = await _theirs(installed, split, episodes)
        say(f"{split}, the reference: {theirs['episodes_per_s']:.2f} episodes/s, {theirs['kib_per_episode']:,.0f} KiB")
        ours = await _ours(work, split, episodes * OURS, sizes.seed)
        say(f"{split}, ours: {ours['episodes_per_s']:,.0f} episodes/s, {ours['kib_per_episode']:.1f} KiB")
        rounds += [theirs, ours]
    pairs = list(zip(rounds[::2], rounds[1::2], strict=True))
    speed = {theirs["split"]: ours["episodes_per_s"] / theirs["episodes_per_s"] for theirs, ours in pairs}
    memory = {theirs["split"]: ours["kib_per_episode"] / theirs["kib_per_episode"] for theirs, ours in pairs}
    result = {
        "speed_ratio": min(speed.values()),
        "memory_ratio": max(memory.values()),
        "speed": speed,
        "memory": memory,
        "reference_reward_one": sum(theirs["reward_one"] for theirs, _ in pairs),
        "reference_episodes": sum(theirs["episodes"] for theirs, _ in pairs),
    }
    return Report(result, rounds, {"episodes": episodes, "at_once": AT_ONCE, "held": HELD})


async def _ours(work: Path, split: str, episodes: int, seed: int) -> Row:
    run = await worker(
        "bench.engine_run", out=str(work / f"run-{split}"), split=split, concurrency=256, episodes=episodes,
        sandboxes=2, seed=seed, durability="episode",
    )  # fmt: skip
    held = await worker(
        "bench.hold_run", out=str(work / f"held-{split}"), split=split, episodes=episodes, sandboxes=2, seed=seed
    )
    growth = sum(held["pss_kib"]["opened"].values()) - sum(held["pss_kib"]["empty"].values())
    return {"side": "ours", **run, "kib_per_episode": growth / episodes, "held": episodes}


async def _theirs(installed: Reference, split: str, episodes: int) -> Row:
    known = list((await asyncio.to_thread(answers, installed, split)).items())
    chosen = [known[number * len(known) // episodes] for number in range(episodes)]
    async with AsyncExitStack() as stack:
        service = await stack.enter_async_context(env_service(installed))
        channel = Channel(service.url, token=None, timeout=_REQUEST_S)
        stack.push_async_callback(channel.close)
        began = time.monotonic()
        played = await _all_played(channel, chosen)
        wall_s = time.monotonic() - began
        kib = await _held(channel, service, [task for task, _ in chosen[:HELD]])
    return {
        "side": "reference",
        "split": split,
        "episodes": episodes,
        "steps": sum(len(actions) for _, actions in chosen),
        "wall_s": wall_s,
        "episodes_per_s": episodes / wall_s,
        "reward_one": played.count(1.0),
        "kib_per_episode": kib,
    }


async def _all_played(channel: Channel, episodes: Sequence[tuple[str, Sequence[bytes]]]) -> list[float]:
    """Play all, AT_ONCE at a time; their rewards."""
    waiting = iter(episodes)
    async with asyncio.TaskGroup() as tasks:
        players = [tasks.create_task(_player(channel, waiting), name=f"player-{n}") for n in range(AT_ONCE)]
    return list(chain.from_iterable(player.result() for player in players))


async def _player(channel: Channel, waiting: Iterator[tuple[str, Sequence[bytes]]]) -> list[float]:
    return [await _played(channel, task, actions) for task, actions in waiting]


async def _played(channel: Channel, task: str, actions: Sequence[bytes]) -> float:
    instance = await _create(channel, task)
    answer: dict[str, Any] = {}
    for action in actions:
        body = {"env_type": "bfcl", "instance_id": instance, "messages": as_text(action)}
        answer = (await channel.post("step", body))["data"]
    await channel.post("release", {"instance_id": instance})
    return float(answer["reward"]) if answer.get("is_terminated") else 0.0


async def _create(channel: Channel, task: str) -> str:
    instance = uuid4().hex
    await channel.post("create", {"env_type": "bfcl", "task_id": task, "instance_id": instance})
    return instance


async def _held(channel: Channel, service: Service, tasks: Sequence[str]) -> float:
    """KiB an open episode, above the state of a service that has served and holds none."""
    before = await asyncio.to_thread(_pss, service)
    instances = [await _create(channel, task) for task in tasks]
    after = await asyncio.to_thread(_pss, service)
    for instance in instances:
        await channel.post("release", {"instance_id": instance})
    return (after - before) / len(tasks)


def _pss(service: Service) -> int:
    total = 0
    for pid in session_members(service.pid):
        try:
            total += pss_kib(pid)
        except (FileNotFoundError, ProcessLookupError, StopIteration):
            continue  # it has just ended
    return total
