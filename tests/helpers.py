"""What several tests need: a parked writer, somebody else's lock, a child process; and the parts of an open gateway."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sqlite3
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import monotonic
from typing import Any, NoReturn

import children
from onewriter import AsyncDbWriter, DbWriter, Ticket, Transaction
from onewriter.base.state import State
from onewriter.core import Core
from onewriter.read.pool import ReaderPool
from onewriter.sqlite.file import DatabaseFile
from onewriter.sqlite.retry import LockPolicy
from onewriter.tasks.threads import ReadingThreads
from onewriter.write.checkpoint import Checkpointer
from onewriter.write.driver import Driver, ThreadDriver
from onewriter.write.queue import JobQueue
from onewriter.write.session import WriteSession
from onewriter.write.writer import Writer

DEADLINE = 30.0  # seconds; a wait that ends there is a hang
BRIEFLY = 0.05  # seconds; for waits that cannot succeed

# Where the parts of an open gateway are: no other place in the tests knows it.


def core_of(db: DbWriter | AsyncDbWriter) -> Core:
    return db._core if isinstance(db, DbWriter) else db._core()


def state_of(db: DbWriter | AsyncDbWriter) -> State:
    return core_of(db).state


def pool_of(db: DbWriter | AsyncDbWriter) -> ReaderPool:
    return core_of(db).pool


def writer_of(db: DbWriter | AsyncDbWriter) -> Writer:
    return core_of(db).writer


def queue_of(db: DbWriter | AsyncDbWriter) -> JobQueue:
    return core_of(db).queue


def file_of(db: DbWriter | AsyncDbWriter) -> DatabaseFile:
    return core_of(db).file


def policy_of(db: DbWriter | AsyncDbWriter) -> LockPolicy:
    return writer_of(db)._lock.policy


def checkpointer_of(db: DbWriter | AsyncDbWriter) -> Checkpointer:
    return writer_of(db)._checkpointer


def drop_session(db: DbWriter | AsyncDbWriter) -> None:
    """As after an error that leaves it in doubt, as soon as the writer is idle; the next job opens another."""
    is_free = threading.get_ident() == state_of(db).writer_thread or not isinstance(driver_of(db), ThreadDriver)
    eventually(lambda: is_free or queue_of(db)._asleep)
    writer_of(db)._connection.drop()


def session_of(db: DbWriter | AsyncDbWriter) -> WriteSession:
    session = writer_of(db)._connection.session
    assert session is not None
    return session


def driver_of(db: DbWriter | AsyncDbWriter) -> Driver:
    return core_of(db).driver


def threads_of(db: AsyncDbWriter) -> ReadingThreads:
    """Those in which SQLite is called for its tasks."""
    return (db._reads or db._task_reads()).threads


def eventually(condition: Callable[[], object]) -> None:
    """Wait for what no event tells of."""
    end = monotonic() + DEADLINE
    while not condition():
        assert monotonic() < end, "it did not come about"
        threading.Event().wait(0.001)


# What holds something up ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def parked(db: DbWriter) -> Iterator[threading.Event]:
    """Keep the writer busy for the ``with`` block, so that what is handed in meanwhile waits together.

    The writer goes on at the end of the block, or when the Event that it yields is set.
    """
    entered, release = threading.Event(), threading.Event()

    def park(tx: Transaction) -> None:
        entered.set()
        if not release.wait(DEADLINE):
            raise TimeoutError("nobody released the parked writer")

    ticket = db.enqueue(park)
    if not entered.wait(DEADLINE):
        raise TimeoutError("the writer did not come to the job that parks it")
    try:
        yield release
    finally:
        release.set()
        assert not isinstance(ticket.exception(DEADLINE), TimeoutError), "what waits for the writer cannot let it go"


@contextlib.contextmanager
def full_disk(size: int) -> Iterator[Callable[[], None]]:
    """For the ``with`` block, from the call of what it yields on, no file can be written behind ``size`` bytes."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def holding_lock(path: Path) -> Iterator[sqlite3.Connection]:
    """Hold SQLite's write lock through another connection for the ``with`` block, or until the caller commits."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        yield connection
        if connection.in_transaction:
            connection.execute("ROLLBACK")


@contextlib.contextmanager
def released_soon(path: Path, seconds: float = 0.3) -> Iterator[None]:
    """Hold SQLite's write lock, and let it go by itself a moment later, while the caller waits for it."""
    with holding_lock(path) as connection:
        timer = threading.Timer(seconds, connection.execute, ["COMMIT"])
        timer.start()
        yield
        timer.join(DEADLINE)


@contextlib.contextmanager
def released_when_met(db: DbWriter, path: Path) -> Iterator[None]:
    """Hold SQLite's write lock until the writer has met it."""
    policy = policy_of(db)
    with holding_lock(path) as connection:

        def release(seconds: float) -> None:
            if connection.in_transaction:
                connection.execute("COMMIT")

        sleep, policy.sleep = policy.sleep, release
        yield
        policy.sleep = sleep


@contextlib.contextmanager
def waiting_for_lock(db: DbWriter, path: Path) -> Iterator[threading.Event]:
    """What is handed in before the yielded Event is set is taken together, and waits for SQLite's lock."""
    go, there = threading.Event(), threading.Event()
    with parked(db) as release:
        stop = db.enqueue("SELECT 1", label="last before the lock is taken")

        def stay(ticket: Ticket[Any]) -> None:
            there.set()
            go.wait(DEADLINE)

        stop.add_done_callback(stay)
        release.set()
        assert there.wait(DEADLINE)
        with holding_lock(path):
            yield go


def until_waiting(db: DbWriter) -> None:
    """Until the writer waits for SQLite's lock."""
    eventually(lambda: "the writer has waited" in state_of(db).describe())


# What a database, the log or an error says ----------------------------------------------------------------------------


def make(path: Path, mode: str = "WAL") -> None:
    with contextlib.closing(sqlite3.connect(path)) as plain:
        plain.execute(f"PRAGMA journal_mode = {mode}")
        plain.execute("CREATE TABLE t (n)")


CREATE = """
CREATE TABLE t (id INTEGER PRIMARY KEY, name UNIQUE);
CREATE TABLE "odd ""name" (id INTEGER PRIMARY KEY, name TEXT);
CREATE TABLE bare (name PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE log (id INTEGER PRIMARY KEY, name);
CREATE TABLE "into" (id INTEGER PRIMARY KEY, "update" TEXT DEFAULT 'd');
CREATE VIEW v AS SELECT name FROM t;
CREATE TRIGGER write_v INSTEAD OF INSERT ON v BEGIN INSERT INTO t (name) VALUES (NEW.name); END;
CREATE TRIGGER log_t AFTER INSERT ON t
BEGIN INSERT INTO log VALUES (500, NEW.name), (501, NEW.name); DELETE FROM log; END;
INSERT INTO t VALUES (10, 'a'), (20, 'b');
"""


def rows(db: DbWriter) -> list[Any]:
    """What is in ``t``, in the order of its insertion."""
    return [n for (n,) in db.read("SELECT n FROM t ORDER BY rowid")]


def rows_in(path: Path) -> list[Any]:
    """The same, as any other connection sees it."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        return [n for (n,) in connection.execute("SELECT n FROM t ORDER BY rowid")]


def inserting(n: int) -> Callable[[Transaction], object]:
    return lambda tx: tx.execute("INSERT INTO t VALUES (?)", (n,))


def attaching(other: Path) -> Callable[[sqlite3.Connection, bool], object]:
    """A hook, ``on_connect``, that attaches a file as ``other``."""
    return lambda connection, readonly: connection.execute("ATTACH ? AS other", (str(other),))


def is_clean(db: DbWriter) -> bool:
    """Whether the only connection to read pins no old state: it sees a new row, and a checkpoint gets through."""
    before = db.run("SELECT count(*) FROM t").rows[0][0]
    db.run("INSERT INTO t VALUES (0)")
    sees = db.read_value("SELECT count(*) FROM t") == before + 1
    return bool(sees and db.run_without_transaction("PRAGMA wal_checkpoint(TRUNCATE)").rows[0][0] == 0)


def names_in(folder: Path) -> list[str]:
    """Without what FUSE keeps of files that are gone and still open."""
    return sorted(name for name in os.listdir(folder) if not name.startswith(".fuse_hidden"))


def log_size(path: Path) -> int:
    return os.path.getsize(f"{path}-wal")


def notes_of(error: BaseException) -> str:
    return "\n".join(getattr(error, "__notes__", ()))


class _Handler(logging.Handler):
    def __init__(self, emit: Callable[[logging.LogRecord], object]) -> None:
        super().__init__()
        self._emit = emit

    def emit(self, record: logging.LogRecord) -> None:
        self._emit(record)


@contextlib.contextmanager
def handling(emit: Callable[[logging.LogRecord], object]) -> Iterator[logging.Handler]:
    """Only ``emit`` hears the log."""
    logger, handler = logging.getLogger("onewriter"), _Handler(emit)
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield handler
    finally:
        logger.propagate = True
        logger.removeHandler(handler)


def raising(error: type[BaseException]) -> Callable[..., NoReturn]:
    def fail(*_: object, **__: object) -> NoReturn:
        raise error("of an exception's own making")

    return fail


class UnhelpfulError(Exception):
    """It can be neither told from False nor asked for its notes."""

    def __bool__(self) -> NoReturn:
        raise RuntimeError("neither true nor false")

    @property
    def __notes__(self) -> NoReturn:  # type: ignore[override]
        raise RuntimeError("no notes")


def raises(error: BaseException) -> Callable[[sqlite3.Connection, bool], object]:
    """A hook, ``on_connect``, that raises it."""

    def hook(connection: sqlite3.Connection, readonly: bool) -> None:
        raise error

    return hook


# Threads and processes ------------------------------------------------------------------------------------------------


def in_threads(*functions: Callable[[], object]) -> list[object]:
    """Run each function in a thread of its own, all at once; their results, or the first error of one of them."""
    with ThreadPoolExecutor(len(functions)) as pool:
        return [future.result(DEADLINE) for future in [pool.submit(function) for function in functions]]


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port: int = listening.getsockname()[1]
        return port


# Whoever runs the tests in the background has SIGINT ignored, and children inherit that.
HEARS_INTERRUPTS = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"


def run_child(code: str, timeout: float = 60.0) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a Python process of its own."""
    return children.run(HEARS_INTERRUPTS + code, timeout)


PRELUDE = """
import json, logging, os, signal, sys, threading
from onewriter import DbWriter

path = {path!r}
logging.basicConfig(format="%(levelname)s %(message)s")
INSERT = "INSERT INTO t VALUES (?)"
"""


def child_code(path: Path, code: str) -> str:
    """``code`` for a child process, with the names that it needs."""
    return PRELUDE.format(path=str(path)) + code
