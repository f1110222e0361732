"""A base image from the Python of this machine, for machines that reach no registry.

Holds the interpreter, its standard library (without tests, tools and packages), the shared libraries that they load,
the certificates, and the accounts root and nobody; nothing else: no shell, no package manager. The tar is made from the
files as they lie here, so its packages are those that the host's own pip downloads.
"""

from __future__ import annotations

import io
import platform
import shutil
import ssl
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

from orchestrator.errors import Unavailable

if TYPE_CHECKING:
    from collections.abc import Iterator

_LEFT_OUT: Final = {
    "__pycache__",
    "dist-packages",
    "ensurepip",
    "idlelib",
    "lib2to3",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
    "tkinter",
    "turtledemo",
}
_MODULES_LEFT_OUT: Final = ("_test", "_ctypes_test", "_tkinter", "_xx", "xx")
_WHEELS_NEED: Final = (
    "libstdc++.so.6", "libgcc_s.so.1", "libm.so.6", "libpthread.so.0", "libdl.so.2", "librt.so.1", "libutil.so.1",
)  # fmt: skip
"""What compiled packages load beyond what Python itself does: the compilers' libraries, and all parts of the C library,
which wheels for older systems name one by one (numpy's names the threads')."""
_LOOKUP: Final = ("libnss_files.so.2", "libnss_dns.so.2", "libresolv.so.2")
"""Loaded by name when an account or a host is looked up; part of libc itself since glibc 2.34."""
_CERTIFICATES: Final = "etc/ssl/certs/ca-certificates.crt"
_TEXTS: Final = {
    "etc/passwd": "root:x:0:0:root:/root:/sbin/nologin\nnobody:x:65534:65534:nobody:/nonexistent:/sbin/nologin\n",
    "etc/group": "root:x:0:\nnogroup:x:65534:\n",
    "etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
}
_DOCKERFILE: Final = f"""FROM scratch
ADD root.tar /
ENV PATH=/usr/local/bin:/usr/bin:/bin LANG=C.UTF-8 SSL_CERT_FILE=/{_CERTIFICATES}
CMD ["python3"]
"""


def base_name() -> str:
    """What the image made from this Python is called."""
    return f"rollout-base:python{platform.python_version()}"


def base_context() -> io.BytesIO:
    """A build context whose image is this Python. Takes seconds and about 60 MB of memory: call it in a thread.

    Raises Unavailable where this machine's Python cannot be copied.
    """
    if sys.platform != "linux" or sys.implementation.name != "cpython" or shutil.which("ldd") is None:
        raise Unavailable("a base image can be made from CPython on Linux with `ldd`; else name one with --base IMAGE")
    root = io.BytesIO()
    with tarfile.open(fileobj=root, mode="w", format=tarfile.GNU_FORMAT) as tar:
        _fill(tar)
    context = io.BytesIO()
    with tarfile.open(fileobj=context, mode="w", format=tarfile.GNU_FORMAT) as tar:
        add_bytes(tar, "Dockerfile", _DOCKERFILE.encode())
        add_bytes(tar, "root.tar", root.getbuffer())
    context.seek(0)
    return context


def add_bytes(tar: tarfile.TarFile, name: str, content: bytes | memoryview, mode: int = 0o644) -> None:
    """A file of root's, of no particular time, so that equal contents make equal layers."""
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    entry.mode = mode
    tar.addfile(entry, io.BytesIO(content))


def _fill(tar: tarfile.TarFile) -> None:
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    executable = Path(sys.executable).resolve()
    stdlib = Path(sysconfig.get_path("stdlib"))
    extensions = Path(sysconfig.get_config_var("DESTSHARED") or stdlib / "lib-dynload")
    for folder in ("root", "usr/local/bin", "etc"):
        _add_folder(tar, folder)
    _add_folder(tar, "tmp", 0o1777)
    for name, text in _TEXTS.items():
        add_bytes(tar, name, text.encode())
    certificates = ssl.get_default_verify_paths().cafile
    if certificates is not None:
        add_bytes(tar, _CERTIFICATES, Path(certificates).read_bytes())
    add_bytes(tar, f"usr/local/bin/{version}", executable.read_bytes(), 0o755)
    for alias in ("python3", "python"):
        _add_link(tar, f"usr/local/bin/{alias}", version)
    for path in _library(stdlib):
        add_bytes(tar, f"usr/local/lib/{version}/{path.relative_to(stdlib).as_posix()}", path.read_bytes())
    modules = sorted(path for path in extensions.glob("*.so") if not path.name.startswith(_MODULES_LEFT_OUT))
    for module in modules:
        add_bytes(tar, f"usr/local/lib/{version}/lib-dynload/{module.name}", module.read_bytes(), 0o755)
    for target, library in sorted(_shared_libraries([executable, *modules]).items()):
        add_bytes(tar, target.lstrip("/"), library.read_bytes(), 0o755)


def _library(stdlib: Path) -> Iterator[Path]:
    for path in sorted(stdlib.rglob("*")):
        inner = path.relative_to(stdlib).parts
        skipped = not _LEFT_OUT.isdisjoint(inner) or inner[0] == "lib-dynload" or inner[0].startswith("config-")
        if path.is_file() and not skipped:
            yield path


def _shared_libraries(binaries: list[Path]) -> dict[str, Path]:
    """Where each library must lie in the image, and where it lies here.

    Those of the system keep their place, which their loader knows; others (an interpreter's own) join the C library.
    """
    found: dict[str, Path] = {}
    for line in subprocess.run(
        ["ldd", *map(str, binaries)], capture_output=True, text=True, check=False
    ).stdout.splitlines():
        words = line.split()
        if len(words) >= 3 and words[1] == "=>" and words[2].startswith("/"):
            found[words[0]] = Path(words[2])
        elif words and words[0].startswith("/") and not words[0].endswith(":"):
            found[words[0]] = Path(words[0])  # the loader itself, named by its full path
    system = next((path.parent for name, path in found.items() if name.startswith("libc.so")), None)
    if system is None:
        raise Unavailable("the C library of this Python was not found by `ldd`: name a base image with --base IMAGE")
    for name in (*_WHEELS_NEED, *_LOOKUP):
        path = next(
            (folder / name for folder in (system, Path("/usr") / system.relative_to("/")) if (folder / name).exists()),
            None,
        )
        if path is not None:
            found.setdefault(name, path)
    return {name if name.startswith("/") else f"{system}/{name}": path.resolve() for name, path in found.items()}


def _add_folder(tar: tarfile.TarFile, name: str, mode: int = 0o755) -> None:
    entry = tarfile.TarInfo(name)
    entry.type = tarfile.DIRTYPE
    entry.mode = mode
    tar.addfile(entry)


def _add_link(tar: tarfile.TarFile, name: str, target: str) -> None:
    entry = tarfile.TarInfo(name)
    entry.type = tarfile.SYMTYPE
    entry.linkname = target
    tar.addfile(entry)
