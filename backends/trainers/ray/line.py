"""A worker's line to its queue: to whatever actor there is now, through any number of them.

Owns what the worker holds and the acknowledgements that nobody has confirmed. Always true: an acknowledgement is said
again until an actor has confirmed it; a claim says what is held already, so that an answer that was lost on its way
holds nothing back; a thread says it every second, so that a blocked event loop costs no lease, and the actor that takes
a dead one's place learns who has what.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from typing import TYPE_CHECKING, Any, Final, TypeVar
from uuid import uuid4

from backends.sandboxes.ray.cluster import NAMESPACE
from backends.trainers.ray.host import Asked
from backends.trainers.ray.leases import Proof
from backends.trainers.ray.queue import actor_name
from orchestrator.errors import Unavailable

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Sequence
    from types import ModuleType

    from backends.trainers.ray.host import Answer

T = TypeVar("T")
LOOK_S: Final = 0.5
BEAT_S: Final = 1.0
LEAVE_S: Final = 5.0

log = logging.getLogger(__name__)


class Line:
    """See the module's docstring. Used by one task at a time, and by its own thread."""

    def __init__(self, ray: ModuleType, queue: str, *, lease_s: float, patience_s: float) -> None:
        self.held: dict[bytes, Proof] = {}
        self.unconfirmed: dict[bytes, Proof] = {}
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
        acks, holds = list(self.unconfirmed.values()), list(self.held.values())
        asked = Asked(self._worker, acks, holds, limit, self._lease_s, wait_s)
        answer: Answer = await self._call(lambda actor: actor.claim.remote(asked))
        self._confirmed(acks, answer.lost)
        self.held.update((lent.ident, Proof(lent.ident, lent.token)) for lent in answer.lent)
        self.claimed += len(answer.lent)
        self.redelivered += sum(lent.redelivered for lent in answer.lent)
        return answer

    def acknowledge(self, ident: bytes) -> None:
        """It is done; said with the next claim, or before it."""
        if (proof := self.held.pop(ident, None)) is not None:
            self.unconfirmed[ident] = proof

    def tell(self) -> None:
        """Say at once what is done, and wait for nothing: the next claim says it again."""
        if self._actor is not None:
            self._actor.ack.remote(list(self.unconfirmed.values()))

    async def confirm(self) -> Collection[bytes]:
        """Say what is done until it is confirmed; what went to another worker before. Raises Unavailable."""
        acks = list(self.unconfirmed.values())
        lost: Sequence[bytes] = await self._call(lambda actor: actor.ack.remote(acks))
        self._confirmed(acks, lost)
        return lost

    async def give_back(self, idents: Sequence[bytes]) -> None:
        """Others may have them, at once. Raises Unavailable."""
        for ident in idents:
            self.held.pop(ident, None)
        await self._call(lambda actor: actor.give_back.remote(self._worker, idents))

    async def leave(self) -> None:
        """Give back all that is held."""
        self._left.set()
        await asyncio.to_thread(self._thread.join)
        self.held.clear()
        if self._actor is None:
            return
        try:
            async with asyncio.timeout(LEAVE_S):
                await self._actor.leave.remote(self._worker, list(self.unconfirmed.values()))
        except (TimeoutError, self._ray.exceptions.RayError):
            log.info("the queue %s is gone; a resume of its run makes another", self._queue)

    async def _call(self, work: Callable[[Any], Awaitable[T]]) -> T:
        """Have an actor answer, the one that there is or the next."""
        since = time.monotonic()
        while True:
            try:
                if self._actor is None:
                    self._actor = await asyncio.to_thread(self._find)
                return await work(self._actor)
            except (ValueError, self._ray.exceptions.RayError) as error:
                self._actor = None
                if time.monotonic() - since > self._patience_s:
                    raise Unavailable(
                        f"the cluster has had no queue {self._queue} for {self._patience_s:g} s ({error}): "
                        "start the run, or resume it"
                    ) from None
            await asyncio.sleep(LOOK_S)

    def _find(self) -> Any:
        return self._ray.get_actor(actor_name(self._queue), NAMESPACE)

    def _confirmed(self, acks: Sequence[Proof], lost: Collection[bytes]) -> None:
        for proof in acks:
            self.unconfirmed.pop(proof.ident, None)
        self.acked += len(acks) - len(lost)
        self.lost += len(lost)
        if lost:
            log.warning("%d groups of %s went to another worker before they were done", len(lost), self._queue)

    def _beat(self) -> None:
        while not self._left.wait(BEAT_S):
            if not (holds := list(self.held.values())):
                continue
            try:
                self._find().extend.remote(self._worker, holds, self._lease_s)
            except (ValueError, self._ray.exceptions.RayError):
                continue  # there is none at the moment
