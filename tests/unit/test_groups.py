"""Groups are released once, with their last sample, whole or said to be partial."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.groups import GroupTracker
from orchestrator.types import EpisodeKey, GroupRelease


@given(
    size=st.integers(1, 4),
    groups=st.integers(1, 4),
    rewarded=st.lists(st.booleans(), min_size=16, max_size=16),
    order=st.randoms(use_true_random=False),
    restored=st.integers(0, 16),
)
def test_any_order_and_any_resume(size: int, groups: int, rewarded: list[bool], order: object, restored: int) -> None:
    keys = [EpisodeKey(f"t{group % 2}", group // 2, sample) for group in range(groups) for sample in range(size)]
    good = dict(zip(keys, rewarded, strict=False))
    order.shuffle(keys)  # type: ignore[attr-defined]
    tracker = GroupTracker(size)
    open_before = [key for key in keys[:restored] if any(_same(key, later) for later in keys[restored:])]
    tracker.restore([(key, good[key]) for key in open_before])
    releases: list[GroupRelease] = []
    for place, key in enumerate(keys[restored:], restored + 1):
        release = tracker.ended(key, rewarded=good[key])
        tracker.check()
        last = not any(_same(key, later) for later in keys[place:])
        assert (release is not None) == last
        releases += [release] if release is not None else []
    for release in releases:
        members = [key for key in keys if (key.task, key.group) == (release.task, release.group)]
        assert release.size == size == len(members)
        assert release.partial == (not all(good[member] for member in members))
    assert tracker.statistics() == (0, len(releases))


def test_a_sample_is_counted_once() -> None:
    tracker = GroupTracker(3)
    tracker.ended(EpisodeKey("t", 0, 1), rewarded=True)
    with pytest.raises(ValueError, match="t/0/1 ended twice"):
        tracker.ended(EpisodeKey("t", 0, 1), rewarded=True)
    assert tracker.statistics() == (1, 0)


def test_check_sees_a_group_that_should_have_been_released() -> None:
    tracker = GroupTracker(1)
    tracker.restore([(EpisodeKey("t", 0, 0), True)])
    with pytest.raises(AssertionError, match="open with 1 of 1"):
        tracker.check()


def _same(one: EpisodeKey, other: EpisodeKey) -> bool:
    return (one.task, one.group) == (other.task, other.group)
