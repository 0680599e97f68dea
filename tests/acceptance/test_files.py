"""The files beside the database, and what happens to them: the log, the folder, the name."""

from __future__ import annotations

import os
import signal
import sqlite3
import statistics
import threading
from collections.abc import Iterator
from pathlib import Path
from time import monotonic, perf_counter
from typing import Any

import pytest

from helpers import DEADLINE, child_code, in_threads, names_in, run_child
from onewriter import DbWriter, WriterBrokenError

LIMIT = 2**20
COUNT = "SELECT count(*) FROM t"


@pytest.fixture
def db(path: Path) -> Iterator[DbWriter]:
    with DbWriter(path, synchronous="NORMAL", wal_limit=LIMIT) as gateway:
        gateway.run("CREATE TABLE t (id INTEGER PRIMARY KEY, text TEXT)")
        gateway.run_many("INSERT INTO t VALUES (?, ?)", [(n, "x" * 2000) for n in range(200)])
        yield gateway
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("mode", ["DELETE", "TRUNCATE", "PERSIST"])
def test_without_a_log_reads_and_writes_are_exact(path: Path, mode: str) -> None:
    with DbWriter(path, journal_mode=mode, synchronous="NORMAL") as db:  # type: ignore[arg-type]
        assert db.journal_mode == mode
        db.run("CREATE TABLE t (n)")
        stop = threading.Event()

        def read() -> None:
            last = 0
            while not stop.is_set():
                rows = db.read("SELECT n FROM t ORDER BY n")
                assert rows == [(n,) for n in range(len(rows))]
                assert len(rows) >= last
                last = len(rows)

        def write() -> None:
            try:
                for n in range(250):
                    db.run("INSERT INTO t VALUES (?)", (n,))
            finally:
                stop.set()

        in_threads(write, read, read)
        assert db.read_value("SELECT count(*) FROM t") == 250


def test_a_file_that_was_deleted_is_noticed_and_not_made_anew(path: Path) -> None:
    db = DbWriter(path)
    db.run("CREATE TABLE t (n)")
    db.run("INSERT INTO t VALUES (1)")
    for name in (str(path), f"{path}-wal", f"{path}-shm"):
        os.unlink(name)
    until = monotonic() + DEADLINE
    with pytest.raises(WriterBrokenError, match="may be lost"):
        while monotonic() < until:
            db.run("INSERT INTO t VALUES (2)")
    with pytest.raises(WriterBrokenError):
        db.read("SELECT n FROM t")
    report = db.close()
    assert report.failed >= 1
    assert db.health.startswith("broken: ")
    assert names_in(path.parent) == []


def test_a_bulk_load_in_chunks_lets_others_in(path: Path) -> None:
    with DbWriter(path, synchronous="NORMAL") as db:
        db.run("CREATE TABLE t (n)")
        rows = ((n,) for n in range(200_000))

        def load() -> None:
            from itertools import islice

            while chunk := list(islice(rows, 5_000)):
                db.run_many("INSERT INTO t VALUES (?)", chunk)

        def others() -> float:
            waits = []
            for _ in range(20):
                began = perf_counter()
                db.run("INSERT INTO t VALUES (-1)")
                waits.append(perf_counter() - began)
            return statistics.median(waits)

        _, wait = in_threads(load, others)
        assert isinstance(wait, float)
        assert wait < DEADLINE  # that it is short is for the benchmark to show
        assert db.read_value("SELECT count(*) FROM t") == 200_020


@pytest.mark.parametrize("journal_mode", ["DELETE", "TRUNCATE", "PERSIST"])
@pytest.mark.parametrize("way", ["statement", "function", "block", "watch", "inline", "new"])
def test_reads_go_on_after_another_process_was_killed_in_its_transaction(
    path: Path, journal_mode: str, way: str
) -> None:
    """What it has left only a connection that may write can roll back."""
    code = """
connection = sqlite3.connect(path, isolation_level=None)
connection.executescript("PRAGMA cache_size = 5; BEGIN IMMEDIATE; UPDATE t SET n = randomblob(500)")
os.kill(os.getpid(), signal.SIGKILL)
"""

    def connect(connection: sqlite3.Connection, readonly: bool) -> None:
        connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()  # a new connection meets it here

    options: dict[str, Any] = {"journal_mode": journal_mode, "on_connect": connect, "inline": way == "inline"}
    with DbWriter(path, **options) as db:
        db.run("CREATE TABLE t (n)")
        db.run_many("INSERT INTO t VALUES (?)", [("x" * 500,)] * 500)
        assert way == "new" or db.read_value(COUNT) == 500
        assert run_child(child_code(path, "import sqlite3" + code)).returncode == -signal.SIGKILL
        if way == "function":
            found = db.read(lambda connection: connection.execute(COUNT).fetchone()[0])
        elif way == "block":
            with db.reader() as connection:
                found = connection.execute(COUNT).fetchone()[0]
        elif way == "watch":
            with db.watch(COUNT) as live:
                ((found,),) = live.next(DEADLINE)
        else:
            found = db.read_value(COUNT)
        assert found == 500
