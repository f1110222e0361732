"""A worker's line to its queue: to whatever actor there is now, through any number of them.

Owns what the worker holds and what it has done of late. Always true: an acknowledgement is said again until an actor
has confirmed it, and again to the actor that takes that one's place, for it may not have been durable; a claim says
what is held already, so that an answer that was lost on its way holds nothing back; a thread says all of that every
second, so that a step of any length costs no lease and delays no acknowledgement, and a new actor learns who has what.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any, Final, TypeVar
from uuid import uuid4

from backends.sandboxes.ray.cluster import NAMESPACE, told
from backends.trainers.ray.host import Asked
from backends.trainers.ray.keeper import actor_name
from backends.trainers.ray.leases import Proof
from orchestrator.errors import RunFailed, Unavailable

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Sequence
    from types import ModuleType

    from backends.trainers.ray.host import Answer

T = TypeVar("T")
LOOK_S: Final = 0.5
BEAT_S: Final = 1.0
LEAVE_S: Final = 5.0
DURABLE_S: Final = 30.0
"""What an actor has confirmed, and still lives after so long, is durable."""
RECENT: Final = 65_536
"""So many confirmed acknowledgements are kept at most."""

log = logging.getLogger(__name__)


class Line:
    """See the module's docstring. Used by one task at a time, and by its own thread."""

    def __init__(self, ray: ModuleType, queue: str, *, lease_s: float, patience_s: float) -> None:
        self.held: dict[bytes, Proof] = {}
        self._unconfirmed: dict[bytes, Proof] = {}
        self._confirmed: deque[tuple[float, Proof]] = deque(maxlen=RECENT)
        self._again: set[bytes] = set()
        """Those among the unconfirmed that are counted already, or never will be."""
        self.claimed = self.acked = self.redelivered = self.lost = 0
        self._ray = ray
        self._queue = queue
        self._lease_s = lease_s
        self._patience_s = patience_s
        self._worker = uuid4().hex
        self._actor: Any = None
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._beat, name=f"ray-worker-{queue}", daemon=True)
        self._thread.start()

    async def claim(self, limit: int, wait_s: float) -> Answer:
        """One claim, which waits for so long. Raises Unavailable. Cancelled: what was claimed is not held."""
        answer: Answer = await self._call(lambda actor, acks: self._claim(actor, acks, limit, wait_s))
        self.held.update((lent.ident, Proof(lent.ident, lent.token)) for lent in answer.lent)
        self.claimed += len(answer.lent)
        self.redelivered += sum(lent.redelivered for lent in answer.lent)
        return answer

    async def _claim(self, actor: Any, acks: Sequence[Proof], limit: int, wait_s: float) -> tuple[Answer, set[bytes]]:
        holds = list(self.held.values())
        answer: Answer = await actor.claim.remote(Asked(self._worker, acks, holds, limit, self._lease_s, wait_s))
        return answer, set(answer.lost)

    def acknowledge(self, proof: Proof) -> None:
        """It is done; said with the next claim, or before it. Whether it counts is the actor's to say."""
        if self.held.get(proof.ident) == proof:
            del self.held[proof.ident]
        else:
            self._again.add(proof.ident)
        self._unconfirmed[proof.ident] = proof

    def tell(self) -> None:
        """Say at once what is done, and wait for nothing: the next claim says it again."""
        if self._actor is not None:
            self._actor.ack.remote(list(self._unconfirmed.values()))

    async def confirm(self) -> Collection[bytes]:
        """Say what is done until it is confirmed; what went to another worker before. Raises Unavailable."""
        return await self._call(self._confirm)

    async def _confirm(self, actor: Any, acks: Sequence[Proof]) -> tuple[set[bytes], set[bytes]]:
        lost = set(await actor.ack.remote(acks))
        return lost, lost

    async def give_back(self, idents: Sequence[bytes]) -> None:
        """Others may have them, at once. Raises Unavailable."""
        for ident in idents:
            self.held.pop(ident, None)
        await self._call(lambda actor, acks: self._give_back(actor, acks, idents))

    async def _give_back(
        self, actor: Any, acks: Sequence[Proof], idents: Sequence[bytes]
    ) -> tuple[set[bytes], set[bytes]]:
        answer = await self._confirm(actor, acks)
        await actor.give_back.remote(self._worker, idents)
        return answer

    async def leave(self) -> None:
        """Give back all that is held."""
        self._left.set()
        await asyncio.to_thread(self._thread.join)
        self.held.clear()
        if self._actor is None:
            return
        try:
            async with asyncio.timeout(LEAVE_S):
                await self._actor.leave.remote(self._worker, list(self._unconfirmed.values()))
        except (TimeoutError, self._ray.exceptions.RayError):
            log.info("the queue %s is gone; a resume of its run makes another", self._queue)

    async def _call(self, work: Callable[[Any, Sequence[Proof]], Awaitable[tuple[T, set[bytes]]]]) -> T:
        """Have an actor answer, the one that there is or the next; that confirms what is done, but for the lost."""
        since = time.monotonic()
        while True:
            try:
                if self._actor is None:
                    self._actor = await asyncio.to_thread(self._find)
                    self._say_again()
                acks = list(self._unconfirmed.values())
                answer, lost = await work(self._actor, acks)
            except self._ray.exceptions.RayTaskError as error:  # it may be a ValueError too
                raise RunFailed(f"the actor of the queue {self._queue} failed: {told(error)}") from None
            except (ValueError, self._ray.exceptions.RayError) as error:
                self._actor = None
                if time.monotonic() - since > self._patience_s:
                    raise Unavailable(
                        f"the cluster has had no queue {self._queue} for {self._patience_s:g} s ({error}): "
                        "start the run, or resume it"
                    ) from None
                await asyncio.sleep(LOOK_S)
                continue
            self._settle(acks, lost)
            return answer

    def _say_again(self) -> None:
        """There may be a new actor: what the old one had confirmed may have died with it."""
        for _, proof in self._confirmed:
            self._unconfirmed[proof.ident] = proof
            self._again.add(proof.ident)
        self._confirmed.clear()

    def _settle(self, acks: Sequence[Proof], lost: Collection[bytes]) -> None:
        now = time.monotonic()
        for proof in acks:
            self._unconfirmed.pop(proof.ident, None)
            if proof.ident not in lost:
                self._confirmed.append((now, proof))
                self.acked += proof.ident not in self._again
        self._again.clear()
        while self._confirmed and self._confirmed[0][0] < now - DURABLE_S:
            self._confirmed.popleft()
        self.lost += len(lost)
        if lost:
            log.warning("%d groups of %s went to another worker before they were done", len(lost), self._queue)

    def _find(self) -> Any:
        return self._ray.get_actor(actor_name(self._queue), NAMESPACE)

    def _beat(self) -> None:
        told: Any = None  # which actor has heard what another had confirmed
        while not self._left.wait(BEAT_S):
            holds, acks = list(self.held.values()), list(self._unconfirmed.values())
            if not holds and not acks:
                continue
            try:
                actor, known = self._find(), self._actor
                if actor not in (known, told):
                    acks += [proof for _, proof in self._confirmed.copy()]
                    told = actor
                if acks:
                    actor.ack.remote(acks)
                if holds:
                    actor.extend.remote(self._worker, holds, self._lease_s)
            except (ValueError, self._ray.exceptions.RayError):
                continue  # there is none at the moment
