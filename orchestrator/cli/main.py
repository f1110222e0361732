"""The command `rollout`: its commands and its exit codes.

0 done; 1 the run failed, or stdout could not be written; 2 the command was used wrongly (one line says what to do);
3 drained before the end, go on with `rollout resume DIR`; 130 cancelled. Commands import what they need when they run,
so that `--help` is quick.
"""

from __future__ import annotations

import os
import sys
from typing import Final, TextIO

import typer

from orchestrator.cli import bench, collect, doctor, env, export, image, reap, resume, serve, show, status, tasks
from orchestrator.cli.exits import CANCELLED, FAILED, USAGE
from orchestrator.errors import RolloutError, UsageError

STDERR: Final = 2

app = typer.Typer(
    name="rollout",
    help="Run agent episodes across sandboxes and land each exactly once in a durable queue.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)
app.command("collect")(collect.collect)
app.command("resume")(resume.resume)
app.command("serve")(serve.serve)
app.command("status")(status.status)
app.command("show")(show.show)
app.command("export")(export.export)
app.command("tasks")(tasks.tasks)
app.add_typer(env.app, name="env")
app.add_typer(image.app, name="image")
app.command("reap")(reap.reap)
app.command("doctor")(doctor.doctor)
app.command("bench")(bench.bench)


def main() -> None:
    """The entry point: runs the command and turns errors into a line and an exit code."""
    keep_places()
    try:
        app()
    except UsageError as error:
        fail(error, USAGE)
    except RolloutError as error:
        fail(error, FAILED)
    except KeyboardInterrupt:
        sys.exit(CANCELLED)
    finally:
        let_go(sys.stdout)
        let_go(sys.stderr)


def keep_places() -> None:
    """Take up the standard descriptors that are closed: else the next file that is opened would be stdout."""
    while (file := os.open(os.devnull, os.O_RDWR)) <= STDERR:
        pass
    os.close(file)


def let_go(stream: TextIO | None) -> None:
    """Flush, so that what cannot be written is no second error at exit, when Python flushes again."""
    if stream is None:
        return
    try:
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def fail(error: RolloutError, code: int) -> None:
    """Say what went wrong, without a traceback, and exit."""
    from orchestrator.cli.output import printable, say

    say(f"rollout: {printable(str(error))}")
    sys.exit(code)
