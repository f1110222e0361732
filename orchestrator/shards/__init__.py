"""One run over several shards: the driver keeps the plan, the store and the display, shards play the episodes.

`messages` is what they say to each other, `crew` the driver's side (a `Player` of the engine), `runner` a shard's side.
Where shards run, and how they are reached, is a backend's (`backends.sandboxes.ray`).
"""

from orchestrator.shards.crew import Crew, CrewStatistics, ShardLink
from orchestrator.shards.job import ShardJob, Shards
from orchestrator.shards.runner import ShardRunner

__all__ = ["Crew", "CrewStatistics", "ShardJob", "ShardLink", "ShardRunner", "Shards"]
