"""The environment keeps every promise that recovery, graders and policies rely on."""

import pytest

from backends.sandboxes.local import LocalBackend
from orchestrator.testing import check_environment


@pytest.mark.parametrize("split", ["text_games", "cliff"])
async def test_text_games(split: str) -> None:
    await check_environment(lambda: LocalBackend("text_games"), split, tasks=3)
