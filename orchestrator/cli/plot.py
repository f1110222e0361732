"""A run as a picture: episodes in flight and finished over time, and the mean reward of each kind of task."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from orchestrator.errors import Unavailable, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from orchestrator.types import Trajectory


class Course(NamedTuple):
    """What the picture shows. Times are seconds since the first episode began."""

    times: Sequence[float]
    running: Sequence[int]
    finished: Sequence[int]
    rewards: Sequence[tuple[str, float, int]]
    """Kind of task (its name without the number), mean reward, episodes that carry one; in order of appearance."""


def course(trajectories: Iterable[Trajectory]) -> Course:
    """Read the picture's numbers off a run's trajectories."""
    changes: list[tuple[float, int]] = []
    sums: dict[str, tuple[float, int]] = {}
    for trajectory in trajectories:
        changes += [(trajectory.started, 1), (trajectory.finished, -1)]
        if trajectory.reward is not None:
            kind = trajectory.key.task.rstrip("0123456789-").rstrip("_") or trajectory.key.task
            total, count = sums.get(kind, (0.0, 0))
            sums[kind] = (total + trajectory.reward, count + 1)
    changes.sort()
    times, running, finished = [0.0], [0], [0]
    for moment, change in changes:
        times.append(moment - changes[0][0])
        running.append(running[-1] + change)
        finished.append(finished[-1] + (change < 0))
    return Course(times, running, finished, [(kind, total / count, count) for kind, (total, count) in sums.items()])


def draw(title: str, shown: Course, path: Path) -> None:
    """Write the picture as PNG. Raises Unavailable without matplotlib, UsageError where it cannot be written."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise Unavailable("a plot needs matplotlib: `pip install 'rollout-orchestrator[plots]'`") from None
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    over_time, by_kind = figure.subplots(1, 2, width_ratios=(3, 2))
    figure.suptitle(title)
    over_time.step(shown.times, shown.finished, where="post", label="finished")
    over_time.step(shown.times, shown.running, where="post", label="in flight")
    over_time.set(xlabel="seconds", ylabel="episodes")
    over_time.legend()
    over_time.grid(visible=True, alpha=0.3)
    kinds = [f"{kind} ({count:,})" for kind, _, count in shown.rewards]
    bars = by_kind.barh(kinds, [mean for _, mean, _ in shown.rewards])
    by_kind.bar_label(bars, fmt="%.3f", padding=3)
    room = max([1.0, *(mean for _, mean, _ in shown.rewards)]) * 1.2
    by_kind.set(xlabel="mean reward", xlim=(min([0.0, *(mean for _, mean, _ in shown.rewards)]), room))
    by_kind.invert_yaxis()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120, format="png")
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}; choose another place") from None
