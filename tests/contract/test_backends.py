"""The backends against their conformance kit: every check a test of its own."""

from __future__ import annotations

import os

import pytest

from backends.environments.catalog import find
from backends.sandboxes.local import LocalBackend
from orchestrator.errors import ConformanceError
from orchestrator.testing import BACKEND_CHECKS, FAULT_CHECKS, Die, MemoryBackend, Slow, check_backend, run_check


def toy() -> LocalBackend:
    return LocalBackend("toy")


def bfcl() -> LocalBackend:
    return LocalBackend("bfcl", auto_install=False)


@pytest.fixture
def bfcl_installed() -> None:
    if not find("bfcl").installed:
        message = "BFCL is not installed: run `rollout env install bfcl`"
        pytest.fail(message) if os.environ.get("CI") == "true" else pytest.skip(message)


@pytest.mark.parametrize("name", BACKEND_CHECKS)
async def test_memory(name: str) -> None:
    await run_check(BACKEND_CHECKS[name], MemoryBackend)


@pytest.mark.parametrize("name", BACKEND_CHECKS)
async def test_local(name: str) -> None:
    await run_check(BACKEND_CHECKS[name], toy)


@pytest.mark.parametrize("name", FAULT_CHECKS)
async def test_local_under_faults(name: str) -> None:
    await run_check(FAULT_CHECKS[name], toy)


@pytest.mark.parametrize("name", BACKEND_CHECKS)
@pytest.mark.usefixtures("bfcl_installed")
async def test_local_with_bfcl(name: str) -> None:
    await run_check(BACKEND_CHECKS[name], bfcl)


async def test_the_whole_kit_in_one_call() -> None:
    await check_backend(MemoryBackend)


class Forgetful(MemoryBackend):
    """Says that nothing is alive, whatever is."""

    async def owned_by(self, run: object) -> list[object]:  # type: ignore[override]
        return []


class Undead(MemoryBackend):
    """Destroys nothing."""

    async def destroy(self, sandbox: object) -> None:
        return None


def dying() -> MemoryBackend:
    return MemoryBackend(lambda call: Die() if call.op == "step" else None)


def never_done() -> MemoryBackend:
    return MemoryBackend(lambda call: Slow(1e6) if call.op == "evaluate" else None)


@pytest.mark.parametrize("make", [Forgetful, Undead, dying])
async def test_a_backend_that_breaks_its_contract_is_found_out(make: type[MemoryBackend]) -> None:
    with pytest.raises(ConformanceError):
        await check_backend(make)


@pytest.mark.looptime
async def test_a_backend_that_never_answers_is_found_out() -> None:
    with pytest.raises(ConformanceError, match="did not end within"):
        await run_check(BACKEND_CHECKS["evaluate"], never_done)
