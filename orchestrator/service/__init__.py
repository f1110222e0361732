"""The HTTP service: sandboxes for clients of AgentScope Runtime's two protocols, and for our own wire.

`Service` is the whole of it; `rollout serve` runs one. `limits` says what it admits, `tenants` who may
ask, `hall` keeps an environment's sandboxes up, `register` keeps the instances that clients hold; `env_service`,
`manager` and `wire` are the three ways in, `routes` what the first two share and `replies` what the third one sends;
`door` is the listening socket.
"""

from orchestrator.service.limits import ServiceLimits
from orchestrator.service.server import Service

__all__ = ["Service", "ServiceLimits"]
