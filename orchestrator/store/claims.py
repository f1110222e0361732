"""Claiming groups from the outbox: for one named consumer, in any process, as many workers as there are.

A group is given to one worker at a time, lowest number first, under a lease. It ends by an ack, by a nack, or by the
end of its lease; after the latter two it is given again, with `redelivered`. A claim's token is the proof of holding
it: it stays good until the group is given to another claim, even if the lease has ended meanwhile, and is worth
nothing from then on. So every group is acked by exactly one claim of each consumer.

Leases are wall-clock times, valid from `granted` to `lease_until`: a clock that is set back ends a lease early, which
costs a redelivery and never an ack. Claims and acks are durable when they return. All methods block on the disk: in
an event loop use `backends.trainers.durable.DurableQueue`, or a thread. One thread at a time.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final
from uuid import uuid4

from orchestrator.errors import ClaimLost, StoreError, UsageError
from orchestrator.store.reader import read_group, unacked
from orchestrator.store.schema import explained, immediate, open_consumer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from orchestrator.types import Group

CLOCK_SLACK_S: Final = 5.0
"""How far the clock may step back before leases granted in what is now the future count as ended."""

# What was given before lies below the frontier and what is new above it. The index holds open claims alone: without
# its name, all that was ever acknowledged would be walked.
_CLAIMABLE: Final = """
SELECT seq FROM deliveries INDEXED BY open_deliveries
WHERE consumer = :consumer AND state = 'claimed' AND (lease_until <= :now OR granted > :now + :slack)
UNION ALL
SELECT seq FROM outbox
WHERE seq > (SELECT coalesce(max(seq), 0) FROM deliveries WHERE consumer = :consumer)
ORDER BY seq LIMIT :limit
"""
_GRANT: Final = """
INSERT INTO deliveries VALUES (:consumer, :seq, :token, 'claimed', :now, :until, 1)
ON CONFLICT(consumer, seq) DO UPDATE SET token = :token, granted = :now, lease_until = :until, claims = claims + 1
RETURNING claims
"""
_HELD: Final = "consumer = ? AND seq = ? AND token = ? AND state = 'claimed'"


@dataclass(frozen=True, slots=True)
class Claim:
    """A group on lease, and the token that proves it."""

    group: Group
    token: str


class Claims:
    """One worker of a named consumer. A context manager."""

    def __init__(self, path: Path, consumer: str, *, clock: Callable[[], float] = time.time) -> None:
        """Open the store of a run. Raises UsageError where there is none, SchemaMismatch, StoreError."""
        if not consumer:
            raise UsageError("a consumer needs a name: groups are acknowledged under it")
        self.path = path
        self.consumer = consumer
        self.worker = uuid4().hex
        self._clock = clock
        self._granted = 0
        self._connection = open_consumer(path)
        # The log stays the same file for as long as a connection is open.
        self._log = os.open(self._connection.filename_wal, os.O_RDONLY | os.O_CLOEXEC)

    def __enter__(self) -> Claims:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; claims stay until their leases end. Idempotent."""
        if self._log >= 0:
            os.close(self._log)
            self._log = -1
        self._connection.close()

    def claim(self, limit: int, lease_s: float) -> list[Claim]:
        """Up to `limit` groups on lease for `lease_s` seconds, lowest number first; none where there is none."""
        if limit < 1 or lease_s <= 0:
            raise UsageError("a claim needs a limit of at least 1 and a lease above 0 seconds")
        with explained(self.path):
            # Asked first without the write lock: a consumer that polls disturbs nobody.
            if not self._claimable(1):
                return []
            with immediate(self._connection):
                granted = [self._grant(seq, lease_s) for seq in self._claimable(limit)]
            self._sync()
            return [
                Claim(read_group(self._connection, seq, redelivered=claims > 1), token)
                for seq, token, claims in granted
            ]

    def ack(self, *claims: Claim) -> None:
        """Acknowledge groups, all or none. Again with the same claim: nothing happens. Raises ClaimLost."""
        with explained(self.path), immediate(self._connection):
            for claim in claims:
                if not self._change("state = 'acked'", (), claim) and not self._acked(claim):
                    raise _lost(claim)
        self._sync()

    def nack(self, *claims: Claim) -> None:
        """Give groups back, all or none; they are given again at once. Raises ClaimLost, also after an ack."""
        with explained(self.path), immediate(self._connection):
            for claim in claims:
                if not self._change("token = '', lease_until = 0", (), claim):
                    raise _lost(claim)

    def extend(self, claim: Claim, lease_s: float) -> None:
        """Let the lease end `lease_s` seconds from now. Raises ClaimLost, also after an ack."""
        now = self._clock()
        with explained(self.path):
            if not self._change("granted = ?, lease_until = ?", (now, now + lease_s), claim):
                raise _lost(claim)

    def surrender(self) -> None:
        """Give back all that this worker still holds, what it was never told of included."""
        self._give_back("AND token LIKE ?", f"{self.worker}-%")

    def reclaim(self) -> None:
        """Give back all that any worker of this consumer holds: for who knows that all of them are dead."""
        self._give_back("")

    def drained(self) -> bool:
        """Whether the run is finished and this consumer has acknowledged all its groups."""
        with explained(self.path):
            # In this order: a run that is finished releases nothing more.
            finished = self._connection.execute("SELECT state FROM run").get == "finished"
            return finished and unacked(self._connection, self.consumer) == 0

    def _sync(self) -> None:
        """Make what was committed durable, without the write lock."""
        try:
            os.fdatasync(self._log)
        except OSError as error:
            raise StoreError(
                f"the disk that holds {self.path} reports an error ({error.strerror}): check it"
            ) from error

    def _give_back(self, condition: str, *values: str) -> None:
        sql = "UPDATE deliveries SET token = '', lease_until = 0 WHERE consumer = ? AND state = 'claimed'"
        with explained(self.path):
            self._connection.execute(f"{sql} {condition}", (self.consumer, *values))

    def _claimable(self, limit: int) -> list[int]:
        values = {"consumer": self.consumer, "now": self._clock(), "slack": CLOCK_SLACK_S, "limit": limit}
        return [row[0] for row in self._connection.execute(_CLAIMABLE, values)]

    def _grant(self, seq: int, lease_s: float) -> tuple[int, str, int]:
        self._granted += 1
        token = f"{self.worker}-{self._granted}"
        now = self._clock()
        values = {"consumer": self.consumer, "seq": seq, "token": token, "now": now, "until": now + lease_s}
        return seq, token, self._connection.execute(_GRANT, values).get

    def _change(self, assignment: str, values: Sequence[float], claim: Claim) -> bool:
        place = (self.consumer, claim.group.seq, claim.token)
        self._connection.execute(f"UPDATE deliveries SET {assignment} WHERE {_HELD}", (*values, *place))
        return self._connection.changes() == 1

    def _acked(self, claim: Claim) -> bool:
        sql = "SELECT 1 FROM deliveries WHERE consumer = ? AND seq = ? AND token = ? AND state = 'acked'"
        place = (self.consumer, claim.group.seq, claim.token)
        return self._connection.execute(sql, place).get is not None


def _lost(claim: Claim) -> ClaimLost:
    group = claim.group
    return ClaimLost(
        f"group {group.seq} ({group.task}/{group.group}) is no longer this worker's: its lease ended and it was given"
        " to another, or it was acknowledged or given back; drop what was made of it, or use a longer lease"
    )
