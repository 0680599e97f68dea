"""What several tests need: a parked writer, somebody else's lock, a child process; and the parts of an open gateway."""

from __future__ import annotations

import contextlib
import socket
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from onewriter import AsyncDbWriter, DbWriter, Transaction
from onewriter.base.state import State
from onewriter.read.pool import ReaderPool
from onewriter.write.driver import Driver
from onewriter.write.session import WriteSession
from onewriter.write.writer import Writer

DEADLINE = 30.0  # seconds; a wait that ends there is a hang

# Where the parts of an open gateway are: no other place in the tests knows it.


def gateway_of(db: DbWriter | AsyncDbWriter) -> DbWriter:
    return db if isinstance(db, DbWriter) else db._gateway()


def state_of(db: DbWriter | AsyncDbWriter) -> State:
    return gateway_of(db)._state


def pool_of(db: DbWriter | AsyncDbWriter) -> ReaderPool:
    return gateway_of(db)._readers


def writer_of(db: DbWriter | AsyncDbWriter) -> Writer:
    return gateway_of(db)._loop


def session_of(db: DbWriter | AsyncDbWriter) -> WriteSession:
    session = writer_of(db)._session
    assert session is not None
    return session


def driver_of(db: DbWriter | AsyncDbWriter) -> Driver:
    return gateway_of(db)._driver


def threads_of(db: AsyncDbWriter) -> ThreadPoolExecutor:
    """Those in which a task's calls run that may block."""
    assert db._pool is not None
    return db._pool


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
        ticket.exception(DEADLINE)


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
    command = [sys.executable, "-c", HEARS_INTERRUPTS + code]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout)
