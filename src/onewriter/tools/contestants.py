"""The contestants of ``bench``: plain sqlite3 in three ways, and the gateway in two."""

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
TIMEOUT = 5.0  # seconds; sqlite3's default


@dataclass
class Session:
    """One process at work on one file.

    ``connect`` gives each thread its write; ``finish`` returns when everything queued is committed; ``failed``
    collects the errors of writes whose call had returned already.
    """

    connect: Callable[[], Write]
    finish: Callable[[], object] = lambda: None
    failed: list[BaseException | None] = field(default_factory=list)


# The path, and the timeout of plain connections.
Opener: TypeAlias = Callable[[Path, float], contextlib.AbstractContextManager[Session]]


@dataclass(frozen=True)
class Contestant:
    key: str
    name: str
    gateway: bool  # whether it must keep every write that it acknowledged
    open: Opener


def operate(execute: Callable[[str, tuple[Any, ...]], object], row: int) -> None:
    """What an application does in a transaction: read, perhaps compute, and write."""
    execute(LOOK, (row,))
    if row % SLOW_EVERY == 0:
        sleep(SLOW)
    execute(INSERT, (row, TEXT))


def in_transaction(connection: sqlite3.Connection, row: int, begin: str = "BEGIN") -> None:
    """``begin``: most code says BEGIN, which is DEFERRED. As it reads first, it can write only if no other connection
    has written since."""
    connection.execute(begin)
    try:
        operate(lambda sql, values: connection.execute(sql, values).fetchall(), row)
        connection.execute("COMMIT")
    finally:
        if connection.in_transaction:
            connection.execute("ROLLBACK")


@contextlib.contextmanager
def each_its_own(path: Path, timeout: float, begin: str = "BEGIN") -> Iterator[Session]:
    connections: list[sqlite3.Connection] = []

    def connected() -> Write:
        connection = connect(path, timeout)
        connections.append(connection)
        return lambda row: in_transaction(connection, row, begin)

    try:
        yield Session(connected)
    finally:
        for connection in connections:
            connection.close()


def each_its_own_immediate(path: Path, timeout: float) -> contextlib.AbstractContextManager[Session]:
    return each_its_own(path, timeout, "BEGIN IMMEDIATE")


@contextlib.contextmanager
def one_and_a_lock(path: Path, timeout: float) -> Iterator[Session]:
    lock = threading.Lock()

    def write(row: int) -> None:
        with lock:
            in_transaction(connection, row)

    with contextlib.closing(connect(path, timeout)) as connection:
        yield Session(lambda: write)


@contextlib.contextmanager
def run(path: Path, timeout: float) -> Iterator[Session]:
    with DbWriter(path, synchronous=SYNCHRONOUS, journal_mode=JOURNAL_MODE) as db:
        yield Session(lambda: lambda row: db.run(lambda tx: operate(tx.execute, row)))


@contextlib.contextmanager
def enqueue(path: Path, timeout: float) -> Iterator[Session]:
    failed: list[BaseException | None] = []
    on_error = lambda ticket: failed.append(ticket.exception())  # noqa: E731
    with DbWriter(path, synchronous=SYNCHRONOUS, journal_mode=JOURNAL_MODE, on_error=on_error) as db:
        yield Session(lambda: lambda row: db.enqueue(lambda tx: operate(tx.execute, row)), db.flush, failed)


THREADS = (
    Contestant("a", "sqlite3, BEGIN", False, each_its_own),
    Contestant("b", "sqlite3, a lock", False, one_and_a_lock),
    Contestant("c", "DbWriter.run", True, run),
    Contestant("d", "DbWriter.enqueue", True, enqueue),
)
PROCESSES = (
    Contestant("e", "sqlite3, BEGIN", False, each_its_own),
    Contestant("f", "sqlite3, IMMEDIATE", False, each_its_own_immediate),
    Contestant("g", "DbWriter.run", True, run),
)
BESIDE_A_SLOW_WRITER = (
    Contestant("h", "sqlite3, IMMEDIATE", False, each_its_own_immediate),
    Contestant("i", "DbWriter.run", True, run),
)
EXPLANATIONS = (
    "sqlite3, BEGIN: a connection for each thread. sqlite3, IMMEDIATE: the same, with BEGIN IMMEDIATE. sqlite3, a "
    "lock: one connection for all threads, and a threading.Lock. DbWriter: one in each process.",
    'locked: transactions that failed with "database is locked". commits: those that were acknowledged. found: their '
    "rows, after the file was opened again. Latencies are of all calls, failed ones too.",
    "(d): latency is that of the enqueue() call; writes/s count to the end of flush().",
)


def connect(path: Path, timeout: float = TIMEOUT) -> sqlite3.Connection:
    """What code without the gateway does."""
    connection = sqlite3.connect(path, timeout=timeout, isolation_level=None, check_same_thread=False)
    connection.execute(f"PRAGMA synchronous = {SYNCHRONOUS}")
    # Where fsync does not reach the disk (macOS) the gateway sets these, so the others get them too.
    connection.execute("PRAGMA fullfsync = 1")
    connection.execute("PRAGMA checkpoint_fullfsync = 1")
    return connection
