"""What is read and where: snapshots, names of files, scripts, settings of every connection."""

from __future__ import annotations

import contextlib
import datetime
import os
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from helpers import in_threads
from onewriter import DbWriter, Transaction


@pytest.mark.parametrize("journal_mode", ["WAL", "DELETE"])
def test_rows_that_nobody_consumes_hold_nothing_up(path: Path, journal_mode: Any) -> None:
    with DbWriter(path, readers=1, journal_mode=journal_mode) as db:
        db.run("CREATE TABLE t (n INTEGER)")
        db.run_many("INSERT INTO t VALUES (?)", [(n,) for n in range(500)])
        rows = iter(db.read("SELECT n FROM t"))
        next(rows)
        db.run("INSERT INTO t VALUES (500)")
        assert db.read_value("SELECT count(*) FROM t") == 501


def test_a_read_as_the_first_call_works(path: Path) -> None:
    with DbWriter(path) as db:
        assert db.read("SELECT 1") == [(1,)]


def test_a_script_is_part_of_its_transaction(any_db: DbWriter) -> None:
    any_db.run("CREATE TABLE t (text TEXT)")
    with pytest.raises(LookupError), any_db.transaction() as tx:
        tx.execute("INSERT INTO t VALUES ('a')")
        tx.executescript("INSERT INTO t VALUES ('b'); INSERT INTO t VALUES ('c');")
        raise LookupError

    def job(tx: Transaction) -> None:
        tx.execute("INSERT INTO t VALUES ('a')")
        tx.connection.executescript("INSERT INTO t VALUES ('b'); INSERT INTO t VALUES ('c');")
        raise LookupError

    with pytest.raises(LookupError):
        any_db.run(job)
    with pytest.raises(sqlite3.OperationalError):
        any_db.run_script("INSERT INTO t VALUES ('a'); INSERT INTO t VALUES ('b'); INSERT INTO nowhere VALUES (1);")
    assert any_db.read("SELECT * FROM t") == []


NAMES = ["a#b", "a?b", "a%41b", "a b", "ünï", "it's", "x&mode=memory", "a?mode=memory"]


@pytest.mark.parametrize("kind", [str, os.fsencode, Path])
@pytest.mark.parametrize("name", NAMES)
def test_any_name_of_a_file_is_that_file(tmp_path: Path, name: str, kind: Any) -> None:
    folder = tmp_path / name
    folder.mkdir()
    with DbWriter(kind(folder / f"{name}.db")) as db:
        db.run("CREATE TABLE t (n INTEGER)")
        db.run_many("INSERT INTO t VALUES (?)", [(1,), (2,)])
        assert db.read_value("SELECT count(*) FROM t") == 2
        with pytest.raises(sqlite3.OperationalError, match="readonly"):
            db.read("INSERT INTO t VALUES (3)")
        assert {entry.removesuffix("-wal").removesuffix("-shm") for entry in os.listdir(folder)} == {f"{name}.db"}
    assert os.listdir(folder) == [f"{name}.db"]


def test_every_connection_has_the_same_settings(path: Path) -> None:
    opened: list[bool] = []

    def hook(connection: sqlite3.Connection, readonly: bool) -> None:
        opened.append(readonly)
        connection.create_function("rev", 1, lambda text: text[::-1], deterministic=True)
        connection.create_collation("backwards", lambda a, b: (a < b) - (a > b))

    with DbWriter(path, readers=4, on_connect=hook, row_factory=sqlite3.Row) as db:
        db.run_script("""
            CREATE TABLE parent (id INTEGER PRIMARY KEY);
            CREATE TABLE child (parent INTEGER REFERENCES parent ON DELETE CASCADE);
        """)
        db.run("INSERT INTO parent VALUES (1)")
        db.run("INSERT INTO child VALUES (1)")
        assert db.run("SELECT rev('abc') AS r").rows[0]["r"] == "cba"
        with db.transaction() as tx:
            assert tx.execute("SELECT rev('abc') AS r").rows[0]["r"] == "cba"
            assert tx.connection.execute("SELECT rev('abc') AS r").fetchone()["r"] == "cba"
        with contextlib.ExitStack() as stack:
            for reader in in_threads(*[lambda: db.reader()] * 4):
                connection = stack.enter_context(reader)  # type: ignore[arg-type, var-annotated]
                row = connection.execute("SELECT 'a' AS x UNION SELECT 'b' ORDER BY x COLLATE backwards").fetchone()
                assert row["x"] == "b"
        assert db.read_one("SELECT rev('abc') AS r")["r"] == "cba"
        db.run("DELETE FROM parent")
        assert db.read_value("SELECT count(*) FROM child") == 0
    assert opened.count(False) == 1
    assert opened.count(True) in range(1, 5)


def test_an_aware_datetime_is_stored_as_its_text(path: Path) -> None:
    moment = datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.timezone(datetime.timedelta(hours=2)))
    with DbWriter(path) as db:
        db.run("CREATE TABLE t (at TIMESTAMP)")
        db.run("INSERT INTO t VALUES (?)", (moment.isoformat(),))
        assert datetime.datetime.fromisoformat(db.read_value("SELECT at FROM t")) == moment
