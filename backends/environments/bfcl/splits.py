"""Which tasks a split holds: `NAME`, `NAME:train` or `NAME:val`.

NAME is one of upstream's sub-types or one category. The order is the data's: categories as upstream lists them, tasks
as their file does. Train and val together are the whole split, without overlap; which of the two a task is in is a
fixed function of its id, the same in every split: val holds every task whose `scenario` has a blake2b digest divisible
by five, about a fifth. The four multi-turn variants of one scenario (base, miss_func, miss_param, long_context with
the same number) stand on the same side, as do the memory variants (kv, vector, rec_sum) of one question, so that no
training task gives away a validation task.
"""

from __future__ import annotations

import re
from functools import cache
from hashlib import blake2b
from typing import Final

from backends.environments.bfcl import data, upstream
from backends.server.environment import Tasks, unavailable, unknown_split, unknown_task

DEFAULT: Final = "multi_turn"

_SEARCH: Final = "internet access, a SERPAPI_API_KEY and the packages requests, beautifulsoup4, html2text, serpapi"
NEEDS: Final = {
    "web_search_base": _SEARCH,
    "web_search_no_snippet": _SEARCH,
    "memory_vector": "sentence-transformers, faiss-cpu and the model all-MiniLM-L6-v2, which must be downloaded",
    "format_sensitivity": "answers as text in each of upstream's prompt formats, not as tool calls",
}
"""The categories that cannot run here, and what each needs."""

_VARIANT: Final = re.compile(r"(multi_turn|memory)_[a-z_]+_(\d+)(?:-[a-z]+-\d+)?")


def scenario(task: str) -> str:
    """What a task shares with its variants: `multi_turn_7` for the four of them, else the task's own id."""
    variant = _VARIANT.fullmatch(task)
    return f"{variant[1]}_{variant[2]}" if variant else task


def in_val(task: str) -> bool:
    """Whether a task belongs to val rather than train."""
    digest = blake2b(scenario(task).encode(), digest_size=8).digest()
    return int.from_bytes(digest) % 5 == 0


@cache
def names() -> tuple[str, ...]:
    """All names a split may have: the sub-types, then the categories."""
    groups = upstream.collections()
    return (*groups, *(category for category in groups["all"] if category not in groups))


def resolve(split: str) -> Tasks:
    """The tasks of a split; "" is the default split. Raises EnvironmentFault: unknown split, or nothing of it can run.

    What is left out is named with the size of the whole category, whichever side was asked for.
    """
    name, _, side = (split or DEFAULT).partition(":")
    if name not in names() or (side not in ("train", "val") and ":" in split):
        raise unknown_split(split, [*names(), "each also with :train or :val"])
    categories = upstream.collections().get(name, (name,))
    if all(category in NEEDS for category in categories):
        raise unavailable(name, "; ".join(dict.fromkeys(NEEDS[category] for category in categories)))
    ids = [task for category in categories if category not in NEEDS for task in data.lines(category).ids]
    if side:
        ids = [task for task in ids if in_val(task) == (side == "val")]
    return Tasks(ids, {category: (_count(category), NEEDS[category]) for category in categories if category in NEEDS})


def check(task: str) -> str:
    """The category of a task that can run here. Raises EnvironmentFault otherwise."""
    category = data.category_of(task)
    if category in NEEDS or task.startswith("format_sensitivity"):
        raise unavailable(task, NEEDS.get(category, NEEDS["format_sensitivity"]))
    if category not in upstream.collections()["all"]:
        raise unknown_task(task, "ids look like multi_turn_base_0; list them by split")
    return category


@cache
def _count(category: str) -> int:
    if category == "format_sensitivity":
        return data.format_sensitivity_count() * upstream.prompt_formats()
    return data.count("web_search") if category.startswith("web_search") else len(data.lines(category).ids)
