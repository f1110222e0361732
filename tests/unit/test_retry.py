"""The retry policy, row by row, and its pauses."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.retry import Again, GiveUp, RetryPolicy
from orchestrator.types import REWARDED, Failure, FailureKind, Outcome

KIND = FailureKind
SAME, NEW, NO = "the same attempt", "a new attempt", "no more"
TABLE = {
    KIND.SANDBOX_LOST: (SAME, Outcome.INFRA_FAILED),
    KIND.SANDBOX_HUNG: (SAME, Outcome.INFRA_FAILED),
    KIND.SANDBOX_START: (SAME, Outcome.INFRA_FAILED),
    KIND.PROTOCOL: (SAME, Outcome.INFRA_FAILED),
    KIND.MODEL_UNAVAILABLE: (SAME, Outcome.INFRA_FAILED),
    KIND.DIVERGED: (NEW, Outcome.ENV_FAILED),
    KIND.NOT_DETERMINISTIC: (NEW, Outcome.ENV_FAILED),
    KIND.ENVIRONMENT: (NO, Outcome.ENV_FAILED),
    KIND.BAD_REWARD: (NO, Outcome.ENV_FAILED),
    KIND.UNKNOWN_TASK: (NO, Outcome.ENV_FAILED),
    KIND.POLICY: (NO, Outcome.INFRA_FAILED),
    KIND.SHARD_LOST: (NEW, Outcome.INFRA_FAILED),
}


def failure(kind: FailureKind) -> Failure:
    return Failure(kind, "step", "it failed")


def test_every_kind_has_its_row() -> None:
    assert set(TABLE) == set(FailureKind)


@pytest.mark.parametrize("kind", FailureKind)
def test_the_table(kind: FailureKind) -> None:
    policy = RetryPolicy(max_tries=3, model_tries=5, first_delay_s=0.5)
    verdict, outcome = TABLE[kind]
    limit = 5 if kind in {KIND.MODEL_UNAVAILABLE, KIND.SHARD_LOST} else 3  # what is gone is gone for all at once
    for tries in range(1, limit):
        decided = policy.decide(failure(kind), tries)
        if verdict is NO:
            assert decided == GiveUp(outcome)
        else:
            delay = 0.0 if kind is KIND.SHARD_LOST else 0.5 * 2 ** (tries - 1)
            assert decided == Again(delay, new_attempt=verdict is NEW)
    assert policy.decide(failure(kind), limit) == GiveUp(outcome)


def test_what_says_it_may_succeed_later_is_tried_again() -> None:
    once = Failure(KIND.ENVIRONMENT, "open", "a download is under way", retryable=True)
    policy = RetryPolicy(max_tries=3, first_delay_s=0.5)
    assert policy.decide(once, 1) == Again(0.5, new_attempt=False)
    assert policy.decide(once, 3) == GiveUp(Outcome.ENV_FAILED)


@given(kind=st.sampled_from(FailureKind), tries=st.integers(1, 200), most=st.integers(1, 200))
def test_no_failure_becomes_a_reward_or_lasts_for_ever(kind: FailureKind, tries: int, most: int) -> None:
    policy = RetryPolicy(max_tries=most, model_tries=most, first_delay_s=0.1, max_delay_s=30.0)
    match policy.decide(failure(kind), tries):
        case GiveUp(outcome):
            assert outcome not in REWARDED
        case Again(delay, _):
            assert tries < most
            assert 0.1 <= delay <= 30.0 or (kind is KIND.SHARD_LOST and delay == 0.0)


def test_a_shard_whose_journal_came_back_costs_no_attempt() -> None:
    back = Failure(KIND.SHARD_LOST, "shard", "its journal is there", retryable=True)
    assert RetryPolicy().decide(back, 1) == Again(0.0, new_attempt=False)
