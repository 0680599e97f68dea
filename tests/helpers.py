"""What several tests need: a parked writer, somebody else's lock, a child process."""

from __future__ import annotations

import contextlib
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from onewriter import DbWriter, Transaction

DEADLINE = 30.0  # seconds; a wait that ends there is a hang


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


def run_child(code: str, timeout: float = 60.0) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a Python process of its own."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout)
