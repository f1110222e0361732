"""What `get_env_profile(split=...)` asks for, and the variables that decide it.

BFCL's `train` and `val` are sides of the sub-type that DATASET_SUB_TYPE names (default multi_turn). A file that
BFCL_SPLID_ID_PATH names and that exists, JSON of {"train": [ids], "val": [ids]}, takes its place; where it does not
exist its name tells the sub-type (`live_split_ids.json`), as that of BFCL_DATA_PATH does (`live_processed.jsonl`).
Every other environment, and every other split, is asked as it is.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

import orjson

from orchestrator.errors import UsageError
from orchestrator.names import unknown

if TYPE_CHECKING:
    from collections.abc import Mapping

BFCL: Final = "bfcl"
SUB_TYPE: Final = "DATASET_SUB_TYPE"
SPLITS: Final = "BFCL_SPLID_ID_PATH"
DATA: Final = "BFCL_DATA_PATH"
DEFAULT: Final = "multi_turn"
_SIDES: Final = ("train", "val")
_NAMED: Final = re.compile(r"([a-z_]+?)_(?:split_ids\.json|processed\.jsonl)")


def resolve(environment: str, split: str, variables: Mapping[str, str]) -> str | list[str]:
    """A split of the environment, or the ids themselves where a file holds them. Raises UsageError."""
    if environment != BFCL or split not in _SIDES:
        return split
    if (named := variables.get(SPLITS)) and (path := Path(named)).is_file():
        return _ids(path, split)
    return f"{_sub_type(variables)}:{split}"


def _sub_type(variables: Mapping[str, str]) -> str:
    if chosen := variables.get(SUB_TYPE):
        return chosen
    for name in (SPLITS, DATA):
        if path := variables.get(name):
            if (match := _NAMED.fullmatch(Path(path).name)) is None:
                raise UsageError(f"{name} is {path!r}, which does not exist; set {SUB_TYPE} to choose a part of BFCL")
            return match[1]
    return DEFAULT


def _ids(path: Path, split: str) -> list[str]:
    try:
        table = orjson.loads(path.read_bytes())
    except (OSError, orjson.JSONDecodeError) as error:
        raise UsageError(f"{SPLITS}: {path} cannot be read: {error}") from None
    if not isinstance(table, dict):
        raise UsageError(f'{SPLITS}: {path} must hold {{"train": [ids], "val": [ids]}}')
    if split not in table:
        raise unknown("split", split, table)
    ids = table[split]
    if not (isinstance(ids, list) and all(isinstance(task, str) for task in ids)):
        raise UsageError(f"{SPLITS}: {split!r} of {path} must be a list of ids")
    return ids
