"""`rollout export`: a run's episodes as JSON lines, each with its `key`.

The file appears when it is whole: it is written beside its place and renamed.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, Literal

import typer

from orchestrator.cli import options

if TYPE_CHECKING:
    from orchestrator.run import Run
    from orchestrator.types import Trajectory


def export(
    run: options.Directory,
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where to write; `-` is stdout.")],
    format_: Annotated[
        Literal["jsonl", "openai"],
        typer.Option("--format", help="jsonl: all that was recorded, by turns; openai: messages and tools."),
    ] = "jsonl",
    outcome: Annotated[str | None, typer.Option(help="Only episodes that ended so.")] = None,
) -> None:
    """Write a run's episodes in the order of their keys, one JSON object a line."""
    import orjson

    from orchestrator.cli.output import say
    from orchestrator.names import unknown
    from orchestrator.run import Run
    from orchestrator.types import Outcome

    if outcome is not None and outcome not in set(Outcome):
        raise unknown("outcome", outcome, Outcome)
    count = 0
    with Run.open(run) as opened, _whole(out) as file:
        row: Callable[[Trajectory], dict[str, Any]] = opened.to_openai if format_ == "openai" else _rows(opened)
        for trajectory in opened.episodes("key"):
            if outcome is None or trajectory.outcome == outcome:
                file.write(orjson.dumps(row(trajectory)) + b"\n")
                count += 1
    say(f"{count:,} episodes{'' if str(out) == '-' else f' in {out}'}")


def _rows(run: "Run") -> Callable[["Trajectory"], dict[str, Any]]:
    """Makes a row of everything that was recorded of an episode; tool sets are named by digest and not repeated."""
    import orjson

    def row(trajectory: "Trajectory") -> dict[str, Any]:
        return {
            "key": str(trajectory.key),
            "task": trajectory.key.task,
            "group": trajectory.key.group,
            "sample": trajectory.key.sample,
            "attempt": trajectory.attempt,
            "incarnations": trajectory.incarnations,
            "outcome": trajectory.outcome.value,
            "stop_reason": trajectory.stop_reason.value,
            "reward": trajectory.reward,
            "steps": trajectory.steps,
            "model_calls": trajectory.model_calls,
            "prompt_tokens": trajectory.prompt_tokens,
            "completion_tokens": trajectory.completion_tokens,
            "failure": trajectory.failure,
            "details": orjson.Fragment(trajectory.details),
            "started": trajectory.started,
            "finished": trajectory.finished,
            "turns": run.transcript(trajectory),
        }

    return row


@contextmanager
def _whole(path: Path) -> Iterator[BinaryIO]:
    """A file that takes its name when the block ends well. Raises UsageError where it cannot be written."""
    import os
    import sys

    from orchestrator.errors import UsageError

    if str(path) == "-":
        yield sys.stdout.buffer
        return
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            yield file
        part.replace(path)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}; choose another place") from None
    finally:
        part.unlink(missing_ok=True)
