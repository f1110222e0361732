"""Mechanism: what runs when, exactly once."""

from orchestrator.facade import Orchestrator
from orchestrator.run import Run
from orchestrator.summary import Progress, Summary
from orchestrator.types import (
    Decision,
    EpisodeKey,
    Evaluation,
    Failure,
    FailureKind,
    Generation,
    Group,
    Observation,
    OnAgentKill,
    Outcome,
    StopReason,
    Trajectory,
)

__all__ = [
    "Decision",
    "EpisodeKey",
    "Evaluation",
    "Failure",
    "FailureKind",
    "Generation",
    "Group",
    "Observation",
    "OnAgentKill",
    "Orchestrator",
    "Outcome",
    "Progress",
    "Run",
    "StopReason",
    "Summary",
    "Trajectory",
]
