"""Documents with Python blocks: finds the blocks, and runs those of one document in one interpreter.

A document is Markdown with fences, or a page that was saved as plain text: that has no fences, and its code has lost
its indentation, which `indented` gives back. Run as a program, this file executes the blocks that it reads from stdin
(a JSON list) in order, in one namespace, and prints what each has printed and left behind, as JSON.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tokenize
from contextlib import redirect_stdout
from io import StringIO
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_FENCED = re.compile(r"^```(?:python|\{code-cell\})[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
_BEGINS = re.compile(r"(from|import) \w|for \w.*:$|[a-z_]+\.[a-z_]+\(|[A-Za-z_][\w.]*(\[.+\])? = ")
_PROSE = re.compile(r"[\u4e00-\u9fff\u00b6]")
_STEP = " " * 4


class Ran(NamedTuple):
    """One block after its run: what it printed, and every name that holds JSON then."""

    stdout: str
    names: dict[str, Any]


def blocks(text: str) -> list[str]:
    """The Python blocks of a document, in order, ready to be compiled."""
    return _FENCED.findall(text) or [indented(block) for block in _saved(text)]


def _saved(text: str) -> list[str]:
    """Runs of lines of code of a page without fences: each from a statement to the next line of prose."""
    found: list[list[str]] = []
    inside = False
    for line in text.splitlines():
        if _PROSE.search(line):
            inside = False
        elif inside:
            found[-1].append(line)
        elif _BEGINS.match(line):
            inside = True
            found.append([line])
    return ["\n".join(lines) + "\n" for lines in found]


def indented(block: str) -> str:
    """The block with an indentation: what follows a line that ends in a colon is its body, to the block's end."""
    source, lines, level, brackets = block.splitlines(), list[str](), 0, 0
    for token in tokenize.generate_tokens(StringIO(block).readline):
        if token.type == tokenize.OP:
            brackets += (token.string in "([{") - (token.string in ")]}")
        lines += [_STEP * level + line for line in source[len(lines) : token.start[0]]]
        level += token.string == ":" and not brackets and not token.line[token.end[1] :].strip()
    return "\n".join(lines) + "\n"


def imported_from(block: str, modules: Mapping[str, str]) -> str:
    """The block with other modules in its import lines, and nothing else changed."""
    for old, new in modules.items():
        block = re.sub(rf"^(\s*(?:from|import)) {re.escape(old)}(?=[\s.])", rf"\1 {new}", block, flags=re.MULTILINE)
    return block


def run(programs: Sequence[str], variables: Mapping[str, str | None], *, timeout: float) -> list[Ran]:
    """Run the blocks in one new interpreter; `variables` are set, or taken away where they are None.

    Raises AssertionError with the traceback where a block fails.
    """
    environment = {**os.environ, **{name: value for name, value in variables.items() if value is not None}}
    for name in (name for name, value in variables.items() if value is None):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-W", "error", __file__],
        input=json.dumps(list(programs)),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr
    return [Ran(*ran) for ran in json.loads(done.stdout)]


def main() -> None:
    """Execute the blocks of stdin."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    done = []
    for number, block in enumerate(json.load(sys.stdin), 1):
        printed = StringIO()
        with redirect_stdout(printed):
            exec(compile(block, f"<block {number}>", "exec"), namespace)
        done.append((printed.getvalue(), {name: value for name, value in namespace.items() if _is_json(value)}))
        done[-1] = json.loads(json.dumps(done[-1]))  # what a later block changes is not this one's
    print(json.dumps(done))  # noqa: T201  # the answer of this program


def _is_json(value: object) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


if __name__ == "__main__":
    main()
