"""A shard's side, against a driver and a player that are played by the test."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from shard_peer import HEAD, KEY, OTHER, Peer

from orchestrator.errors import RolloutError, RunFailed, UsageError
from orchestrator.playing import Unplayed
from orchestrator.records import EpisodeBuffer
from orchestrator.shards.messages import (
    End,
    Fatal,
    Held,
    Launch,
    Message,
    NotPlayed,
    Played,
    Ready,
    Settled,
)
from orchestrator.shards.runner import ShardRunner
from orchestrator.types import Decision, EpisodeKey, Failure, FailureKind, Outcome, StopReason, Trajectory

if TYPE_CHECKING:
    from collections.abc import Sequence


class Player:
    """Decides once, and then does what the test says."""

    def __init__(self) -> None:
        self.ends: asyncio.Future[RolloutError | Failure | None] = asyncio.get_running_loop().create_future()
        self.forgotten: list[EpisodeKey] = []

    async def play(self, key: EpisodeKey, attempt: int, buffer: EpisodeBuffer) -> Trajectory:
        buffer.decide(Decision(b"{}"))
        end = await asyncio.shield(self.ends)
        if isinstance(end, RolloutError):
            raise end
        if end is not None:
            raise Unplayed(end, buffer)
        return Trajectory(key, attempt, Outcome.COMPLETED, StopReason.DONE, 1.0, 1, bytes(buffer.data))

    def stored(self, keys: Sequence[EpisodeKey]) -> None:
        self.forgotten += keys

    def cpu_seconds(self) -> float:
        return 0.0

    def own_cpu_seconds(self) -> float:
        return 0.0


@pytest.fixture
async def driver() -> Peer:
    return Peer()


@pytest.fixture
async def player() -> Player:
    return Player()


def decided() -> bytes:
    buffer = EpisodeBuffer(HEAD)
    buffer.decide(Decision(b"{}"))
    return bytes(buffer.data)


async def test_what_the_journal_held_is_told_first_and_what_is_settled_forgotten(driver: Peer, player: Player) -> None:
    runner = ShardRunner(player, "node", {KEY: (2, HEAD)})
    running = asyncio.create_task(runner.run(driver))
    assert [await driver.told.get(), await driver.told.get()] == [Held(KEY, 2, HEAD), Ready("node")]
    await driver.say(Settled([KEY]))
    assert player.forgotten == [KEY]
    await driver.say(End(complete=True))
    await running
    assert runner.complete


async def test_a_shard_that_leaves_gives_back_what_it_has_as_it_stands(driver: Peer, player: Player) -> None:
    runner = ShardRunner(player, "node", {})
    running = asyncio.create_task(runner.run(driver))
    assert await driver.told.get() == Ready("node")
    await driver.say(Launch(KEY, 1, HEAD))
    await runner.leave("its node has gone")
    await driver.say(Launch(OTHER, 0, HEAD))  # on its way meanwhile
    given_back = Failure(FailureKind.SHARD_LOST, "shard", "its node has gone", retryable=True)
    assert await driver.told.get() == NotPlayed(KEY, 1, given_back, decided())
    assert await driver.told.get() == Fatal("its node has gone", hopeless=False)
    assert await driver.told.get() == NotPlayed(OTHER, 0, given_back, HEAD)
    driver.leave()
    await running


async def test_episodes_are_cancelled_in_silence_when_the_connection_ends(driver: Peer, player: Player) -> None:
    running = asyncio.create_task(ShardRunner(player, "node", {}).run(driver))
    assert await driver.told.get() == Ready("node")
    await driver.say(Launch(KEY, 0, HEAD))
    driver.leave()
    await running
    assert driver.told.empty()


@pytest.mark.parametrize(
    ("end", "said"),
    [
        (None, Played(Trajectory(KEY, 0, Outcome.COMPLETED, StopReason.DONE, 1.0, 1, decided()))),
        (
            Failure(FailureKind.POLICY, "act", "x"),
            NotPlayed(KEY, 0, Failure(FailureKind.POLICY, "act", "x"), decided()),
        ),
        (RunFailed("no sandbox can be started"), Fatal("no sandbox can be started", hopeless=False)),
        (UsageError("the policy is in use already"), Fatal("the policy is in use already", hopeless=True)),
    ],
)
async def test_what_came_of_an_episode_is_told(
    driver: Peer, player: Player, end: RolloutError | Failure | None, said: Message
) -> None:
    running = asyncio.create_task(ShardRunner(player, "node", {}).run(driver))
    assert await driver.told.get() == Ready("node")
    await driver.say(Launch(KEY, 0, HEAD))
    player.ends.set_result(end)
    assert await driver.told.get() == said
    driver.leave()
    await running
