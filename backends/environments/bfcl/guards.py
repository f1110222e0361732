"""Refusals of arguments that would stop the whole process: upstream's simulators trust theirs.

A guard looks at a simulator and the arguments of one call and says why the call is refused, or None. A session shares
its process with thousands of others, and C code that works on a huge number or Python code that walks a file system
with 2**40 paths cannot be interrupted. The bounds lie far above every call of the ground truth.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Guard = Callable[[Any, Mapping[str, Any]], str | None]

MAX_BITS: Final = 65_536
"""The size of an integer that `power` may compute."""
MAX_DIGITS: Final = 1_000
"""The precision, and the decimal places, that may be asked for."""
MAX_NUMERAL: Final = 64
"""The length of a string given where a number belongs (upstream hands it to mpmath, which reads it)."""
MAX_PATHS: Final = 256 * 1024
"""The length of all paths below a directory together that `find` and `du` may walk."""
MAX_LEVELS: Final = 64
"""How deep they may go; a directory that was copied into itself has no end."""
MAX_KEY: Final = 1_000
"""The length of a memory's key, and of a search for one."""
MAX_MEMORY: Final = 65_536
"""The length that a memory of running text may grow to by replacing (upstream bounds what is put in, not the whole)."""


def _power(_: object, arguments: Mapping[str, Any]) -> str | None:
    match arguments:
        case {"base": int(base), "exponent": int(exponent)} if (
            abs(base) > 1 and base.bit_length() * exponent > MAX_BITS
        ):
            return f"the result of power would have more than {MAX_BITS} bits; use smaller numbers"
    return None


def _digits(name: str) -> Guard:
    def guard(_: object, arguments: Mapping[str, Any]) -> str | None:
        for parameter, value in arguments.items():
            if isinstance(value, str) and len(value) > MAX_NUMERAL:
                return f"{parameter} must be a number"
        value = arguments.get(name)
        try:
            refused = value is not None and abs(int(value)) > MAX_DIGITS
        except (TypeError, ValueError, OverflowError):
            return None  # not a number: the simulator says so itself
        return f"{name} must be at most {MAX_DIGITS}" if refused else None

    return guard


def _walk(start: Any) -> str | None:
    length = 0
    waiting = [(start, 0, 0)]
    while waiting:
        directory, level, prefix = waiting.pop()
        for name, item in directory.contents.items():
            length += prefix + len(name) + 1
            if length > MAX_PATHS or level > MAX_LEVELS:
                return "the directory is too large or contains itself; choose a smaller one"
            if hasattr(item, "contents"):
                waiting.append((item, level + 1, prefix + len(name) + 1))
    return None


def _find(files: Any, arguments: Mapping[str, Any]) -> str | None:
    path = arguments.get("path")
    from_root = isinstance(path, str) and path.startswith("/")
    return _walk(files.root if from_root else files._current_dir)  # noqa: SLF001 - upstream names it so


def _du(files: Any, _: Mapping[str, Any]) -> str | None:
    return _walk(files._current_dir)  # noqa: SLF001 - upstream names it so


def _short(name: str) -> Guard:
    def guard(_: object, arguments: Mapping[str, Any]) -> str | None:
        value = arguments.get(name)
        refused = isinstance(value, str) and len(value) > MAX_KEY
        return f"{name} must have at most {MAX_KEY} characters" if refused else None

    return guard


def _replace(memory: Any, arguments: Mapping[str, Any]) -> str | None:
    old, new = str(arguments.get("old_text")), str(arguments.get("new_text"))
    if len(memory.memory) + memory.memory.count(old) * (len(new) - len(old)) > MAX_MEMORY:
        return f"the memory would have more than {MAX_MEMORY} characters; replace with a shorter text"
    return None


GUARDS: Final[Mapping[tuple[str, str], Guard]] = {
    ("MathAPI", "power"): _power,
    ("MathAPI", "logarithm"): _digits("precision"),
    ("MathAPI", "square_root"): _digits("precision"),
    ("MathAPI", "round_number"): _digits("decimal_places"),
    ("GorillaFileSystem", "find"): _find,
    ("GorillaFileSystem", "du"): _du,
    ("MemoryAPI_kv", "core_memory_add"): _short("key"),
    ("MemoryAPI_kv", "core_memory_key_search"): _short("query"),
    ("MemoryAPI_kv", "archival_memory_add"): _short("key"),
    ("MemoryAPI_kv", "archival_memory_key_search"): _short("query"),
    ("MemoryAPI_rec_sum", "memory_replace"): _replace,
}
"""Guards by (simulator, method)."""
