"""``tx.connection`` and ``reader()``: a ``sqlite3.Connection`` for libraries, whatever they do with it."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from onewriter import DbWriter, Transaction, TransactionClosedError

INSERT = "INSERT INTO t VALUES (?)"
Use = Callable[[sqlite3.Connection], object]


@pytest.fixture
def db(any_db: DbWriter) -> DbWriter:
    any_db.run("CREATE TABLE t (n INTEGER)")
    return any_db


def rows(db: DbWriter) -> list[Any]:
    return [n for (n,) in db.read("SELECT n FROM t ORDER BY rowid")]


def with_statement(connection: sqlite3.Connection) -> None:
    with connection:
        connection.execute(INSERT, (2,))


def set_attribute(name: str, value: object) -> Use:
    return lambda connection: setattr(connection, name, value)


HARMLESS: dict[str, Use] = {
    "commit": lambda c: c.commit(),
    "close": lambda c: c.close(),
    "with": with_statement,
    "isolation_level": set_attribute("isolation_level", "EXCLUSIVE"),
    "isolation_level None": set_attribute("isolation_level", None),
    "autocommit": set_attribute("autocommit", False),
    "row_factory": set_attribute("row_factory", sqlite3.Row),
    "text_factory": set_attribute("text_factory", bytes),
    "executescript": lambda c: c.executescript("INSERT INTO t VALUES (3); INSERT INTO t VALUES (4);"),
    "a cursor left open": lambda c: c.execute("SELECT n FROM t UNION SELECT 7").fetchone(),
    "unread RETURNING": lambda c: c.execute("INSERT INTO t VALUES (5), (6) RETURNING n").fetchone(),
    "savepoints": lambda c: [c.execute(sql) for sql in ("SAVEPOINT a", "ROLLBACK TO a", "RELEASE A")],
    "a savepoint left open": lambda c: c.execute("SAVEPOINT b"),
    "create_function": lambda c: c.create_function("f", 0, lambda: 1),
    "PRAGMA": lambda c: c.execute("PRAGMA recursive_triggers = 1"),
}
REFUSED: dict[str, Use] = {
    "BEGIN": lambda c: c.execute("begin"),
    "COMMIT": lambda c: c.execute("/* now */ CoMMit -- at last"),
    "END": lambda c: c.executescript("INSERT INTO t VALUES (8); END TRANSACTION;"),
    "ROLLBACK": lambda c: c.cursor().execute("rollback"),
    "ATTACH": lambda c: c.execute("ATTACH ':memory:' AS other"),
    "VACUUM": lambda c: c.execute("VACUUM"),
    "PRAGMA foreign_keys": lambda c: c.execute("PRAGMA foreign_keys = 0"),
    "PRAGMA journal_mode": lambda c: c.execute("PRAGMA journal_mode = DELETE"),
    "PRAGMA query_only": lambda c: c.execute("PRAGMA query_only = 1"),
    "set_authorizer": lambda c: c.set_authorizer(None),
    "set_progress_handler": lambda c: c.set_progress_handler(None, 1),
    "deserialize": lambda c: c.deserialize(b""),
    "call": lambda c: c("SELECT 1"),
}


def in_a_block(db: DbWriter, function: Callable[[Transaction], None]) -> None:
    with db.transaction() as tx:
        function(tx)


def in_a_job(db: DbWriter, function: Callable[[Transaction], None]) -> None:
    db.run(function)


WAYS = [in_a_block, in_a_job]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("use", HARMLESS.values(), ids=HARMLESS)
def test_what_libraries_do_is_harmless(db: DbWriter, use: Use, way: Callable[..., None]) -> None:
    def job(tx: Transaction) -> None:
        tx.connection.execute(INSERT, (1,))
        use(tx.connection)
        raise LookupError

    with pytest.raises(LookupError):
        way(db, job)
    assert rows(db) == []
    way(db, lambda tx: use(tx.connection) and None)
    assert db.run("SELECT 'text'").rows == [("text",)]
    db.run("DELETE FROM t")
    db.run(INSERT, (9,))
    assert rows(db) == [9]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("use", REFUSED.values(), ids=REFUSED)
def test_what_would_reach_beyond_the_loan_is_refused(db: DbWriter, use: Use, way: Callable[..., None]) -> None:
    def job(tx: Transaction) -> None:
        tx.connection.execute(INSERT, (1,))
        for _ in range(2):
            with pytest.raises(sqlite3.Error):
                use(tx.connection)
        tx.execute(INSERT, (2,))

    way(db, job)
    db.run(INSERT, (3,))
    assert rows(db) == [1, 2, 3]
    assert db.run_without_transaction("PRAGMA foreign_keys").rows == [(1,)]


@pytest.mark.parametrize("way", WAYS)
def test_rollback_undoes_what_the_job_has_done_so_far(db: DbWriter, way: Callable[..., None]) -> None:
    told: list[str] = []

    def job(tx: Transaction) -> None:
        tx.execute(INSERT, (1,))
        tx.on_commit(lambda: told.append("undone"))
        tx.connection.execute(INSERT, (2,))
        tx.connection.rollback()
        tx.on_commit(lambda: told.append("done"))
        tx.connection.execute(INSERT, (3,))
        tx.connection.commit()

    way(db, job)
    assert (rows(db), told) == ([3], ["done"])


def test_a_failed_script_leaves_nothing_behind(db: DbWriter) -> None:
    with db.transaction() as tx:
        with pytest.raises(sqlite3.OperationalError):
            tx.connection.executescript("INSERT INTO t VALUES (1); INSERT INTO nowhere VALUES (1);")
        tx.execute(INSERT, (2,))
    assert rows(db) == [2]


def test_it_is_a_connection_with_cursors(db: DbWriter) -> None:
    with db.transaction() as tx:
        connection = tx.connection
        assert isinstance(connection, sqlite3.Connection)
        assert tx.connection is connection
        assert connection.in_transaction
        cursor = connection.cursor()
        assert cursor.connection is connection
        cursor.executemany(INSERT, [(1,), (2,)])
        assert cursor.rowcount == 2
        cursor.executescript("INSERT INTO t VALUES (3);")
        assert [n for (n,) in cursor.execute("SELECT n FROM t")] == [1, 2, 3]
        connection.row_factory = sqlite3.Row
        assert connection.execute("SELECT 1 AS x").fetchone()["x"] == 1
        assert connection.execute("SELECT 1 AS x").fetchmany(2)[0]["x"] == 1
        assert connection.executemany(INSERT, []).rowcount in (0, -1)
        assert connection.total_changes >= 3
        connection.text_factory = bytes
        assert connection.text_factory is bytes
        assert connection.execute("SELECT 'a'").fetchone()[0] == b"a"
        assert connection.getlimit(sqlite3.SQLITE_LIMIT_LENGTH) > 0
    db.run("CREATE TABLE blobs (data BLOB)")
    with db.transaction() as tx:
        rowid = tx.execute("INSERT INTO blobs VALUES (zeroblob(3))").lastrowid
        blob = tx.connection.blobopen("blobs", "data", rowid or 0)
        blob.write(b"abc")
    assert db.read_value("SELECT data FROM blobs") == b"abc"
    assert db.run("SELECT 'a'").rows == [("a",)]


# reader() -------------------------------------------------------------------------------------------------------------


def test_a_reader_sees_the_moment_of_its_entry(db: DbWriter) -> None:
    db.run(INSERT, (1,))
    with db.reader() as connection:
        ticket = db.enqueue(INSERT, (2,))
        db.run(INSERT, (3,))
        for _ in range(2):
            assert connection.execute("SELECT count(*) FROM t").fetchone() == (1,)
            assert db.read_value("SELECT count(*) FROM t") == 1
            assert db.read(lambda c: c.execute("SELECT count(*) FROM t").fetchone()) == (1,)
        with db.reader() as inner:
            assert inner is connection
    assert rows(db) == [1, 2, 3]
    with db.reader(after=ticket) as connection:
        assert connection.execute("SELECT count(*) FROM t").fetchone() == (3,)


def test_of_a_reader_and_a_block_the_inner_one_decides(db: DbWriter) -> None:
    with db.transaction() as tx:
        tx.execute(INSERT, (1,))
        with db.reader() as connection:
            assert connection.execute("SELECT count(*) FROM t").fetchone() == (0,)
            assert rows(db) == []
        assert rows(db) == [1]
    with db.reader(), db.transaction() as tx:
        tx.execute(INSERT, (2,))
        assert rows(db) == [1, 2]
        with db.reader() as connection:
            assert connection.execute("SELECT count(*) FROM t").fetchone() == (1,)


READER_USES: dict[str, Use] = {
    "BEGIN": lambda c: c.execute("BEGIN"),
    "COMMIT": lambda c: c.execute("COMMIT"),
    "ROLLBACK": lambda c: c.execute("ROLLBACK"),
    "INSERT": lambda c: c.execute("INSERT INTO t VALUES (1)"),
    "CREATE TEMP": lambda c: c.execute("CREATE TEMP TABLE x (n)"),
    "ATTACH": lambda c: c.execute("ATTACH ':memory:' AS other"),
    "VACUUM INTO": lambda c: c.execute("VACUUM INTO '/dev/null'"),
    "query_only": lambda c: c.execute("PRAGMA query_only = 0"),
}


@pytest.mark.parametrize("use", READER_USES.values(), ids=READER_USES)
def test_a_reader_can_neither_write_nor_end_its_snapshot(db: DbWriter, use: Use) -> None:
    with db.reader() as connection:
        with pytest.raises(sqlite3.Error):
            use(connection)
        db.run(INSERT, (1,))
        assert connection.execute("SELECT count(*) FROM t").fetchone() == (0,)
    assert rows(db) == [1]


@pytest.mark.parametrize("use", HARMLESS.values(), ids=HARMLESS)
def test_a_reader_comes_back_clean(db: DbWriter, use: Use) -> None:
    def block() -> None:
        with db.reader() as connection:
            connection.rollback()
            connection.execute("SELECT 1 UNION SELECT 2").fetchone()
            use(connection)

    for _ in range(3):
        with contextlib.suppress(sqlite3.OperationalError):  # it cannot write
            block()
        db.run(INSERT, (1,))
        assert rows(db)[-1:] == [1]
        assert db.read("SELECT 'text'") == [("text",)]
    checkpoint = db.run_without_transaction("PRAGMA wal_checkpoint(TRUNCATE)").rows[0]
    assert checkpoint[0] == 0


def test_a_connection_of_an_ended_reader_is_dead(db: DbWriter) -> None:
    with db.reader() as connection:
        cursor = connection.execute("SELECT 1 UNION SELECT 2")
    for use in (connection.cursor, cursor.fetchone, lambda: connection.in_transaction):
        with pytest.raises(sqlite3.ProgrammingError):
            use()


def test_a_reader_of_a_dropped_generator_comes_back(db: DbWriter) -> None:
    def generate() -> Any:
        with db.reader() as connection:
            yield from connection.execute("SELECT 1 UNION SELECT 2")

    for _ in range(10):  # there are four connections
        generator = generate()
        assert next(generator) == (1,)
        del generator
    db.run(INSERT, (1,))
    assert rows(db) == [1]


# What goes past the loan ----------------------------------------------------------------------------------------------


class CountingCursor(sqlite3.Cursor):
    """A library's own cursor."""

    executed = 0

    def execute(self, *args: Any) -> Any:
        CountingCursor.executed += 1
        return super().execute(*args)


@pytest.mark.parametrize("factory", [sqlite3.Cursor, CountingCursor])
def test_a_cursor_of_any_class_is_bound_to_the_loan(any_db: DbWriter, factory: type[sqlite3.Cursor]) -> None:
    any_db.run("CREATE TABLE t (n)")
    kept: list[Any] = []

    def job(tx: Transaction) -> None:
        cursor = tx.connection.cursor(factory)
        kept.append(cursor)
        cursor.execute("INSERT INTO t VALUES (1)")
        assert isinstance(cursor, factory)
        assert cursor.connection is tx.connection
        with pytest.raises(sqlite3.DatabaseError, match="not authorized"):
            cursor.execute("COMMIT")
        cursor.executescript("INSERT INTO t VALUES (2); INSERT INTO t VALUES (3)")
        raise LookupError

    with pytest.raises(LookupError):
        any_db.run(job)
    assert any_db.read("SELECT n FROM t") == []
    uses: list[Callable[[], object]] = [
        lambda: kept[0].execute("SELECT 1"),
        lambda: kept[0].connection.execute("SELECT 1"),
    ]
    for use in uses:
        with pytest.raises(TransactionClosedError):
            use()
    assert factory is sqlite3.Cursor or CountingCursor.executed > 0


def test_a_cursor_factory_that_is_no_class_of_cursors_is_refused(any_db: DbWriter) -> None:
    no_class: Any = lambda connection: None  # noqa: E731
    with any_db.reader() as connection, pytest.raises(TypeError, match=r"sqlite3\.Cursor"):
        connection.cursor(no_class)


def test_rollback_undoes_the_innermost_part_and_leaves_the_rest(any_db: DbWriter) -> None:
    any_db.run("CREATE TABLE t (n)")

    def nested(tx: Transaction) -> None:
        tx.execute("INSERT INTO t VALUES (20)")
        tx.connection.rollback()
        tx.execute("INSERT INTO t VALUES (21)")

    with any_db.transaction() as tx:
        told: list[str] = []
        tx.execute("INSERT INTO t VALUES (1)")
        with tx.savepoint():
            tx.on_rollback(lambda: told.append("part"))
            tx.execute("INSERT INTO t VALUES (2)")
            tx.connection.rollback()
            tx.execute("INSERT INTO t VALUES (3)")
        with any_db.transaction() as inner:
            inner.execute("INSERT INTO t VALUES (10)")
            inner.connection.rollback()
        any_db.run(nested)
        any_db.read(lambda connection: connection.rollback())  # the end of a read undoes nothing
        assert tx.execute("SELECT n FROM t ORDER BY n").fetchall() == [(1,), (3,), (21,)]
    assert told == ["part"]
    assert any_db.read("SELECT n FROM t ORDER BY n") == [(1,), (3,), (21,)]


def test_rollback_of_a_reader_does_nothing(any_db: DbWriter) -> None:
    with any_db.reader() as connection:
        cursor = connection.execute("SELECT 1 UNION SELECT 2")
        connection.rollback()
        assert cursor.fetchall() == [(1,), (2,)]


def test_what_a_borrower_sets_on_a_reader_is_gone_for_the_next(path: Path) -> None:
    heard: list[str] = []
    with DbWriter(path, readers=1, pragmas={"cache_size": -1000}) as db:
        before = db.read_value("PRAGMA cache_size")
        settings: list[Callable[[sqlite3.Connection], object]] = [
            lambda connection: connection.create_function("lower", 1, lambda value: "mine"),
            lambda connection: connection.create_collation("NOCASE", lambda a, b: 0),
            lambda connection: connection.execute("PRAGMA cache_size = -77"),
            lambda connection: connection.execute("PRAGMA case_sensitive_like = 1"),
            lambda connection: connection.set_trace_callback(heard.append),
        ]
        for use in settings:
            with db.reader() as connection:
                use(connection)
            heard.clear()
            row = db.read_one("SELECT lower('A'), 'a' = 'B' COLLATE NOCASE, 'a' LIKE 'A'")
            assert (row, db.read_value("PRAGMA cache_size"), heard) == (("a", 0, 1), before, [])
        with db.reader() as connection:
            connection.execute("PRAGMA table_info(t)")  # which sets nothing
            kept = connection.loan.connection  # type: ignore[attr-defined]
        with db.reader() as connection:
            assert connection.loan.connection is kept  # type: ignore[attr-defined]


def test_whoever_follows_the_sql_of_a_job_does_not_follow_that_of_others(any_db: DbWriter) -> None:
    heard: list[str] = []

    def job(tx: Transaction) -> None:
        tx.connection.set_trace_callback(heard.append)
        tx.execute("SELECT 1")

    any_db.run(job)
    assert "SELECT 1" in heard
    any_db.run("SELECT 2")
    any_db.flush()
    assert "SELECT 2" not in heard
