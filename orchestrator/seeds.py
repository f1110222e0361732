"""Seeds: every random choice follows from the run's seed and the episode's identity, never from time or order."""

from __future__ import annotations

from hashlib import blake2b
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from orchestrator.types import EpisodeKey


def derive(*parts: object) -> int:
    """A 63-bit seed from the text of its parts."""
    text = "\x1f".join(map(str, parts))
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def environment_seed(run_seed: int, key: EpisodeKey) -> int:
    """Equal for all samples of a group: f(run seed, task, group)."""
    return derive("environment", run_seed, key.task, key.group)


def policy_seed(run_seed: int, key: EpisodeKey) -> int:
    """The environment's ingredients and the sample."""
    return derive("policy", run_seed, key.task, key.group, key.sample)
