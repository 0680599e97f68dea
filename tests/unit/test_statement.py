"""Statements: their Result, their parameters, and scripts of them."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from typing import Any

import pytest

from helpers import parked
from onewriter import DbWriter, Result
from onewriter.sqlite.statement import describe_sql, script_parts, split_script

CREATE = """
CREATE TABLE t (id INTEGER PRIMARY KEY, name TEXT UNIQUE);
CREATE TABLE "odd ""name" (id INTEGER PRIMARY KEY, name TEXT);
CREATE TABLE bare (name TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE log (id INTEGER PRIMARY KEY, name TEXT);
INSERT INTO t VALUES (10, 'a'), (20, 'b');
"""


@pytest.fixture
def db(any_db: DbWriter) -> DbWriter:
    any_db.run_script(CREATE)
    return any_db


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


def test_many_rows_are_one_job(db: DbWriter) -> None:
    assert db.run_many("INSERT INTO t (name) VALUES (?)", ((str(n),) for n in range(5))).rowcount == 5
    assert db.run_many("INSERT INTO t (name) VALUES (:name)", [{"name": "x"}]).rowcount == 1
    assert db.run_many("DELETE FROM t WHERE name = ?", []).rowcount == 0
    assert db.run_many("UPDATE t SET name = name || ?", [("!",), ("?",)]).rowcount == 16


def test_parameters_are_those_of_the_call(path: Any) -> None:
    values, named, buffer, rows = [1], {"n": 2}, bytearray(b"3"), [[4], [5]]
    with DbWriter(path) as db:
        db.run("CREATE TABLE t (n)")
        with parked(db):
            db.enqueue("INSERT INTO t VALUES (?)", values)
            db.enqueue("INSERT INTO t VALUES (:n)", named)
            db.enqueue("INSERT INTO t VALUES (?)", (buffer,))
            db.enqueue("INSERT INTO t VALUES (:n)", {"n": buffer})
            values[0], named["n"], buffer[0] = 9, 9, ord("9")
        db.run_many("INSERT INTO t VALUES (?)", rows)
        assert [n for (n,) in db.read("SELECT n FROM t")] == [1, 2, b"3", b"3", 4, 5]


class Row:
    """A sequence of its own making, as sqlite3 accepts it."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        return [6][index]


@pytest.mark.parametrize(
    "params", [(6,), [6], range(6, 7), {"1": 6}.values(), Row()], ids=lambda params: type(params).__name__
)
def test_parameters_are_any_sequence(db: DbWriter, params: Any) -> None:
    assert db.run("SELECT ?", params).rows == [(6,)]


@pytest.mark.parametrize("params", ["a", b"a", bytearray(b"a"), memoryview(b"a"), {1}, frozenset((1,)), 5, None])
def test_what_is_no_row_of_parameters_is_refused(db: DbWriter, params: Any) -> None:
    for call in (lambda: db.run("SELECT ?", params), lambda: db.enqueue("SELECT ?", params)):
        with pytest.raises(TypeError, match="parameters"):
            call()
    with db.transaction() as tx, pytest.raises(TypeError, match="parameters"):
        tx.execute("SELECT ?", params)


@pytest.mark.parametrize("rows", ["ab", b"ab", {"a": 1}, 5, None], ids=repr)
def test_what_is_no_iterable_of_rows_is_refused(db: DbWriter, rows: Any) -> None:
    with pytest.raises(TypeError, match="seq_of_params"):
        db.run_many("SELECT ?", rows)


def test_rows_of_returning_would_be_dropped_so_they_are_refused(db: DbWriter) -> None:
    import sqlite3

    sql = "INSERT INTO t (name) VALUES (?) RETURNING id"
    with pytest.raises(sqlite3.ProgrammingError, match="RETURNING"):
        db.run_many(sql, [("x",)])
    with db.transaction() as tx, pytest.raises(sqlite3.ProgrammingError, match="RETURNING"):
        tx.executemany(sql, [("x",)])
    db.run_many("INSERT INTO t (name) VALUES (?) -- RETURNING", [("RETURNING",)])


def test_sql_must_be_text(db: DbWriter) -> None:
    calls: list[Any] = [
        lambda: db.run(b"SELECT 1"),  # type: ignore[call-overload]
        lambda: db.run_many(None, []),  # type: ignore[arg-type]
        lambda: db.run_script(3),  # type: ignore[arg-type]
        lambda: db.run_without_transaction(3),  # type: ignore[arg-type]
        lambda: db.enqueue(None),  # type: ignore[call-overload]
        lambda: db.run(lambda tx: tx.execute(3)),  # type: ignore[arg-type]
        lambda: db.run(lambda tx: tx.on_commit(3)),  # type: ignore[arg-type]
        lambda: db.run(lambda tx: 1, (1,)),  # type: ignore[call-overload]
        lambda: db.run("SELECT 1", label=3),  # type: ignore[call-overload]
        lambda: db.run("SELECT 1", timeout="3"),  # type: ignore[call-overload]
        lambda: db.run_script("SELECT 1", foreign_keys=0),  # type: ignore[arg-type]
        lambda: db.transaction(label=3),  # type: ignore[arg-type]
    ]
    for call in calls:
        with pytest.raises(TypeError):
            call()
    assert db.run("SELECT 1").rows == [(1,)]


def test_functions_that_only_make_something_to_run_are_refused(db: DbWriter) -> None:
    async def coroutine(tx: object) -> None:
        pass

    def generator(tx: object) -> Iterator[int]:
        yield 1

    async def both(tx: object) -> Any:
        yield 1

    class Callable:
        async def __call__(self, tx: object) -> None:
            pass

    for function in (coroutine, generator, both, Callable()):
        for call in (db.run, db.enqueue, db.read):
            with pytest.raises(TypeError, match="plain functions"):
                call(function)


SCRIPTS: list[tuple[str, list[str]]] = [
    ("", []),
    (" -- nothing\n/* at all */ ", []),
    ("SELECT 1", ["SELECT 1"]),
    ("SELECT 1; SELECT ';' ;", ["SELECT 1;", " SELECT ';' ;"]),
    ('SELECT 1 AS "a;b"; SELECT [x;y] FROM `z;`', ['SELECT 1 AS "a;b";', " SELECT [x;y] FROM `z;`"]),
    ("SELECT 1 -- ; no\n; SELECT 2 /* ; */", ["SELECT 1 -- ; no\n;", " SELECT 2 /* ; */"]),
    (
        "CREATE TRIGGER a AFTER INSERT ON t BEGIN SELECT 1; SELECT CASE WHEN 1 THEN 2 END; END; SELECT 3",
        ["CREATE TRIGGER a AFTER INSERT ON t BEGIN SELECT 1; SELECT CASE WHEN 1 THEN 2 END; END;", " SELECT 3"],
    ),
    ("SELECT 'it''s; fine'; SELECT 'open", ["SELECT 'it''s; fine';", " SELECT 'open"]),
    (
        "/* ; */ create temporary/**/trigger a BEGIN x; ; -- END;\nEND/**/; y;",
        ["/* ; */ create temporary/**/trigger a BEGIN x; ; -- END;\nEND/**/;", " y;"],
    ),
    (
        "EXPLAIN QUERY PLAN CREATE TRIGGER a BEGIN x; END; y",
        ["EXPLAIN QUERY PLAN CREATE TRIGGER a BEGIN x; END;", " y"],
    ),
    ("SELECT 1; CREATE TRIGGER a BEGIN x; y;", ["SELECT 1;", " CREATE TRIGGER a BEGIN x; y;"]),
]


@pytest.mark.parametrize(("script", "statements"), SCRIPTS)
def test_a_script_is_split_at_the_ends_of_its_statements(script: str, statements: list[str]) -> None:
    assert list(split_script(script)) == statements
    assert "".join(script_parts(script)) == "".join(statements)


def test_a_long_script_is_run_in_parts_of_whole_statements() -> None:
    trigger = "CREATE TRIGGER a AFTER INSERT ON t BEGIN\n" + "UPDATE t SET n = ';';\n" * 5000 + "END;\n"
    insert = "INSERT INTO t VALUES (1);\n"
    parts = list(script_parts(insert * 499 + trigger + insert * 100_000))
    assert "".join(parts) == (insert * 499 + trigger + insert * 100_000).rstrip()
    assert [part for part in parts if "TRIGGER" in part] == ["\n" + trigger.rstrip()]
    assert all(part.rstrip().endswith(";") for part in parts)


def test_a_long_script_is_one_transaction(any_db: DbWriter) -> None:
    any_db.run("CREATE TABLE t (n)")
    inserts = "".join(f"INSERT INTO t VALUES ({n});\n" for n in range(2000))
    any_db.run_script(inserts)
    for bad in ("INSERT INTO nothing VALUES (1)", "COMMIT", "BEGIN", "ROLLBACK", "SAVEPOINT s"):
        with pytest.raises(sqlite3.DatabaseError):
            any_db.run_script(f"DELETE FROM t;\n{inserts}\n{bad};")
        with pytest.raises(sqlite3.DatabaseError):
            any_db.run_script(f"{bad}; DELETE FROM t")
    assert any_db.read("SELECT count(*), sum(n) FROM t") == [(2000, sum(range(2000)))]


def test_a_long_text_is_described_as_a_short_one() -> None:
    values = ", ".join(["(1, 'RETURNING ) FAIL', x'ab') /* ROLLBACK */"] * 100_000)
    for head, tail in (
        ('INSERT INTO main."t""t" VALUES ', ""),
        ("INSERT INTO t VALUES ", " RETURNING n"),
        ("REPLACE INTO [t] VALUES ", " -- RETURNING"),
        ("INSERT INTO 😀 VALUES ", " ON CONFLICT DO UPDATE SET n = 1"),
        ("WITH v AS (VALUES ", ") INSERT INTO 't' SELECT * FROM v RETURNING (n)"),
        ("UPDATE t SET n = 1 WHERE n IN (SELECT * FROM (VALUES ", ") ORDER BY :RETURNING)"),
        ("INSERT OR FAIL INTO t VALUES ", ""),
    ):
        assert describe_sql(head + values + tail) == describe_sql(head + "(1)" + tail)
    assert describe_sql("INSERT INTO 😀 VALUES (1)").table == "😀"
    assert describe_sql("SELECT " + "(" * 500_000).verb == "SELECT"
