"""The environments against their conformance kit: BFCL a sample of each category that can run here."""

from __future__ import annotations

import os

import orjson
import pytest

from backends.environments.catalog import find
from backends.sandboxes.local import LocalBackend
from orchestrator.errors import ConformanceError
from orchestrator.testing import MemoryBackend, check_environment
from orchestrator.testing.environment import junk
from orchestrator.testing.script import MemoryCall, Say

MULTI_TURN = [f"multi_turn_{kind}" for kind in ("base", "miss_func", "miss_param", "long_context")]
SINGLE_TURN = ["simple_python", "simple_java", "parallel_multiple", "irrelevance", "live_simple", "live_relevance"]


@pytest.fixture
def bfcl_installed() -> None:
    if not find("bfcl").installed:
        message = "BFCL is not installed: run `rollout env install bfcl`"
        pytest.fail(message) if os.environ.get("CI") == "true" else pytest.skip(message)


@pytest.mark.parametrize("split", ["", "toy", "toy:train", "toy:val"])
async def test_toy(split: str) -> None:
    await check_environment(lambda: LocalBackend("toy"), split, tasks=4)


@pytest.mark.parametrize("split", [*MULTI_TURN, *SINGLE_TURN])
@pytest.mark.usefixtures("bfcl_installed")
async def test_bfcl(split: str) -> None:
    await check_environment(lambda: LocalBackend("bfcl", auto_install=False), split, tasks=2)


async def test_memory() -> None:
    await check_environment(MemoryBackend, "memory", tasks=2, solved=4.0)


def test_junk_is_what_it_says() -> None:
    actions = junk()
    assert b"" in actions
    assert max(map(len, actions)) > 50_000
    assert sum(_parses(action) for action in actions) > 20
    assert sum(not _parses(action) for action in actions) >= 5


def _parses(action: bytes) -> bool:
    try:
        orjson.loads(action)
    except orjson.JSONDecodeError:
        return False
    return True


def second_sandbox_differs(call: MemoryCall) -> Say | None:
    return Say() if call.op == "step" and call.sandbox == 4 else None


def grading_wears_off(call: MemoryCall) -> Say | None:
    grading_wears_off.count += call.op == "evaluate"  # type: ignore[attr-defined]
    return Say(grade=float(grading_wears_off.count)) if call.op == "evaluate" else None  # type: ignore[attr-defined]


grading_wears_off.count = 0  # type: ignore[attr-defined]


def no_json(call: MemoryCall) -> Say | None:
    return Say(b"[]") if call.op == "open" else None


@pytest.mark.parametrize(
    ("script", "promise"),
    [
        (second_sandbox_differs, "equal actions give equal bytes"),
        (grading_wears_off, "grad"),
        (no_json, "an observation is messages"),
    ],
)
async def test_an_environment_that_breaks_its_contract_is_found_out(script: object, promise: str) -> None:
    with pytest.raises(ConformanceError, match=promise):
        await check_environment(lambda: MemoryBackend(script), "memory", tasks=2, solved=None)  # type: ignore[arg-type]
