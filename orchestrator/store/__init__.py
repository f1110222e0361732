"""The durable store of one run: trajectories, the outbox of whole groups, tool sets, and who has claimed what.

One SQLite file in WAL mode. The orchestrator is the only writer of results (`Store`); consumers in any process claim
and acknowledge groups (`Claims`); anyone may read while the run goes on (`StoreReader`). What is always true, and
held by the schema itself wherever SQL can say it:

1. A key has at most one row in `trajectories`; a row is never changed or deleted.
2. A row of an older run epoch than the run's is refused, so an orchestrator that was given up cannot write late.
3. A group reaches the outbox once, whole, in the transaction of its last trajectory; outbox numbers have no gaps.
4. For each consumer every group numbered up to its frontier has been claimed at least once, and none beyond.
"""

from orchestrator.store.claims import Claim, Claims
from orchestrator.store.reader import StoreReader
from orchestrator.store.schema import holds_run
from orchestrator.store.store import Store
from orchestrator.store.values import CommittedEpisode, RunMeta, Totals

__all__ = [
    "Claim",
    "Claims",
    "CommittedEpisode",
    "RunMeta",
    "Store",
    "StoreReader",
    "Totals",
    "holds_run",
]
