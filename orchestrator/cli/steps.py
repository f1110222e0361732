"""Progress of a build or a pull: a bar on a terminal, a line a step elsewhere."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from orchestrator.cli.output import people, printable, say

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from backends.sandboxes.docker.port import Step


@contextmanager
def steps_shown(title: str) -> Iterator[Callable[[Step], None]]:
    """Something to call with each step, on stderr; silent until the first."""
    console = people()
    if console.is_terminal and not console.is_dumb_terminal:
        columns = (
            TextColumn("{task.fields[title]}"),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
        )
        with Progress(*columns, console=console, transient=True) as bar:
            yield _on_bar(bar, title)
    else:
        yield _in_lines(title)


def _on_bar(bar: Progress, title: str) -> Callable[[Step], None]:
    task = bar.add_task("", title=title, total=None, visible=False)

    def show(step: Step) -> None:
        text = printable(step.text).partition("\n")[0]
        bar.update(task, visible=True, description=text, completed=step.done, total=step.total or None)

    return show


def _in_lines(title: str) -> Callable[[Step], None]:
    last = ""

    def show(step: Step) -> None:
        nonlocal last
        text = printable(step.text).partition("\n")[0]
        if text != last:
            of = f" {step.done + 1}/{step.total}" if 0 < step.total < 1000 else ""
            say(f"{title}{of}: {text}")
        last = text

    return show
