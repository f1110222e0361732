"""Seeds follow from the run's seed and the episode's identity alone."""

from __future__ import annotations

import os
import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.seeds import derive, environment_seed, policy_seed
from orchestrator.types import EpisodeKey

KEYS = st.builds(EpisodeKey, st.text(), st.integers(0, 1000), st.integers(0, 1000))


def test_known_values_never_change() -> None:
    """A stored run is resumed with these: another value would be another history."""
    key = EpisodeKey("multi_turn_base_0", 2, 3)
    assert environment_seed(7, key) == derive("environment", 7, "multi_turn_base_0", 2) == 4092578031786796856
    assert policy_seed(7, key) == derive("policy", 7, "multi_turn_base_0", 2, 3) == 3863245775813570442


@given(seed=st.integers(), key=KEYS, other=KEYS)
def test_samples_of_a_group_share_the_environments_seed_alone(seed: int, key: EpisodeKey, other: EpisodeKey) -> None:
    sibling = EpisodeKey(key.task, key.group, other.sample)
    assert environment_seed(seed, key) == environment_seed(seed, sibling)
    assert (policy_seed(seed, key) == policy_seed(seed, sibling)) == (key == sibling)
    same_group = (key.task, key.group) == (other.task, other.group)
    assert (environment_seed(seed, key) == environment_seed(seed, other)) == same_group
    assert environment_seed(seed, key) != environment_seed(seed + 1, key)
    assert 0 <= policy_seed(seed, key) < 2**63


def test_another_process_derives_the_same() -> None:
    program = "from orchestrator.seeds import derive; print(derive('a', 1, 'b'))"
    environ = {**os.environ, "PYTHONHASHSEED": "12345"}
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environ, check=True)
    assert int(output.stdout) == derive("a", 1, "b")
