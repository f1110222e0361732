"""The environment keeps every promise that recovery, graders and policies rely on."""

from backends.sandboxes.local import LocalBackend
from orchestrator.testing import check_environment


async def test_mygame() -> None:
    await check_environment(lambda: LocalBackend("mygame"), "mygame")
