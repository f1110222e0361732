"""A shop's database that the agent changes by SQL. An example of isolation `process`.

Each session has a process of its own, so a statement that never returns, or brings SQLite down, costs that session and
no other. The database is made once, in `preload`; every session's process inherits it. What the session leaves is
exported, and graded in a process where none of the agent's statements ever ran.
"""

from __future__ import annotations

import random
import sqlite3
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Final

import orjson

from backends.server.environment import (
    Grade,
    Reply,
    Tasks,
    Toolset,
    observation,
    unknown_split,
    unknown_task,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

CITIES: Final = ("Bergen", "Ghent", "Porto", "Turin", "Umea")
SCHEMA: Final = """\
CREATE TABLE customers (id INTEGER PRIMARY KEY, name TEXT, city TEXT);
CREATE TABLE orders (id INTEGER PRIMARY KEY, customer INTEGER REFERENCES customers, cents INTEGER, state TEXT);
"""
ASKED: Final = {
    "ship": (
        "Set the state of all open orders of customers in {city} to 'shipped'.",
        "UPDATE orders SET state = 'shipped' WHERE state = 'open'"
        " AND customer IN (SELECT id FROM customers WHERE city = '{city}')",
    ),
    "cancel": (
        "Delete the open orders below 20.00 of customers in {city}.",
        "DELETE FROM orders WHERE state = 'open' AND cents < 2000"
        " AND customer IN (SELECT id FROM customers WHERE city = '{city}')",
    ),
    "move": (
        "The customers without any order in {city} have moved away: delete them.",
        "DELETE FROM customers WHERE city = '{city}' AND id NOT IN (SELECT customer FROM orders)",
    ),
}
TASKS: Final = {f"{what}_{city.lower()}": (what, city) for what in ASKED for city in CITIES}
TOOLS: Final = Toolset(
    [
        {
            "type": "function",
            "function": {
                "name": "sql",
                "description": "Run one statement of SQLite's SQL.",
                "parameters": {
                    "type": "object",
                    "properties": {"statement": {"type": "string"}},
                    "required": ["statement"],
                },
            },
        }
    ]
)
ROWS: Final = 50
"""Rows of a result that are shown."""
WIDTH: Final = 200
"""Characters of a value that are shown."""
ALLOWED: Final = frozenset(
    {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_RECURSIVE, sqlite3.SQLITE_FUNCTION}
    | {sqlite3.SQLITE_INSERT, sqlite3.SQLITE_UPDATE, sqlite3.SQLITE_DELETE, sqlite3.SQLITE_TRANSACTION}
)
"""What a statement may be made of: it reads and changes rows."""
CHANCE: Final = frozenset(
    {"random", "randomblob", "date", "time", "datetime", "julianday", "unixepoch", "strftime", "timediff"}
    | {"current_date", "current_time", "current_timestamp"}
)
"""Functions whose result no replay can repeat."""


def environment() -> SqlDesk:
    """The entry point that the server calls, once."""
    return SqlDesk()


@cache
def database() -> bytes:
    """The shop as it stands before anybody has changed it."""
    chance = random.Random(7)
    shop = sqlite3.connect(":memory:", isolation_level=None)
    shop.executescript(SCHEMA)
    people = [(n, f"Customer {n}", chance.choice(CITIES)) for n in range(1, 121)]
    orders = [
        (n, chance.randint(1, 120), chance.randint(200, 9000), chance.choice(("open", "shipped")))
        for n in range(1, 201)
    ]
    shop.executemany("INSERT INTO customers VALUES (?, ?, ?)", people)
    shop.executemany("INSERT INTO orders VALUES (?, ?, ?, ?)", orders)
    made = shop.serialize()
    shop.close()
    return made


def opened() -> sqlite3.Connection:
    """A copy of the shop, from which no statement reaches a file, the clock or chance."""
    shop = sqlite3.connect(":memory:", isolation_level=None)
    shop.deserialize(database())
    shop.set_authorizer(allowed)
    return shop


def allowed(action: int, first: str | None, second: str | None, *where: str | None) -> int:
    """SQLite asks this about every part of a statement."""
    by_chance = action == sqlite3.SQLITE_FUNCTION and (second or "").lower() in CHANCE
    return sqlite3.SQLITE_OK if action in ALLOWED and not by_chance else sqlite3.SQLITE_DENY


def content(shop: sqlite3.Connection) -> bytes:
    """All rows of both tables, as JSON."""
    tables = {
        "customers": "SELECT id, name, city FROM customers ORDER BY id",
        "orders": "SELECT id, customer, cents, state FROM orders ORDER BY id",
    }
    return orjson.dumps({name: shop.execute(query).fetchall() for name, query in tables.items()})


class SqlDesk:
    """All tasks."""

    name: ClassVar[str] = "sql_desk"
    isolation: ClassVar[str] = "process"
    deterministic: ClassVar[bool] = True
    runs_code: ClassVar[bool] = False
    max_turns: ClassVar[int] = 30

    def tasks(self, split: str) -> Tasks:
        """`sql_desk`: all of them."""
        if (split or self.name) != self.name:
            raise unknown_split(split, [self.name])
        return Tasks(list(TASKS))

    def preload(self) -> None:
        """Make the database, in the process that all sessions' processes are forked from."""
        database()

    def open(self, task: str, seed: int, options: Mapping[str, Any]) -> tuple[Desk, Reply]:
        """A copy of the shop and what is asked for; the seed changes nothing."""
        question, _ = asked(task)
        text = f"{question} Say that you are done when you are.\n\n{SCHEMA}"
        return Desk(opened()), Reply(observation([{"role": "user", "content": text}], toolset=TOOLS), toolset=TOOLS)

    def grade(self, task: str, seed: int, options: Mapping[str, Any], state: bytes, params: Mapping[str, Any]) -> Grade:
        """1.0 where the shop holds what the known statement leaves, else 0.0."""
        shop = opened()
        shop.execute(asked(task)[1])
        return Grade(float(content(shop) == state))

    def solution(self, task: str) -> Sequence[bytes]:
        """The known statement, then the end."""
        function = {"name": "sql", "arguments": orjson.dumps({"statement": asked(task)[1]}).decode()}
        call = {"id": "call_0", "type": "function", "function": function}
        acts = ({"content": None, "tool_calls": [call]}, {"content": "Done."})
        return [orjson.dumps({"role": "assistant", **act}) for act in acts]


def asked(task: str) -> tuple[str, str]:
    """A task's question and the statement that does it. Raises EnvironmentFault."""
    if task not in TASKS:
        raise unknown_task(task, f"there are {', '.join(TASKS)}")
    what, city = TASKS[task]
    question, statement = ASKED[what]
    return question.format(city=city), statement.format(city=city)


class Desk:
    """One episode, in a process of its own."""

    def __init__(self, shop: sqlite3.Connection) -> None:
        self._shop = shop

    def step(self, action: bytes) -> Reply:
        """Run a message's statements; a text without any ends the episode."""
        try:
            message = orjson.loads(action)
            calls = message.get("tool_calls")
            if not calls and isinstance(message.get("content"), str) and message["content"].strip():
                return Reply(observation([]), done=True)
            messages = [self._called(call) for call in calls]
        except (orjson.JSONDecodeError, AttributeError, KeyError, TypeError):
            messages = [{"role": "user", "content": "Call `sql` with a `statement`, or say that you are done."}]
        return Reply(observation(messages))

    def _called(self, call: Mapping[str, Any]) -> Mapping[str, Any]:
        statement = orjson.loads(call["function"]["arguments"])["statement"]
        text = self._run(str(statement)) if call["function"]["name"] == "sql" else "error: the only tool is `sql`"
        return {"role": "tool", "tool_call_id": str(call["id"]), "content": text}

    def _run(self, statement: str) -> str:
        try:
            cursor = self._shop.execute(statement)
            rows, columns = cursor.fetchmany(ROWS), cursor.description
            cursor.close()
        except (sqlite3.Error, sqlite3.Warning, ValueError) as error:
            return f"error: {error}"
        if columns is None:
            return f"{max(cursor.rowcount, 0)} rows changed"
        return "\n".join(" | ".join(str(value)[:WIDTH] for value in row) for row in rows) or "no rows"

    def export(self) -> bytes:
        """What the shop holds now."""
        try:
            return content(self._shop)
        except (sqlite3.Error, TypeError):
            return b""  # a row holds what JSON cannot

    def close(self) -> None:
        """Let the shop go."""
        self._shop.close()
