"""Sandboxes, and whole shards of a run, on the nodes of a Ray cluster: Ray places and watches, our own wire carries.

`cluster` connects this process. `host` is the actor of a sandbox, `backend` makes them; `shard` is the actor of a
shard, `shards` keeps them. Needs the extra `[ray]`; importing this package imports neither ray nor a cluster.
"""

from backends.sandboxes.ray.backend import RayBackend
from backends.sandboxes.ray.cluster import RayOptions
from backends.sandboxes.ray.shards import RayShards

__all__ = ["RayBackend", "RayOptions", "RayShards"]
