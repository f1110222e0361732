"""The conformance kit of trainer queues: what a `TrainerQueue` promises, tried out on a real one.

    async def test_my_queue():
        await check_queue(make_queue)

`make_queue()` is an async context manager that gives a `QueueUnderTest`: the queue, empty, and the other end of it.
The kit needs no test framework and takes well under a second for a queue that answers at once.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from orchestrator import records
from orchestrator.errors import ConformanceError
from orchestrator.types import Decision, EpisodeKey, Evaluation, Group, Observation, Outcome, StopReason, Trajectory

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from contextlib import AbstractAsyncContextManager
    from typing import TypeAlias

    from orchestrator.protocols import TrainerQueue

    MakeQueue: TypeAlias = Callable[[], AbstractAsyncContextManager["QueueUnderTest"]]

GRACE_S: Final = 0.1
"""How long a delivery that must wait is watched."""
LIMIT_S: Final = 30.0
"""How long a delivery that must be accepted may take."""

Key = tuple[str, int]


@dataclass(frozen=True, slots=True)
class QueueUnderTest:
    """A queue and its other end.

    `take(n)` gives the next `n` accepted groups at most, as (task, group), in order and without waiting for more; it
    must also work after the context manager has been left. `capacity` is how many groups are accepted before a
    delivery waits for a `take`; None where only a disk or a remote bounds it.
    """

    queue: TrainerQueue
    take: Callable[[int], Awaitable[list[Key]]]
    capacity: int | None


async def check_queue(make_queue: MakeQueue) -> None:
    """Check a queue against its contract. Raises ConformanceError with the promise that it breaks."""
    for check in (_named, _keeps_order, _idempotent, _concurrent, _waits, _cancelled, _keeps_at_close):
        async with asyncio.timeout(LIMIT_S):
            await check(make_queue)


def sample_group(seq: int, *, size: int = 2) -> Group:
    """A small group with real buffers; the first sample of every third group carries no reward."""
    trajectories = [_trajectory(EpisodeKey(f"task_{seq}", 0, sample), seq) for sample in range(size)]
    partial = any(trajectory.reward is None for trajectory in trajectories)
    return Group(seq, f"task_{seq}", 0, partial, trajectories)


def _trajectory(key: EpisodeKey, seq: int) -> Trajectory:
    buffer = records.EpisodeBuffer(records.header("kit", "0" * 16))
    buffer.observe(Observation(b'{"messages":[{"role":"user","content":"Go."}]}'))
    buffer.decide(Decision(b'{"role":"assistant","content":"Gone."}'))
    buffer.observe(Observation(b'{"messages":[]}', 1.0, done=True))
    failed = key.sample == 0 and seq % 3 == 0
    if not failed:
        buffer.grade(Evaluation(1.0))
    return Trajectory(
        key=key,
        attempt=1,
        outcome=Outcome.INFRA_FAILED if failed else Outcome.COMPLETED,
        stop_reason=StopReason.FAILURE if failed else StopReason.DONE,
        reward=None if failed else 1.0,
        steps=1,
        buffer=bytes(buffer.data),
        started=1.0,
        finished=2.0,
    )


async def _named(make_queue: MakeQueue) -> None:
    async with make_queue() as subject:
        if not isinstance(subject.queue.name, str) or not subject.queue.name:
            raise ConformanceError("a queue has a name, which the store counts its acknowledgements under")


async def _keeps_order(make_queue: MakeQueue) -> None:
    async with make_queue() as subject:
        groups = _groups(subject, 5)
        for group in groups:
            await subject.queue.deliver(group)
        await _expect(subject, groups, "groups delivered one after the other come out once each, in that order")


async def _idempotent(make_queue: MakeQueue) -> None:
    async with make_queue() as subject:
        group = sample_group(1)
        await subject.queue.deliver(group)
        await subject.queue.deliver(replace(group, redelivered=True))
        await _expect(subject, [group], "a group delivered twice is accepted once")
        await subject.queue.deliver(replace(group, redelivered=True))
        await _expect(subject, [], "a group delivered again after it was taken is not accepted again")


async def _concurrent(make_queue: MakeQueue) -> None:
    async with make_queue() as subject:
        groups = _groups(subject, 8)
        async with asyncio.TaskGroup() as tasks:
            for group in groups:
                tasks.create_task(subject.queue.deliver(group))
                tasks.create_task(subject.queue.deliver(replace(group, redelivered=True)))
        await _expect(subject, groups, "groups delivered at the same time are accepted once each", ordered=False)


async def _waits(make_queue: MakeQueue) -> None:
    async with make_queue() as subject:
        if subject.capacity is None:
            return
        *groups, last = [sample_group(seq) for seq in range(1, subject.capacity + 2)]
        for group in groups:
            await subject.queue.deliver(group)
        waiting = asyncio.create_task(subject.queue.deliver(last), name="deliver-to-a-full-queue")
        await asyncio.wait({waiting}, timeout=GRACE_S)
        if waiting.done():
            raise ConformanceError(f"a queue of {subject.capacity} groups accepted one more: its deliver must wait")
        taken = await subject.take(1)
        await waiting
        if taken != [_key(groups[0])]:
            raise ConformanceError(f"the oldest group comes out of a full queue: {subject.queue.name} gave {taken}")
        await _expect(subject, [*groups[1:], last], "a delivery that waited is accepted once there is room")


async def _cancelled(make_queue: MakeQueue) -> None:
    async with make_queue() as subject:
        for turns in range(6):
            group = sample_group(turns + 1)
            await _cancel(subject.queue, group, turns)
            await subject.queue.deliver(group)
            await _expect(subject, [group], "a group whose delivery was cancelled and repeated is accepted once")
    async with make_queue() as subject:
        if subject.capacity is None:
            return
        *groups, last = [sample_group(seq) for seq in range(1, subject.capacity + 2)]
        for group in groups:
            await subject.queue.deliver(group)
        await _cancel(subject.queue, last, turns=3)
        await _expect(subject, groups, "a delivery cancelled while it waited for room is not accepted")
        await subject.queue.deliver(last)
        await _expect(subject, [last], "a delivery cancelled while it waited is accepted when it is repeated")


async def _keeps_at_close(make_queue: MakeQueue) -> None:
    async with make_queue() as subject:
        groups = _groups(subject, 3)
        for group in groups:
            await subject.queue.deliver(group)
    await _expect(subject, groups, "what was accepted is still there after the queue is closed")


async def _cancel(queue: TrainerQueue, group: Group, turns: int) -> None:
    """Begin a delivery and cancel it after some turns of the event loop."""
    delivery = asyncio.create_task(queue.deliver(group), name="deliver-to-be-cancelled")
    for _ in range(turns):
        await asyncio.sleep(0)
    delivery.cancel()
    await asyncio.wait({delivery})
    if not delivery.cancelled():
        delivery.result()


async def _expect(subject: QueueUnderTest, groups: list[Group], promise: str, *, ordered: bool = True) -> None:
    wanted = [_key(group) for group in groups]
    found = await subject.take(len(wanted) + 1)
    if found != wanted and (ordered or sorted(found) != sorted(wanted)):
        raise ConformanceError(f"{promise}: {subject.queue.name} gave {found}, not {wanted}")


def _key(group: Group) -> Key:
    return (group.task, group.group)


def _groups(subject: QueueUnderTest, count: int) -> list[Group]:
    """As many groups as fit, `count` at most."""
    return [sample_group(seq) for seq in range(1, min(count, subject.capacity or count) + 1)]
