"""Benchmarks of the project itself, behind `rollout bench`."""
