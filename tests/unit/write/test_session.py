"""What a connection remembers: last_insert_rowid(), changes(), TEMP objects; and which triggers keep jobs apart."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers import DEADLINE, inserting, parked, raising, session_of
from onewriter import AsyncDbWriter, DbWriter, ForkedError, Ticket, Transaction

FAILS = "INSERT INTO t VALUES (abs(-9223372036854775808))"  # of which it is not certain that it left nothing
UNDOES = "INSERT OR ROLLBACK INTO one VALUES (1)"

SCHEMA = """
CREATE TABLE parent (id INTEGER PRIMARY KEY, x);
CREATE TABLE child (p);
CREATE TABLE other (id INTEGER PRIMARY KEY);
CREATE TABLE t (x);
CREATE TABLE one (k UNIQUE);
INSERT INTO one VALUES (1);
CREATE TABLE viewed (p, n);
CREATE VIEW asking AS SELECT last_insert_rowid(), changes();
CREATE TABLE defaulted (x, p DEFAULT (last_insert_rowid()));
CREATE TRIGGER follow AFTER UPDATE ON parent BEGIN INSERT INTO child VALUES (changes()); END;
INSERT INTO parent (x) VALUES ('a'), ('b'), ('c');
"""

INSERT = "INSERT INTO t VALUES (?)"
TABLE = "CREATE TABLE t (n INTEGER PRIMARY KEY)"
KEYS = "CREATE TABLE p (id INTEGER PRIMARY KEY); CREATE TABLE c (pid REFERENCES p (id))"
ASKS = ["SELECT last_insert_rowid()", "SELECT changes()", 'SELECT 1 + "total_changes"() -- so', "SELECT * FROM asking"]

ASKS.append("WITH a AS (VALUES (CHANGES())) SELECT * FROM a")


def same(asked: Callable[[], Any]) -> None:
    with pytest.raises(sqlite3.DatabaseError, match="not authorized") as denied:
        asked()
    assert any("RETURNING" in note for note in denied.value.__notes__)


@pytest.mark.parametrize("sql", ASKS)
def test_what_only_asks_the_connection_is_refused_as_a_job_or_read_of_its_own(any_db: DbWriter, sql: str) -> None:
    any_db.run_script(SCHEMA)

    def many(tx: Transaction) -> Any:
        return tx.execute(sql).rows

    # Allowed and refused in turn: a text that SQLite has prepared is asked about all the same.
    for _ in range(2):
        same(lambda: any_db.run(sql))
        same(lambda: any_db.run_without_transaction(sql))
        same(lambda: any_db.read(sql))
        assert any_db.run(many)
        with any_db.transaction() as tx:
            assert tx.execute(sql).rows
            assert tx.connection.execute(sql).fetchall()
            assert any_db.run(sql).rows
            assert any_db.read(sql)
        with any_db.reader() as reader:
            assert reader.execute(sql).fetchall()
            assert any_db.read(sql)
        assert any_db.read(lambda connection: connection.execute(sql).fetchall())
        any_db.run_script(f"INSERT INTO child VALUES (5);\n{sql}\n; DELETE FROM child")


@pytest.mark.parametrize("name", ["defaulted", "over"])
def test_a_table_with_a_default_that_asks_can_be_read(any_db: DbWriter, name: str) -> None:
    """SQLite 3.54 asks the authorizer about the default, too."""
    any_db.run_script(SCHEMA + "CREATE VIEW over AS SELECT x, p FROM defaulted WHERE x > 0")
    any_db.run("INSERT INTO parent VALUES (7, 'd')")
    any_db.run("INSERT INTO defaulted (x) VALUES (1)")
    for _ in range(2):
        assert [x for x, _ in any_db.read(f"SELECT * FROM {name}")] == [1]
        assert [x for x, _ in any_db.run(f"SELECT * FROM {name}").rows] == [1]
        assert [x for x, _ in any_db.run_without_transaction(f"SELECT * FROM {name}").rows] == [1]


def test_a_refused_question_does_not_make_its_batch_run_twice(db: DbWriter) -> None:
    db.run("CREATE TABLE t (a)")
    with parked(db):
        db.enqueue("INSERT INTO t VALUES (1)")
        asked = db.enqueue("SELECT changes()")
        db.enqueue("INSERT INTO t VALUES (2)")
    assert isinstance(asked.exception(DEADLINE), sqlite3.DatabaseError)
    db.flush(DEADLINE)
    assert (db.stats().run_twice, db.read("SELECT a FROM t")) == (0, [(1,), (2,)])


def test_a_function_of_the_users_with_such_a_name_is_theirs(path: Path) -> None:
    def connect(connection: sqlite3.Connection, readonly: bool) -> None:
        connection.create_function("changes", 2, lambda a, b: b - a)

    with DbWriter(path, on_connect=connect) as db:
        assert db.read_value("SELECT changes(1, 3)") == 2
        assert db.run("SELECT changes(1, 3)").rows == [(2,)]
        same(lambda: db.read("SELECT last_insert_rowid()"))


@pytest.mark.parametrize("bad", [FAILS, UNDOES, "INSERT INTO t VALUES (1)"])
@pytest.mark.parametrize(
    "asks",
    [
        "INSERT INTO child VALUES (last_insert_rowid())",
        "INSERT INTO child VALUES (changes())",
        "INSERT INTO defaulted (x) VALUES (1)",
        "INSERT INTO viewed SELECT * FROM asking",
        "UPDATE parent SET x = 2",
    ],
)
def test_a_write_that_asks_the_connection_finds_what_it_would_find_alone(path: Path, asks: str, bad: str) -> None:
    jobs = [asks, "INSERT INTO other VALUES (77)", "DELETE FROM other", asks, bad, asks]

    def rows(db: DbWriter) -> list[Any]:
        return [db.read(f"SELECT * FROM {table}") for table in ("child", "defaulted", "viewed", "parent")]

    with DbWriter(path.with_name("alone.db")) as db:
        db.run_script(SCHEMA)
        for job in jobs:
            db.enqueue(job).exception(DEADLINE)
        alone = rows(db)
    with DbWriter(path) as db:
        db.run_script(SCHEMA)
        with parked(db):
            tickets = [db.enqueue(job) for job in jobs]
        assert [ticket.exception(DEADLINE) is None for ticket in tickets].count(False) <= 1
        assert rows(db) == alone


def test_the_number_of_a_databases_changes_is_refused_where_another_connection_may_answer(any_db: DbWriter) -> None:
    any_db.run("CREATE TABLE t (a)")
    for sql in ("PRAGMA data_version", "PRAGMA main.Data_Version", "SELECT * FROM pragma_data_version"):
        with any_db.reader() as reader:
            version = reader.execute(sql).fetchone()
            assert any_db.read_one(sql) == version
        same(lambda sql=sql: any_db.read(sql))  # type: ignore[misc]
        same(lambda sql=sql: any_db.read_value(sql))  # type: ignore[misc]


def test_a_task_is_refused_the_same(path: Path) -> None:
    async def main() -> None:
        async with AsyncDbWriter(path) as db:
            for sql in ("SELECT changes()", "PRAGMA main.data_version"):
                with pytest.raises(sqlite3.DatabaseError, match="not authorized"):
                    await db.read(sql)
                async with db.reader() as reader:
                    assert (await reader.execute(sql)).rows
            with pytest.raises(sqlite3.DatabaseError, match="not authorized"):
                await db.run("SELECT changes()")
            async with db.transaction() as tx:
                await tx.execute("CREATE TEMP TABLE w (a)")
                assert (await tx.execute("SELECT changes()")).rows
            await db.run("CREATE TEMP TABLE w (a)")

    asyncio.run(main())


def test_full_text_search_asks_for_that_number_itself(db: DbWriter) -> None:
    db.run("CREATE VIRTUAL TABLE text USING fts5 (a)")
    db.run("INSERT INTO text VALUES ('one word')")
    assert db.read("SELECT a FROM text WHERE text MATCH 'word'") == [("one word",)]
    with db.reader() as reader:
        assert reader.execute("SELECT a FROM text WHERE text MATCH 'one'").fetchall() == [("one word",)]
    assert db.read("SELECT a FROM text WHERE text MATCH 'word'") == [("one word",)]


TEMP = [
    "CREATE TEMP TABLE users AS SELECT 1 AS n",
    "CREATE TABLE temp.users (n)",
    "CREATE TEMP VIEW users AS SELECT 1 AS n",
    "CREATE VIEW temp.users AS SELECT 1 AS n",
    "CREATE TEMP TRIGGER loud AFTER INSERT ON users BEGIN SELECT RAISE(ABORT, 'loud'); END",
    "CREATE TRIGGER temp.loud AFTER INSERT ON users BEGIN SELECT RAISE(ABORT, 'loud'); END",
    "CREATE VIRTUAL TABLE temp.users USING fts5 (n)",
    'CREATE TEMP TABLE "a""b" (n); CREATE INDEX temp."i""" ON "a""b" (n); CREATE TEMP TABLE users (n)',
    "CREATE TEMP TABLE up (k PRIMARY KEY); CREATE TEMP TABLE users (n REFERENCES up (k)); "
    "INSERT INTO up VALUES (1); INSERT INTO temp.users VALUES (1)",
]


def by_script(db: DbWriter, sql: str) -> None:
    db.run_script(sql)


def by_run(db: DbWriter, sql: str) -> None:
    db.run(sql)


def by_function(db: DbWriter, sql: str) -> None:
    db.run(lambda tx: tx.executescript(sql))


def by_block(db: DbWriter, sql: str) -> None:
    with db.transaction() as tx:
        tx.executescript(sql)


def by_loan(db: DbWriter, sql: str) -> None:
    with db.transaction() as tx:
        tx.connection.executescript(sql)


def bare(db: DbWriter, sql: str) -> None:
    db.run_without_transaction(sql)


SEVERAL = (by_script, by_function, by_block, by_loan)


@pytest.mark.parametrize(
    ("way", "sql"),
    [(way, sql) for way in SEVERAL for sql in TEMP] + [(way, sql) for way in (by_run, bare) for sql in TEMP[:-2]],
)
def test_temp_objects_end_with_their_job(any_db: DbWriter, way: Callable[[DbWriter, str], None], sql: str) -> None:
    any_db.run("CREATE TABLE users (n)")
    for _ in range(2):
        way(any_db, sql)
        any_db.run("INSERT INTO users VALUES (1)")
    assert any_db.read("SELECT n FROM main.users") == [(1,), (1,)]
    assert any_db.run("SELECT name FROM temp.sqlite_schema").rows == []
    assert any_db.run("PRAGMA foreign_keys").rows == [(1,)]


def test_a_temp_table_does_not_reach_the_jobs_behind_it(db: DbWriter, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "onewriter")
    db.run("CREATE TABLE users (n)")
    with parked(db):
        for _ in range(3):
            made = db.enqueue("CREATE TEMP TABLE users AS SELECT 5 AS n")
            db.enqueue("INSERT INTO users VALUES (1)")
            made_by_function = db.enqueue(lambda tx: tx.execute("CREATE TEMP TABLE users AS SELECT 5 AS n") and None)
            db.enqueue("INSERT INTO users VALUES (2)")
            failed = db.enqueue(lambda tx: tx.executescript("CREATE TEMP TABLE users (n); SELECT nothing"))
            db.enqueue("INSERT INTO users VALUES (3)")
    assert [made.exception(DEADLINE), made_by_function.exception(DEADLINE)] == [None, None]
    assert failed.exception(DEADLINE) is not None
    db.flush(DEADLINE)
    assert db.read("SELECT n FROM users") == [(1,), (2,), (3,)] * 3


def test_temp_objects_of_on_connect_stay(path: Path) -> None:
    def connect(connection: sqlite3.Connection, readonly: bool) -> None:
        connection.execute("CREATE TEMP TABLE kept AS SELECT 7 AS n")

    with DbWriter(path, on_connect=connect) as db:
        db.run("CREATE TEMP TABLE work (n)")
        db.run_without_transaction("CREATE TEMP TABLE work (n)")
        assert db.run("SELECT n FROM kept").rows == [(7,)]
        assert db.read("SELECT n FROM kept") == [(7,)]


def test_a_reader_makes_no_temp_objects(db: DbWriter) -> None:
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        db.read("CREATE TEMP TABLE t (a)")
    with db.reader() as reader, pytest.raises(sqlite3.OperationalError, match="readonly"):
        reader.execute("CREATE TEMP VIEW v AS SELECT 1")


def test_no_setting_leaves_a_row_of_a_write_unread(path: Path) -> None:
    def connect(connection: sqlite3.Connection, readonly: bool) -> None:
        connection.execute("PRAGMA count_changes = 1")

    with pytest.raises(ValueError, match="count_changes"):
        DbWriter(path, pragmas={"count_changes": 1})
    with DbWriter(path, on_connect=connect, pragmas={"count_changes": "off"}, lock_timeout=1.0) as db:
        db.run("CREATE TABLE t (a)")
        for refused in (db.run, db.run_without_transaction, db.run_script):
            with pytest.raises(sqlite3.DatabaseError, match="not authorized") as denied:
                refused("PRAGMA count_changes = 1")
            assert any("rowcount" in note for note in denied.value.__notes__)
        db.run_script("PRAGMA count_changes = OFF")
        assert db.run("INSERT INTO t VALUES (1)").rows == []
        assert db.run_many("UPDATE t SET a = ?", [(2,), (3,)]).rowcount == 2


@pytest.mark.parametrize(
    "sql", ["SELECT 1", "SELECT count(*)", "SELECT 'a' LIKE 'A' -- so", "SELECT sqlite_version() AS v"]
)
def test_the_columns_of_a_select_have_the_names_that_sqlite_gives_them(path: Path, sql: str) -> None:
    plain = sqlite3.connect(":memory:")
    names = plain.execute(sql).description
    plain.close()
    with DbWriter(path, row_factory=sqlite3.Row) as db:
        for result in (db.run(sql), db.enqueue(sql).result(), db.run(lambda tx: tx.execute(sql))):
            assert result.description == names
            assert result.rows[0].keys() == [names[0][0]]


def test_a_trigger_that_somebody_else_made_keeps_jobs_apart(db: DbWriter, path: Path) -> None:
    """Since it can undo a whole transaction, functions would run twice if they shared one with what fires it."""
    db.run(TABLE)
    with parked(db):
        tickets = [db.enqueue(inserting(n)) for n in range(3)]
    db.flush()
    with contextlib.closing(sqlite3.connect(path)) as other:
        other.execute(
            "CREATE TRIGGER undo BEFORE INSERT ON t WHEN NEW.n = 99 BEGIN SELECT RAISE(ROLLBACK, 'undone'); END"
        )
    with parked(db):
        tickets = [db.enqueue(inserting(n)) for n in range(3, 6)]
        tickets.append(db.enqueue(inserting(99)))
    db.flush()
    assert [type(ticket.exception()) for ticket in tickets] == [type(None)] * 3 + [sqlite3.IntegrityError]
    assert db.stats().run_twice == 0


@pytest.mark.parametrize(
    ("schema", "shared"),
    [
        ('CREATE TABLE other (rollback_reason, "deferred") -- rolled back, deferred', True),
        ("CREATE TABLE other (n CHECK (n <> 'rollback')); CREATE VIEW v AS SELECT 'DEFERRED' AS x", True),
        ("CREATE TABLE other (n UNIQUE ON CONFLICT Rollback)", False),
        ("CREATE TABLE other (n REFERENCES t (n) DEFERRABLE INITIALLY deferred)", False),
    ],
)
@pytest.mark.parametrize("text_factory", [str, bytes])
def test_only_a_keyword_in_the_schema_keeps_jobs_apart(
    path: Path, schema: str, shared: bool, text_factory: Any
) -> None:
    def hook(connection: sqlite3.Connection, readonly: bool) -> None:
        connection.text_factory = text_factory

    with DbWriter(path, on_connect=hook) as db:
        db.run(TABLE)
        db.run_script(schema)
        before = db.stats().commits
        with parked(db):
            tickets = [db.enqueue("INSERT INTO t VALUES (?)", (n,)) for n in range(10)]
        db.flush()
        assert all(ticket.exception() is None for ticket in tickets)
        assert db.stats().commits - before == (2 if shared else 11)


def test_what_like_and_lower_are_here_is_not_asked_of_the_schema(path: Path) -> None:
    def replace(connection: sqlite3.Connection, readonly: bool) -> None:
        connection.create_function("lower", 1, lambda value: value.no_such)
        connection.create_function("like", 2, lambda pattern, value: False)

    with DbWriter(path, on_connect=replace) as db:
        db.run("CREATE TABLE t (n UNIQUE ON CONFLICT FAIL)")
        before = db.stats().commits
        with parked(db):
            tickets: list[Ticket[Any]] = [
                db.enqueue("INSERT INTO t VALUES (1)"),
                db.enqueue("INSERT INTO t VALUES (7), (1)"),
                db.enqueue("INSERT INTO t VALUES (3)"),
            ]
        assert [type(ticket.exception(DEADLINE)) for ticket in tickets] == [
            type(None),
            sqlite3.IntegrityError,
            type(None),
        ]
        assert db.read("SELECT n FROM t ORDER BY n") == [(1,), (3,)]
        assert db.stats().commits - before == 2


def test_defer_foreign_keys_outside_a_transaction_is_refused_and_inside_works(db: DbWriter) -> None:
    db.run_script(KEYS)
    with pytest.raises(sqlite3.DatabaseError) as refused:
        db.run_without_transaction("PRAGMA defer_foreign_keys = ON")
    assert any("inside a job" in note for note in refused.value.__notes__)

    def child_first(tx: Transaction) -> None:
        tx.execute("PRAGMA defer_foreign_keys = ON")
        tx.execute("INSERT INTO c VALUES (1)")
        tx.execute("INSERT INTO p VALUES (1)")

    db.run(child_first)
    assert db.read("SELECT pid FROM c") == [(1,)]


def test_in_a_forked_child_neither_begin_nor_commit_nor_a_savepoint_reaches_sqlite(path: Path) -> None:
    with DbWriter(path) as db:
        session = session_of(db)
        db.run("CREATE TABLE t (n)")
    kept = session.after_fork_in_child()  # as it is called there
    with pytest.raises(ForkedError):
        session.control["COMMIT"]()
    for call in (session.set_mark, session.release_mark, session.undo_to_mark):
        with pytest.raises(ForkedError):
            call()
    assert len(kept) == 3


def test_opening_a_connection_does_not_settle_where_temporary_tables_are(new_db: DbWriter) -> None:
    new_db.run("PRAGMA temp_store = MEMORY")  # an error, in a transaction, as soon as there is a temporary database


def test_what_the_job_that_undoes_a_batch_leaves_is_found_behind_it(path: Path) -> None:
    def undoes(tx: Transaction) -> None:
        tx.execute("INSERT INTO t VALUES (50, 1)")
        tx.execute("INSERT OR ROLLBACK INTO t VALUES (51, 1)")

    with DbWriter(path) as db:
        db.run_script("CREATE TABLE t (id INTEGER PRIMARY KEY, n UNIQUE); CREATE TABLE child (id)")
        with parked(db):
            db.enqueue("INSERT INTO t VALUES (10, 0)")
            db.enqueue(undoes)
            db.enqueue("INSERT INTO child VALUES (last_insert_rowid())")
        db.flush(DEADLINE)
        assert db.read("SELECT * FROM child") == [(50,)]


def test_a_last_rowid_that_cannot_be_restored_is_told_and_costs_no_job_anything(
    path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with DbWriter(path) as db:
        db.run("CREATE TABLE t (n UNIQUE)")
        db.flush(DEADLINE)
        monkeypatch.setattr(type(session_of(db)), "set_history", raising(sqlite3.OperationalError))
        with parked(db):
            first = db.enqueue("INSERT INTO t VALUES (1)")
            undoes = db.enqueue(lambda tx: tx.execute("INSERT OR ROLLBACK INTO t VALUES (1)"))
            last = db.enqueue("INSERT INTO t VALUES (2)")
        assert isinstance(undoes.exception(DEADLINE), sqlite3.IntegrityError)
        assert [job.result(DEADLINE).rowcount for job in (first, last)] == [1, 1]
    assert "last_insert_rowid() could not be restored" in caplog.text


@pytest.mark.parametrize("convert", [raising(LookupError), lambda _: None, bytes], ids=["fails", "none", "bytes"])
def test_converters_are_not_called_for_what_the_gateway_itself_asks(
    path: Path, monkeypatch: pytest.MonkeyPatch, convert: Callable[[bytes], object]
) -> None:
    """The schema's own columns are declared as TEXT and INT, too."""
    with DbWriter(path, detect_types=sqlite3.PARSE_DECLTYPES | sqlite3.PARSE_COLNAMES) as db:
        db.run_script("CREATE TABLE t (n PRIMARY KEY, x) WITHOUT ROWID; CREATE INDEX i ON t (x)")
        for declared in ("TEXT", "INT", "INTEGER"):
            monkeypatch.setitem(sqlite3.converters, declared, convert)
        with parked(db) as release:
            tickets = [db.enqueue(sql) for sql in ("CREATE TEMP TABLE x (a)", "INSERT INTO t VALUES (1, 2)") * 2]
            release.set()
        outcomes = [type(ticket.exception(DEADLINE)) for ticket in tickets]
        assert outcomes == [type(None), type(None), type(None), sqlite3.IntegrityError]
        with db.watch("SELECT x FROM t ORDER BY x") as live:
            assert live.next(DEADLINE) == [(2,)]
            db.run("INSERT INTO t VALUES (2, 1)")
            assert live.next(DEADLINE) == [(1,), (2,)]
        db.run_many("INSERT INTO t VALUES (?, 3)", [(3,), (4,)])
        with db.transaction() as tx, contextlib.closing(tx.connection.execute("SELECT x FROM t")) as cursor:
            assert len(cursor.fetchall()) == 4
        db.checkpoint()


def test_adapters_are_not_called_for_what_the_gateway_itself_binds(path: Path) -> None:
    """sqlite3 calls an adapter for int and str, too, as soon as one of the types that it knows itself has one."""
    undoes = "INSERT OR ROLLBACK INTO t (n) VALUES (1)"
    says = "INSERT INTO said SELECT last_insert_rowid(), changes()"
    with DbWriter(path) as db:
        db.run_script("CREATE TABLE t (n UNIQUE); INSERT INTO t VALUES (1); CREATE TABLE said (a, b)")
        db.run_script("CREATE TABLE w (n PRIMARY KEY) WITHOUT ROWID")
        with parked(db) as release, pytest.MonkeyPatch.context() as patch:
            adapters: dict[Any, Any] = sqlite3.adapters
            for kind in (int, str, bytearray):
                patch.setitem(adapters, (kind, sqlite3.PrepareProtocol), raising(LookupError))
            sqlite3.register_adapter(bytearray, bytes)  # from now on it looks for adapters of all types
            tickets = [
                db.enqueue("INSERT INTO t VALUES (2), (3)"),
                db.enqueue(lambda tx: tx.execute(undoes)),
                db.enqueue(says),
                db.enqueue("INSERT INTO w VALUES (1)"),
            ]
            release.set()
            assert [type(ticket.exception(DEADLINE)) for ticket in tickets] == [
                type(None),
                sqlite3.IntegrityError,
                type(None),
                type(None),
            ]
            assert tickets[3].result().lastrowid is None
        assert db.read("SELECT a, b FROM said") == [(3, 0)]  # the statement that failed has changed none


def test_a_function_of_on_connect_that_has_the_name_of_one_of_sqlite_is_not_called_for_the_gateway(path: Path) -> None:
    def connect(connection: sqlite3.Connection, readonly: bool) -> None:
        connection.create_function("count", -1, raising(LookupError))

    with DbWriter(path, on_connect=connect) as db:
        db.run("CREATE TABLE t (n INTEGER PRIMARY KEY)")
        assert db.run("INSERT INTO t VALUES (7)").lastrowid == 7
