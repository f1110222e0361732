"""A trainer queue on a Ray cluster, for trainers on other nodes.

`queue` is the driver's end, with what it holds (`stock`) and who keeps the actor (`keeper`); `worker` is a trainer's,
over its `line`; between them is the actor, `host`, with a table of leases, `leases`.
Needs the extra `[ray]`; importing this package imports neither ray nor a cluster.
"""

from backends.trainers.ray.queue import RayQueue
from backends.trainers.ray.worker import RayWorker

__all__ = ["RayQueue", "RayWorker"]
