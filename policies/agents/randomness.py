"""Randomness of decisions: a pure function of the episode's seed and a few counters, so that a resume repeats it."""

from __future__ import annotations

from hashlib import blake2b

_MASK = (1 << 64) - 1


def derive(seed: int, *counters: int) -> int:
    """64 uniform bits from a seed and counters: equal on every machine and in every version."""
    numbers = b"".join((number & _MASK).to_bytes(8, "little") for number in (seed, *counters))
    return int.from_bytes(blake2b(numbers, digest_size=8).digest(), "little")


def uniform(seed: int, *counters: int) -> float:
    """A number in [0, 1) from a seed and counters."""
    return (derive(seed, *counters) >> 11) / (1 << 53)
