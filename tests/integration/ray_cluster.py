"""A Ray cluster of several nodes on this machine, for tests."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator


class TwoNodes:
    """A head and one node more; `node()` adds another."""

    def __init__(self, cluster: Any) -> None:
        self.cluster = cluster
        self.address: str = cluster.address

    def node(self, **options: Any) -> Any:
        return self.cluster.add_node(num_cpus=2, **options)


@contextmanager
def two_nodes() -> Iterator[TwoNodes]:
    import ray
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))  # where shards find the tests' policies
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
        cluster.add_node(num_cpus=2)
    try:
        ray.init(address=cluster.address, namespace="rollout", log_to_driver=False)
        yield TwoNodes(cluster)
    finally:
        ray.shutdown()
        cluster.shutdown()
