"""Teardown ends whatever happens to its owner, or is left behind at its deadline. In virtual time."""

from __future__ import annotations

import asyncio
import logging

import pytest

from orchestrator.shield import ended_within, shielded

pytestmark = pytest.mark.looptime


async def test_work_in_time() -> None:
    assert await shielded(asyncio.sleep(3.0), deadline_s=10.0, what="it")
    assert asyncio.get_running_loop().time() == 3.0


async def test_work_that_never_ends_is_cancelled_at_the_deadline(caplog: pytest.LogCaptureFixture) -> None:
    ended = False

    async def stuck() -> None:
        nonlocal ended
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            ended = True

    with caplog.at_level(logging.ERROR):
        assert not await shielded(stuck(), deadline_s=10.0, what="the sandbox")
    assert asyncio.get_running_loop().time() == 10.0
    assert "the sandbox did not end within 10 s" in caplog.text
    await asyncio.sleep(0)
    assert ended


@pytest.mark.parametrize("cancellations", [1, 2, 5])
async def test_cancelled_owner_waits_and_is_cancelled_afterwards(cancellations: int) -> None:
    finished: list[float] = []

    async def work() -> None:
        await asyncio.sleep(4.0)
        finished.append(asyncio.get_running_loop().time())

    owner = asyncio.create_task(shielded(work(), deadline_s=10.0, what="it"))
    for _ in range(cancellations):
        await asyncio.sleep(0.5)
        owner.cancel()
    with pytest.raises(asyncio.CancelledError):
        await owner
    assert finished == [4.0]


async def test_cancelled_owner_of_work_that_never_ends() -> None:
    owner = asyncio.create_task(shielded(asyncio.sleep(1e6), deadline_s=10.0, what="it"))
    await asyncio.sleep(1.0)
    owner.cancel()
    with pytest.raises(asyncio.CancelledError):
        await owner
    assert asyncio.get_running_loop().time() == 10.0


async def test_failing_work_is_told_and_not_raised(caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        raise OSError("no such device")

    assert not await shielded(work(), deadline_s=10.0, what="unmounting")
    assert "unmounting failed: no such device" in caplog.text


async def test_tasks_that_go_on_at_the_deadline_are_cancelled_and_waited_for() -> None:
    async def slow_to_go() -> None:
        try:
            await asyncio.sleep(60.0)
        finally:
            await asyncio.sleep(1.0)

    quick, slow = asyncio.create_task(asyncio.sleep(2.0)), asyncio.create_task(slow_to_go())
    await ended_within({quick, slow}, 10.0)
    assert asyncio.get_running_loop().time() == 11.0
    assert (quick.cancelled(), slow.cancelled()) == (False, True)


async def test_no_tasks_take_no_time() -> None:
    await ended_within(set(), 10.0)
    assert asyncio.get_running_loop().time() == 0.0
