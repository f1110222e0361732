"""The driver's side of shards, against shards that are played by the test: what dies, what is late, what comes back."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from shard_peer import HEAD, KEY, OTHER, Peer

from orchestrator.errors import RunFailed
from orchestrator.events import ShardEnded, ShardStarted
from orchestrator.playing import Unplayed
from orchestrator.records import EpisodeBuffer
from orchestrator.shards import crew as crews
from orchestrator.shards.crew import Crew
from orchestrator.shards.messages import (
    Fatal,
    Held,
    Launch,
    NotPlayed,
    Played,
    Ready,
    Settled,
    Standing,
    Tools,
)
from orchestrator.types import (
    Decision,
    EpisodeKey,
    Failure,
    FailureKind,
    Observation,
    Outcome,
    StopReason,
    Trajectory,
)

if TYPE_CHECKING:
    from orchestrator.events import Event


def buffer(turns: int = 0) -> EpisodeBuffer:
    made = EpisodeBuffer(HEAD)
    made.observe(Observation(b'{"messages":[]}'))
    for turn in range(turns):
        made.decide(Decision(b'{"turn":%d}' % turn))
        made.observe(Observation(b'{"messages":[]}'))
    return made


def trajectory(key: EpisodeKey = KEY, attempt: int = 0) -> Trajectory:
    return Trajectory(key, attempt, Outcome.COMPLETED, StopReason.DONE, 1.0, 1, bytes(buffer(1).data))


def ignore(event: Event) -> None:
    """Nobody listens."""


class Shard(Peer):
    """A shard's end of a link."""

    def __init__(self, crew: Crew, slot: int) -> None:
        super().__init__()
        self.link = crew.join(slot)
        self.task = asyncio.create_task(self.link.run(self))

    async def die(self) -> Failure:
        self.leave()
        return await self.task


@pytest.fixture
def crew() -> Crew:
    return Crew(2, HEAD, lambda toolsets: None, emit=ignore, journalled=True)


async def ready(crew: Crew, slot: int) -> Shard:
    shard = Shard(crew, slot)
    await shard.say(Ready("node"))
    return shard


async def launched(crew: Crew, shard: Shard, key: EpisodeKey = KEY) -> asyncio.Task[Trajectory]:
    playing = asyncio.create_task(crew.play(key, 0, EpisodeBuffer(HEAD)))
    assert await shard.told.get() == Launch(key, 0, HEAD)
    return playing


async def test_an_episode_is_launched_and_its_trajectory_settled_where_it_was_played() -> None:
    crew = Crew(2, HEAD, lambda toolsets: None, emit=ignore, journalled=True)
    one, two = await ready(crew, 0), await ready(crew, 1)
    playing = await launched(crew, one)
    other = await launched(crew, two, OTHER)  # the less busy one
    await one.say(Played(trajectory()))
    assert await playing == trajectory()
    crew.stored([KEY])
    assert await one.told.get() == Settled([KEY])
    await two.say(Played(trajectory(OTHER)))
    await other
    assert two.told.empty()
    for shard in (one, two):
        await shard.die()


async def test_tools_and_standing_are_taken_over() -> None:
    tools: dict[str, bytes] = {}
    crew = Crew(1, HEAD, lambda toolsets: tools.update(toolsets), emit=ignore, journalled=True)
    shard = await ready(crew, 0)
    await shard.say(Tools("d", b"[]"), Standing(3, 1.5, 2.5))
    assert tools == {"d": b"[]"}
    assert crew.statistics()[3:] == (3, 2.5)
    assert crew.cpu_seconds() == 1.5
    await shard.die()
    assert crew.cpu_seconds() == 1.5  # what it has used stays used
    assert crew.statistics().lost == 1


async def test_a_dead_shard_s_episode_goes_on_from_its_successor_s_journal(crew: Crew) -> None:
    dead = await ready(crew, 0)
    playing = await launched(crew, dead)
    assert (await dead.die()).kind is FailureKind.SHARD_LOST
    successor = Shard(crew, 0)
    await successor.say(Held(KEY, 0, bytes(buffer(3).data)))
    with pytest.raises(Unplayed) as unplayed:
        await playing
    assert unplayed.value.failure.retryable  # the same attempt
    assert unplayed.value.buffer.turn == 3
    await successor.say(Ready("node"))
    assert crew.statistics().attempts_lost == 0
    again = asyncio.create_task(crew.play(KEY, 0, unplayed.value.buffer))
    assert await successor.told.get() == Launch(KEY, 0, bytes(buffer(3).data))
    await successor.say(Played(trajectory()))
    await again
    await successor.die()


async def test_of_two_that_died_together_one_may_have_found_what_both_had_recorded(crew: Crew) -> None:
    one, two = await ready(crew, 0), await ready(crew, 1)
    first, second = await launched(crew, one), await launched(crew, two, OTHER)
    await one.die()
    await two.die()
    heir, empty = Shard(crew, 0), Shard(crew, 1)
    await empty.say(Ready("node"))
    assert not first.done()
    assert not second.done()
    await heir.say(Held(KEY, 0, bytes(buffer(3).data)), Held(OTHER, 0, bytes(buffer(4).data)), Ready("node"))
    for playing, turn in ((first, 3), (second, 4)):
        with pytest.raises(Unplayed) as unplayed:
            await playing
        assert (unplayed.value.failure.retryable, unplayed.value.buffer.turn) == (True, turn)
    assert crew.statistics().attempts_lost == 0
    for shard in (heir, empty):
        await shard.die()


async def test_a_second_death_has_a_patience_of_its_own(crew: Crew, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crews, "ORPHANED_S", 0.02)
    dead = await ready(crew, 0)
    playing = await launched(crew, dead)
    await dead.die()
    again = Shard(crew, 0)
    await again.say(Held(KEY, 0, bytes(buffer(1).data)), Ready("node"))
    with pytest.raises(Unplayed):
        await playing
    playing = asyncio.create_task(crew.play(KEY, 0, buffer(1)))
    await again.told.get()
    monkeypatch.setattr(crews, "ORPHANED_S", 60.0)
    await again.die()
    await asyncio.sleep(0.04)  # the first one's patience has ended by now
    assert not playing.done()
    last = Shard(crew, 0)
    await last.say(Held(KEY, 0, bytes(buffer(2).data)))
    with pytest.raises(Unplayed) as unplayed:
        await playing
    assert unplayed.value.buffer.turn == 2
    await last.die()


async def test_what_a_dead_shard_s_journal_holds_of_durable_episodes_is_settled_at_once(crew: Crew) -> None:
    dead = await ready(crew, 0)
    playing = await launched(crew, dead)
    await dead.say(Played(trajectory()))
    await playing
    crew.stored([KEY])
    await dead.die()
    successor = Shard(crew, 0)
    await successor.say(Held(KEY, 0, bytes(buffer(3).data)), Ready("node"))
    assert await successor.told.get() == Settled([KEY])
    await successor.die()


async def test_a_shard_that_is_quiet_gets_nothing_new_while_another_speaks(crew: Crew) -> None:
    quiet, speaks = await ready(crew, 0), await ready(crew, 1)
    quiet.link.heard -= crews.QUIET_S + 1
    playing = [await launched(crew, speaks, EpisodeKey("toy_0", 0, sample)) for sample in range(3)]
    await speaks.die()
    playing.append(await launched(crew, quiet, OTHER))  # the only one
    await quiet.die()
    crew.fail("over")
    for task in playing:
        with pytest.raises(RunFailed):
            await task


async def test_what_no_shard_can_mend_ends_the_run(crew: Crew) -> None:
    one, two = await ready(crew, 0), await ready(crew, 1)
    first, second = await launched(crew, one), await launched(crew, two, OTHER)
    await one.say(Fatal("the policy is in use already", hopeless=True))
    for playing in (first, second):
        with pytest.raises(RunFailed, match="in use already"):
            await playing
    await two.die()


async def test_what_is_a_shard_s_own_is_mended_by_another(crew: Crew) -> None:
    one, two = await ready(crew, 0), await ready(crew, 1)
    first = await launched(crew, one)
    await one.say(Fatal("no sandbox can be started", hopeless=False))
    assert not first.done()
    successor = await ready(crew, 0)
    with pytest.raises(Unplayed):
        await first
    for shard in (two, successor):
        await shard.die()


async def test_who_listens_hears_of_shards_that_come_and_go_before_the_end() -> None:
    heard: list[object] = []
    crew = Crew(1, HEAD, lambda toolsets: None, emit=heard.append, journalled=True)
    one = await ready(crew, 0)
    playing = await launched(crew, one)
    await one.die()
    two = await ready(crew, 0)
    crew.end(complete=False)
    await two.die()
    closed = Failure(FailureKind.SHARD_LOST, "shard", "shard 0 closed its connection")
    assert heard == [ShardStarted(0, "node"), ShardEnded(0, closed, 1), ShardStarted(0, "node")]
    assert crew.statistics().lost == 1
    with pytest.raises(Unplayed):
        await playing


async def test_what_the_successor_does_not_know_begins_anew() -> None:
    crew = Crew(1, HEAD, lambda toolsets: None, emit=ignore, journalled=True)
    dead = await ready(crew, 0)
    playing = await launched(crew, dead)
    await dead.die()
    successor = await ready(crew, 0)
    with pytest.raises(Unplayed) as unplayed:
        await playing
    assert unplayed.value.failure == Failure(FailureKind.SHARD_LOST, "shard", "its shard ended, and its steps with it")
    assert crew.statistics().attempts_lost == 1
    await successor.die()


@pytest.mark.parametrize("journalled", [True, False])
async def test_without_a_successor_it_begins_anew_after_a_while(
    journalled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crews, "ORPHANED_S", 0.05)
    crew = Crew(2, HEAD, lambda toolsets: None, emit=ignore, journalled=journalled)
    dead = await ready(crew, 0)
    playing = await launched(crew, dead)
    await dead.die()
    with pytest.raises(Unplayed):
        await playing
    assert crew.statistics().attempts_lost == 1


async def test_a_dead_shard_commits_nothing() -> None:
    crew = Crew(1, HEAD, lambda toolsets: None, emit=ignore, journalled=True)
    late = await ready(crew, 0)
    playing = await launched(crew, late)
    crew.lose(late.link, Failure(FailureKind.SHARD_LOST, "shard", "it has said nothing for long"))
    successor = await ready(crew, 0)
    with pytest.raises(Unplayed):
        await playing
    again = asyncio.create_task(crew.play(KEY, 1, EpisodeBuffer(HEAD)))
    await successor.told.get()
    await late.say(Played(trajectory()))
    assert not again.done()  # nobody listened
    await successor.say(Played(trajectory(attempt=1)))
    assert (await again).attempt == 1
    await successor.die()


async def test_a_shard_that_answers_what_it_was_not_asked_is_not_believed(crew: Crew) -> None:
    for lie in (
        Played(trajectory()),
        NotPlayed(KEY, 0, Failure(FailureKind.POLICY, "act", ""), HEAD),
        Launch(KEY, 0, b""),
    ):
        shard = await ready(crew, 0)
        await shard.say(lie)
        assert (await shard.task).kind is FailureKind.SHARD_LOST
        assert shard.link not in crew._links


async def test_an_answer_to_another_attempt_is_not_believed(crew: Crew) -> None:
    shard = await ready(crew, 0)
    playing = await launched(crew, shard)
    await shard.say(Played(trajectory(attempt=1)))
    assert (await shard.task).kind is FailureKind.SHARD_LOST
    crew.fail("over")
    with pytest.raises(RunFailed):
        await playing


async def test_an_older_attempt_in_a_journal_is_nobody_s(crew: Crew) -> None:
    dead = await ready(crew, 0)
    playing = asyncio.create_task(crew.play(KEY, 1, EpisodeBuffer(HEAD)))
    await dead.told.get()
    await dead.die()
    successor = Shard(crew, 0)
    await successor.say(Held(KEY, 0, bytes(buffer(3).data)))
    assert not playing.done()
    await successor.say(Held(KEY, 1, bytes(buffer(1).data)))
    with pytest.raises(Unplayed) as unplayed:
        await playing
    assert unplayed.value.buffer.turn == 1
    await successor.die()


async def test_a_failed_try_comes_back_with_what_it_had_recorded(crew: Crew) -> None:
    shard = await ready(crew, 0)
    playing = await launched(crew, shard)
    failure = Failure(FailureKind.MODEL_UNAVAILABLE, "act", "no answer")
    await shard.say(NotPlayed(KEY, 0, failure, bytes(buffer(2).data)))
    with pytest.raises(Unplayed) as unplayed:
        await playing
    assert (unplayed.value.failure, unplayed.value.buffer.turn) == (failure, 2)
    await shard.die()


async def test_of_several_journals_the_furthest_counts(crew: Crew) -> None:
    one, two = Shard(crew, 0), Shard(crew, 1)
    await one.say(Held(KEY, 0, bytes(buffer(5).data)), Held(OTHER, 0, bytes(buffer(1).data)), Ready("a"))
    await two.say(Held(KEY, 1, bytes(buffer(2).data)), Held(OTHER, 0, bytes(buffer(4).data)), Ready("b"))
    await crew.gathered(everyone=True, within_s=1)
    assert {key: (attempt, held.turn) for key, (attempt, held) in crew.held.items()} == {KEY: (1, 2), OTHER: (0, 4)}
    crew.stored([KEY])  # both are told: each has it in its journal
    assert await one.told.get() == Settled([KEY]) == await two.told.get()
    for shard in (one, two):
        await shard.die()


async def test_a_run_without_any_shard_fails_and_says_so(crew: Crew) -> None:
    playing = asyncio.create_task(crew.play(KEY, 0, EpisodeBuffer(HEAD)))
    await asyncio.sleep(0)
    crew.fail("no shard can be started")
    with pytest.raises(RunFailed, match="no shard can be started"):
        await playing
    with pytest.raises(RunFailed):
        await crew.gathered(everyone=False, within_s=1)
