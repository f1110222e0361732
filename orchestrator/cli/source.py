"""A configuration file with the line of each key, so that a refused value can be shown where it stands."""

from __future__ import annotations

from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import yaml

from orchestrator.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence
    from pathlib import Path

    from pydantic_core import ErrorDetails


@dataclass(frozen=True, slots=True)
class Source:
    """A parsed YAML mapping; empty where there is no file."""

    path: Path | None = None
    values: Mapping[str, object] = field(default_factory=dict)
    root: yaml.Node | None = None

    @classmethod
    def read(cls, path: Path) -> Source:
        """Parse a file with YAML's safe subset. Raises UsageError with the file and line."""
        try:
            text = path.read_text(encoding="utf-8")
            root = yaml.compose(text, Loader=yaml.SafeLoader)
            values = yaml.safe_load(text)
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"cannot read the configuration {path}: {error}") from None
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            place = f"{path}:{mark.line + 1}" if mark else str(path)
            raise UsageError(f"{place}: not YAML: {getattr(error, 'problem', None) or error}") from None
        if root is None:
            return cls(path)
        if not isinstance(values, dict):
            raise UsageError(f"{path}:1: a configuration is a mapping, such as `env: bfcl`")
        _refuse_duplicates(path, root)
        return cls(path, values, root)

    def explain(self, error: ErrorDetails, given: Mapping[str, object], known: Collection[str]) -> str:
        """One refused value as `place: pydantic's message`, with the nearest known key for an unknown one."""
        loc = error["loc"]
        key = str(loc[-1]) if loc else ""
        message = error["msg"]
        if error["type"] == "extra_forbidden" and (close := get_close_matches(key, sorted(known), n=1)):
            belongs = f"it does not belong to {' '.join(map(str, loc[:-1]))}" if close[0] == key else ""
            message += f" ({belongs or f'did you mean {close[0]!r}?'})"
        elif error["type"] == "value_error":
            message = str(error["ctx"]["error"])  # ours, and whole
        elif error["type"] == "missing":
            message += f" (give {option(key)}, or `{key}:` in a file named by --config)"
        elif error["type"] not in {"union_tag_invalid", "union_tag_not_found"}:
            message += f", not {error['input']!r:.60}"
        named = next((number for number in reversed(range(len(loc))) if str(loc[number]) in given), None)
        if named is not None:
            return f"{' '.join((option(str(loc[named])), *map(str, loc[named + 1 :])))}: {message}"
        dotted = ".".join(str(part) for part in loc)
        return f"{self._place(loc)}{dotted}: {message}"

    def _place(self, loc: Sequence[int | str]) -> str:
        if self.path is None:
            return ""
        line = _line(self.root, loc) if self.root is not None else 1
        return f"{self.path}:{line}: "


def option(key: str) -> str:
    """The option of a key."""
    return f"--{key.replace('_', '-')}"


def _line(node: yaml.Node, loc: Sequence[int | str]) -> int:
    """The line of the deepest key of `loc` that the file has; pydantic's union tags are not in it and passed over."""
    line = node.start_mark.line + 1
    for part in loc:
        children = _children(node)
        if part in children:
            key, node = children[part]
            line = key.start_mark.line + 1
    return line


def _children(node: yaml.Node) -> dict[Any, tuple[yaml.Node, yaml.Node]]:
    if isinstance(node, yaml.MappingNode):
        return {key.value: (key, value) for key, value in node.value}
    if isinstance(node, yaml.SequenceNode):
        return {index: (item, item) for index, item in enumerate(node.value)}
    return {}


def _refuse_duplicates(path: Path, node: yaml.Node) -> None:
    """YAML's own loader lets the last of two equal keys win without a word."""
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise UsageError(f"{path}:{key.start_mark.line + 1}: {key.value!r} is given twice; keep one")
            seen.add(str(key.value))
    for _, child in _children(node).values():
        _refuse_duplicates(path, child)
