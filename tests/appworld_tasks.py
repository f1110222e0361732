"""Synthetic AppWorld data for tests: a dozen small tasks about a person who does not exist, with their gold code.

`write(python, root)` fills `root` with what AppWorld calls its root (a folder with `data` in it), by running this very
file on the interpreter of the environment's venv: the package's own model classes make the databases. `settle(folder,
root)` makes a home of the project's that knows them. What comes out derives from the package's protected part, so it
is made anew for each use and never committed. Our words and our content throughout; standard library at import, the
package inside `main` alone.
"""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

NOW = datetime(2023, 5, 18, 12, 0, 0)  # noqa: DTZ001  # the package's clocks know no zones
PERSON = {
    "first_name": "Ada",
    "last_name": "Example",
    "email": "ada.example@example.com",
    "phone_number": "5550100001",
    "birthday": "1990-01-02",
    "sex": "female",
}
ACCOUNTS = ("simple_note", "phone", "todoist")
NOTES = (
    ("Groceries", ["home"]),
    ("Trip ideas", ["home", "travel"]),
    ("Book list", ["reading"]),
    ("Old workout plan", ["archive"]),
    ("Half a poem", ["draft"]),
    ("Voucher of last year", ["expired"]),
)
_LOGIN = """\
passwords = {entry["account_name"]: entry["password"] for entry in apis.supervisor.show_account_passwords()}
token = apis.%(app)s.login(username="%(user)s", password=passwords["%(app)s"])["access_token"]
"""
_ANSWER = """
    with test(\"\"\"the answer is right\"\"\"):
        test.case(__import__("json").loads(models.end.supervisor.Task.all()[0].answer), "==", ground_truth_answer)
"""
_CHANGED = """
    with test(\"\"\"%(what)s\"\"\"):
        test.case(models.changed_model_names(), "==", %(models)s)
"""
_RECORDS = """
    added, updated, removed = models.changed_records("%(model)s")
    with test(\"\"\"%(what)s\"\"\"):
        test.case([%(field)s for record in %(which)s], "==", %(value)r)
"""


class Made(NamedTuple):
    """A task as it is written down. `checks` are pairs of a requirement and the code that tests it."""

    id: str
    instruction: str
    solution: str
    answer: object
    checks: tuple[tuple[str, str], ...]


def write(python: Path, root: Path) -> Path:
    """Make the data below `root` with the venv's `python`; gives `root` back. Takes about ten seconds."""
    done = subprocess.run(
        [str(python), "-I", __file__, str(root)], capture_output=True, text=True, timeout=300, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"the synthetic tasks could not be made: {done.stderr[-2000:]}")
    return root


def settle(folder: Path, root: Path) -> Path:
    """A home of the project's (`ROLLOUT_HOME`) in `folder`: the user's venvs and wheels, as data what `root` holds.

    The caller sets the variable; this is for the host alone, and works whatever the variable is now.
    """
    from backends.environments.catalog import find, home
    from backends.environments.data import register

    folder.mkdir(parents=True, exist_ok=True)
    for kept in ("envs", "wheels"):
        (home() / kept).mkdir(parents=True, exist_ok=True)
        (folder / kept).symlink_to(home() / kept)
    register(find("appworld"), root, folder / "data", lambda line: None)
    return folder


def splits() -> dict[str, list[str]]:
    """The ids of each split, in order."""
    found: dict[str, list[str]] = {"train": [], "dev": [], "test_normal": [], "test_challenge": []}
    sides = {"tidy01": "train", "jot02": "train", "ask03": "dev", "meet04": "test_normal", "plan05": "test_challenge"}
    for task in tasks():
        found[sides[task.id.partition("_")[0]]].append(task.id)
    return found


def tasks() -> list[Made]:
    """All tasks."""
    made = [_tidy(number, tag) for number, tag in enumerate(("archive", "draft", "expired"), 1)]
    made += [
        _jot(number, title, text)
        for number, (title, text) in enumerate(
            (("Window", "Measure it."), ("Radio", "Ask for the manual."), ("Garden", "Seeds, then water.")), 1
        )
    ]
    made += [_ask(number, tag) for number, tag in enumerate(("home", "travel", "reading"), 1)]
    made += [
        _meet(number, first, phone)
        for number, (first, phone) in enumerate(
            (("Bela", "5550100002"), ("Cleo", "5550100003"), ("Dora", "5550100004")), 1
        )
    ]
    return made + [_plan(number, name) for number, name in enumerate(("Roof repair", "Winter choir"), 1)]


def _login(app: str) -> str:
    return _LOGIN % {"app": app, "user": PERSON["phone_number" if app == "phone" else "email"]}


def _changed(what: str, models: str) -> tuple[str, str]:
    return what, _CHANGED % {"what": what, "models": models}


def _records(what: str, model: str, which: str, field: str, value: object) -> tuple[str, str]:
    return what, _RECORDS % {"what": what, "model": model, "which": which, "field": field, "value": value}


_RIGHT = ("the answer is right", _ANSWER)


def _tidy(number: int, tag: str) -> Made:
    title = next(title for title, tags in NOTES if tag in tags)
    return Made(
        f"tidy01_{number}",
        f'Delete the note tagged "{tag}" in my SimpleNote account and tell me how many notes are left.',
        _login("simple_note")
        + f'[found] = apis.simple_note.search_notes(access_token=token, tags=["{tag}"])\n'
        + 'apis.simple_note.delete_note(access_token=token, note_id=found["note_id"])\n'
        + "left = apis.simple_note.search_notes(access_token=token, page_limit=20)\n"
        + "apis.supervisor.complete_task(answer=len(left))\n",
        len(NOTES) - 1,
        (
            _RIGHT,
            _changed("only notes have changed", '{"simple_note.Note"}'),
            _records("that note alone is gone", "simple_note.Note", "removed", "record.title", [title]),
        ),
    )


def _jot(number: int, title: str, text: str) -> Made:
    return Made(
        f"jot02_{number}",
        f'Write a SimpleNote note with the title "{title}" and the text "{text}"',
        _login("simple_note")
        + f"apis.simple_note.create_note(access_token=token, title={title!r}, content={text!r})\n"
        + "apis.supervisor.complete_task()\n",
        None,
        (
            _RIGHT,
            _changed("only notes have changed", '{"simple_note.Note"}'),
            _records(
                "the note is there", "simple_note.Note", "added", "(record.title, record.content)", [(title, text)]
            ),
        ),
    )


def _ask(number: int, tag: str) -> Made:
    return Made(
        f"ask03_{number}",
        f'How many of my SimpleNote notes are tagged "{tag}"?',
        _login("simple_note")
        + f'found = apis.simple_note.search_notes(access_token=token, tags=["{tag}"], page_limit=20)\n'
        + "apis.supervisor.complete_task(answer=len(found))\n",
        sum(tag in tags for _, tags in NOTES),
        (_RIGHT,),
    )


def _meet(number: int, first: str, phone: str) -> Made:
    return Made(
        f"meet04_{number}",
        f"Add {first} Sample to the contacts of my phone; the number is {phone}.",
        _login("phone")
        + f'apis.phone.add_contact(first_name="{first}", last_name="Sample", phone_number="{phone}", '
        + f'email="{first.lower()}@example.com", access_token=token)\napis.supervisor.complete_task()\n',
        None,
        (
            _RIGHT,
            _changed("only contacts have changed", '{"phone.Contact"}'),
            _records("the contact is there", "phone.Contact", "added", "record.phone_number", [phone]),
        ),
    )


def _plan(number: int, name: str) -> Made:
    return Made(
        f"plan05_{number}",
        f'Create a Todoist project called "{name}".',
        _login("todoist")
        + f'apis.todoist.create_project(access_token=token, name="{name}")\napis.supervisor.complete_task()\n',
        None,
        (
            _RIGHT,
            _records("the project is there", "todoist.Project", "added", "record.name", [name]),
        ),
    )


def main(root: Path) -> None:
    """Runs on the venv's interpreter."""
    import os

    os.environ["APPWORLD_ROOT"] = str(root)
    os.environ["APPWORLD_CACHE"] = str(root / ".cache")
    for folder in ("datasets", "api_docs/standard", "base_dbs", "tasks"):
        (root / "data" / folder).mkdir(parents=True)
    from appworld.apps import get_all_apps
    from appworld.apps.api_lib import set_local_date_and_time
    from appworld.collections.models import ModelCollection
    from appworld.common.constants import DB_VERSION

    _write_docs(root)
    set_local_date_and_time(NOW)
    apps = list(get_all_apps())
    models = ModelCollection.load(":memory:test", ":memory:test", load_apps=apps, create_db=True)
    _fill(models)
    with contextlib.redirect_stdout(io.StringIO()):
        models.save(str(root / "data" / "base_dbs"), format="full", app_names=apps, delete_if_exists=True)
    for task in tasks():
        _write_task(root, task, models, apps, DB_VERSION)
    for split, ids in splits().items():
        (root / "data" / "datasets" / f"{split}.txt").write_text("\n".join(ids) + "\n", encoding="utf-8")
    (root / "data" / "version.txt").write_text(DB_VERSION, encoding="utf-8")


def _write_docs(root: Path) -> None:
    from appworld.collections.api_docs import ApiDocCollection

    for app, documents in ApiDocCollection.build().items():
        if app != "admin":
            plain = {
                name: {**json.loads(json.dumps(d, default=str)), "canary_string": ""} for name, d in documents.items()
            }
            _dump(root / "data" / "api_docs" / "standard" / f"{app}.json", plain)


def _fill(models: Any) -> None:
    models.admin.MainUser(**PERSON).save()
    supervisor = models.supervisor.Supervisor(**PERSON)
    supervisor.save()
    names = {key: PERSON[key] for key in ("first_name", "last_name")}
    for app in ACCOUNTS:
        password = f"secret-{app}-1"
        models.supervisor.AccountPassword(supervisor_id=supervisor.id, account_name=app, password=password).save()
        contact = {"phone_number": PERSON["phone_number"]} if app == "phone" else {"email": PERSON["email"]}
        more = {} if app == "phone" else {"verified": True}
        user = models[app].User(**names, **contact, password=password, created_at=NOW, last_logged_in=NOW, **more)
        user.save()
        if app == "simple_note":
            for title, tags in NOTES:
                models.simple_note.Note(
                    user_id=user.id, title=title, content=f"# {title}", tags=tags, created_at=NOW, updated_at=NOW
                ).save()


def _write_task(root: Path, task: Made, models: Any, apps: list[str], version: str) -> None:
    models.restart_db_tracker()
    for old in models.supervisor.Task.all():
        old.delete()
    supervisor = models.supervisor.Supervisor.all()[0]
    models.supervisor.Task(supervisor_id=supervisor.id, instruction=task.instruction).save()
    folder = root / "data" / "tasks" / task.id
    truth = folder / "ground_truth"
    truth.mkdir(parents=True)
    with contextlib.redirect_stdout(io.StringIO()):
        models.save(
            str(folder / "dbs"), format="changes", app_names=apps, delete_if_exists=True, save_model_hashes=True
        )
    known = {key: PERSON[key] for key in ("first_name", "last_name", "email", "phone_number")}
    specs = {"instruction": task.instruction, "supervisor": known, "datetime": NOW.isoformat(), "db_version": version}
    _dump(folder / "specs.json", specs)
    numbers = {"num_apps": 1, "num_apis": 4, "num_api_calls": 4, "num_solution_code_lines": 5}
    _dump(truth / "metadata.json", {"difficulty": 1, "mode": "minimal", **numbers})
    _dump(truth / "public_data.json", {})
    _dump(truth / "private_data.json", {})
    _dump(truth / "answer.json", task.answer)
    _dump(truth / "test_data.json", [{"requirement": what, "label": "no_op_fail"} for what, _ in task.checks])
    head = "def evaluate(test, public_data, private_data, main_user, models, ground_truth_answer):\n"
    (truth / "evaluation.py").write_text(head + "".join(code for _, code in task.checks), encoding="utf-8")
    body = "".join(f"    {line}\n" for line in task.solution.splitlines())
    (truth / "compiled_solution.py").write_text(f"def solution(apis, requester):\n{body}", encoding="utf-8")


def _dump(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
