"""`rollout export`: a run's episodes as JSON lines, each with its `key`.

A file appears when it is whole: it is written beside its place and renamed; a link stays and its target is replaced.
What is no regular file (a pipe, a device) is written to as it is. What a sandbox sent is parsed, so that a row is one
line whatever it holds; an episode that cannot be read is left out and counted, and costs no other its row.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, Final, Literal

import typer

from orchestrator.cli import options

if TYPE_CHECKING:
    from orchestrator.run import Run
    from orchestrator.types import Trajectory

_STDOUT: Final = ("-", "/dev/stdout")
"""Names of what the command was given as its output: never replaced by a file."""


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

    from orchestrator.cli.output import printable, say
    from orchestrator.errors import SandboxError
    from orchestrator.names import unknown
    from orchestrator.run import Run
    from orchestrator.types import Outcome

    if outcome is not None and outcome not in set(Outcome):
        raise unknown("outcome", outcome, Outcome)
    count, unreadable, example = 0, 0, ""
    with Run.open(run) as opened, _open(out) as file:
        row: Callable[[Trajectory], dict[str, Any]] = opened.to_openai if format_ == "openai" else _rows(opened)
        for trajectory in opened.episodes("key"):
            if outcome is not None and trajectory.outcome != outcome:
                continue
            try:
                line = orjson.dumps(row(trajectory), option=orjson.OPT_APPEND_NEWLINE)
            except SandboxError as error:
                unreadable += 1
                example = f"{trajectory.key}: {error}"
                continue
            file.write(line)
            count += 1
    if unreadable:
        say(f"{unreadable:,} episodes cannot be read and are left out, such as {printable(example)}")
    say(f"{count:,} episodes{'' if str(out) in _STDOUT else f' in {out}'}")


def _rows(run: "Run") -> Callable[["Trajectory"], dict[str, Any]]:
    """Makes a row of everything that was recorded of an episode; tool sets are named by digest and not repeated."""

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
            "details": _details(trajectory.details),
            "started": trajectory.started,
            "finished": trajectory.finished,
            "turns": run.transcript(trajectory),
        }

    return row


def _details(raw: bytes) -> object:
    """The grade's details; their text where they are not JSON."""
    import orjson

    try:
        return orjson.loads(raw)
    except orjson.JSONDecodeError:
        return raw.decode("utf-8", "replace")


@contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    """Where the rows go. Raises UsageError where a file cannot be written, OutputLost where stdout cannot."""
    from orchestrator.cli.output import asked_for
    from orchestrator.errors import UsageError

    if str(path) in _STDOUT:
        with asked_for() as stdout:
            yield stdout.buffer
        return
    try:
        with path.open("wb") if path.exists() and not path.is_file() else _whole(path) as file:
            yield file
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}; choose another place") from None


@contextmanager
def _whole(path: Path) -> Iterator[BinaryIO]:
    """A regular file that takes its name when the block ends well."""
    import os

    target = Path(os.path.realpath(path))
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            yield file
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
