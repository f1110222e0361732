"""Public conformance kits for backends, environments and queues; a backend in memory; faults at random; leaks seen.

None of them needs a test framework: a kit is an async function that raises ConformanceError with the broken promise.
"""

from orchestrator.testing.backend import BACKEND_CHECKS, check_backend
from orchestrator.testing.chaos import SandboxKiller, killed
from orchestrator.testing.environment import check_environment
from orchestrator.testing.faults import FAULT_CHECKS
from orchestrator.testing.harness import run_check
from orchestrator.testing.memory import MemoryBackend
from orchestrator.testing.queue import QueueUnderTest, check_queue
from orchestrator.testing.script import Die, Gone, Hang, MemoryCall, Refuse, Say, Slow

__all__ = [
    "BACKEND_CHECKS",
    "FAULT_CHECKS",
    "Die",
    "Gone",
    "Hang",
    "MemoryBackend",
    "MemoryCall",
    "QueueUnderTest",
    "Refuse",
    "SandboxKiller",
    "Say",
    "Slow",
    "check_backend",
    "check_environment",
    "check_queue",
    "killed",
    "run_check",
]
