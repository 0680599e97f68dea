"""Who takes part in ``bench``: plain sqlite3 in two ways, and the gateway in two."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from time import sleep
from typing import Any, Literal, TypeAlias

from onewriter.gateway import DbWriter

Write: TypeAlias = Callable[[int], object]  # writes the row with this id
CREATE = "CREATE TABLE load (id INTEGER PRIMARY KEY, text TEXT NOT NULL)"
INSERT = "INSERT INTO load VALUES (?, ?)"
LOOK = "SELECT count(*) FROM load WHERE id = ?"
TEXT = "one row, one operation"
SLOW_EVERY = 500  # operations, of which one computes for that long while its transaction is open:
SLOW = 0.02  # seconds
JOURNAL_MODE: Literal["WAL"] = "WAL"
SYNCHRONOUS: Literal["FULL"] = "FULL"


@dataclass
class Session:
    """One contestant at work on one file.

    ``connect`` gives each thread its write; ``finish`` returns once everything handed in is committed; ``failed``
    collects the errors of writes whose call had returned already.
    """

    connect: Callable[[], Write]
    finish: Callable[[], object] = lambda: None
    failed: list[BaseException | None] = field(default_factory=list)


@dataclass(frozen=True)
class Contestant:
    key: str
    name: str
    gateway: bool  # whether it must keep every write that it acknowledged
    open: Callable[[Path], contextlib.AbstractContextManager[Session]]


def operate(execute: Callable[[str, tuple[Any, ...]], object], row: int) -> None:
    """What an application does in a transaction: look, perhaps compute, and write."""
    execute(LOOK, (row,))
    if row % SLOW_EVERY == 0:
        sleep(SLOW)
    execute(INSERT, (row, TEXT))


def in_transaction(connection: sqlite3.Connection, row: int) -> None:
    # As most code begins: DEFERRED. It reads first, so it may write only if nobody else has written since.
    connection.execute("BEGIN")
    try:
        operate(lambda sql, values: connection.execute(sql, values).fetchall(), row)
        connection.execute("COMMIT")
    finally:
        if connection.in_transaction:
            connection.execute("ROLLBACK")


@contextlib.contextmanager
def _each_its_own(path: Path) -> Iterator[Session]:
    connections: list[sqlite3.Connection] = []

    def begin() -> Write:
        connection = connect(path)
        connections.append(connection)
        return lambda row: in_transaction(connection, row)

    try:
        yield Session(begin)
    finally:
        for connection in connections:
            connection.close()


@contextlib.contextmanager
def _one_and_a_lock(path: Path) -> Iterator[Session]:
    lock = threading.Lock()

    def write(row: int) -> None:
        with lock:
            in_transaction(connection, row)

    with contextlib.closing(connect(path)) as connection:
        yield Session(lambda: write)


@contextlib.contextmanager
def _run(path: Path) -> Iterator[Session]:
    with DbWriter(path, synchronous=SYNCHRONOUS, journal_mode=JOURNAL_MODE) as db:
        yield Session(lambda: lambda row: db.run(lambda tx: operate(tx.execute, row)))


@contextlib.contextmanager
def _enqueue(path: Path) -> Iterator[Session]:
    failed: list[BaseException | None] = []
    on_error = lambda ticket: failed.append(ticket.exception())  # noqa: E731
    with DbWriter(path, synchronous=SYNCHRONOUS, journal_mode=JOURNAL_MODE, on_error=on_error) as db:
        yield Session(lambda: lambda row: db.enqueue(lambda tx: operate(tx.execute, row)), db.flush, failed)


CONTESTANTS = (
    Contestant("a", "sqlite3, a connection per thread", False, _each_its_own),
    Contestant("b", "sqlite3, one connection and a lock", False, _one_and_a_lock),
    Contestant("c", "DbWriter.run", True, _run),
    Contestant("d", "DbWriter.enqueue", True, _enqueue),
)
COMPARED_WITH = "b"


def connect(path: Path) -> sqlite3.Connection:
    """What code without the gateway does: sqlite3's own timeout, of 5 seconds."""
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    connection.execute(f"PRAGMA synchronous = {SYNCHRONOUS}")
    # Where fsync does not reach the disk (macOS) the gateway sets these, so the others get them too.
    connection.execute("PRAGMA fullfsync = 1")
    connection.execute("PRAGMA checkpoint_fullfsync = 1")
    return connection
