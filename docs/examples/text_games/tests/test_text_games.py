"""The environment keeps every promise that recovery, graders and policies rely on."""

from backends.sandboxes.local import LocalBackend
from orchestrator.testing import check_environment


async def test_text_games() -> None:
    await check_environment(lambda: LocalBackend("text_games"), "text_games", tasks=4)
