"""A Result says what its own statement did, and outlives its transaction."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers import CREATE, DEADLINE, parked, rows
from onewriter import DbWriter, Result, Transaction

INSERT = "INSERT INTO t VALUES (?)"
INSERT_NAME = "INSERT INTO t (name) VALUES (?)"


@pytest.fixture
def db(names_db: DbWriter) -> DbWriter:
    return names_db


# SQL, rowcount, lastrowid, rows
RESULTS: list[tuple[str, int, int | None, list[Any]]] = [
    ("INSERT INTO t (name) VALUES ('c')", 1, 21, []),
    ("insert into main.t (name) values ('c'), ('d')", 2, 22, []),
    ("-- a comment\n/* and one */ INSERT INTO t VALUES (5, 'c')", 1, 5, []),
    ('INSERT INTO "odd ""name" VALUES (7, 1)', 1, 7, []),
    ('INSERT INTO [odd "name] VALUES (8, 1)', 1, 8, []),
    ("REPLACE INTO t VALUES (10, 'z')", 1, 10, []),
    ("INSERT OR REPLACE INTO t (name) VALUES ('a')", 1, 21, []),
    ("INSERT OR IGNORE INTO t (name) VALUES ('a')", 0, None, []),
    ("INSERT INTO t (name) VALUES ('a') ON CONFLICT DO NOTHING", 0, None, []),
    ("INSERT INTO t (name) VALUES ('c') ON CONFLICT DO NOTHING", 1, 21, []),
    ("INSERT INTO t (name) VALUES ('a') ON CONFLICT (name) DO UPDATE SET name = 'q'", 1, None, []),
    ("INSERT INTO t (name) VALUES ('c') ON CONFLICT (name) DO UPDATE SET name = 'q'", 1, None, []),
    ("INSERT INTO bare VALUES ('a')", 1, None, []),
    ("INSERT INTO main.bare VALUES ('a')", 1, None, []),
    ('INSERT INTO "main"."bare" VALUES (1)', 1, None, []),
    ("INSERT INTO t (name) SELECT 'c' WHERE 0", 0, None, []),
    ("INSERT INTO t (name) VALUES ('c') RETURNING id, name", 1, 21, [(21, "c")]),
    ("WITH x AS (SELECT 'c' AS n) INSERT INTO t (name) SELECT n FROM x", 1, 21, []),
    ("WITH x(n) AS (VALUES (1), (2)) UPDATE t SET name = name || 1 WHERE id > 1", 2, None, []),
    ("WITH x AS (SELECT 1) DELETE FROM t RETURNING id", 2, None, [(10,), (20,)]),
    ("UPDATE t SET name = upper(name)", 2, None, []),
    ("UPDATE t SET name = 'q' WHERE id = 99", 0, None, []),
    ("DELETE FROM t", 2, None, []),
    ("SELECT name FROM t ORDER BY id", -1, None, [("a",), ("b",)]),
    ("WITH x AS (SELECT 5 AS n) SELECT n FROM x", -1, None, [(5,)]),
    ("CREATE TABLE other (n)", -1, None, []),
    ("", -1, None, []),
]

# SQL, rowcount, lastrowid, rows
SUBTLE_RESULTS: list[tuple[str, int, int | None, list[Any]]] = [
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


@pytest.mark.parametrize(("sql", "rowcount", "lastrowid", "rows"), RESULTS)
def test_a_result_says_what_its_own_statement_did(
    db: DbWriter, sql: str, rowcount: int, lastrowid: int | None, rows: list[Any]
) -> None:
    db.run("INSERT INTO log VALUES (77, 'an earlier job')")
    result = db.run(sql)
    assert (result.rowcount, result.lastrowid, result.rows) == (rowcount, lastrowid, rows)


@pytest.mark.parametrize(("sql", "rowcount", "lastrowid", "rows"), RESULTS)
def test_it_says_the_same_inside_a_block(
    db: DbWriter, sql: str, rowcount: int, lastrowid: int | None, rows: list[Any]
) -> None:
    with db.transaction() as tx:
        tx.execute("INSERT INTO log VALUES (77, 'an earlier statement')")
        result = tx.execute(sql)
    assert (result.rowcount, result.lastrowid, result.rows) == (rowcount, lastrowid, rows)


def test_each_of_many_queued_statements_has_its_own_result(path: Any) -> None:
    with DbWriter(path) as db:
        db.run_script(CREATE)
        with parked(db):
            tickets = [
                db.enqueue("INSERT INTO t (name) VALUES (?)", ("c",)),
                db.enqueue("INSERT OR IGNORE INTO t (name) VALUES (?)", ("c",)),
                db.enqueue("INSERT INTO bare VALUES (?)", ("c",)),
                db.enqueue("UPDATE t SET name = name || 1"),
                db.enqueue("INSERT INTO t (name) VALUES (?)", ("d",)),
                db.enqueue("INSERT INTO t (name) VALUES (?)", ("d",)),
                db.enqueue("INSERT INTO log (name) VALUES (?)", ("e",)),
            ]
        db.flush()
        found = [(t.result().rowcount, t.result().lastrowid) if t.exception() is None else None for t in tickets]
        assert found == [(1, 21), (0, None), (1, None), (3, None), (1, 22), None, (1, 1)]
        assert tickets[0].result() is tickets[0].result()


def test_a_result_can_be_used_like_a_cursor(db: DbWriter) -> None:
    result = db.run("SELECT 1 AS n UNION SELECT 2 UNION SELECT 3 UNION SELECT 4")
    assert isinstance(result, Result)
    assert [column[0] for column in result.description] == ["n"]
    assert result.fetchone() == (1,)
    assert result.fetchmany() == [(2,)]
    assert list(result) == [(3,), (4,)]
    assert result.fetchall() == [(3,), (4,)]
    assert (result.fetchone(), result.fetchmany(2), result.fetchall()) == (None, [], [])
    assert len(result.rows) == 4
    assert "rows=4" in repr(result)


def test_a_rowid_is_never_that_of_another_statement(table_db: DbWriter) -> None:
    table_db.run_script("""
        CREATE TABLE bare (n PRIMARY KEY) WITHOUT ROWID;
        CREATE TABLE keyed (id INTEGER PRIMARY KEY, n UNIQUE);
    """)
    table_db.run("INSERT INTO keyed VALUES (50, 1)")
    table_db.run("INSERT INTO keyed VALUES (99, 1) ON CONFLICT (n) DO UPDATE SET id = 99")
    assert table_db.run("INSERT INTO bare VALUES (1)").lastrowid is None
    table_db.run("INSERT INTO keyed VALUES (55, 2) ON CONFLICT (n) DO UPDATE SET n = 3")
    assert table_db.run("INSERT INTO bare VALUES (2)").lastrowid is None
    with table_db.transaction() as tx:
        tx.connection.execute("INSERT INTO keyed VALUES (60, 4)")
        assert tx.execute("INSERT INTO bare VALUES (3)").lastrowid is None
    table_db.run(lambda tx: tx.connection.execute("INSERT INTO keyed VALUES (61, 5)").close())
    assert table_db.run("INSERT INTO bare VALUES (4)").lastrowid is None
    with pytest.raises(sqlite3.IntegrityError):
        table_db.run("INSERT OR FAIL INTO keyed VALUES (70, 6), (71, 6)")
    assert table_db.run("INSERT INTO bare VALUES (5)").lastrowid is None
    assert table_db.run("INSERT INTO keyed VALUES (80, 8)").lastrowid == 80


def test_lastrowid_and_rowcount_are_the_statements_own(new_db: DbWriter) -> None:
    new_db.run_script("CREATE TABLE t (id INTEGER PRIMARY KEY); CREATE TABLE w (k PRIMARY KEY) WITHOUT ROWID")
    assert new_db.run("INSERT INTO t VALUES (1)").lastrowid == 1
    with pytest.raises(sqlite3.IntegrityError):
        new_db.run_many(INSERT, [(5,), (5,)])
    assert new_db.run("INSERT INTO w VALUES (2)").lastrowid is None
    new_db.run(INSERT, (9,))
    new_db.run("CREATE VIRTUAL TABLE f USING fts5(a)")
    assert new_db.run("INSERT INTO w VALUES (3)").lastrowid is None


def test_an_empty_statement_has_nothing_of_the_one_before(new_db: DbWriter) -> None:
    new_db.run("CREATE TABLE t (a)")
    new_db.run("INSERT INTO t VALUES (1), (2), (3) RETURNING a")
    result = new_db.run("")
    assert (result.rowcount, result.lastrowid, result.rows) == (-1, None, [])


@pytest.mark.parametrize("size", [0, -1, -5])
def test_fetchmany_of_no_size_gives_all_as_sqlite3_does(new_db: DbWriter, size: int) -> None:
    assert new_db.run("VALUES (1), (2), (3)").fetchmany(size) == [(1,), (2,), (3,)]


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_result_is_not_mistaken_about_its_statement_in_any_way_to_run_it(path: Path, way: Any) -> None:
    with DbWriter(path) as db:
        db.run_script(CREATE)
        for sql, rowcount, lastrowid, rows in SUBTLE_RESULTS:
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
    result = db.run(INSERT_NAME, ("c",))
    assert isinstance(result, Result)
    assert (result.rows, list(result), result.fetchone(), result.fetchall()) == ([], [], None, [])
    assert result.description is None


async def coroutine() -> None:
    pass


def generate(tx: Transaction) -> Iterator[Any]:
    yield from tx.execute("SELECT 1")


LIVE: dict[str, Callable[[Transaction], object]] = {
    "cursor": lambda tx: tx.connection.execute("SELECT 1 UNION SELECT 2"),
    "generator": lambda tx: generate(tx),
    "generator expression": lambda tx: (row for row in tx.execute("SELECT 1")),
    "coroutine": lambda tx: coroutine(),
}


@pytest.mark.parametrize("live", LIVE.values(), ids=LIVE)
def test_a_result_that_is_alive_is_refused_and_its_job_is_rolled_back(
    table_db: DbWriter, live: Callable[[Transaction], object]
) -> None:
    def job(tx: Transaction) -> object:
        tx.execute(INSERT, (1,))
        return live(tx)

    with pytest.raises(TypeError, match="live"):
        table_db.run(job)
    assert isinstance(table_db.enqueue(job).exception(DEADLINE), TypeError)
    with table_db.transaction(), pytest.raises(TypeError, match="live"):
        table_db.run(job)
    with pytest.raises(TypeError, match="live"):
        table_db.read(lambda connection: connection.execute("SELECT 1"))
    assert rows(table_db) == []


@pytest.mark.parametrize("result", [None, 0, (1, 2), [{}], "text", ...], ids=repr)
def test_any_other_result_comes_back_as_the_same_object(table_db: DbWriter, result: object) -> None:
    assert table_db.run(lambda tx: result) is result
    assert table_db.enqueue(lambda tx: result).result(DEADLINE) is result


def test_rows_of_a_statement_in_a_job_stay_readable_after_it(table_db: DbWriter) -> None:
    result = table_db.run(lambda tx: tx.execute("SELECT 1 UNION SELECT 2"))
    assert list(result) == [(1,), (2,)]
    assert list(table_db.run(lambda tx: iter(tx.execute("SELECT 3")))) == [(3,)]
