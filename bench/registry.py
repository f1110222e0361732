"""The scenarios by name, and the one way to run one: measure, write the JSON file, draw the plot beside it."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import orjson

from bench.agentscope import agentscope
from bench.appworld import appworld
from bench.density import density
from bench.docker import docker
from bench.docker_faults import docker_faults
from bench.machine import describe, versions
from bench.overhead import overhead
from bench.ray import ray
from bench.recovery import recovery
from bench.webshop import webshop
from orchestrator.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from bench.values import Report, Say, Scenario, Sizes

SCHEMA: Final = 1
"""Of the JSON file."""

SCENARIOS: Final[Mapping[str, Scenario]] = {
    "overhead": overhead,
    "density": density,
    "recovery": recovery,
    "docker": docker,
    "docker-faults": docker_faults,
    "webshop": webshop,
    "appworld": appworld,
    "agentscope": agentscope,
    "ray": ray,
}
_KILLING: Final = ("recovery", "docker-faults")


async def conduct(name: str, sizes: Sizes, out: Path, say: Say) -> Report:
    """Run a scenario, write `out` (JSON) and, with matplotlib, the plot beside it (PNG). Returns what it found.

    Raises UsageError where the sizes or the path make no sense, RunFailed where a measurement is none. Cancelled: all
    processes are ended, and nothing is written.
    """
    if sizes.kills is not None and name not in _KILLING:
        raise UsageError(f"{name} kills nothing: --kills belongs to {' and '.join(_KILLING)}")
    work = await asyncio.to_thread(_working_directory, out)
    keep = False
    try:
        machine = await asyncio.to_thread(describe, work)
        report = await SCENARIOS[name](sizes, work, say)
        keep = report.evidence
        await asyncio.to_thread(_write, out, _document(name, sizes, machine, report))
    finally:
        if not keep:
            await asyncio.to_thread(shutil.rmtree, work, ignore_errors=True)
    if keep:
        say(f"something is wrong: the runs that show it are kept in {work}")
    if find_spec("matplotlib") is None:
        say("no plot: it needs matplotlib, `pip install 'rollout-orchestrator[plots]'`")
    else:
        from bench.plots import draw

        say(f"plot: {await asyncio.to_thread(draw, name, report, out.with_suffix('.png'))}")
    return report


def _working_directory(out: Path) -> Path:
    """On the disk that results lie on: /tmp may be memory, where a sync costs nothing."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f".{out.stem}-", dir=out.parent.absolute()))
    except OSError as error:
        raise UsageError(
            f"{out} cannot be written ({error.strerror}: {error.filename}): choose another file"
        ) from error


def _document(name: str, sizes: Sizes, machine: Mapping[str, Any], report: Report) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "scenario": name,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine,
        "versions": versions(),
        "sizes": sizes,
        "settings": report.settings,
        "result": report.result,
        "rounds": report.rounds,
    }


def _write(out: Path, document: Mapping[str, Any]) -> None:
    try:
        out.write_bytes(orjson.dumps(document, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
    except OSError as error:
        raise UsageError(f"{out} cannot be written ({error.strerror}): choose another file") from error
