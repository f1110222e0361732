"""The store's file: its schema and version, how it is opened, and what its errors mean to a person.

Every connection of the project is made here. A file without a schema version holds no run yet: a creator that dies
half-way leaves nothing that a second one would mistake for a run.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import apsw

from orchestrator.errors import RunExists, SchemaMismatch, StoreError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from orchestrator.store.values import RunMeta

VERSION: Final = 1
PAGE_BYTES: Final = 16384
"""Measured best for rows of 5 to 10 KB: half the CPU of 4 KiB pages, and little waste."""
CHECKPOINT_PAGES: Final = 1000
LOG_LIMIT_BYTES: Final = 64 * 1024 * 1024
BUSY_S: Final = 10.0
"""How long a connection waits for another's transaction before it gives up."""

_SCHEMA: Final = """
CREATE TABLE run(
    id INTEGER PRIMARY KEY CHECK (id = 1),
    meta TEXT NOT NULL,
    run_epoch INTEGER NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('running', 'finished')),
    duplicates INTEGER NOT NULL,
    plan TEXT,
    summary TEXT
) STRICT;
CREATE TABLE toolsets(digest TEXT PRIMARY KEY, body BLOB NOT NULL) STRICT;
CREATE TABLE trajectories(
    task TEXT NOT NULL,
    grp INTEGER NOT NULL,
    sample INTEGER NOT NULL,
    attempt INTEGER NOT NULL,
    run_epoch INTEGER NOT NULL,
    outcome TEXT NOT NULL,
    stop_reason TEXT NOT NULL,
    reward REAL CHECK (reward IS NULL OR outcome IN ('completed', 'truncated')),
    steps INTEGER NOT NULL,
    incarnations INTEGER NOT NULL,
    model_calls INTEGER NOT NULL,
    prompt_tokens INTEGER NOT NULL,
    completion_tokens INTEGER NOT NULL,
    failure TEXT,
    details BLOB NOT NULL,
    started REAL NOT NULL,
    finished REAL NOT NULL,
    buffer BLOB NOT NULL,
    PRIMARY KEY (task, grp, sample)
) STRICT;
CREATE TRIGGER fenced BEFORE INSERT ON trajectories
WHEN NEW.run_epoch < (SELECT run_epoch FROM run WHERE id = 1)
BEGIN SELECT RAISE(ABORT, 'fenced'); END;
CREATE TABLE outbox(
    seq INTEGER PRIMARY KEY,
    task TEXT NOT NULL,
    grp INTEGER NOT NULL,
    size INTEGER NOT NULL,
    partial INTEGER NOT NULL,
    released_at REAL NOT NULL,
    UNIQUE (task, grp)
) STRICT;
CREATE TRIGGER whole BEFORE INSERT ON outbox
WHEN NEW.size <> (SELECT count(*) FROM trajectories WHERE task = NEW.task AND grp = NEW.grp)
BEGIN SELECT RAISE(ABORT, 'a group was released that is not whole'); END;
CREATE TABLE deliveries(
    consumer TEXT NOT NULL,
    seq INTEGER NOT NULL,
    token TEXT NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('claimed', 'acked')),
    granted REAL NOT NULL,
    lease_until REAL NOT NULL,
    claims INTEGER NOT NULL,
    PRIMARY KEY (consumer, seq)
) STRICT, WITHOUT ROWID;
CREATE INDEX open_deliveries ON deliveries(consumer, seq) WHERE state = 'claimed';
"""


def create(path: Path, meta: RunMeta) -> apsw.Connection:
    """Make the store of a new run and return its writing connection. Raises RunExists, SchemaMismatch, StoreError."""
    with explained(path):
        connection = _connect(path, apsw.SQLITE_OPEN_READWRITE | apsw.SQLITE_OPEN_CREATE)
        try:
            if connection.pragma("user_version") == 0 and connection.pragma("page_count") == 0:
                connection.pragma("page_size", PAGE_BYTES)
            if connection.pragma("journal_mode", "wal") != "wal":
                raise StoreError(f"{path} lies on a file system without shared memory: put the run on a local disk")
            with immediate(connection):
                _refuse_existing(connection, path)
                connection.execute(_SCHEMA)
                row = (meta.to_json(),)
                connection.execute("INSERT INTO run VALUES (1, ?, 1, 'running', 0, NULL, NULL)", row)
                connection.pragma("user_version", VERSION)
        except BaseException:
            connection.close()
            raise
        return _tune_writer(connection)


def open_writer(path: Path) -> apsw.Connection:
    """The writing connection of an existing run. Raises UsageError, SchemaMismatch, StoreError."""
    with explained(path):
        return _tune_writer(_open(path, apsw.SQLITE_OPEN_READWRITE))


def open_consumer(path: Path) -> apsw.Connection:
    """A connection that claims and acknowledges, and leaves it to its user to sync the log. Raises as `open_writer`."""
    with explained(path):
        connection = _open(path, apsw.SQLITE_OPEN_READWRITE)
        # A commit that syncs holds the write lock meanwhile, a few ms on a busy disk: a worker that acks group after
        # group would keep the orchestrator out. Workers sync after the commit instead, without the lock.
        connection.pragma("synchronous", "NORMAL")
        # Moving the log into the file is the orchestrator's work as long as it lives: an ack must stay short.
        connection.wal_autocheckpoint(4 * CHECKPOINT_PAGES)
        return connection


def open_reader(path: Path) -> apsw.Connection:
    """A connection that cannot write. Raises as `open_writer`."""
    with explained(path):
        return _open(path, apsw.SQLITE_OPEN_READONLY)


def holds_run(path: Path) -> bool:
    """Whether a run's store is there, of any schema version: a creator has committed it. Raises StoreError."""
    if not path.is_file():
        return False
    with explained(path):
        # Not read-only: what a creator that was killed has left must be rolled back before it can be read.
        connection = _connect(path, apsw.SQLITE_OPEN_READWRITE)
        try:
            return bool(connection.pragma("user_version"))
        finally:
            connection.close()


@contextmanager
def immediate(connection: apsw.Connection) -> Iterator[None]:
    """A transaction that holds the write lock from its start; rolled back when the body raises."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        # SQLite itself has rolled back after some errors (a full disk, a failed read).
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn an error of SQLite into a StoreError that says what to do."""
    try:
        yield
    except apsw.Error as error:
        raise StoreError(f"{_advice(error, path)} ({type(error).__name__}: {error})") from error
    except (TypeError, ValueError, OverflowError) as error:  # a value that SQLite or JSON cannot hold
        raise StoreError(f"{path} cannot hold a value: {type(error).__name__}: {error}; please report this") from error


def _advice(error: apsw.Error, path: Path) -> str:
    again = f"then run `rollout resume {path.parent}`; all that was committed is kept"
    match error:
        case apsw.FullError():
            return f"the disk that holds {path} is full: free some space, {again}"
        case apsw.BusyError() | apsw.LockedError():
            return (
                f"{path} is locked by another process: close what has it open (a database browser, a backup), {again}"
            )
        case apsw.CorruptError() | apsw.NotADBError():
            return f"{path} is damaged or not a run's store: restore it from a copy, or collect into a new directory"
        case apsw.ReadOnlyError() | apsw.CantOpenError() | apsw.PermissionsError() | apsw.AuthError():
            return f"{path} cannot be opened or written: check owner and permissions of its directory, {again}"
        case apsw.IOError():
            return f"the disk that holds {path} reports an error: check it (full, removed, failing), {again}"
        case apsw.ConstraintError() if "fenced" in str(error):
            return f"another process has resumed the run in {path.parent}: this one may not write to it any more"
        case _:
            return f"{path} refused an operation: please report this"


def _connect(path: Path, flags: int) -> apsw.Connection:
    connection = apsw.Connection(str(path), flags=flags)
    connection.set_busy_timeout(int(BUSY_S * 1000))
    return connection


def _open(path: Path, flags: int) -> apsw.Connection:
    if not path.is_file():
        raise UsageError(f"there is no run in {path.parent}: name a directory that `rollout collect --out` has made")
    connection = _connect(path, flags)
    try:
        version = connection.pragma("user_version")
        if version == 0:
            raise UsageError(f"{path.parent} holds no run: its creation was cut short. Collect into it again")
        if version != VERSION:
            raise SchemaMismatch(
                f"{path} has schema {version}, this version reads {VERSION}: use the version that wrote it"
            )
    except BaseException:
        connection.close()
        raise
    return connection


def _refuse_existing(connection: apsw.Connection, path: Path) -> None:
    version = connection.pragma("user_version")
    if version == 0 and not connection.execute("SELECT count(*) FROM sqlite_schema").get:
        return
    if version != VERSION:
        raise SchemaMismatch(f"{path} is no store of this version (schema {version}): collect into a new directory")
    if connection.execute("SELECT state FROM run").get == "finished":
        raise RunExists(f"{path.parent} holds a finished run: choose another directory, or remove it")
    raise RunExists(f"{path.parent} holds an unfinished run: go on with `rollout resume {path.parent}`")


def _tune_writer(connection: apsw.Connection) -> apsw.Connection:
    connection.pragma("synchronous", "FULL")
    connection.pragma("journal_size_limit", LOG_LIMIT_BYTES)
    connection.wal_autocheckpoint(CHECKPOINT_PAGES)
    return connection
