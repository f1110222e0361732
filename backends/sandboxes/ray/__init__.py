"""Sandboxes on the nodes of a Ray cluster: Ray places and watches them, our own wire carries the steps.

`cluster` connects this process, `host` is the actor that runs on a node, `backend` puts both together. Needs the extra
`[ray]`; importing this package imports neither ray nor a cluster.
"""

from backends.sandboxes.ray.backend import RayBackend
from backends.sandboxes.ray.cluster import RayOptions

__all__ = ["RayBackend", "RayOptions"]
