"""AppWorld on real sandboxes: the contract of environments, and the truth that a session cannot reach."""

from __future__ import annotations

import pytest

from backends.sandboxes.local import LocalBackend
from orchestrator.testing import check_environment

pytestmark = pytest.mark.usefixtures("home")


def backend() -> LocalBackend:
    return LocalBackend("appworld", unsafe=True, auto_install=False)


async def test_it_keeps_the_contract_of_environments() -> None:
    await check_environment(backend, "appworld", tasks=1, limit_s=240)
