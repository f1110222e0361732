"""Where the engine's episodes are played: `Player`, and the one that plays them in this process.

The scheduler says what runs when, the store keeps what came of it; in between a player turns a key into a trajectory.
Always true: a try ends in a trajectory, or in `Unplayed` with what it has recorded, from which any player can go on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from orchestrator.episode import Episode
from orchestrator.errors import PolicyError, SandboxError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from orchestrator.episode import EpisodeServices, EpisodeSettings
    from orchestrator.journal import Journal
    from orchestrator.records import EpisodeBuffer
    from orchestrator.types import EpisodeKey, Failure, Trajectory


class Unplayed(Exception):
    """A try that ended without a trajectory: why, and what was recorded until then."""

    def __init__(self, failure: Failure, buffer: EpisodeBuffer) -> None:
        super().__init__(failure.message)
        self.failure = failure
        self.buffer = buffer


class Player(Protocol):
    """Plays episodes, as many at once as it is given."""

    async def play(self, key: EpisodeKey, attempt: int, buffer: EpisodeBuffer) -> Trajectory:
        """Play one to its end, from where `buffer` stands. Raises Unplayed, RolloutError where the run cannot go on.

        Cancelled: sessions are closed; what a journal holds can be resumed.
        """
        ...

    def stored(self, keys: Sequence[EpisodeKey]) -> None:
        """These trajectories are durable: what was kept to play them again is not needed any more."""
        ...

    def cpu_seconds(self) -> float:
        """User + system CPU of all sandboxes so far."""
        ...

    def own_cpu_seconds(self) -> float:
        """User + system CPU of what plays outside this process, sandboxes apart."""
        ...


class LocalPlayer:
    """Plays in this process, on its own sandboxes. `journal` makes steps durable."""

    def __init__(self, settings: EpisodeSettings, services: EpisodeServices, journal: Journal | None) -> None:
        self._settings = settings
        self._services = services
        self._journal = journal

    async def play(self, key: EpisodeKey, attempt: int, buffer: EpisodeBuffer) -> Trajectory:
        """See `Player.play`. The one place where an episode's exception becomes data."""
        try:
            return await Episode(key, attempt, buffer, self._settings, self._services).run()
        except (SandboxError, PolicyError) as error:
            raise Unplayed(error.failure, buffer) from error

    def stored(self, keys: Sequence[EpisodeKey]) -> None:
        """See `Player.stored`."""
        if self._journal is not None:
            for key in keys:
                self._journal.forget(key)

    def cpu_seconds(self) -> float:
        """See `Player.cpu_seconds`."""
        return self._services.pool.cpu_seconds()

    def own_cpu_seconds(self) -> float:
        """See `Player.own_cpu_seconds`."""
        return 0.0
