"""Sandboxes as containers of a Docker daemon on this machine: `DockerBackend`.

The backend is imported when it is asked for: the reaper lives in this package too, and must stay small while it waits.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from backends.sandboxes.docker.backend import DockerBackend as DockerBackend


def __getattr__(name: str) -> Any:
    if name == "DockerBackend":
        from backends.sandboxes.docker.backend import DockerBackend

        return DockerBackend
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
