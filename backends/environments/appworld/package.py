"""The package `appworld` in this process: loaded, warmed up, and told where to read and where to write.

Always true: the package reads the registered data where it lies, and writes into a fresh temporary folder for each
world; it never reads a `.env` file; where no world is open, it has no thread and no open database.
"""

from __future__ import annotations

import os
import tempfile
from functools import cache
from pathlib import Path
from typing import Final

from backends.server.environment import unavailable

SEED: Final = 100
"""The package's own default, which its ground truth was made with."""
_COMMON: Final = (
    """\
profile = apis.supervisor.show_profile()
for account in apis.supervisor.show_account_passwords():
    app = account["account_name"]
    user = profile["phone_number" if app == "phone" else "email"]
    print(apis[app].login(username=user, password=account["password"]))
""",
    "1 / 0",
)
"""What most episodes do: calls, logging in, failing."""


def load(data: Path) -> None:
    """Import the package, its apps, and what of ours needs them. Raises EnvironmentFault where it cannot be had.

    The package remembers paths, for this process and all that are forked from it.
    """
    os.environ["APPWORLD_ROOT"] = str(data)
    os.environ["APPWORLD_CACHE"] = os.environ["IPYTHONDIR"] = tempfile.mkdtemp(prefix="appworld-")
    os.environ["PYTHON_DOTENV_DISABLED"] = "1"  # else it would take in the first `.env` above its own folder
    try:
        from appworld.collections.apis import ApiCollection  # noqa: F401  # imports the apps' routes
    except ImportError as error:
        message = "the package appworld with its apps unpacked: run `rollout env install appworld`"
        raise unavailable("AppWorld", f"{message} ({error})") from None
    from backends.environments.appworld import grading, session  # noqa: F401


def warm_up(task: str) -> None:
    """Open a world and let it run some code, so that whatever the package keeps is kept from now on.

    What is done here is not done in a forked process, where all memory that is written to becomes its own: the apps'
    routes are built, and the clocks stopped, at no time that matters (the first to stop them goes through all modules).
    """
    from appworld import requester
    from appworld.apps.api_lib import set_local_date_and_time
    from appworld.common.constants import DEFAULT_SYSTEM_DATETIME

    from backends.environments.appworld.world import World

    requester.build_main_app = cache(requester.build_main_app)
    world = World(task)
    try:
        for code in _COMMON:
            world.run(code, 60)
        world.completed()
    finally:
        world.close()
    set_local_date_and_time(DEFAULT_SYSTEM_DATETIME)


def take_outputs() -> Path:
    """A fresh folder for what the package writes, to be given to it as the name of an experiment: it joins paths, and
    this one is absolute."""
    return Path(tempfile.mkdtemp(prefix="world-"))


def without_names(text: str, outputs: Path) -> str:
    """A text in which nothing tells one process's folders from another's."""
    return text.replace(outputs.name, "world").replace(str(outputs.parent), "/session")


def databases(outputs: Path, task: str) -> Path:
    """Where a world's databases are written in its folder, one file of changes for each app."""
    return outputs / "tasks" / task / "dbs"


def forget() -> None:
    """Close whatever worlds and databases the package has open."""
    from appworld.apps import model_lib
    from appworld.environment import AppWorld

    AppWorld.close_all()
    model_lib.get_direct_cached_sqlite3_connection.cache_clear()
