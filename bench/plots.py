"""A scenario's figures as a picture: every round is shown, not only what was made of them. Needs matplotlib."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from matplotlib.figure import Figure

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from matplotlib.axes import Axes

    from bench.values import Report

_SIDES: Final = {"bare": "bare loop", "episode": "orchestrator", "step": "with step journal"}


def draw(name: str, report: Report, path: Path) -> Path:
    """Write the picture of a scenario as PNG."""
    figure = Figure(figsize=(7.5, 3.8), layout="constrained")
    axes = figure.subplots()
    match name:
        case "overhead":
            _overhead(axes, report)
        case "density":
            _density(axes, report.result)
        case "docker":
            _docker(axes, report)
        case "agentscope":
            _agentscope(axes, report)
        case "webshop":
            _webshop(axes, report)
        case "appworld":
            _appworld(axes, report)
        case "docker-faults":
            _docker_faults(axes, report)
        case "ray":
            _ray(axes, report.result)
        case _:
            _recovery(axes, report)
    axes.grid(visible=True, axis="y", alpha=0.3)
    figure.savefig(path, dpi=120)
    return path


def _overhead(axes: Axes, report: Report) -> None:
    levels = [int(level) for level in report.result["cpu_us_per_step"]]
    for place, (side, label) in enumerate(_SIDES.items()):
        rows = [row for row in report.rounds if row["side"] == side and row["split"] == report.settings["split"]]
        across = [levels.index(row["concurrency"]) + 0.08 * (place - 1) for row in rows]
        axes.plot(across, [row.get("cpu_us_per_step") or row["bare_us_per_step"] for row in rows], "o", label=label)
    axes.set_xticks(range(len(levels)), [f"{level:,}" for level in levels])
    axes.set(xlabel="episodes at once", ylabel="CPU a step, us", title="Orchestrator CPU a step, every round")
    axes.set_ylim(bottom=0)
    axes.legend()


def _density(axes: Axes, result: Mapping[str, Any]) -> None:
    stages = {"opened": "after opening", "played": "before the last action"}
    bottom = [0.0] * len(stages)
    for who in ("orchestrator", "servers"):
        heights = [result[stage][who] for stage in stages]
        bars = axes.bar(list(stages.values()), heights, bottom=bottom, width=0.5, label=who)
        axes.bar_label(bars, fmt="%.1f", label_type="center")
        bottom = [below + height for below, height in zip(bottom, heights, strict=True)]
    axes.set(ylabel="KiB an episode", title=f"Memory of a live episode, {result['episodes']:,} at once")
    axes.legend()


def _recovery(axes: Axes, report: Report) -> None:
    for workload in ("replay", "chat"):
        kills = [kill for row in report.rounds if row["workload"] == workload for kill in row["kills"]]
        stored = [kill["stored"] / kill["of"] * 100 for kill in kills]
        axes.plot([kill["after_s"] for kill in kills], stored, "x", label=f"{workload}, {len(kills)} kills")
    faults = sum(report.result[name] for name in ("lost", "duplicated", "model_calls_repeated", "processes_left"))
    title = f"{report.result['kills']} kills of the orchestrator: {faults} keys, calls or processes lost or doubled"
    axes.set(xlabel="seconds into a life", ylabel="episodes stored, %", title=title)
    axes.legend()


def _agentscope(axes: Axes, report: Report) -> None:
    for side in ("reference", "ours"):
        rows = [row for row in report.rounds if row["side"] == side]
        axes.plot([row["kib_per_episode"] for row in rows], [row["episodes_per_s"] for row in rows], "o", label=side)
    axes.set(xscale="log", yscale="log", xlabel="KiB a live episode", ylabel="episodes/s", title="BFCL, each alone")
    axes.legend()


def _webshop(axes: Axes, report: Report) -> None:
    for row in report.rounds:
        if times := sorted(row["ms"]):
            share = [place / len(times) * 100 for place in range(1, len(times) + 1)]
            axes.plot(times, share, label=f"{row['side']}, {len(times):,}")
    axes.set(xscale="log", xlabel="milliseconds", ylabel="done within, %", title="WebShop: every step and search")
    axes.legend()


def _appworld(axes: Axes, report: Report) -> None:
    axes.plot([row["create_ms"] for row in report.rounds], [row["mib"] for row in report.rounds], "o")
    axes.set(
        xlabel="milliseconds to open", ylabel="MiB after the task", title="AppWorld: every world, all alive at once"
    )
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)


def _docker(axes: Axes, report: Report) -> None:
    for side in ("local", "docker"):
        rows = [row for row in report.rounds if row["side"] == side]
        axes.plot([row["cpu_us_per_step"] for row in rows], [row["steps_per_s"] for row in rows], "o", label=side)
    axes.set(xlabel="orchestrator's CPU a step, us", ylabel="steps/s", title="Containers and processes, every round")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.legend()


def _docker_faults(axes: Axes, report: Report) -> None:
    rows = [row for row in report.rounds if row.get("noticed_s")]
    for place, row in enumerate(rows):
        late = [seconds - row["deadline_s"] for seconds in row["noticed_s"]]
        axes.plot([place] * len(late), late, "x", label=f"{row['fault']}, {len(late)} strikes")
    axes.set_xticks(range(len(rows)), [row["fault"] for row in rows])
    right, episodes = report.result["episodes_right"], report.result["episodes"]
    title = f"Faults of containers: {right:,} of {episodes:,} episodes right"
    axes.set(ylabel="noticed after its deadline, s", title=title)
    axes.legend()


def _ray(axes: Axes, result: Mapping[str, Any]) -> None:
    used: Mapping[str, Mapping[str, float]] = result["us_per_episode"]
    bottom = [0.0] * len(used)
    for who in ("driver", "shards", "sandboxes", "others"):
        heights = [parts[who] for parts in used.values()]
        axes.bar(list(used), heights, bottom=bottom, width=0.5, label=who)
        bottom = [below + height for below, height in zip(bottom, heights, strict=True)]
    steps, scaling = result["steps_ratio"], result["shards_scaling"]
    title = f"Steps a second on Ray {steps:.2f} of local, two shards {scaling:.2f} of one"
    axes.set(ylabel="CPU an episode, us", title=title)
    axes.legend()
