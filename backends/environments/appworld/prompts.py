"""What a session is told before its first action: how to work, and for whom.

The manual comes in three lengths: whole, with a worked example; `simple`, a few lines; and without `prompt`, only who
the task is for. Our words; the rules are those that AppWorld's tasks and their graders rest on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

_FIRST_CALLS: Final = """\
print(apis.api_docs.show_app_descriptions())                                    # which apps there are
print(apis.api_docs.show_api_descriptions(app_name="supervisor"))               # what an app can do
print(apis.api_docs.show_api_doc(app_name="supervisor", api_name="show_account_passwords"))  # one of its calls"""

_WHOLE: Final = """\
You work for the person named below, and do one task on their accounts all by yourself. You work by writing Python: in \
every message write one block of it,

```python
...
```

which runs in a shell that keeps its variables from block to block. You get what the block printed, or how it failed, \
and write the next one. The object `apis` stands for the apps. Find out what it can do from within:

```python
{first}
```

An example. Say that the task is to tell the password of the music account. You write

```python
print(apis.api_docs.show_api_descriptions(app_name="supervisor"))
```

and find `show_account_passwords` in what it prints. It takes no arguments, as its documentation says, so you write

```python
passwords = apis.supervisor.show_account_passwords()
print([entry["account_name"] for entry in passwords])
```

see that there is an entry for the app you need, and finish:

```python
[found] = [entry["password"] for entry in passwords if entry["account_name"] == "spotify"]
apis.supervisor.complete_task(answer=found)
```

Rules
1. Write small blocks, one a message; see that a step has worked before you change what cannot be changed back.
2. Names, addresses, ids and tokens in the example are made up. Get the real ones from the apps.
3. What concerns the person (addresses, payment cards, passwords) is in the app `supervisor`; friends, family and \
colleagues are contacts in the app `phone`.
4. Use the apps through `apis` alone, as their documentation says; no other packages reach them. Python's standard \
library is at hand, but for what touches the system. A "file" in a task is one of the app `file_system`.
5. Calls that list things give one page at a time: go through all pages.
6. For the time of day and the date ask Python (`DateTime.now()`) or the app `phone`, never your memory. A day lasts \
from 00:00:00 to 23:59:59; there are no time zones.
7. Change nothing that the task does not ask for.
8. When all is done, call `apis.supervisor.complete_task()`. Where the task asks for something, give it as `answer`, \
bare: a number in digits, a name, a title, not a sentence. Where it asks for nothing, leave the answer out. If the \
task cannot be done, call it with `status="fail"`. The call ends the session.
9. Nobody answers questions: decide everything yourself.

"""

_SIMPLE: Final = """\
You do one task on a person's accounts by writing Python. Each of your messages is run in a shell that keeps its \
variables, and you get what it printed. `apis` stands for the apps:

{first}

Log in with the passwords from the app `supervisor`, go through all pages of what comes in pages, change nothing that \
is not asked for. At the end call `apis.supervisor.complete_task(answer=...)`, without an answer where the task asks \
for none.

"""

_PERSON: Final = """\
The task is for {first_name} {last_name}; e-mail {email}, phone number {phone_number}."""


def system(person: Mapping[str, str], *, simple: bool, manual: bool) -> str:
    """The system message. `person` has first_name, last_name, email and phone_number."""
    text = _PERSON.format_map(person)
    if not manual:
        return text
    return (_SIMPLE if simple else _WHOLE).format(first=_FIRST_CALLS) + text
