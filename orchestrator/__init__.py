"""Mechanism: what runs when, exactly once."""

from orchestrator.facade import Orchestrator, Progress, Summary
from orchestrator.run import Run
from orchestrator.types import Decision, EpisodeKey, Generation, Group, Outcome, StopReason, Trajectory

__all__ = [
    "Decision",
    "EpisodeKey",
    "Generation",
    "Group",
    "Orchestrator",
    "Outcome",
    "Progress",
    "Run",
    "StopReason",
    "Summary",
    "Trajectory",
]
