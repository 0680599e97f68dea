"""What once got past the guard of a lent connection, each once more."""

from __future__ import annotations

import sqlite3
import threading
from pathlib import Path
from typing import Any

import pytest

from onewriter import DbWriter, ReadTimeoutError, TransactionAbortedError, TransactionClosedError

ENDLESS = "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c) SELECT max(n) FROM c"


@pytest.fixture
def db(any_db: DbWriter) -> DbWriter:
    any_db.run("CREATE TABLE t (n UNIQUE)")
    return any_db


def test_a_read_in_a_block_that_is_taken_back_leaves_the_writer_writable(db: DbWriter) -> None:
    for n in range(5):
        with pytest.raises(TransactionClosedError), db.transaction(max_hold=0.03):
            db.read(ENDLESS)
        with pytest.raises(TransactionClosedError), db.transaction(max_hold=0.03):
            db.read(lambda connection: threading.Event().wait(0.1))
            db.read("SELECT 1")
        db.run("INSERT INTO t VALUES (?)", (n,))


def test_a_savepoint_of_a_lent_connection_opens_the_way_for_no_other(db: DbWriter) -> None:
    def job(tx: Any) -> None:
        for sql in ("SAVEPOINT a", "RELEASE a"):
            tx.connection.execute(sql)

    for _ in range(2):
        db.run(job)
        for sql in ("SAVEPOINT a", "RELEASE a"):
            with pytest.raises(sqlite3.DatabaseError, match="not authorized"):
                db.run_without_transaction(sql)
            with pytest.raises(sqlite3.DatabaseError, match="not authorized"):
                db.run(sql)
            with db.transaction() as tx, pytest.raises(sqlite3.DatabaseError, match="not authorized"):
                tx.execute(sql)


@pytest.mark.parametrize("mode", ["OFF", "MEMORY", "DELETE", "off"])
def test_the_journal_mode_is_the_constructors(db: DbWriter, mode: str) -> None:
    for _ in range(2):
        with pytest.raises(sqlite3.DatabaseError, match="not authorized"):
            db.run_without_transaction(f"PRAGMA journal_mode = {mode}")
    assert db.run_without_transaction("PRAGMA journal_mode = WAL").rows == [("wal",)]


@pytest.mark.parametrize("sql", ["PRAGMA locking_mode = EXCLUSIVE", "PRAGMA journal_mode = DELETE"])
def test_a_read_cannot_change_how_its_connection_locks(db: DbWriter, sql: str) -> None:
    for _ in range(5):
        with pytest.raises(sqlite3.DatabaseError, match="not authorized"):
            db.read(sql)
        db.run("SELECT 1")
        assert db.read("SELECT 1") == [(1,)]


def test_a_read_inside_a_read_does_not_open_the_outer_one_for_writing(db: DbWriter) -> None:
    def outer(connection: sqlite3.Connection) -> None:
        db.read("SELECT 1")
        db.read(lambda inner: inner.execute("SELECT 1").fetchall())
        connection.execute("INSERT INTO t VALUES (1)")

    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        db.run(lambda tx: db.read(outer))
    db.run("INSERT INTO t VALUES (1)")


def test_a_read_inside_a_job_or_block_ends_at_its_timeout_too(db: DbWriter) -> None:
    def job(tx: Any) -> None:
        tx.execute("INSERT INTO t VALUES (1)")
        for read in (ENDLESS, lambda connection: connection.execute(ENDLESS).fetchall()):
            with pytest.raises(ReadTimeoutError):
                db.read(read, timeout=0.03)
        tx.execute("INSERT INTO t VALUES (2)")

    db.run(job)
    db.run("DELETE FROM t")
    with db.transaction() as tx:
        job(tx)
    assert db.read("SELECT n FROM t") == [(1,), (2,)]


def test_a_rowid_is_never_that_of_another_statement(db: DbWriter) -> None:
    db.run_script("""
        CREATE TABLE bare (n PRIMARY KEY) WITHOUT ROWID;
        CREATE TABLE keyed (id INTEGER PRIMARY KEY, n UNIQUE);
    """)
    db.run("INSERT INTO keyed VALUES (50, 1)")
    db.run("INSERT INTO keyed VALUES (99, 1) ON CONFLICT (n) DO UPDATE SET id = 99")
    assert db.run("INSERT INTO bare VALUES (1)").lastrowid is None
    db.run("INSERT INTO keyed VALUES (55, 2) ON CONFLICT (n) DO UPDATE SET n = 3")
    assert db.run("INSERT INTO bare VALUES (2)").lastrowid is None
    with db.transaction() as tx:
        tx.connection.execute("INSERT INTO keyed VALUES (60, 4)")
        assert tx.execute("INSERT INTO bare VALUES (3)").lastrowid is None
    db.run(lambda tx: tx.connection.execute("INSERT INTO keyed VALUES (61, 5)").close())
    assert db.run("INSERT INTO bare VALUES (4)").lastrowid is None
    with pytest.raises(sqlite3.IntegrityError):
        db.run("INSERT OR FAIL INTO keyed VALUES (70, 6), (71, 6)")
    assert db.run("INSERT INTO bare VALUES (5)").lastrowid is None
    assert db.run("INSERT INTO keyed VALUES (80, 8)").lastrowid == 80


def test_rows_are_counted_whatever_a_text_begins_with(db: DbWriter) -> None:
    assert db.run_many("WITH x(n) AS (VALUES (?)) INSERT INTO t SELECT n FROM x", [(1,), (2,)]).rowcount == 2
    assert db.run("; INSERT INTO t VALUES (3)").rowcount == 1
    assert db.run("\ufeffINSERT INTO t VALUES (4)").rowcount == 1
    assert db.run(";DELETE FROM t").rowcount == 4


def test_every_use_after_sqlites_own_rollback_raises(db: DbWriter) -> None:
    db.run("INSERT INTO t VALUES (1)")
    with pytest.raises(TransactionAbortedError), db.transaction() as tx:
        with pytest.raises(sqlite3.IntegrityError):
            tx.execute("INSERT OR ROLLBACK INTO t VALUES (1)")
        for use in (lambda: tx.connection, lambda: tx.on_commit(print), lambda: tx.on_rollback(print)):
            with pytest.raises(TransactionAbortedError):
                use()


class Buffer(bytearray):
    pass


def test_a_buffer_of_any_kind_is_captured(path: Path) -> None:
    from helpers import parked

    buffer = Buffer(b"1")
    with DbWriter(path) as db:
        with parked(db):
            ticket = db.enqueue("SELECT ?", (buffer,))
            buffer[0] = ord("9")
        assert ticket.result(30).rows == [(b"1",)]


def test_a_dump_can_be_had_through_a_loan(db: DbWriter) -> None:
    db.run("INSERT INTO t VALUES (1)")
    with db.transaction() as tx:
        assert any("INSERT INTO" in line for line in tx.connection.iterdump())
    with db.reader() as connection:
        assert any("INSERT INTO" in line for line in connection.iterdump())


def test_a_file_of_a_few_bytes_is_not_written_over(path: Path) -> None:
    path.write_bytes(b"x")
    with pytest.raises(sqlite3.DatabaseError, match="not a database"):
        DbWriter(path)
    assert path.read_bytes() == b"x"


def test_settings_of_a_new_file_come_before_its_journal(path: Path) -> None:
    pragmas: dict[str, str | int] = {
        "page_size": 8192,
        "auto_vacuum": "FULL",
        "encoding": "UTF-16",
        "secure_delete": "FAST",
    }
    for _ in range(2):
        with DbWriter(path, pragmas=pragmas) as db:
            db.run("CREATE TABLE IF NOT EXISTS t (n)")
            assert db.run_without_transaction("PRAGMA page_size").rows == [(8192,)]
            assert db.read_value("PRAGMA auto_vacuum") == 1
            assert db.read_value("PRAGMA encoding").startswith("UTF-16")
            assert db.read_value("PRAGMA secure_delete") == 2


@pytest.mark.parametrize(
    "arguments", [{"pragmas": ["x"]}, {"foreign_keys": "no"}, {"inline": 1}, {"auto_checkpoint": 0}]
)
def test_what_is_no_mapping_or_bool_is_refused(path: Path, arguments: Any) -> None:
    with pytest.raises(TypeError):
        DbWriter(path, **arguments)
