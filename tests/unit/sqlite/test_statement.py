"""Statements: what their text says, many rows, and scripts of them."""

from __future__ import annotations

import contextlib
import sqlite3
import tracemalloc
from typing import Any

import pytest

from onewriter import DbWriter, Transaction
from onewriter.sqlite.statement import _describe_long, describe_sql, inside_of_dump, script_parts, split_script

INSERT = "INSERT INTO t (name) VALUES (?)"


@pytest.fixture
def db(names_db: DbWriter) -> DbWriter:
    return names_db


def names(db: DbWriter) -> list[Any]:
    return [name for (name,) in db.read("SELECT name FROM t ORDER BY id")]


def test_many_rows_are_one_job(db: DbWriter) -> None:
    assert db.run_many("INSERT INTO t (name) VALUES (?)", ((str(n),) for n in range(5))).rowcount == 5
    assert db.run_many("INSERT INTO t (name) VALUES (:name)", [{"name": "x"}]).rowcount == 1
    assert db.run_many("DELETE FROM t WHERE name = ?", []).rowcount == 0
    assert db.run_many("UPDATE t SET name = name || ?", [("!",), ("?",)]).rowcount == 16


def test_rows_of_returning_would_be_dropped_so_they_are_refused(db: DbWriter) -> None:
    sql = "INSERT INTO t (name) VALUES (?) RETURNING id"
    with pytest.raises(sqlite3.ProgrammingError, match="RETURNING"):
        db.run_many(sql, [("x",)])
    with db.transaction() as tx, pytest.raises(sqlite3.ProgrammingError, match="RETURNING"):
        tx.executemany(sql, [("x",)])
    db.run_many("INSERT INTO t (name) VALUES (?) -- RETURNING", [("RETURNING",)])


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
    values = ", ".join(["(1, 'RETURNING ) FAIL', x'ab') /* ROLLBACK */"] * 20_000)
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


def test_two_statements_in_one_text_are_refused_and_neither_is_done(db: DbWriter) -> None:
    for call in (db.run, db.run_without_transaction, lambda sql: db.run(lambda tx: tx.execute(sql))):
        with pytest.raises((sqlite3.Warning, sqlite3.ProgrammingError), match="one statement"):
            call("DELETE FROM t; DELETE FROM t")
    assert names(db) == ["a", "b"]


def test_many_rows_count_only_what_they_changed(db: DbWriter) -> None:
    result = db.run_many("INSERT OR IGNORE INTO t (name) VALUES (?)", [("a",), ("c",), ("b",), ("d",)])
    assert (result.rowcount, result.lastrowid, result.rows) == (2, None, [])


@pytest.mark.parametrize("sql", ["SELECT ?", "WITH x AS (SELECT ?) SELECT * FROM x", "VALUES (?)"])
def test_many_rows_of_a_query_are_refused_by_sqlite3(db: DbWriter, sql: str) -> None:
    with pytest.raises(sqlite3.ProgrammingError, match="DML"):
        db.run_many(sql, [(1,), (2,)])
    assert names(db) == ["a", "b"]


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


def test_rows_are_counted_whatever_a_text_begins_with(table_db: DbWriter) -> None:
    assert table_db.run_many("WITH x(n) AS (VALUES (?)) INSERT INTO t SELECT n FROM x", [(1,), (2,)]).rowcount == 2
    assert table_db.run("; INSERT INTO t VALUES (3)").rowcount == 1
    assert table_db.run("\ufeffINSERT INTO t VALUES (4)").rowcount == 1
    assert table_db.run(";DELETE FROM t").rowcount == 4


@pytest.mark.parametrize(
    ("script", "inside", "turns_keys_off"),
    [
        ("BEGIN TRANSACTION;\nINSERT;\nCOMMIT;", "\nINSERT;", False),
        ("PRAGMA foreign_keys=OFF;\nBEGIN TRANSACTION;\nINSERT;\nCOMMIT;\n", "\nINSERT;", True),
        (
            "-- by a tool\nPRAGMA foreign_keys = off;\nBEGIN;A;\nCOMMIT TRANSACTION;\nPRAGMA foreign_keys = on;\n",
            "A;",
            True,
        ),
        ("begin immediate; commit", "", False),
        ("BEGIN;END TRANSACTION;", "", False),
        ("BEGIN; A; B; ROLLBACK;", None, False),
        ("A; BEGIN; B; COMMIT;", None, False),
        ("BEGIN; A; COMMIT; B;", None, False),
        ("BEGIN; CREATE TRIGGER x AFTER INSERT ON y BEGIN DELETE FROM z; END;", None, False),
        ("BEGIN; INSERT INTO t VALUES ('; COMMIT');", None, False),
        ("BEGIN; -- COMMIT", None, False),
        ("-- a dump\nBEGIN;\nA;\nCOMMIT; -- of all", "\nA;", False),
        ("/* a */BEGIN;A;/* b */COMMIT/* c */;;;", "A;/* b */", False),
        ("BEGIN;A;COMMIT;\n-- x\nPRAGMA foreign_keys = ON; /* y */", "A;", False),
        ("", None, False),
    ],
)
def test_a_script_that_is_one_transaction_is_known(script: str, inside: str | None, turns_keys_off: bool) -> None:
    assert inside_of_dump(script) == (script if inside is None else inside, turns_keys_off)


DUMPED = """
CREATE TABLE child (id PRIMARY KEY, parent REFERENCES parent (id));
CREATE TABLE parent (id INTEGER PRIMARY KEY, text);
CREATE TRIGGER follow AFTER DELETE ON parent BEGIN DELETE FROM child WHERE parent = OLD.id; END;
CREATE VIEW both AS SELECT * FROM child JOIN parent;
INSERT INTO parent VALUES (1, 'COMMIT; it''s'), (2, 'two' || char(10) || 'lines;');
INSERT INTO child VALUES (1, 1), (2, 2);
"""


def dumped() -> str:
    with contextlib.closing(sqlite3.connect(":memory:")) as source:
        source.executescript(DUMPED)
        return "\n".join(source.iterdump())


@pytest.mark.parametrize("head", ["", "PRAGMA foreign_keys=OFF;\n"])
def test_a_dump_is_restored_by_run_script(any_db: DbWriter, head: str) -> None:
    # Its children may come before their parents, so that the keys have to be off.
    any_db.run_script(head + dumped(), foreign_keys=None if head else False)
    assert any_db.read("SELECT * FROM child ORDER BY id") == [(1, 1), (2, 2)]
    assert any_db.read_value("SELECT text FROM parent WHERE id = 1") == "COMMIT; it's"
    assert any_db.run_without_transaction("PRAGMA foreign_keys").rows == [(1,)]


def test_a_dump_whose_keys_are_violated_leaves_nothing(any_db: DbWriter) -> None:
    dump = "PRAGMA foreign_keys=OFF;\n" + dumped().replace("COMMIT;", "INSERT INTO child VALUES (3, 3);\nCOMMIT;")
    with pytest.raises(sqlite3.IntegrityError, match="FOREIGN KEY"):
        any_db.run_script(dump)
    assert any_db.read("SELECT * FROM sqlite_schema") == []


@pytest.mark.parametrize("script", ["BEGIN; CREATE TABLE t (n); COMMIT; CREATE TABLE u (n)", "BEGIN; COMMIT; COMMIT;"])
def test_a_script_with_several_transactions_is_refused(any_db: DbWriter, script: str) -> None:
    with pytest.raises(sqlite3.DatabaseError, match="not authorized"):
        any_db.run_script(script)
    assert any_db.read("SELECT * FROM sqlite_schema") == []


def test_a_name_in_deep_parentheses_is_no_clause() -> None:
    assert not describe_sql("INSERT INTO t SELECT (((((( 1 ))))) + returning) FROM s").returning
    assert describe_sql("INSERT INTO t SELECT (((((( 1 ))))) + n) FROM s RETURNING n").returning
