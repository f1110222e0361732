"""Script for the environment's own interpreter: plays WebShop as a server's sessions do, prints one JSON row.

`python webshop_inside.py GOALS`, with ROLLOUT_DATA naming the catalogue where it is not the shipped one. Every time is
that of one call of `Session.step`, page and all. Where the folder holds golden rankings, every query is searched in a
visit of its own and the first page is read as an agent would read it.
"""

from __future__ import annotations

import gc
import sys
import time
import tracemalloc
from typing import TYPE_CHECKING, Any

import orjson

from backends.environments.webshop import catalogue
from backends.environments.webshop.inside import WebShop
from backends.environments.webshop.shop import Shop

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from backends.server.environment import Session

GOLDEN = "bm25_top50.jsonl"
QUERIES = "human_goals.json"
FIRST_PAGE = 10
LIVE = 1000


def main() -> None:
    """Measure and print."""
    goals, source = int(sys.argv[1]), catalogue.folder()
    started = time.perf_counter()
    shop = Shop(source)
    started = time.perf_counter() - started
    webshop = WebShop(shop)
    tasks = webshop.tasks("").ids[:goals]
    row = {
        "products": len(shop.products),
        "start_s": started,
        **_searched(webshop, source, tasks[0], goals),
        **_played(webshop, tasks),
        "kib_per_session": _weight(webshop, tasks),
    }
    sys.stdout.write(orjson.dumps(row).decode() + "\n")


def _searched(webshop: WebShop, source: Path, task: str, count: int) -> dict[str, Any]:
    """The golden rankings: how many first pages are identical, and what a search takes that nobody made before."""
    if not (source / GOLDEN).exists() or not (source / QUERIES).exists():
        return {"queries": 0, "identical_top10": None, "search_ms": []}
    queries = orjson.loads((source / QUERIES).read_bytes())
    golden = [orjson.loads(line) for line in (source / GOLDEN).read_bytes().splitlines()[:count]]
    identical, times = 0, []
    for entry in golden:
        visit, _ = webshop.open(task, 0, {"actions": True})
        body, took = _step(visit, _search(queries[entry["q"]]))
        times.append(took)
        identical += _shown(body) == [asin.lower() for asin in entry["top"][:FIRST_PAGE]]
    return {"queries": len(golden), "identical_top10": identical, "search_ms": times}


def _played(webshop: WebShop, tasks: Sequence[str]) -> dict[str, Any]:
    """The known solutions, step by step."""
    times: list[float] = []
    rewards: list[float] = []
    for task in tasks:
        visit, _ = webshop.open(task, 0, {})
        times += (_step(visit, action)[1] for action in webshop.solution(task))
        rewards.append(visit.evaluate({}).reward)
    return {"goals": len(rewards), "reward_one": rewards.count(1.0), "step_ms": times}


def _weight(webshop: WebShop, tasks: Sequence[str]) -> float:
    """KiB of Python objects that a visit holds once a product is looked at."""
    tracemalloc.start()
    gc.collect()
    before = tracemalloc.get_traced_memory()[0]
    live = [_looking(webshop, tasks[number % len(tasks)]) for number in range(LIVE)]
    gc.collect()
    weight = (tracemalloc.get_traced_memory()[0] - before) / len(live) / 1024
    tracemalloc.stop()
    return weight


def _looking(webshop: WebShop, task: str) -> Session:
    visit, _ = webshop.open(task, 0, {})
    for action in webshop.solution(task)[:-1]:
        visit.step(action)
    return visit


def _step(visit: Session, action: bytes) -> tuple[bytes, float]:
    """An observation and the milliseconds that it took."""
    started = time.perf_counter_ns()
    reply: Any = visit.step(action)
    return reply.body, (time.perf_counter_ns() - started) / 1e6


def _search(words: str) -> bytes:
    function = {"name": "search", "arguments": orjson.dumps({"keywords": words}).decode()}
    call = {"id": "c", "type": "function", "function": function}
    return orjson.dumps({"role": "assistant", "content": None, "tool_calls": [call]})


def _shown(body: bytes) -> list[str]:
    """The products on a page of results, from its list of buttons."""
    text: str = orjson.loads(body)["messages"][0]["content"]
    return list(_products(orjson.loads(text.rpartition("\n")[2])["clickables"]))


def _products(buttons: Sequence[str]) -> Iterator[str]:
    return (button for button in buttons if button not in ("back to search", "next >"))


if __name__ == "__main__":
    main()
