"""WebShop: whether its search ranks as upstream's does, what its goals are worth, what a step costs.

- `identical_top10`: of `queries` golden rankings (Anserini's, over the same products), how many first pages show the
  same ten products in the same order; None where the data folder holds none.
- `step_p50_ms`, `step_p99_ms`: of every step of the known solutions, inside the sandbox, page and all;
  `search_p50_ms`: of the golden searches alone, each made for the first time.
- `reward_one`: known solutions that earn 1.0. Upstream's own code gives 1.0 to 1,861 of the first 2,000 of the
  1,000-product set; an option of the others cannot match by its rules.
- `start_s`: loading and indexing the catalogue. `kib_per_session`: Python objects of a visit in the middle of it.

The catalogue is the registered one (`rollout env data webshop --from DIR`), else the folder `shared/data/webshop`
beside a checkout of this project, else the small one that ships with it. To falsify it: `rounds` holds every time.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from statistics import quantiles
from typing import TYPE_CHECKING, Any, Final

from backends.environments.catalog import find, stage
from backends.environments.install import install
from bench.values import Report
from bench.workers import row_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from backends.environments.catalog import EnvironmentSpec
    from bench.values import Row, Say, Sizes

GOALS: Final = 2000
SCRIPT: Final = Path(__file__).with_name("webshop_inside.py")
BESIDE: Final = Path(__file__).parents[2] / "shared" / "data" / "webshop"


async def webshop(sizes: Sizes, work: Path, say: Say) -> Report:
    """Measure it. Raises Unavailable where WebShop cannot be installed, RunFailed where the measurement fails."""
    spec = find("webshop")
    python = await install(spec, progress=say)
    source = await asyncio.to_thread(_catalogue, spec)
    say(f"catalogue: {source or 'the shipped one'}")
    staged = await asyncio.to_thread(stage, spec)
    row = await _measure(python, staged, source, sizes.episodes or GOALS, work)
    steps, searches = row.pop("step_ms"), row.pop("search_ms")
    result = {**row, **_figures("step", steps), **_figures("search", searches)}
    say(
        f"top 10 identical for {row['identical_top10']} of {row['queries']:,} queries, "
        f"{row['reward_one']:,} of {row['goals']:,} goals at 1.0, a step takes {result['step_p50_ms']:.3f} ms"
    )
    settings = {"catalogue": "shipped" if source is None else source.name, "goals": row["goals"]}
    return Report(result, [{"side": "step", "ms": steps}, {"side": "search", "ms": searches}], settings)


def _catalogue(spec: EnvironmentSpec) -> Path | None:
    """Where the real products lie; None for the shipped ones."""
    return spec.data_folder or (BESIDE if BESIDE.is_dir() else None)


async def _measure(python: Path, staged: Path, source: Path | None, goals: int, work: Path) -> Row:
    """Run the script on the environment's interpreter. Cancelled: it is killed."""
    environ = {"PATH": os.environ.get("PATH", ""), "PYTHONPATH": str(staged), "PYTHONDONTWRITEBYTECODE": "1"}
    return await row_of(
        (str(python), str(SCRIPT), str(goals)),
        "the measurement of WebShop",
        cwd=work,
        env=environ if source is None else environ | {"ROLLOUT_DATA": str(source)},
    )


def _figures(name: str, times: Sequence[float]) -> dict[str, Any]:
    """Median and 99th percentile in milliseconds; None of nothing."""
    if len(times) < 2:
        return {f"{name}_p50_ms": None, f"{name}_p99_ms": None}
    cuts = quantiles(times, n=100, method="inclusive")
    return {f"{name}_p50_ms": cuts[49], f"{name}_p99_ms": cuts[98]}
