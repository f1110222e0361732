"""What packages export is sorted, complete and documented; importing them does nothing else."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import subprocess
import sys
from types import ModuleType

import pytest

import backends
import bench
import orchestrator
import policies

ROOTS = (orchestrator, backends, policies, bench)
MODULES = sorted(
    found.name
    for root in ROOTS
    for found in pkgutil.walk_packages(root.__path__, f"{root.__name__}.")
    if not found.name.endswith((".__main__", ".inside"))
    and not any(f".environments.{name}" in found.name for name in ("appworld", "bfcl"))
)
"""All that the project's own environment can import; what `appworld` and `bfcl` need is installed in theirs."""
EXPORTING = [name for name in ("orchestrator", *MODULES) if hasattr(importlib.import_module(name), "__all__")]
ADAPTERS = {"bench.plots"}
"""Modules that are the one place where a heavy client is imported."""
FOREIGN = ("aiodocker", "ray", "torch", "matplotlib", "pyarrow")


def test_the_public_packages_say_what_they_export() -> None:
    assert {"orchestrator", "orchestrator.store", "orchestrator.testing"} <= set(EXPORTING)


@pytest.mark.parametrize("name", EXPORTING)
def test_exports_are_sorted_and_complete(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__all__ == sorted(module.__all__, key=_kind_then_name)
    assert len(set(module.__all__)) == len(module.__all__)
    public = {
        member
        for member, value in vars(module).items()
        if not member.startswith("_") and not isinstance(value, ModuleType)
    }
    assert public - {"annotations", "TYPE_CHECKING"} == set(module.__all__)


def _kind_then_name(name: str) -> tuple[int, str]:
    """Constants, then classes, then functions: the order that the linter keeps."""
    return (0 if name.isupper() else 1 if name[0].isupper() else 2), name


@pytest.mark.parametrize("name", EXPORTING)
def test_exports_are_documented(name: str) -> None:
    module = importlib.import_module(name)
    for member in module.__all__:
        value = getattr(module, member)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert inspect.getdoc(value), f"{name}.{member} needs a docstring"


@pytest.mark.parametrize("name", MODULES)
def test_every_module_says_what_it_is(name: str) -> None:
    assert (importlib.import_module(name).__doc__ or "").strip(), f"{name} needs a docstring"


def test_importing_the_core_brings_in_nothing_of_the_outside() -> None:
    program = f"""
import sys
import orchestrator, orchestrator.testing
outside = [name for name in sys.modules if name.split(".")[0] in {("backends", "policies", "bench", *FOREIGN)!r}]
assert not outside, outside
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_importing_everything_is_silent_and_takes_no_heavy_client_along() -> None:
    program = f"""
import importlib, sys, threading
for name in {[name for name in MODULES if name not in ADAPTERS]!r}:
    importlib.import_module(name)
assert threading.active_count() == 1
heavy = [name for name in {FOREIGN!r} if name in sys.modules]
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
