"""How many sandboxes to keep ready: what is waited for, and what will be while the next one starts."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.demand import WINDOW_S, Demand


def test_one_is_kept_without_any_demand() -> None:
    assert Demand(8).target(0.0) == 1


def test_those_that_wait_are_counted() -> None:
    demand = Demand(8)
    demand.waiting = 3
    assert demand.target(0.0) == 4
    demand.waiting = 100
    assert demand.target(0.0) == 8


def test_it_follows_the_pace_and_the_time_of_a_start() -> None:
    demand = Demand(100)
    demand.started(2.0)
    for tenth in range(100):  # ten a second
        demand.leased(tenth / 10)
    assert demand.target(9.9) == 30, "twenty come while one starts, and half as many again"
    assert demand.target(9.9 + WINDOW_S) == 1, "and none when nobody asks any more"


def test_slower_starts_ask_for_more() -> None:
    demand = Demand(100)
    for tenth in range(100):
        demand.leased(tenth / 10)
    targets = []
    for seconds in (0.1, 0.1, 5.0, 5.0):
        demand.started(seconds)
        targets.append(demand.target(9.9))
    assert targets == sorted(targets)
    assert targets[0] < targets[-1]


@given(
    most=st.integers(1, 50),
    waiting=st.integers(0, 100),
    leases=st.lists(st.floats(0, 100), max_size=50),
    starts=st.lists(st.floats(0, 60), max_size=10),
    now=st.floats(0, 200),
)
def test_it_is_at_least_one_and_at_most_all(
    most: int, waiting: int, leases: list[float], starts: list[float], now: float
) -> None:
    demand = Demand(most)
    demand.waiting = waiting
    for moment in sorted(leases):
        demand.leased(moment)
    for seconds in starts:
        demand.started(seconds)
    assert 1 <= demand.target(now) <= most
