"""Begins an environment of a user's own: a package that is found by its entry point, with a small game to replace.

What is written is `template/`, an environment that works as it stands, with its name put into it. The template is code
like any other: checked, typed, and played by the tests through what comes out of here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from backends.environments.discovery import DECLARATION, NAME, places
from orchestrator.errors import UsageError

_TEMPLATE: Final = Path(__file__).parent / "template"
_LOWER: Final = "mygame"
_CAMEL: Final = "MyGame"
_MAX_NAME: Final = 48


def scaffold(name: str, folder: Path) -> list[Path]:
    """Write a new environment called `name` into `folder`, which is made; the paths of its files.

    Raises UsageError for a name that cannot be one or is taken, and for a folder that holds something; OSError.
    """
    if not NAME.fullmatch(name) or len(name) > _MAX_NAME:
        raise UsageError(
            f"an environment cannot be called {name!r}: a lower-case letter, then such letters, digits and _, "
            f"at most {_MAX_NAME} characters"
        )
    if (taken := places().get(name)) is not None:
        raise UsageError(f"there is an environment {name!r} already ({taken.source}): choose another name")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} exists and is not an empty folder: name another one, or remove it")
    package = folder / f"{name}_environment"
    texts = {
        folder / "pyproject.toml": _named("project.toml", name),
        package / "__init__.py": f'"""The environment `{name}`: `inside.py` is what runs in its sandboxes."""\n',
        package / DECLARATION: _named("declaration.toml", name),
        package / "inside.py": _named("inside.py", name),
        package / "Dockerfile": _named("Dockerfile", name),
        folder / "tests" / f"test_{name}.py": _named("test.py", name),
    }
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return list(texts)


def _named(file: str, name: str) -> str:
    text = (_TEMPLATE / file).read_text(encoding="utf-8")
    camel = "".join(part.capitalize() for part in name.split("_"))
    for old, new in ((f"{_LOWER}-", f"{name.replace('_', '-')}-"), (_LOWER, name), (_CAMEL, camel)):
        text = text.replace(old, new)
    return text
