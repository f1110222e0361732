"""Claims against a model, through every order of claiming, settling, dying and clock jumps that hypothesis finds."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

from orchestrator.errors import ClaimLost, UsageError
from orchestrator.store import Claim, Claims, RunMeta, StoreReader, schema
from orchestrator.store.claims import CLOCK_SLACK_S
from orchestrator.store.commit import Committer, Row
from orchestrator.testing.queue import sample_group
from orchestrator.types import GroupRelease, RunId

META = RunMeta(RunId("r-1"), "toy", "0123456789abcdef", 7, 1000.0, {})
WORKERS = 2


@dataclass
class Given:
    """What the model knows of a group that was given at least once."""

    token: str = ""
    acked: bool = False
    granted: float = 0.0
    until: float = 0.0
    claims: int = 0


class Outbox:
    """A store that groups can be released into, without an orchestrator."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "run.sqlite"
        self._connection = schema.create(self.path, META)
        self._committer = Committer(self._connection, self.path, 1)
        self.released = 0

    def release(self, count: int) -> None:
        rows: list[Row] = []
        for _ in range(count):
            self.released += 1
            first, last = sample_group(self.released).trajectories
            partial = first.reward is None
            rows += [Row(first, None), Row(last, GroupRelease(last.key.task, 0, 2, partial=partial))]
        self._committer.commit(rows, {})

    def finish(self) -> None:
        self._connection.execute("UPDATE run SET state = 'finished'")

    def close(self) -> None:
        self._connection.close()


class ClaimsMachine(RuleBasedStateMachine):
    """Two workers of one consumer, whose every answer the model foretells."""

    made = Bundle("made")

    @initialize()
    def begin(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.outbox = Outbox(Path(self.folder.name))
        self.now = 1_000_000.0
        self.given: dict[int, Given] = {}
        self.workers = [self.open() for _ in range(WORKERS)]
        self.reader = StoreReader(self.outbox.path)
        self.held: list[set[int]] = [set() for _ in range(WORKERS)]

    def open(self) -> Claims:
        return Claims(self.outbox.path, "trainer", clock=lambda: self.now)

    def teardown(self) -> None:
        if hasattr(self, "outbox"):
            for worker in self.workers:
                worker.close()
            self.reader.close()
            self.outbox.close()
            self.folder.cleanup()

    def claimable(self) -> list[int]:
        return [seq for seq in range(1, self.outbox.released + 1) if self.is_claimable(seq)]

    def is_claimable(self, seq: int) -> bool:
        given = self.given.get(seq)
        if given is None:
            return True
        over = given.until <= self.now or given.granted > self.now + CLOCK_SLACK_S
        return not given.acked and over

    @rule(count=st.integers(1, 4))
    def release(self, count: int) -> None:
        self.outbox.release(count)

    @rule(target=made, worker=st.integers(0, WORKERS - 1), limit=st.integers(1, 5), lease=st.sampled_from([1.0, 10.0]))
    def claim(self, worker: int, limit: int, lease: float) -> list[tuple[int, Claim]]:
        expected = self.claimable()[:limit]
        claims = self.workers[worker].claim(limit, lease)
        assert [claim.group.seq for claim in claims] == expected
        for claim in claims:
            seq = claim.group.seq
            given = self.given.setdefault(seq, Given())
            assert claim.group.redelivered == (given.claims > 0)
            assert claim.token != given.token
            assert claim.group.trajectories == sample_group(seq).trajectories
            assert claim.group.partial == (seq % 3 == 0)
            given.token, given.granted, given.until = claim.token, self.now, self.now + lease
            given.claims += 1
            for held in self.held:
                held.discard(seq)
            self.held[worker].add(seq)
        return [(worker, claim) for claim in claims]

    @rule(claims=made, pick=st.randoms(use_true_random=False))
    def ack(self, claims: list[tuple[int, Claim]], pick) -> None:  # type: ignore[no-untyped-def]
        for worker, claim in pick.sample(claims, len(claims)):
            given = self.given[claim.group.seq]
            if given.token == claim.token:
                self.workers[worker].ack(claim)
                given.acked = True
                self.held[worker].discard(claim.group.seq)
            else:
                with pytest.raises(ClaimLost):
                    self.workers[worker].ack(claim)

    @rule(claims=made)
    def ack_together(self, claims: list[tuple[int, Claim]]) -> None:
        if not claims:
            return
        worker = claims[0][0]
        all_good = all(self.given[claim.group.seq].token == claim.token for _, claim in claims)
        if all_good:
            self.workers[worker].ack(*(claim for _, claim in claims))
            for _, claim in claims:
                self.given[claim.group.seq].acked = True
                self.held[worker].discard(claim.group.seq)
        else:
            with pytest.raises(ClaimLost):
                self.workers[worker].ack(*(claim for _, claim in claims))

    @rule(claims=made)
    def nack(self, claims: list[tuple[int, Claim]]) -> None:
        for worker, claim in claims[:2]:
            given = self.given[claim.group.seq]
            if given.token == claim.token and not given.acked:
                self.workers[worker].nack(claim)
                given.token, given.until = "", 0.0
                self.held[worker].discard(claim.group.seq)
            else:
                with pytest.raises(ClaimLost):
                    self.workers[worker].nack(claim)

    @rule(claims=made, lease=st.sampled_from([2.0, 30.0]))
    def extend(self, claims: list[tuple[int, Claim]], lease: float) -> None:
        for worker, claim in claims[:2]:
            given = self.given[claim.group.seq]
            if given.token == claim.token and not given.acked:
                self.workers[worker].extend(claim, lease)
                given.granted, given.until = self.now, self.now + lease
            else:
                with pytest.raises(ClaimLost):
                    self.workers[worker].extend(claim, lease)

    @rule(seconds=st.sampled_from([0.5, 1.0, 9.0, 40.0, -1.0, -20.0, 100_000.0]))
    def clock_moves(self, seconds: float) -> None:
        self.now += seconds

    @rule(worker=st.integers(0, WORKERS - 1))
    def worker_dies_and_another_comes(self, worker: int) -> None:
        self.workers[worker].close()
        self.workers[worker] = self.open()
        self.held[worker] = set()

    @rule(worker=st.integers(0, WORKERS - 1))
    def surrender(self, worker: int) -> None:
        self.workers[worker].surrender()
        self.given_back(self.held[worker])

    @rule(worker=st.integers(0, WORKERS - 1))
    def reclaim(self, worker: int) -> None:
        self.workers[worker].reclaim()
        self.given_back({seq for seq, given in self.given.items() if not given.acked})

    def given_back(self, seqs: set[int]) -> None:
        for seq in list(seqs):
            self.given[seq].token, self.given[seq].until = "", 0.0
            for held in self.held:
                held.discard(seq)

    @invariant()
    def counts_agree(self) -> None:
        if not hasattr(self, "reader"):
            return
        acked = sum(given.acked for given in self.given.values())
        assert self.reader.unacked("trainer") == self.outbox.released - acked
        assert self.reader.unacked("nobody") == self.outbox.released
        assert self.reader.totals().redelivered == sum(given.claims - 1 for given in self.given.values())
        assert not self.workers[0].drained()


TestClaimsMachine = ClaimsMachine.TestCase
TestClaimsMachine.settings = settings(
    max_examples=50, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


def test_drained_once_finished_and_acked(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path)
    outbox.release(2)
    with Claims(outbox.path, "a") as claims, Claims(outbox.path, "b") as other:
        claims.ack(*claims.claim(9, 60))
        assert not claims.drained()
        outbox.finish()
        assert claims.drained()
        assert not other.drained(), "consumers are independent of each other"
        assert [claim.group.seq for claim in other.claim(9, 60)] == [1, 2]
    outbox.close()


def test_late_ack_counts_while_nobody_else_has_the_group(tmp_path: Path) -> None:
    now = [0.0]
    outbox = Outbox(tmp_path)
    outbox.release(2)
    with Claims(outbox.path, "a", clock=lambda: now[0]) as slow, Claims(outbox.path, "a", clock=lambda: now[0]) as fast:
        first, second = slow.claim(2, 10)
        now[0] = 100.0
        slow.ack(first)
        (again,) = fast.claim(2, 10)
        assert again.group.seq == 2
        assert again.group.redelivered
        with pytest.raises(ClaimLost, match="task_2/0"):
            slow.ack(second)
        fast.ack(again)
    outbox.close()


def test_clock_set_back_ends_leases_instead_of_stretching_them(tmp_path: Path) -> None:
    now = [1_000_000.0]
    outbox = Outbox(tmp_path)
    outbox.release(1)
    with (
        Claims(outbox.path, "a", clock=lambda: now[0]) as dead,
        Claims(outbox.path, "a", clock=lambda: now[0]) as other,
    ):
        assert len(dead.claim(1, 60)) == 1
        now[0] -= CLOCK_SLACK_S
        assert other.claim(1, 60) == [], "a small step back, as time servers make them, ends nothing"
        now[0] -= 3600.0
        assert [claim.group.redelivered for claim in other.claim(1, 60)] == [True]
    outbox.close()


def test_surrender_leaves_the_claims_of_others_alone(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path)
    outbox.release(2)
    with Claims(outbox.path, "a") as one, Claims(outbox.path, "a") as two, Claims(outbox.path, "b") as other:
        one.claim(1, 60)
        kept = two.claim(1, 60)
        elsewhere = other.claim(2, 60)
        one.surrender()
        two.ack(*kept)
        other.ack(*elsewhere)
        assert [claim.group.seq for claim in two.claim(2, 60)] == [1]
        one.reclaim()
        assert [claim.group.seq for claim in one.claim(2, 60)] == [1]
    outbox.close()


def test_claim_and_ack_are_synced_without_the_write_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outbox = Outbox(tmp_path)
    outbox.release(2)
    synced: list[str] = []

    def sync(file: int) -> None:
        outbox._connection.set_busy_timeout(0)
        outbox._connection.execute("BEGIN IMMEDIATE; ROLLBACK")
        synced.append(os.readlink(f"/proc/self/fd/{file}"))

    with Claims(outbox.path, "a") as claims:
        monkeypatch.setattr(os, "fdatasync", sync)
        taken = claims.claim(2, 60)
        assert len(synced) == 1
        claims.ack(*taken)
        assert synced == [f"{outbox.path}-wal"] * 2
        assert claims._connection.pragma("synchronous") == 1, "a commit itself must not wait for the disk"
    outbox.close()


def test_bad_arguments(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path)
    with pytest.raises(UsageError, match="needs a name"):
        Claims(outbox.path, "")
    with Claims(outbox.path, "a") as claims:
        for limit, lease in ((0, 1.0), (1, 0.0), (1, -1.0)):
            with pytest.raises(UsageError, match="limit of at least 1"):
                claims.claim(limit, lease)
    outbox.close()


def test_polling_consumer_does_not_wait_for_the_writer(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path)
    with Claims(outbox.path, "a") as claims:
        outbox._connection.execute("BEGIN IMMEDIATE")
        assert claims.claim(1, 60) == [], "nothing to claim: found out without the write lock"
        outbox._connection.execute("ROLLBACK")
    outbox.close()
