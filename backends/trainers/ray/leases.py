"""Which worker holds which group of a queue: the table in the queue's actor. Pure; times are given by the caller.

Always true: a parcel is reserved, waits, or is held by one worker, from its push to its ack; it is acked once, and said
to be acked from then on. A claim's token is good until the parcel is given back, or to another claim, even where its
lease has ended. What an earlier life of the queue may have given away is reserved for a while for the worker that says
so, and an ack that comes before its parcel is kept for it. Oldest first, what came back included.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict, deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

GIVEN_BACK: Final = "-"
"""No claim's token: that of one which was given back is worth nothing, however late its holder's lease is prolonged."""
REMEMBERED: Final = 65_536
"""How many acks are remembered, so that one that is repeated is known again."""


class Parcel(NamedTuple):
    """A group on its way: `ident` is what it is known by in every life of the queue.

    `payload` is the group, pickled, or a list of one reference to that in the object store. `given` says that an
    earlier life may have given it to a worker.
    """

    ident: bytes
    payload: Any
    given: bool


class Lent(NamedTuple):
    """A parcel and the claim on it."""

    ident: bytes
    token: str
    payload: Any
    redelivered: bool


class Proof(NamedTuple):
    """That a worker was given a parcel."""

    ident: bytes
    token: str


class LeaseStatistics(NamedTuple):
    """`waiting` includes those that are reserved; `held` are with `workers`; the rest counts since the start."""

    waiting: int
    held: int
    workers: int
    pushed: int
    lent: int
    redelivered: int
    acked: int
    lost: int


@dataclass(slots=True)
class _Entry:
    order: int
    parcel: Parcel
    token: str = ""
    """Of the claim that it was given to last; empty in a life that has not given it; GIVEN_BACK where it was."""
    worker: str = ""
    """Who holds it; empty while it waits."""


class Leases:
    """See the module's docstring. `life` makes its tokens different from those of other lives."""

    def __init__(self, life: str, *, grace_s: float) -> None:
        self._life = life
        self._grace_s = grace_s
        self._entries: dict[bytes, _Entry] = {}
        self._waiting: list[tuple[int, bytes]] = []
        self._reserved: deque[tuple[float, bytes]] = deque()
        self._until: dict[str, float] = {}
        self._holds: dict[str, set[bytes]] = {}
        self._settled: OrderedDict[bytes, str] = OrderedDict()
        self._early: OrderedDict[bytes, str] = OrderedDict()
        self._log: list[bytes] = []
        self._log_start = 0
        self._pushed = self._lent = self._redelivered = self._acked = self._lost = 0
        self.finished = False
        """Nothing more will be pushed."""

    def push(self, parcels: Iterable[Parcel], now: float) -> None:
        """Take parcels in; again, nothing happens."""
        for parcel in parcels:
            if parcel.ident in self._entries:
                continue
            if parcel.ident in self._settled:
                self._log.append(parcel.ident)
                continue
            self._pushed += 1
            entry = self._entries[parcel.ident] = _Entry(self._pushed, parcel)
            if (token := self._early.pop(parcel.ident, None)) is not None:
                self._settle(entry, token)
            elif parcel.given:
                self._reserved.append((now + self._grace_s, parcel.ident))
            else:
                heapq.heappush(self._waiting, (entry.order, parcel.ident))

    def grant(self, worker: str, limit: int, now: float, lease_s: float) -> list[Lent]:
        """Up to `limit` parcels on lease, oldest first."""
        self.advance(now)
        self._until[worker] = now + lease_s
        lent: list[Lent] = []
        while len(lent) < limit and self._waiting:
            entry = self._entries.get(heapq.heappop(self._waiting)[1])
            if entry is not None and not entry.worker:
                lent.append(self._lend(entry, worker))
        return lent

    def ack(self, proof: Proof) -> bool:
        """Whether the parcel is acknowledged by this claim: now, before, or as soon as it comes."""
        entry = self._entries.get(proof.ident)
        if entry is None:
            return self._acked_before(proof)
        if entry.token not in {"", proof.token}:
            self._lost += 1
            return False
        self._settle(entry, proof.token)
        return True

    def extend(self, worker: str, holds: Collection[Proof], now: float, lease_s: float, *, exact: bool = False) -> None:
        """Prolong a worker's leases; what it holds and nobody else has been given since is its own again.

        `exact`: it holds nothing else, because an answer to it has been lost, say.
        """
        self.advance(now)
        self._until[worker] = now + lease_s
        if exact:
            self._release(worker, self._holds.get(worker, set()) - {proof.ident for proof in holds})
        for proof in holds:
            entry = self._entries.get(proof.ident)
            if entry is not None and not entry.worker and entry.token in {"", proof.token}:
                self._hold(entry, worker, proof.token)

    def give_back(self, worker: str, idents: Iterable[bytes]) -> None:
        """Some of what a worker holds waits again, at once."""
        for entry in self._release(worker, idents):
            entry.token = GIVEN_BACK

    def leave(self, worker: str) -> None:
        """A worker is gone: all that it holds waits again."""
        self._release(worker, list(self._holds.get(worker, ())))
        self._until.pop(worker, None)
        self._holds.pop(worker, None)

    def advance(self, now: float) -> None:
        """End the leases and reservations that have run out."""
        for worker in [worker for worker, until in self._until.items() if until <= now]:
            self.leave(worker)
        while self._reserved and self._reserved[0][0] <= now:
            entry = self._entries.get(self._reserved.popleft()[1])
            if entry is not None and not entry.worker and not entry.token:
                heapq.heappush(self._waiting, (entry.order, entry.parcel.ident))

    def acked(self, after: int) -> tuple[int, Sequence[bytes]]:
        """What was acked, from the `after`-th ack on, which must not fall back; and how many acks that makes in all."""
        del self._log[: max(0, after - self._log_start)]
        self._log_start = max(after, self._log_start)
        return self._log_start + len(self._log), list(self._log)

    @property
    def over(self) -> bool:
        """Whether all is acked and nothing more comes."""
        return self.finished and not self._entries

    def workers(self) -> set[str]:
        """Those whose lease has not run out."""
        return set(self._until)

    def statistics(self) -> LeaseStatistics:
        """Counts; cheap."""
        held = sum(map(len, self._holds.values()))
        waiting = len(self._entries) - held
        counts = (self._pushed, self._lent, self._redelivered, self._acked, self._lost)
        return LeaseStatistics(waiting, held, len(self._until), *counts)

    def check(self) -> None:
        """Verify the invariants."""
        queued = {ident for _, ident in self._waiting} | {ident for _, ident in self._reserved}
        for ident, entry in self._entries.items():
            holders = [worker for worker, held in self._holds.items() if ident in held]
            if holders != ([entry.worker] if entry.worker else []) or not (entry.worker or ident in queued):
                raise AssertionError(f"{entry} is with {holders}")
            if ident in self._settled or ident in self._early:
                raise AssertionError(f"{entry} was acked")
        if any(ident not in self._entries for held in self._holds.values() for ident in held):
            raise AssertionError("a worker holds what is acked")

    def _lend(self, entry: _Entry, worker: str) -> Lent:
        again = entry.parcel.given or bool(entry.token)
        self._lent += 1
        self._redelivered += again
        self._hold(entry, worker, f"{self._life}-{self._lent}")
        return Lent(entry.parcel.ident, entry.token, entry.parcel.payload, again)

    def _release(self, worker: str, idents: Iterable[bytes]) -> list[_Entry]:
        held = self._holds.get(worker, set())
        released = [self._entries[ident] for ident in held.intersection(idents)]
        for entry in released:
            held.remove(entry.parcel.ident)
            entry.worker = ""
            heapq.heappush(self._waiting, (entry.order, entry.parcel.ident))
        return released

    def _hold(self, entry: _Entry, worker: str, token: str) -> None:
        entry.worker, entry.token = worker, token
        self._holds.setdefault(worker, set()).add(entry.parcel.ident)

    def _settle(self, entry: _Entry, token: str) -> None:
        ident = entry.parcel.ident
        del self._entries[ident]
        if entry.worker:
            self._holds[entry.worker].discard(ident)
        self._acked += 1
        self._log.append(ident)
        self._settled[ident] = token
        if len(self._settled) > REMEMBERED:
            self._settled.popitem(last=False)

    def _acked_before(self, proof: Proof) -> bool:
        token = self._settled.get(proof.ident)
        if token is None:
            self._early[proof.ident] = proof.token
            if len(self._early) > REMEMBERED:
                self._early.popitem(last=False)
            return True
        self._lost += token != proof.token
        return token == proof.token
