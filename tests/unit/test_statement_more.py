"""More of statements: where a Result could be mistaken, what is captured when, scripts that do something."""

from __future__ import annotations

import array
import sqlite3
import threading
import tracemalloc
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from helpers import DEADLINE, parked
from onewriter import DbWriter, Result, Transaction
from onewriter.sqlite.statement import _describe_long, describe_sql

INSERT = "INSERT INTO t (name) VALUES (?)"
CREATE = """
CREATE TABLE t (id INTEGER PRIMARY KEY, name UNIQUE);
CREATE TABLE bare (name PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE log (id INTEGER PRIMARY KEY, name);
CREATE TABLE "into" (id INTEGER PRIMARY KEY, "update" TEXT DEFAULT 'd');
CREATE VIEW v AS SELECT name FROM t;
CREATE TRIGGER write_v INSTEAD OF INSERT ON v BEGIN INSERT INTO t (name) VALUES (NEW.name); END;
CREATE TRIGGER log_t AFTER INSERT ON t
BEGIN INSERT INTO log VALUES (500, NEW.name), (501, NEW.name); DELETE FROM log; END;
INSERT INTO t VALUES (10, 'a'), (20, 'b');
"""


@pytest.fixture
def db(any_db: DbWriter) -> DbWriter:
    any_db.run_script(CREATE)
    return any_db


def names(db: DbWriter) -> list[Any]:
    return [name for (name,) in db.read("SELECT name FROM t ORDER BY id")]


# SQL, rowcount, lastrowid, rows
RESULTS: list[tuple[str, int, int | None, list[Any]]] = [
    ("INSERT INTO t (name) VALUES ('ON CONFLICT DO UPDATE SET')", 1, 21, []),
    ("INSERT INTO t (name) VALUES ('c') /* ON CONFLICT DO UPDATE */ ON CONFLICT DO NOTHING", 1, 21, []),
    ("INSERT INTO t (name) SELECT name || 1 FROM t", 2, 22, []),
    ("INSERT INTO t (name) SELECT 'c' WHERE 1 ON CONFLICT (name) DO UPDATE SET name = excluded.name", 1, None, []),
    ("INSERT INTO t (name) VALUES ('a') ON CONFLICT (name) DO UPDATE SET name = 'q' WHERE 0", 0, None, []),
    ("INSERT INTO t (name) WITH x(n) AS (VALUES ('c'), ('d')) SELECT n FROM x", 2, 22, []),
    ("INSERT INTO t VALUES (-5, 'c')", 1, -5, []),
    ("INSERT INTO t VALUES (0, 'c')", 1, 0, []),
    ("INSERT INTO v VALUES ('c')", 0, None, []),
    ('INSERT INTO "into" DEFAULT VALUES', 1, 1, []),
    ("INSERT INTO [into] ([update]) VALUES ('DO UPDATE') RETURNING [update]", 1, 1, [("DO UPDATE",)]),
    ("INSERT INTO main . `into` VALUES (6, 'x');  -- done", 1, 6, []),
    ("REPLACE INTO 't' VALUES (10, 'b')", 1, 10, []),
    ("INSERT OR ABORT INTO t (name) VALUES ('c') RETURNING rowid AS \"RETURNING\"", 1, 21, [(21,)]),
    ("INSERT INTO bare VALUES ('x'), ('y')", 2, None, []),
    ("REPLACE INTO bare VALUES ('x') RETURNING name", 1, None, [("x",)]),
    ("INSERT INTO t (name) VALUES ('a') ON CONFLICT (name) DO UPDATE SET name = 'q' RETURNING id", 1, None, [(10,)]),
    ("UPDATE t SET name = 'q' WHERE id = 10 RETURNING name", 1, None, [("q",)]),
    ("UPDATE OR IGNORE t SET name = 'a'", 1, None, []),
    ("WITH x AS (SELECT 10 AS i) UPDATE t SET name = 'q' WHERE id IN (SELECT i FROM x) RETURNING id", 1, None, [(10,)]),
    ("WITH x AS (SELECT 1) UPDATE t SET name = 'q' WHERE 0", 0, None, []),
    (
        "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c LIMIT 5) INSERT INTO log SELECT n, n FROM c",
        5,
        5,
        [],
    ),
    ("-- WITH\nWITH x AS (SELECT 'a' AS n) DELETE FROM t WHERE name IN x", 1, None, []),
    ("WITH x AS (SELECT 'c' AS n) REPLACE INTO bare SELECT n FROM x", 1, None, []),
    ("VALUES (1), (2)", -1, None, [(1,), (2,)]),
    ("PRAGMA user_version", -1, None, [(0,)]),
    ("-- nothing but a comment", -1, None, []),
]
WAYS: dict[str, Any] = {
    "run": lambda db, sql: db.run(sql),
    "a queued job": lambda db, sql: db.enqueue(sql).result(DEADLINE),
    "a function": lambda db, sql: db.run(lambda tx: tx.execute(sql)),
    "a run inside a job": lambda db, sql: db.run(lambda tx: db.run(sql)),
    "run_without_transaction": lambda db, sql: db.run_without_transaction(sql),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_result_is_not_mistaken_about_its_statement_in_any_way_to_run_it(path: Path, way: Any) -> None:
    with DbWriter(path) as db:
        db.run_script(CREATE)
        for sql, rowcount, lastrowid, rows in RESULTS:
            result = way(db, sql)
            assert (result.rowcount, result.lastrowid, result.rows) == (rowcount, lastrowid, rows), sql
            db.run("DELETE FROM t")
            db.run_many("DELETE FROM bare WHERE name <> ?", [("",)])
            db.run('DELETE FROM "into"')
            db.run("INSERT INTO t VALUES (10, 'a'), (20, 'b')")


def test_the_same_rowid_twice_is_a_rowid_twice(db: DbWriter) -> None:
    """The connection's last rowid does not change then; that alone does not make a table one without rowids."""
    for _ in range(3):
        assert db.run("INSERT INTO log VALUES (7, 'x')").lastrowid == 7
        assert db.run("INSERT INTO t VALUES (7, 'x')").lastrowid == 7
        assert db.enqueue("REPLACE INTO t VALUES (7, 'y')").result(DEADLINE).lastrowid == 7
        assert db.run("INSERT INTO bare VALUES ('x')").lastrowid is None
        db.run_script("DELETE FROM log; DELETE FROM t; DELETE FROM bare;")


def test_a_result_outlives_its_transaction_and_its_gateway(path: Path) -> None:
    with DbWriter(path) as db:
        db.run_script(CREATE)
        with db.transaction() as tx:
            inside = tx.execute("SELECT id, name FROM t")
            assert inside.fetchone() == (10, "a")
            tx.execute("DELETE FROM t")
        outside = db.run("SELECT 1 AS x, 2 AS y")
    assert inside.fetchall() == [(20, "b")]
    assert [column[0] for column in outside.description] == ["x", "y"]
    assert all(column[1:] == (None,) * 6 for column in outside.description)
    assert list(outside) == [(1, 2)]


def test_a_statement_without_rows_has_none_and_no_description(db: DbWriter) -> None:
    result = db.run(INSERT, ("c",))
    assert isinstance(result, Result)
    assert (result.rows, list(result), result.fetchone(), result.fetchall()) == ([], [], None, [])
    assert result.description is None


def test_two_statements_in_one_text_are_refused_and_neither_is_done(db: DbWriter) -> None:
    for call in (db.run, db.run_without_transaction, lambda sql: db.run(lambda tx: tx.execute(sql))):
        with pytest.raises((sqlite3.Warning, sqlite3.ProgrammingError), match="one statement"):
            call("DELETE FROM t; DELETE FROM t")
    assert names(db) == ["a", "b"]


# Parameters -----------------------------------------------------------------------------------------------------------


class Named(Mapping[str, Any]):
    """A mapping that is no dict."""

    def __getitem__(self, key: str) -> Any:
        return {"a": 1, "b": b"2"}[key]

    def __iter__(self) -> Iterator[str]:
        return iter("ab")

    def __len__(self) -> int:
        return 2


def test_named_parameters_come_from_any_mapping(db: DbWriter) -> None:
    assert db.run("SELECT :a, @b, $a", Named()).rows == [(1, b"2", 1)]
    assert db.run("SELECT :a", {"a": 1, "unused": object()}).rows == [(1,)]
    assert db.read("SELECT :a, :b", Named()) == [(1, b"2")]
    with pytest.raises(sqlite3.ProgrammingError, match="binding"):
        db.run("SELECT :missing", {"a": 1})


def test_a_generator_of_parameters_is_consumed_at_the_call_in_the_callers_thread(path: Path) -> None:
    threads: list[int] = []

    def values() -> Iterator[str]:
        threads.append(threading.get_ident())
        yield "c"

    with DbWriter(path) as db:
        db.run_script(CREATE)
        with parked(db):
            db.enqueue(INSERT, values())
            assert threads == [threading.get_ident()]
        db.flush(DEADLINE)
        assert names(db) == ["a", "b", "c"]


def test_buffers_of_every_kind_are_those_of_the_call(path: Path) -> None:
    buffer, numbers = bytearray(b"1"), array.array("B", b"2")
    with DbWriter(path) as db:
        db.run("CREATE TABLE t (a, b, c)")
        with parked(db):
            ticket = db.enqueue(
                "INSERT INTO t VALUES (?, ?, ?) RETURNING a, b, c", [buffer, numbers, memoryview(buffer)]
            )
            buffer[0] = numbers[0] = ord("9")
        assert ticket.result(DEADLINE).rows == [(b"1", b"2", b"1")]


def test_rows_of_run_many_are_those_of_the_call(path: Path) -> None:
    """They are changed after the last one was asked for, while the job waits."""
    listed, named, buffer, asked = ["c"], {"1": "d"}, bytearray(b"e"), threading.Event()

    def rows() -> Iterator[Any]:
        yield listed
        yield tuple(named.values())
        yield [buffer]
        asked.set()

    with DbWriter(path) as db, ThreadPoolExecutor() as pool:
        db.run_script(CREATE)
        with parked(db):
            call = pool.submit(db.run_many, INSERT, rows(), timeout=DEADLINE)
            assert asked.wait(DEADLINE)
            listed[0] = named["1"] = "z"
            buffer[0] = ord("z")
        assert call.result(DEADLINE).rowcount == 3
        assert names(db) == ["a", "b", "c", "d", b"e"]


def test_a_generator_of_rows_that_fails_fails_the_call_and_nothing_is_accepted(db: DbWriter) -> None:
    def rows() -> Iterator[tuple[str]]:
        yield ("c",)
        raise LookupError("midway")

    before = db.stats().committed
    with pytest.raises(LookupError, match="midway"):
        db.run_many(INSERT, rows())
    assert (db.stats().committed, db.stats().failed) == (before, 0)

    def job(tx: Transaction) -> None:
        with pytest.raises(LookupError, match="midway"):
            tx.executemany(INSERT, rows())

    db.run(job)
    assert names(db) == ["a", "b"]


@pytest.mark.parametrize("row", ["x", b"x", {"x"}, 5, None], ids=repr)
def test_one_row_that_is_no_row_fails_the_call_of_run_many(db: DbWriter, row: Any) -> None:
    with pytest.raises(TypeError, match="parameters"):
        db.run_many(INSERT, [("c",), row])
    with db.transaction() as tx, pytest.raises(TypeError, match="parameters"):
        tx.executemany(INSERT, [("c",), row])
    assert names(db) == ["a", "b"]


def test_rows_of_run_many_may_come_from_a_map_or_a_zip(db: DbWriter) -> None:
    assert db.run_many(INSERT, map(lambda name: [name], "cd")).rowcount == 2
    assert db.run_many("INSERT INTO t VALUES (?, ?)", zip((50, 51), "ef", strict=True)).rowcount == 2
    assert names(db) == list("abcdef")


def test_many_rows_count_only_what_they_changed(db: DbWriter) -> None:
    result = db.run_many("INSERT OR IGNORE INTO t (name) VALUES (?)", [("a",), ("c",), ("b",), ("d",)])
    assert (result.rowcount, result.lastrowid, result.rows) == (2, None, [])


@pytest.mark.parametrize("sql", ["SELECT ?", "WITH x AS (SELECT ?) SELECT * FROM x", "VALUES (?)"])
def test_many_rows_of_a_query_are_refused_by_sqlite3(db: DbWriter, sql: str) -> None:
    with pytest.raises(sqlite3.ProgrammingError):
        db.run_many(sql, [(1,), (2,)])
    assert names(db) == ["a", "b"]


# Scripts --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["", " \n\t", ";", ";;  ; ", "-- nothing", "/* nothing; */", "/* not closed; "])
def test_a_script_of_nothing_does_nothing_and_succeeds(db: DbWriter, script: str) -> None:
    db.run_script(script)
    with db.transaction() as tx:
        tx.executescript(script)
        tx.connection.executescript(script)
    assert names(db) == ["a", "b"]


FAILING = ["INSERT INTO t (name) VALUES ('a')", "INSERT INTO nowhere VALUES (1)", "SELEC", "COMMIT", "VACUUM"]


@pytest.mark.parametrize("last", FAILING)
def test_a_script_that_fails_leaves_nothing_wherever_it_fails(db: DbWriter, last: str) -> None:
    script = f"CREATE TABLE new (n); INSERT INTO t (name) VALUES ('c'); {last}; INSERT INTO t (name) VALUES ('d')"
    with pytest.raises(sqlite3.DatabaseError):
        db.run_script(script)

    def job(tx: Transaction) -> None:
        tx.execute(INSERT, ("e",))
        with pytest.raises(sqlite3.DatabaseError):
            tx.executescript(script)
        with pytest.raises(sqlite3.DatabaseError):
            db.run_script(script)

    db.run(job)
    assert names(db) == ["a", "b", "e"]
    assert db.read("SELECT name FROM sqlite_schema WHERE name = 'new'") == []


def test_a_script_may_have_rows_that_nobody_reads(db: DbWriter) -> None:
    db.run_script(
        "SELECT * FROM t; INSERT INTO t (name) VALUES ('c'), ('d') RETURNING id; DROP TABLE log; PRAGMA user_version;"
    )
    assert names(db)[:2] == ["a", "b"]


def test_a_trigger_with_case_and_strings_is_one_statement_of_a_script(db: DbWriter) -> None:
    db.run_script("""
        CREATE TABLE seen (text);
        create temp trigger if not exists "end;" after delete on main.t begin
            insert into seen values (case when old.name = 'a' then 'it''s; end;' else "old".name end); -- end;
            select case when 1 then 2 end;
        END /* ; */ ;
        DELETE FROM t; SELECT 'not; the end' -- without a semicolon at the end
    """)
    assert db.run("SELECT text FROM seen").rows == [("it's; end;",), ("b",)]


def test_many_rows_of_a_select_are_refused_in_any_form(db: DbWriter) -> None:
    for sql in ("SELECT ?", "WITH x AS (SELECT ?) SELECT * FROM x"):
        with pytest.raises(sqlite3.ProgrammingError, match="DML"):
            db.run_many(sql, [(1,), (2,)])


def test_a_long_text_is_read_without_much_memory_and_not_kept() -> None:
    text = "INSERT INTO t VALUES ('" + "x" * 10**6 + "''y')"
    tracemalloc.start()
    try:
        assert describe_sql(text).verb == "INSERT"
        assert tracemalloc.get_traced_memory()[1] < 10**6
    finally:
        tracemalloc.stop()
    for n in range(5):
        assert describe_sql(f"SELECT {n} /* {'x' * 20_000} */").verb == "SELECT"
    assert _describe_long.cache_info().currsize <= 2
