"""Delays between retries."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import UsageError
from policies.agents.backoff import Backoff, read_retry_after

draws = st.floats(0, 1, exclude_max=True)


@given(retry=st.integers(0, 10_000), draw=draws)
def test_a_delay_is_the_upper_half_of_the_backoff(retry: int, draw: float) -> None:
    whole = min(30.0, 0.5 * 2.0 ** min(retry, 100))
    assert whole / 2 <= Backoff().delay(retry, draw) <= whole


@given(retry=st.integers(0, 100), draw=draws, asked=st.floats(0, 1e9))
def test_what_the_server_asks_is_waited_out_but_bounded(retry: int, draw: float, asked: float) -> None:
    backoff = Backoff(retry_after_cap_s=60.0)
    assert min(asked, 60.0) <= backoff.delay(retry, draw, asked) <= 60.0 + backoff.cap_s


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, None),
        ("2", 2.0),
        ("0.25", 0.25),
        ("-1", None),
        ("inf", None),
        ("nan", None),
        ("soon", None),
        ("Thu, 01 Jan 1970 00:01:40 GMT", 60.0),
        ("Thu, 01 Jan 1970 00:00:10 GMT", 0.0),
        ("Thu, 01 Jan 1970 00:01:40", 60.0),
        ("Thu, 99 Jan 1970 00:01:40 GMT", None),
    ],
)
def test_retry_after_in_both_forms(header: str | None, seconds: float | None) -> None:
    assert read_retry_after(header, now=40.0) == seconds


def test_nonsense_is_refused() -> None:
    with pytest.raises(UsageError, match="max_retries is -1"):
        Backoff(max_retries=-1)
