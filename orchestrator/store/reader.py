"""Reading a store, while its run goes on or after: lazy, on a connection that cannot write.

No read transaction outlives a call: iterators page by key, so that a slow reader never keeps the log from being
checkpointed. All methods block on the disk; in an event loop they belong on a thread. Raises StoreError.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Literal

import orjson

from orchestrator.store.schema import explained, open_reader
from orchestrator.store.values import COLUMNS, WIDTH, CommittedEpisode, RunMeta, Totals, decode
from orchestrator.types import EpisodeKey, Group, Outcome, Trajectory

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    import apsw

PAGE_ROWS: Final = 32

_COUNTS: Final = """
SELECT outcome, count(*), count(reward), total(reward), total(reward = 1.0), sum(steps), sum(model_calls),
    sum(prompt_tokens), sum(completion_tokens), sum(incarnations > 1)
FROM trajectories GROUP BY outcome
"""
_OPEN_GROUPS: Final = """
SELECT task, grp, sample FROM trajectories AS t
WHERE NOT EXISTS (SELECT 1 FROM outbox AS o WHERE o.task = t.task AND o.grp = t.grp)
ORDER BY task, grp, sample
"""
# Numbers have no gaps and claims take the lowest first: what was never claimed lies above the consumer's frontier.
_UNACKED: Final = """
SELECT (SELECT coalesce(max(seq), 0) FROM outbox)
    - (SELECT coalesce(max(seq), 0) FROM deliveries WHERE consumer = :consumer)
    + (SELECT count(*) FROM deliveries WHERE consumer = :consumer AND state = 'claimed')
"""


class StoreReader:
    """A context manager. One thread at a time."""

    def __init__(self, path: Path) -> None:
        """Open the store of a run. Raises UsageError where there is none, SchemaMismatch, StoreError."""
        self.path = path
        self._connection = open_reader(path)
        self.meta = RunMeta.from_json(self._get("SELECT meta FROM run"))

    def __enter__(self) -> StoreReader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection. Idempotent."""
        self._connection.close()

    @property
    def run_epoch(self) -> int:
        """1 at first; one more for every resume."""
        epoch: int = self._get("SELECT run_epoch FROM run")
        return epoch

    @property
    def state(self) -> Literal["running", "finished"]:
        """Whether all that was asked of the run is stored."""
        state: Literal["running", "finished"] = self._get("SELECT state FROM run")
        return state

    @property
    def plan(self) -> dict[str, Any] | None:
        """The resolved plan; None before it was saved."""
        return _parsed(self._get("SELECT plan FROM run"))

    @property
    def summary(self) -> dict[str, Any] | None:
        """What the run reported at its end; None before."""
        return _parsed(self._get("SELECT summary FROM run"))

    def episodes(self, order: Literal["commit", "key"] = "commit") -> Iterator[Trajectory]:
        """All trajectories stored, lazily; in commit order also those that are stored meanwhile."""
        if order == "key":
            sql = f"SELECT {COLUMNS} FROM trajectories WHERE (task, grp, sample) > (?, ?, ?) ORDER BY task, grp, sample"
            place: tuple[Any, ...] = ("", -1, -1)
        else:
            sql = f"SELECT {COLUMNS}, rowid FROM trajectories WHERE rowid > ? ORDER BY rowid"
            place = (0,)
        while rows := self._all(f"{sql} LIMIT {PAGE_ROWS}", place):
            for row in rows:
                yield decode(row[:WIDTH])
            place = rows[-1][:3] if order == "key" else rows[-1][-1:]

    def episode(self, key: EpisodeKey) -> Trajectory | None:
        """One trajectory, or None while it is not stored."""
        sql = f"SELECT {COLUMNS} FROM trajectories WHERE task = ? AND grp = ? AND sample = ?"
        rows = self._all(sql, (key.task, key.group, key.sample))
        return decode(rows[0]) if rows else None

    def groups(self, after: int = 0) -> Iterator[Group]:
        """All groups released with a number above `after`, in that order, lazily."""
        while seqs := self._all(f"SELECT seq FROM outbox WHERE seq > ? ORDER BY seq LIMIT {PAGE_ROWS}", (after,)):
            for (seq,) in seqs:
                with explained(self.path):
                    group = read_group(self._connection, seq)
                yield group
            after = seqs[-1][0]

    def toolsets(self) -> dict[str, bytes]:
        """All tool sets by digest, each a JSON array."""
        return dict(self._all("SELECT digest, body FROM toolsets"))

    def committed(self) -> dict[EpisodeKey, CommittedEpisode]:
        """Every stored key, and how it ended."""
        rows = self._all("SELECT task, grp, sample, outcome, reward, attempt FROM trajectories")
        return {EpisodeKey(t, g, s): CommittedEpisode(Outcome(o), r, a) for t, g, s, o, r, a in rows}

    def open_groups(self) -> dict[tuple[str, int], list[EpisodeKey]]:
        """The stored keys of every group that has some and is not released."""
        groups: dict[tuple[str, int], list[EpisodeKey]] = {}
        for task, group, sample in self._all(_OPEN_GROUPS):
            groups.setdefault((task, group), []).append(EpisodeKey(task, group, sample))
        return groups

    def unacked(self, consumer: str) -> int:
        """How many released groups this consumer has not acknowledged."""
        with explained(self.path):
            return unacked(self._connection, consumer)

    def totals(self) -> Totals:
        """Sums over all that is stored; reads every row, without its buffer."""
        rows = self._all(_COUNTS)
        sums = [sum(column) for column in list(zip(*rows, strict=True))[1:]] if rows else [0] * 9
        return Totals(
            episodes=sums[0],
            outcomes={Outcome(row[0]): row[1] for row in rows},
            rewarded=sums[1],
            reward_sum=sums[2],
            reward_one=int(sums[3]),
            steps=sums[4],
            model_calls=sums[5],
            prompt_tokens=sums[6],
            completion_tokens=sums[7],
            recovered=sums[8],
            groups=self._get("SELECT coalesce(max(seq), 0) FROM outbox"),
            duplicates=self._get("SELECT duplicates FROM run"),
            redelivered=self._get("SELECT coalesce(sum(claims - 1), 0) FROM deliveries"),
        )

    def _all(self, sql: str, values: Sequence[Any] = ()) -> list[Any]:
        with explained(self.path):
            return self._connection.execute(sql, values).fetchall()

    def _get(self, sql: str) -> Any:
        with explained(self.path):
            return self._connection.execute(sql).get


def unacked(connection: apsw.Connection, consumer: str) -> int:
    """How many released groups the consumer has not acknowledged."""
    count: int = connection.execute(_UNACKED, {"consumer": consumer}).get
    return count


def read_group(connection: apsw.Connection, seq: int, *, redelivered: bool = False) -> Group:
    """A released group with all its trajectories, in sample order."""
    task, group, partial = connection.execute("SELECT task, grp, partial FROM outbox WHERE seq = ?", (seq,)).get
    sql = f"SELECT {COLUMNS} FROM trajectories WHERE task = ? AND grp = ? ORDER BY sample"
    trajectories = [decode(row) for row in connection.execute(sql, (task, group))]
    return Group(seq, task, group, bool(partial), trajectories, redelivered)


def _parsed(text: str | None) -> dict[str, Any] | None:
    return None if text is None else orjson.loads(text)
