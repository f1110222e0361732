"""Runs inside a build container, never on the host: `bake.py packages`, then `bake.py compile`.

`packages` makes a venv in /opt/rollout/venv and fills it from /build/wheels alone; pip itself comes as a wheel and does
not stay. Then a package's own set-up runs, if it has one. `compile` writes bytecode of the standard library, the
packages and the staged sources below /opt/rollout/bytecode, so that a container's first request does not wait for the
compiler. Standard library only.
"""

from __future__ import annotations

import compileall
import json
import py_compile
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path("/opt/rollout")
WHEELS = Path("/build/wheels")


def packages() -> None:
    """Make the venv, install both lists of requirements into it, and let it set itself up."""
    venv = ROOT / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    pip = f"{next(WHEELS.glob('pip-*.whl'))}/pip"
    requirements = json.loads((WHEELS / "requirements.json").read_text(encoding="utf-8"))
    for flags, names in (([], requirements["requirements"]), (["--no-deps"], requirements["requirements_no_deps"])):
        if names:
            options = ["--no-index", "--find-links", str(WHEELS), "--no-compile", "--disable-pip-version-check", "-q"]
            subprocess.run(
                [sys.executable, pip, "--python", str(venv / "bin/python"), "install", *options, *flags, *names],
                check=True,
            )
    if setup := requirements["setup"]:
        subprocess.run([str(venv / "bin/python"), "-I", *setup], check=True, env={"HOME": str(WHEELS)})


def compile_all() -> None:
    """Bytecode that is believed without a look at the source: the image never changes."""
    sys.pycache_prefix = str(ROOT / "bytecode")
    for folder in (sysconfig.get_path("stdlib"), ROOT / "venv", ROOT / "stage"):
        compileall.compile_dir(
            folder, quiet=2, workers=0, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH
        )


if __name__ == "__main__":
    {"packages": packages, "compile": compile_all}[sys.argv[1]]()
