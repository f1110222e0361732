"""What a Ray queue's driver holds: each group once, in order, and nobody waits for what cannot come."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from backends.trainers.ray import stock as module
from backends.trainers.ray.stock import Stock, identity
from orchestrator.errors import RunFailed, UsageError
from orchestrator.testing.queue import sample_group

if TYPE_CHECKING:
    from collections.abc import Awaitable

GROUPS = [sample_group(seq) for seq in range(1, 6)]


async def waits(what: Awaitable[object]) -> asyncio.Task[object]:
    """A task that has come as far as it can, and waits."""

    async def wait() -> object:
        return await what

    task = asyncio.create_task(wait())
    for _ in range(5):
        await asyncio.sleep(0)
    assert not task.done()
    return task


async def test_a_group_is_accepted_once_before_and_after_its_acknowledgement() -> None:
    stock = Stock("x", 4)
    group = GROUPS[0]
    await stock.accept(group)
    await stock.accept(replace(group, redelivered=True))
    await stock.settle([identity(group), identity(GROUPS[1])])
    await stock.accept(group)
    assert (len(stock), stock.accepted, stock.acked, stock.repeated) == (0, 1, 1, 2)
    assert await stock.take_acks() == [1]


async def test_it_is_full_until_something_is_acknowledged() -> None:
    stock = Stock("x", 2)
    for group in GROUPS[:2]:
        await stock.accept(group)
    late = await waits(stock.accept(GROUPS[2]))
    await stock.accept(GROUPS[0])  # it is known: there is nothing to wait for
    await stock.settle([identity(GROUPS[1])])
    await late
    assert [held.seq for _, held in await stock.unpushed(9)] == [1, 2, 3]
    assert len(stock) == 2


async def test_a_new_actor_is_given_what_is_not_acknowledged_in_order() -> None:
    stock = Stock("x", 8)
    for group in GROUPS:
        await stock.accept(group)
    await stock.pushed(4)
    await stock.settle([identity(GROUPS[0]), identity(GROUPS[2])])
    assert [held.seq for _, held in await stock.unpushed(9)] == [5]
    stock.again()
    assert [held.seq for _, held in await stock.unpushed(9)] == [2, 4, 5]
    assert [held.seq for _, held in await stock.unpushed(2)] == [2, 4]


async def test_all_is_pushed_or_the_end_is_known() -> None:
    stock = Stock("x", 8)
    waiting = await waits(stock.unpushed(9))
    await stock.accept(GROUPS[0])
    assert len(await waiting) == 1  # type: ignore[arg-type]
    flushing = await waits(stock.all_pushed())
    await stock.pushed(1)
    await flushing
    waiting = await waits(stock.unpushed(9))
    await stock.finish()
    assert await waiting == []
    with pytest.raises(UsageError, match="a new run needs a new one"):
        await stock.accept(GROUPS[1])
    await stock.accept(GROUPS[0])


async def test_a_failure_is_told_to_whoever_waits_then_and_later() -> None:
    stock = Stock("x", 1)
    await stock.accept(GROUPS[0])
    waiting = [await waits(stock.accept(GROUPS[1])), await waits(stock.take_acks()), await waits(stock.all_pushed())]
    await stock.fail("no node")
    for told in (*waiting, stock.accept(GROUPS[2]), stock.take_acks()):
        with pytest.raises(RunFailed, match="no node"):
            await told


async def test_acks_before_a_failure_are_told_first() -> None:
    stock = Stock("x", 1)
    await stock.accept(GROUPS[0])
    await stock.settle([identity(GROUPS[0])])
    await stock.fail("no node")
    assert await stock.take_acks() == [1]
    with pytest.raises(RunFailed):
        await stock.take_acks()


async def test_a_cancelled_delivery_is_not_accepted() -> None:
    stock = Stock("x", 1)
    await stock.accept(GROUPS[0])
    late = await waits(stock.accept(GROUPS[1]))
    late.cancel()
    await asyncio.wait({late})
    await stock.settle([identity(GROUPS[0])])
    assert (len(stock), stock.accepted) == (0, 1)


async def test_what_it_remembers_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REMEMBERED", 2)
    stock = Stock("x", 8)
    for group in GROUPS:
        await stock.accept(group)
        await stock.settle([identity(group)])
    assert (stock.acked, len(stock._done)) == (5, 2)
    await stock.accept(GROUPS[4])
    assert stock.repeated == 1


def test_who_a_group_is() -> None:
    group = GROUPS[0]
    again = replace(group, redelivered=True)
    assert identity(group) == identity(again)
    others = [replace(group, seq=9), replace(group, group=1), replace(group, trajectories=group.trajectories[:1])]
    other_life = replace(group, trajectories=[replace(t, started=7.0) for t in group.trajectories])
    assert len({identity(one) for one in (group, *others, other_life)}) == 5


async def test_who_brings_an_acknowledged_group_again_is_told_again() -> None:
    stock = Stock("x", 4)
    await stock.accept(GROUPS[0])
    await stock.settle([identity(GROUPS[0])])
    assert await stock.take_acks() == [1], "the run ends before it has written that down"
    await stock.accept(replace(GROUPS[0], redelivered=True))
    await stock.accept(GROUPS[0])
    assert await stock.take_acks() == [1]
    await stock.fail("each is told once a delivery")
    with pytest.raises(RunFailed):
        await stock.take_acks()


@pytest.mark.parametrize("late", [True, False])
async def test_acks_of_another_run_are_not_those_of_its_namesakes(late: bool) -> None:
    stock = Stock("x", 4)
    earlier, later = GROUPS[0], replace(GROUPS[0], task="another")
    await stock.accept(earlier)
    if late:
        await stock.accept(later)
    await stock.settle([identity(earlier)])
    await stock.accept(later)
    told = await waits(stock.take_acks())
    await stock.settle([identity(later)])
    assert await told == [1]
