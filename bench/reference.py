"""The reference: AgentScope Runtime's own environment service for BFCL, from the package index, in a venv of its own.

Owns that venv (`home()/envs`), the service's folder beside it (`home()/reference`) and a running service's processes.
Always true: nothing of the package is changed. Three things that keep it from starting or from grading as it is
shipped are mended where it is laid out: its package file is emptied (it imports from above its own root), BFCL is of
the last release that it can grade with, and a key is set that nobody asks for. A service, with all the processes of
its cluster, is one session and ends with its owner's `async with`; its temporary files lie in a private directory.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import tempfile
from contextlib import asynccontextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Final

import aiohttp

from backends.environments.catalog import EnvironmentSpec, home
from backends.environments.install import install
from backends.sandboxes.private import private_directory
from orchestrator.errors import RunFailed, Unavailable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

INSTALL_S: Final = 600.0
"""About 200 MB are downloaded and 800 MB written: 75 s where both are quick."""
PREPARE_S: Final = 120.0
START_S: Final = 60.0
_STOP_S: Final = 10.0
_POLL_S: Final = 0.1
_TAIL: Final = 2000
_LAYOUT: Final = "1"
"""Of the service's folder; another layout is another folder."""

_SERVICE: Final = ("ray==2.60.0", "fastapi==0.165.0", "uvicorn==0.54.0", "Jinja2", "httpx", "psutil", "soundfile")
_CLIENT: Final = ("shortuuid", "docker", "redis", "fakeredis", "oss2", "pydantic-settings")
_BFCL: Final = (
    "requests", "tqdm", "numpy==1.26.4", "pandas", "huggingface_hub", "pydantic>=2.11.7", "python-dotenv",
    "tree_sitter==0.21.3", "tree-sitter-java==0.21.0", "tree-sitter-javascript==0.21.4", "openai", "mistralai==1.7.0",
    "anthropic", "cohere==5.13.3", "typer", "tabulate", "datamodel-code-generator==0.25.7", "google-genai==1.24.0",
    "qwen-agent", "mpmath==1.3.0", "tenacity", "writer-sdk", "overrides", "boto3", "beautifulsoup4", "html2text",
    "rank_bm25==0.2.2", "google-search-results", "networkx==3.3",
)  # fmt: skip
"""What that release of BFCL imports to grade; torch, sentence-transformers and faiss it does not need for it."""

SPEC: Final = EnvironmentSpec(
    name="agentscope-reference",
    folder=Path(__file__).parent,
    description="AgentScope Runtime's training sandbox, as published",
    licence="Apache-2.0",
    requirements=(*_SERVICE, *_CLIENT, *_BFCL),
    requirements_no_deps=("bfcl-eval==2025.9.18", "agentscope-runtime==1.1.6.post2"),
    isolation="process",
    deterministic=True,
    runs_code=False,
)


@dataclass(frozen=True, slots=True)
class Reference:
    """The installed reference: its interpreter, and the folder that its service is started from."""

    python: Path
    root: Path


@dataclass(frozen=True, slots=True)
class Service:
    """A running environment service. `pid` leads the session of all its processes."""

    url: str
    pid: int


async def reference(progress: Callable[[str], None] = lambda line: None) -> Reference:
    """Install it at its first use, about a minute, then at no cost. Waits for another installer.

    Raises Unavailable where the package index cannot be reached. Cancelled: what was begun is removed.
    """
    try:
        python = await install(SPEC, progress=progress, deadline_s=INSTALL_S)
    except Unavailable as error:
        raise Unavailable(f"the reference cannot be had here, and nothing can be held against it: {error}") from None
    root = _root(python)
    if not await asyncio.to_thread(root.is_dir):
        progress("preparing the reference's data")
        await _prepare(python, root)
    return Reference(python, root)


def found() -> Reference:
    """The installed reference. Raises Unavailable where it has not been installed."""
    python = SPEC.interpreter()
    if not (root := _root(python)).is_dir():
        raise Unavailable("the reference is not prepared: run `rollout bench agentscope` once")
    return Reference(python, root)


def _root(python: Path) -> Path:
    return home() / "reference" / blake2b(f"{_LAYOUT} {python}".encode(), digest_size=8).hexdigest()


async def _prepare(python: Path, root: Path) -> None:
    """Lay its folder out under another name, run its own data script there, and rename it: whole or not there."""
    building = await asyncio.to_thread(_lay_out, python, root)
    try:
        box = building / "training_box"
        script = str(box / "environments" / "bfcl" / "bfcl_dataprocess.py")
        environ = {
            "PATH": os.environ.get("PATH", ""),
            "HOME": str(building),
            "LANG": "C.UTF-8",
            "OPENAI_API_KEY": "none",
        }
        process = await asyncio.create_subprocess_exec(
            str(python), script, cwd=box, env=environ, stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        try:
            async with asyncio.timeout(PREPARE_S):
                said, _ = await process.communicate()
        except TimeoutError:
            raise RunFailed(f"the reference's data script took more than {PREPARE_S:g} s") from None
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if process.returncode != 0:
            raise RunFailed(f"the reference's data script failed:\n{said.decode(errors='replace')[-_TAIL:]}")
        await asyncio.to_thread(_rename, building, root)
    finally:
        await asyncio.to_thread(shutil.rmtree, building, ignore_errors=True)


def _lay_out(python: Path, root: Path) -> Path:
    packages = next((python.parent.parent / "lib").glob("python*/site-packages"))
    root.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=".building-", dir=root.parent))
    box = building / "training_box"
    shutil.copytree(packages / "agentscope_runtime" / "sandbox" / "box" / "training_box", box)
    (box / "__init__.py").write_bytes(b"")
    shutil.copytree(packages / "bfcl_eval" / "data", box / "bfcl" / "data")
    return building


def _rename(building: Path, root: Path) -> None:
    try:
        building.rename(root)
    except OSError:
        if not root.is_dir():  # not another caller's
            raise


@asynccontextmanager
async def env_service(installed: Reference, *, split: str = "multi_turn") -> AsyncIterator[Service]:
    """Start the service on a free port of loopback; `split` is one of its data script's. Raises RunFailed.

    On leaving, however that happens, every process of it is ended and waited for.
    """
    with private_directory() as folder:
        port = _free_port()
        log = folder / "log"
        with log.open("wb") as output:
            process = await asyncio.create_subprocess_exec(
                str(installed.python), "-m", "training_box.env_service", "--env", "bfcl",
                "--portal", "127.0.0.1", "--port", str(port),
                cwd=folder, env=_environ(installed.root, folder, split), stdin=asyncio.subprocess.DEVNULL,
                stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip
        try:
            url = f"http://127.0.0.1:{port}"
            await _ready(url, process, log)
            yield Service(url, process.pid)
        finally:
            await _stop(process)


def _environ(root: Path, folder: Path, split: str) -> dict[str, str]:
    data = root / "training_box" / "bfcl"
    return {
        "PATH": os.environ.get("PATH", ""),
        "HOME": str(folder),
        "LANG": "C.UTF-8",
        "TMPDIR": str(folder),
        "RAY_TMPDIR": str(folder),
        "RAY_USAGE_STATS_ENABLED": "0",
        "OPENAI_API_KEY": "none",
        "PYTHONPATH": str(root),
        "BFCL_DATA_PATH": str(data / "multi_turn" / f"{split}_processed.jsonl"),
        "BFCL_SPLID_ID_PATH": str(data / "multi_turn" / f"{split}_split_ids.json"),
        "BFCL_ANSWER_PATH": str(data / "data" / "possible_answer"),
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def _ready(url: str, process: asyncio.subprocess.Process, log: Path) -> None:
    try:
        async with asyncio.timeout(START_S), aiohttp.ClientSession() as session:
            while process.returncode is None:
                try:
                    async with session.get(f"{url}/healthz") as response:
                        if response.status == 200:
                            return
                except aiohttp.ClientError:
                    pass  # it does not listen yet
                await asyncio.sleep(_POLL_S)
    except TimeoutError:
        pass
    said = await asyncio.to_thread(log.read_bytes)
    raise RunFailed(f"the reference's service did not start:\n{said.decode(errors='replace')[-_TAIL:]}")


async def _stop(process: asyncio.subprocess.Process) -> None:
    """End the whole session: its workers are in process groups of their own."""
    ends = asyncio.get_running_loop().time() + _STOP_S
    while left := await asyncio.to_thread(session_members, process.pid):
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        if asyncio.get_running_loop().time() > ends:
            raise RunFailed(f"processes of the reference do not end: {left}")
        await asyncio.sleep(_POLL_S)
    await process.wait()


def session_members(leader: int) -> list[int]:
    """The living processes of the session that `leader` began: reads /proc."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, session = path.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[:4]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(session) == leader and state not in {"Z", "X"}:
            found.append(int(path.parent.name))
    return found
