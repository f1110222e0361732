"""The catalogue: declarations, digests that follow content, staging, and installing into a venv of its own."""

from __future__ import annotations

import asyncio
import shutil
import socket
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.environments import catalog
from backends.environments.install import install
from orchestrator.errors import Unavailable, UnknownName, UsageError
from orchestrator.names import unknown

if TYPE_CHECKING:
    from pathlib import Path

DECLARATION = """\
name = "demo"
description = "A demo"
licence = "MIT"
isolation = "shared"
deterministic = true
runs_code = false
"""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ROLLOUT_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "demo"
    folder.mkdir()
    (folder / "environment.toml").write_text(DECLARATION, encoding="utf-8")
    (folder / "inside.py").write_text("def environment(): ...\n", encoding="utf-8")
    return folder


@pytest.fixture
def spec(folder: Path) -> catalog.EnvironmentSpec:
    return catalog.read(folder)


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    """A wheel made by hand: installing it needs no index."""
    path = tmp_path / "demo_package-1.0-py3-none-any.whl"
    info = "demo_package-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("demo_package.py", "ANSWER = 42\n")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: demo-package\nVersion: 1.0\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: hand\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", f"demo_package.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")
    return path


def test_every_shipped_environment_is_well_declared() -> None:
    for name in catalog.names():
        spec = catalog.find(name)
        assert spec.name == name
        assert spec.description
        assert (spec.folder / "inside.py").is_file()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (("name = ", "nome = "), "unknown key 'nome'"),
        (("deterministic = true", "deterministic = 1"), "'deterministic' must be given, as true or false"),
        (('licence = "MIT"', ""), "'licence' must be given, as a string"),
        (('"shared"', '"thread"'), "'isolation' must be one of shared, process"),
        (('name = "demo"', 'name = "other"'), "must be the folder's name"),
        (('name = "demo"', 'name = "demo'), "environment.toml: "),
        (("runs_code", "requirements = [1]\nruns_code"), "'requirements' must be a list of strings"),
    ],
)
def test_a_bad_declaration_names_the_file_and_the_key(folder: Path, change: tuple[str, str], complaint: str) -> None:
    (folder / "environment.toml").write_text(DECLARATION.replace(*change), encoding="utf-8")
    with pytest.raises(UsageError, match=complaint) as caught:
        catalog.read(folder)
    assert str(folder / "environment.toml") in str(caught.value)


def test_a_misspelt_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(UnknownName, match=r"unknown environment 'bfc'.*did you mean 'bfcl'\?.*known: bfcl"):
        raise unknown("environment", "bfc", ["toy", "bfcl"])
    with pytest.raises(UnknownName, match=r"unknown environment '\.\./bfcl'"):
        catalog.find("../bfcl")


def test_the_digest_follows_content_and_requirements_only(folder: Path) -> None:
    spec = catalog.read(folder)
    first = spec.digest
    assert len(first) == 16
    assert int(first, 16) >= 0
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "inside.pyc").write_bytes(b"compiled")
    shutil.copytree(folder, folder.parent / "elsewhere" / "demo")
    assert spec.digest == first
    assert catalog.read(folder.parent / "elsewhere" / "demo").digest == first
    assert replace(spec, requirements=("x",)).digest != first
    assert replace(spec, requirements=("x",)).digest != replace(spec, requirements_no_deps=("x",)).digest
    (folder / "more").mkdir()
    (folder / "more" / "data.json").write_text("{}", encoding="utf-8")
    assert spec.digest != first


@given(st.lists(st.text(max_size=4), max_size=4), st.lists(st.text(max_size=4), max_size=4))
def test_two_lists_of_parts_never_run_together(left: list[str], right: list[str]) -> None:
    same = [part.encode() for part in left] == [part.encode() for part in right]
    assert (catalog._hash(*left) == catalog._hash(*right)) == same


def test_a_staged_tree_stands_alone(folder: Path, home: Path) -> None:
    (folder / "inside.py").write_text("from backends.server import environment as api\n", encoding="utf-8")
    spec = catalog.read(folder)
    tree = catalog.stage(spec)
    assert tree == home / "stage" / spec.digest
    code = "import sys, backends.environments.demo.inside as demo; print(demo.__file__, 'orchestrator' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": str(tree)}, cwd="/", capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [str(tree / "backends/environments/demo/inside.py"), "False"]
    assert not (tree / "backends" / "environments" / "catalog.py").exists()


def test_concurrent_callers_share_one_whole_tree(folder: Path, home: Path) -> None:
    spec = catalog.read(folder)
    with ThreadPoolExecutor(8) as pool:
        trees = set(pool.map(lambda _: catalog.stage(spec), range(32)))
    assert trees == {home / "stage" / spec.digest}
    assert [path.name for path in (home / "stage").iterdir()] == [spec.digest]
    assert (home / "stage" / spec.digest / "backends/server/wire.py").is_file()


def test_without_requirements_the_host_serves_it(folder: Path) -> None:
    spec = catalog.read(folder)
    assert spec.installed
    assert str(spec.interpreter()) == sys.executable


def run_answer(python: Path) -> str:
    code = "import demo_package; print(demo_package.ANSWER)"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout


async def test_installing_makes_a_venv_of_its_own(spec: catalog.EnvironmentSpec, wheel: Path) -> None:
    spec = replace(spec, requirements_no_deps=(str(wheel),))
    assert not spec.installed
    with pytest.raises(Unavailable, match="run `rollout env install demo`"):
        spec.interpreter()
    lines: list[str] = []
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(install(spec, progress=lines.append)) for _ in range(2)]
    assert {task.result() for task in tasks} == {spec.interpreter()}
    assert sum("making a venv" in line for line in lines) == 1
    assert "demo: waiting for another installation of it" in lines
    assert await asyncio.to_thread(run_answer, spec.interpreter()) == "42\n"


async def test_a_failed_installation_shows_the_log_and_leaves_nothing(
    spec: catalog.EnvironmentSpec, home: Path
) -> None:
    spec = replace(spec, requirements=("/no/such/demo-1.0-py3-none-any.whl",))
    with pytest.raises(Unavailable, match=r"(?s)ended with status 1.*rollout env install demo.*no/such/demo") as caught:
        await install(spec, progress=lambda _: None)
    assert spec.venv is not None
    assert f"{spec.venv}.log" in str(caught.value)
    assert not spec.installed
    assert not [path for path in (home / "envs").iterdir() if path.is_dir()]


async def test_a_deadline_ends_an_installer_that_waits(spec: catalog.EnvironmentSpec, home: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        spec = replace(spec, requirements=(f"demo @ http://127.0.0.1:{port}/demo-1.0-py3-none-any.whl",))
        began = time.monotonic()
        with pytest.raises(Unavailable, match="took more than 2 s"):
            await install(spec, progress=lambda _: None, deadline_s=2.0)
    assert time.monotonic() - began < 10, "pip was waited for instead of killed"
    assert not [path for path in (home / "envs").iterdir() if path.is_dir()]
