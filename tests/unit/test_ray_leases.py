"""The table of leases of a Ray queue: any order of pushes, claims, acks, deaths and lives of its actor."""

from __future__ import annotations

from itertools import count

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from backends.trainers.ray.leases import Leases, Lent, Parcel, Proof

GRACE_S = 5.0
WORKERS = ("ann", "bob", "cy")


class Queue(RuleBasedStateMachine):
    """A driver, its workers and one actor after the other; what each of them knows is kept apart."""

    @initialize()
    def begin(self) -> None:
        self.now = 0.0
        self.lives = count()
        self.idents = (number.to_bytes(4, "big") for number in count())
        self.unacked: dict[bytes, bool] = {}
        self.durable: list[bytes] = []
        self.held: dict[str, dict[bytes, str]] = {worker: {} for worker in WORKERS}
        self.done: dict[str, list[Proof]] = {worker: [] for worker in WORKERS}
        self.good: set[bytes] = set()
        """Acked in this life of the actor."""
        self.live()

    def live(self) -> None:
        self.leases = Leases(f"life{next(self.lives)}", grace_s=GRACE_S)
        self.heard = 0
        self.good.clear()

    @rule(number=st.integers(1, 4))
    def push(self, number: int) -> None:
        fresh = [next(self.idents) for _ in range(number)]
        self.unacked.update(dict.fromkeys(fresh, False))
        self.leases.push([Parcel(ident, b"", False) for ident in fresh], self.now)

    @rule(worker=st.sampled_from(WORKERS), limit=st.integers(1, 3))
    def claim(self, worker: str, limit: int) -> None:
        proofs = [Proof(*item) for item in self.held[worker].items()]
        self.leases.extend(worker, proofs, self.now, 10.0, exact=True)
        before = self.leases.statistics().waiting
        lent = self.leases.grant(worker, limit, self.now, 10.0)
        assert before == 0 or len(lent) <= limit
        for one in lent:
            assert one.ident in self.unacked
            assert one.ident not in self.held[worker]
            self.held[worker][one.ident] = one.token

    @precondition(lambda self: any(self.held.values()))
    @rule(data=st.data())
    def ack(self, data: st.DataObject) -> None:
        worker = data.draw(st.sampled_from([worker for worker in WORKERS if self.held[worker]]))
        ident = data.draw(st.sampled_from(sorted(self.held[worker])))
        proof = Proof(ident, self.held[worker].pop(ident))
        if self.leases.ack(proof):
            assert ident not in self.good, "acked by two claims"
            self.good.add(ident)
            self.done[worker].append(proof)
            assert self.leases.ack(proof), "an ack that is said again"

    @rule(worker=st.sampled_from(WORKERS))
    def beat(self, worker: str) -> None:
        self.leases.extend(worker, [Proof(*item) for item in self.held[worker].items()], self.now, 10.0)

    @precondition(lambda self: any(self.held.values()))
    @rule(data=st.data(), late=st.booleans())
    def nack(self, data: st.DataObject, late: bool) -> None:
        """A beat that was begun before it may come after it."""
        worker = data.draw(st.sampled_from([worker for worker in WORKERS if self.held[worker]]))
        ident = data.draw(st.sampled_from(sorted(self.held[worker])))
        before = [Proof(*item) for item in self.held[worker].items()]
        del self.held[worker][ident]
        self.leases.extend(worker, before, self.now, 10.0)
        self.leases.give_back(worker, [ident])
        if late:
            self.leases.extend(worker, before, self.now, 10.0)
        assert ident not in self.leases._holds.get(worker, ())

    @rule(worker=st.sampled_from(WORKERS))
    def leave(self, worker: str) -> None:
        self.leases.leave(worker)
        self.held[worker].clear()

    @rule(worker=st.sampled_from(WORKERS))
    def die(self, worker: str) -> None:
        self.held[worker].clear()
        self.done[worker].clear()

    @rule(seconds=st.floats(0.0, 12.0))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.leases.advance(self.now)

    @rule()
    def hear(self) -> None:
        self.heard, acked = self.leases.acked(self.heard)
        for ident in acked:
            if self.unacked.pop(ident, None) is not None:
                self.durable.append(ident)

    @rule(first=st.permutations(WORKERS))
    def be_replaced(self, first: list[str]) -> None:
        """The actor dies; living workers say what they have done and hold before the grace is over."""
        self.live()
        self.leases.push([Parcel(ident, b"", True) for ident in self.unacked], self.now)
        for worker in first:
            self.good.update(proof.ident for proof in self.done[worker] if self.leases.ack(proof))
            self.beat(worker)

    @invariant()
    def consistent(self) -> None:
        self.leases.check()

    @invariant()
    def durable_once(self) -> None:
        assert len(set(self.durable)) == len(self.durable)
        assert not set(self.durable) & set(self.unacked)

    def teardown(self) -> None:
        """Whatever happened, one patient worker brings everything to its end."""
        if not hasattr(self, "leases"):
            return
        self.wait(100.0)
        while lent := self.leases.grant("dora", 2, self.now, 10.0):
            assert all(self.leases.ack(Proof(one.ident, one.token)) for one in lent)
        self.hear()
        assert not self.unacked
        self.leases.finished = True
        assert self.leases.over


TestQueue = Queue.TestCase
TestQueue.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def filled(number: int, *, given: bool = False) -> Leases:
    leases = Leases("life", grace_s=GRACE_S)
    leases.push([Parcel(bytes([one]), b"", given) for one in range(number)], 0.0)
    return leases


def idents(lent: list[Lent]) -> list[int]:
    return [one.ident[0] for one in lent]


def test_oldest_first_what_came_back_included() -> None:
    leases = filled(4)
    assert idents(leases.grant("ann", 2, 0.0, 10.0)) == [0, 1]
    assert idents(leases.grant("bob", 1, 0.0, 30.0)) == [2]
    lent = leases.grant("cy", 9, 11.0, 10.0)
    assert [(one.ident[0], one.redelivered) for one in lent] == [(0, True), (1, True), (3, False)]


def test_a_late_ack_is_good_until_the_parcel_is_given_again() -> None:
    leases = filled(2)
    (first, second) = leases.grant("ann", 2, 0.0, 10.0)
    leases.advance(20.0)
    assert leases.ack(Proof(first.ident, first.token))
    (again,) = leases.grant("bob", 2, 20.0, 10.0)
    assert not leases.ack(Proof(second.ident, second.token))
    assert leases.ack(Proof(again.ident, again.token))
    assert leases.acked(0) == (2, [first.ident, second.ident])
    assert leases.statistics().lost == 1


@pytest.mark.parametrize("beaten", [True, False])
def test_what_an_earlier_life_gave_waits_for_its_worker(beaten: bool) -> None:
    leases = filled(1, given=True)
    assert leases.grant("bob", 1, 4.0, 10.0) == []
    if beaten:
        leases.extend("ann", [Proof(bytes([0]), "earlier-7")], 4.5, 10.0)
    assert len(leases.grant("bob", 1, 6.0, 10.0)) == (not beaten)


def test_an_ack_before_its_parcel_is_kept_for_it() -> None:
    leases = Leases("life", grace_s=GRACE_S)
    assert leases.ack(Proof(b"x", "earlier-7"))
    leases.push([Parcel(b"x", b"", True)], 0.0)
    assert leases.grant("bob", 1, 100.0, 10.0) == []
    assert leases.acked(0) == (1, [b"x"])


def test_an_answer_that_was_lost_holds_nothing_back() -> None:
    leases = filled(3)
    kept, _ = leases.grant("ann", 2, 0.0, 10.0)
    leases.extend("ann", [Proof(kept.ident, kept.token)], 1.0, 10.0, exact=True)
    assert idents(leases.grant("bob", 9, 1.0, 10.0)) == [1, 2]


def test_a_worker_that_leaves_gives_all_back_at_once() -> None:
    leases = filled(2)
    leases.grant("ann", 2, 0.0, 10.0)
    leases.give_back("ann", [bytes([1]), b"not its own"])
    assert idents(leases.grant("bob", 9, 0.0, 10.0)) == [1]
    leases.leave("ann")
    assert idents(leases.grant("bob", 9, 0.0, 10.0)) == [0]
    assert leases.workers() == {"bob"}


def test_what_was_given_back_is_not_held_again() -> None:
    leases = filled(1)
    (lent,) = leases.grant("ann", 1, 0.0, 10.0)
    proof = Proof(lent.ident, lent.token)
    leases.give_back("ann", [lent.ident])
    leases.extend("ann", [proof], 0.0, 10.0)
    assert not leases.ack(proof)
    (again,) = leases.grant("bob", 1, 0.0, 10.0)
    assert (again.ident, again.redelivered) == (lent.ident, True)
