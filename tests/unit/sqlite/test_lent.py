"""``tx.connection`` and ``reader()``: a ``sqlite3.Connection`` for libraries, whatever they do with it."""

from __future__ import annotations

import contextlib
import gc
import linecache
import sqlite3
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from helpers import DEADLINE, notes_of, raising, rows, session_of
from onewriter import DbWriter, ReentrantWriteError, Transaction, TransactionAbortedError, TransactionClosedError
from onewriter.sqlite import lent
from onewriter.sqlite.lent_blob import LentBlob
from onewriter.sqlite.lent_cursor import MANY, is_plain_row

INSERT = "INSERT INTO t VALUES (?)"
ROUNDS = 6  # a few seconds; the program takes more
Use = Callable[[sqlite3.Connection], object]


@pytest.fixture
def db(any_db: DbWriter) -> DbWriter:
    any_db.run("CREATE TABLE t (n INTEGER)")
    return any_db


def test_a_row_factory_with_python_code_of_its_own_is_not_a_plain_one() -> None:
    class Plain(sqlite3.Row):
        @property
        def first(self) -> Any:
            return self[0]

    class Counting(sqlite3.Row):
        def __init__(self, *_: Any) -> None:
            pass

    class Made(sqlite3.Row):
        def __new__(cls, *arguments: Any) -> Made:
            return super().__new__(cls, *arguments)

    class Meta(type):
        pass

    class Strange(sqlite3.Row, metaclass=Meta):
        pass

    assert [is_plain_row(one) for one in (sqlite3.Row, Plain)] == [True] * 2
    assert [is_plain_row(one) for one in (Counting, Made, Strange, dict, dict_factory)] == [False] * 5


def dict_factory(cursor: sqlite3.Cursor, row: tuple[Any, ...]) -> dict[str, Any]:
    return dict(zip((column[0] for column in cursor.description), row, strict=True))


def test_a_lent_connection_that_cannot_commit_at_the_end_of_a_with_block_rolls_back(
    db: DbWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lent.LentConnection, "commit", raising(MemoryError))
    with db.transaction() as tx, contextlib.suppress(MemoryError), tx.connection as connection:
        connection.execute(INSERT, (1,))
    assert rows(db) == []


def test_a_connection_is_made_once_for_many_loans_and_only_a_few_are_kept(db: DbWriter) -> None:
    lent._shells.clear()
    with contextlib.ExitStack() as many:
        for _ in range(lent.MOST_SHELLS + 2):
            pool = many.enter_context(DbWriter(":memory:"))
            many.enter_context(pool.reader())
    assert len(lent._shells) == lent.MOST_SHELLS
    with db.reader():
        assert len(lent._shells) == lent.MOST_SHELLS - 1


def test_a_cursor_with_a_factory_reads_and_then_writes(db: DbWriter) -> None:
    with db.transaction() as tx:
        tx.connection.row_factory = dict_factory
        cursor = tx.connection.cursor()
        assert cursor.execute("SELECT 1 AS a").fetchall() == [{"a": 1}]
        assert cursor.execute(INSERT, (1,)).fetchall() == []
        assert cursor.fetchone() is None


def test_a_script_that_undoes_the_whole_transaction_is_told_by_its_own_error(db: DbWriter) -> None:
    db.run("CREATE UNIQUE INDEX i ON t (n)")
    with pytest.raises(TransactionAbortedError), db.transaction() as tx:
        tx.connection.execute(INSERT, (1,))
        with pytest.raises(sqlite3.IntegrityError):
            tx.connection.executescript("INSERT INTO t VALUES (2); INSERT OR ROLLBACK INTO t VALUES (1)")
    assert rows(db) == []


@pytest.mark.parametrize("factory", [None, dict_factory], ids=["tuples", "dicts"])
def test_cursors_that_are_gone_leave_nothing_behind(path: Path, factory: Any) -> None:
    def references() -> int:
        gc.collect()
        return sum(type(one) is weakref.ref for one in gc.get_objects())

    with DbWriter(path) as db, db.reader() as connection:
        connection.row_factory = factory
        for _ in range(MANY):
            connection.execute("SELECT 1 AS n").fetchall()
        before = references()
        for _ in range(3 * MANY):
            connection.execute("SELECT 1 AS n").fetchall()
        assert references() < before + MANY + 300


def test_a_function_is_created_after_the_call_of_another_thread_and_not_refused(path: Path) -> None:
    entered, free = threading.Event(), threading.Event()

    def gate() -> bool:
        entered.set()
        threading.Timer(0.1, free.set).start()
        return free.wait(DEADLINE)

    def create(connection: sqlite3.Connection) -> None:
        connection.create_function("one", 0, lambda: 1)

    with (
        DbWriter(path, on_connect=lambda connection, _: connection.create_function("gate", 0, gate)) as db,
        db.reader() as connection,
        ThreadPoolExecutor(1) as pool,
    ):
        waiting = pool.submit(lambda: connection.execute("SELECT gate()").fetchall())
        assert entered.wait(DEADLINE)
        create(connection)
        assert waiting.result(DEADLINE) == [(1,)]
        assert connection.execute("SELECT one()").fetchone() == (1,)


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

if sys.version_info >= (3, 12):
    HARMLESS["autocommit"] = set_attribute("autocommit", False)

REFUSED: dict[str, Use] = {
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
PROGRAM = Path(__file__).parents[2] / "experiments" / "lentcalls.py"


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
def test_rollback_undoes_the_librarys_transaction_and_nothing_before_it(db: DbWriter, way: Callable[..., None]) -> None:
    told: list[str] = []

    def job(tx: Transaction) -> None:
        tx.execute(INSERT, (1,))
        tx.connection.rollback()
        tx.connection.execute(INSERT, (2,))
        tx.on_commit(lambda: told.append("undone"))
        tx.connection.rollback()
        tx.on_commit(lambda: told.append("done"))
        tx.connection.execute(INSERT, (3,))
        tx.connection.commit()

    way(db, job)
    assert (rows(db), told) == ([1, 3], ["done"])


def test_a_failed_script_leaves_nothing_behind(db: DbWriter) -> None:
    with db.transaction() as tx:
        with pytest.raises(sqlite3.OperationalError):
            tx.connection.executescript("INSERT INTO t VALUES (1); INSERT INTO nowhere VALUES (1);")
        tx.execute(INSERT, (2,))
    assert rows(db) == [2]


def test_a_null_character_in_a_script_is_refused_before_any_of_it_has_run(db: DbWriter) -> None:
    with db.transaction() as tx, pytest.raises(ValueError, match="embedded null character"):
        tx.connection.executescript("INSERT INTO t VALUES (1);\0 INSERT INTO t VALUES (2)")
    assert rows(db) == []


def test_a_control_statement_that_cannot_be_read_has_ended_what_the_cursor_had(db: DbWriter) -> None:
    with contextlib.closing(sqlite3.connect(":memory:")) as plain, db.transaction() as tx:
        for connection in (plain, tx.connection):
            cursor = connection.execute("VALUES (1), (2)")
            with pytest.raises((sqlite3.ProgrammingError, sqlite3.Warning)):
                cursor.execute("COMMIT; SELECT 1")
            assert (cursor.fetchone(), cursor.description, cursor.rowcount) == (None, None, -1)


def test_it_is_a_connection_with_cursors(db: DbWriter) -> None:
    with db.transaction() as tx:
        connection = tx.connection
        assert isinstance(connection, sqlite3.Connection)
        assert tx.connection is connection
        assert not connection.in_transaction
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
        assert connection.total_changes == 3
        connection.text_factory = bytes
        assert connection.text_factory is bytes
        assert connection.execute("SELECT 'a'").fetchone()[0] == b"a"
        assert connection.getlimit(sqlite3.SQLITE_LIMIT_LENGTH) > 0
    db.run("CREATE TABLE blobs (data BLOB)")
    with db.transaction() as tx:
        rowid = tx.execute("INSERT INTO blobs VALUES (zeroblob(3))").lastrowid
        blob = tx.connection.blobopen("blobs", "data", rowid or 0)
        blob.write(b"abc")
        with pytest.raises(TypeError, match="is not iterable"):
            assert b"a" in blob  # type: ignore[operator]
    assert db.read_value("SELECT data FROM blobs") == b"abc"
    assert db.run("SELECT 'a'").rows == [("a",)]


READER_USES: dict[str, Use] = {
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


def test_rollback_in_a_part_leaves_what_came_before_the_librarys_transaction(any_db: DbWriter) -> None:
    any_db.run("CREATE TABLE t (n)")

    def nested(tx: Transaction) -> None:
        tx.connection.execute("INSERT INTO t VALUES (20)")
        tx.connection.rollback()
        tx.execute("INSERT INTO t VALUES (21)")

    with any_db.transaction() as tx:
        told: list[str] = []
        tx.execute("INSERT INTO t VALUES (1)")
        with tx.savepoint():
            tx.connection.execute("INSERT INTO t VALUES (2)")
            tx.on_rollback(lambda: told.append("part"))
            tx.connection.rollback()
            tx.execute("INSERT INTO t VALUES (3)")
        with any_db.transaction() as inner:
            inner.connection.execute("INSERT INTO t VALUES (10)")
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
            kept = connection._loan.connection  # type: ignore[attr-defined]
        with db.reader() as connection:
            assert connection._loan.connection is kept  # type: ignore[attr-defined]


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


def back_up_into(connection: sqlite3.Connection) -> None:
    with contextlib.closing(sqlite3.connect(":memory:")) as own:
        own.backup(connection)


PAST_THE_CLASS: dict[str, Callable[[Any, Any, Any], object]] = {
    "Connection.execute": lambda con, cur, blob: sqlite3.Connection.execute(con, "INSERT INTO t VALUES (1)"),
    "Connection.commit": lambda con, cur, blob: sqlite3.Connection.commit(con),
    "Connection.cursor": lambda con, cur, blob: sqlite3.Connection.cursor(con),
    "Connection.blobopen": lambda con, cur, blob: sqlite3.Connection.blobopen(con, "b", "data", 1),
    "Connection.interrupt": lambda con, cur, blob: sqlite3.Connection.interrupt(con),
    "Connection.in_transaction": lambda con, cur, blob: sqlite3.Connection.total_changes.__get__(con),
    "a new Cursor": lambda con, cur, blob: sqlite3.Cursor(con).execute("SELECT 1"),
    "Cursor.execute": lambda con, cur, blob: sqlite3.Cursor.execute(cur, "INSERT INTO t VALUES (1)"),
    "Cursor.executescript": lambda con, cur, blob: sqlite3.Cursor.executescript(cur, "COMMIT"),
    "Cursor.fetchone": lambda con, cur, blob: sqlite3.Cursor.fetchone(cur),
    "Blob.write": lambda con, cur, blob: sqlite3.Blob.write(blob, b"x"),
    "a target of backup": lambda con, cur, blob: back_up_into(con),
}


@contextlib.contextmanager
def lent_by(db: DbWriter, way: str) -> Iterator[sqlite3.Connection]:
    if way == "reader":
        with db.reader() as connection:
            yield connection
    elif way == "nested":
        with db.transaction(), db.transaction() as inner:
            yield inner.connection
    else:
        with db.transaction() as tx:
            yield tx.connection


LENDERS = ["block", "nested", "reader"]


@pytest.fixture
def blobs(any_db: DbWriter) -> DbWriter:
    any_db.run_script("CREATE TABLE t (n); CREATE TABLE b (data); INSERT INTO b VALUES (zeroblob(10))")
    return any_db


@pytest.mark.parametrize("lender", LENDERS)
@pytest.mark.parametrize("use", PAST_THE_CLASS.values(), ids=PAST_THE_CLASS)
def test_what_is_called_past_its_class_reaches_nothing(
    blobs: DbWriter, use: Callable[[Any, Any, Any], object], lender: str
) -> None:
    with lent_by(blobs, lender) as connection:
        cursor = connection.execute("SELECT 1 UNION SELECT 2")
        blob = connection.blobopen("b", "data", 1, readonly=True)
        assert isinstance(cursor, sqlite3.Cursor)
        assert isinstance(blob, sqlite3.Blob)
        with pytest.raises((sqlite3.ProgrammingError, TypeError)):
            use(connection, cursor, blob)
        assert cursor.fetchall() == [(1,), (2,)]
        cursor = connection.execute("SELECT 1")
    with pytest.raises((sqlite3.ProgrammingError, TypeError)):
        use(connection, cursor, blob)
    assert blobs.read("SELECT n FROM t") == []


class KeepingCursor(sqlite3.Cursor):
    """A library's own, which keeps the connection it was made with, and calls its base in the old way."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        sqlite3.Cursor.__init__(self, connection)
        self.kept = connection


def test_a_cursor_class_is_made_with_the_lent_connection(blobs: DbWriter) -> None:
    with pytest.raises(LookupError), blobs.transaction() as tx:
        cursor = tx.connection.cursor(KeepingCursor)
        cursor.execute("INSERT INTO t VALUES (1)")
        assert cursor.kept is tx.connection
        cursor.kept.commit()
        raise LookupError
    assert blobs.read("SELECT n FROM t") == []


class NamingRow(sqlite3.Row):
    def __new__(cls, cursor: Any, row: Any) -> Any:
        seen.append(cursor)
        return super().__new__(cls, cursor, row)


seen: list[Any] = []


def by_hand(cursor: Any, row: Any) -> Any:
    seen.append(cursor)
    return sqlite3.Row(cursor, row)


@pytest.mark.parametrize("lender", LENDERS)
@pytest.mark.parametrize("factory", [by_hand, NamingRow, sqlite3.Row])
def test_a_row_factory_sees_the_lent_cursor_and_its_columns(blobs: DbWriter, factory: Any, lender: str) -> None:
    seen.clear()
    with lent_by(blobs, lender) as connection:
        connection.row_factory = factory
        for sql in ('SELECT 1 AS a, 2 AS "b""c"', "SELECT 1 AS d, 2 AS d"):
            cursor = connection.execute(sql)
            names = [name for name, *_ in cursor.description]
            rows = [connection.execute(sql).fetchone(), *connection.execute(sql).fetchmany(), *connection.execute(sql)]
            assert [row.keys() for row in [*rows, *cursor.fetchall()]] == [names] * 4
        assert all(each.connection is connection for each in seen)
        cursor = connection.cursor()
        cursor.row_factory = None
        assert cursor.execute("SELECT 1").fetchone() == (1,)


@pytest.mark.parametrize("lender", ["block", "nested"])
def test_a_script_leaves_alone_what_its_cursor_has(blobs: DbWriter, lender: str) -> None:
    with lent_by(blobs, lender) as connection:
        cursor = connection.cursor()
        cursor.row_factory = sqlite3.Row
        cursor.execute("INSERT INTO t VALUES (7)")
        cursor.execute("SELECT 1 AS a UNION SELECT 2")
        before = cursor.description, cursor.lastrowid
        assert tuple(cursor.fetchone()) == (1,)
        assert cursor.executescript("INSERT INTO t VALUES (8); SELECT 3 AS b") is cursor
        assert (cursor.description, cursor.lastrowid) == before
        assert [row["a"] for row in cursor] == [2]
        assert cursor.execute("SELECT 4 AS c").fetchone()["c"] == 4
    assert blobs.read("SELECT n FROM t ORDER BY n") == [(7,), (8,)]


def test_a_script_makes_no_rows(path: Path) -> None:
    with DbWriter(path, row_factory=raising(LookupError)) as db, db.transaction() as tx:
        tx.connection.executescript("SELECT 1; SELECT 2")


def test_each_statement_of_a_script_runs_to_its_end(blobs: DbWriter) -> None:
    with blobs.transaction() as tx:
        tx.connection.executescript("INSERT INTO t VALUES (1), (2) RETURNING n")
        tx.connection.commit()
    assert blobs.read("SELECT n FROM t") == [(1,), (2,)]


def test_scripts_leave_no_cursors_behind(blobs: DbWriter) -> None:
    with blobs.transaction() as tx:
        counts = []
        for _ in range(2):
            for _ in range(9):
                tx.connection.executescript("SELECT 1")
            gc.collect()
            counts.append(sum(type(thing) is sqlite3.Cursor for thing in gc.get_objects()))
    assert counts[0] == counts[1]


def test_a_script_whose_row_cannot_be_made_is_undone_with_that_error_and_leaves_nothing_open(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sqlite3.converters, "FAILS", raising(LookupError))
    with DbWriter(path, detect_types=sqlite3.PARSE_COLNAMES, lock_timeout=0.1) as db:
        db.run("CREATE TABLE t (n)")
        ticket = db.enqueue(
            lambda tx: tx.connection.executescript('INSERT INTO t VALUES (1) RETURNING n AS "n [fails]"')
        )
        error = ticket.exception(DEADLINE)  # which keeps the frames, and what they have
        assert isinstance(error, LookupError)
        with db.transaction() as tx:
            with contextlib.suppress(LookupError):
                tx.connection.executescript('INSERT INTO t VALUES (2) RETURNING n AS "n [fails]"')
            tx.execute("INSERT INTO t VALUES (3)")
        assert db.read("SELECT n FROM t") == [(3,)]


def test_a_script_that_is_interrupted_twice_leaves_nothing_open_behind_its_block(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def second(frame: FrameType, event: str, _: object) -> Any:
        line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
        if event == "line" and "raw.close()" in line:
            sys.settrace(None)
            raise KeyboardInterrupt
        return second

    monkeypatch.setitem(sqlite3.converters, "FAILS", raising(LookupError))
    before = sys.gettrace()
    with DbWriter(path, detect_types=sqlite3.PARSE_COLNAMES, lock_timeout=0.1) as db:
        db.run("CREATE TABLE t (n)")
        with pytest.raises(BaseException) as caught, db.transaction() as tx:  # noqa: PT011 - whatever became of it
            sys.settrace(second)
            try:
                tx.connection.executescript('INSERT INTO t VALUES (1) RETURNING n AS "n [fails]"')
            finally:
                was_interrupted = sys.gettrace() is None
                sys.settrace(before)
        assert was_interrupted
        assert caught.value is not None  # its frames are kept
        db.run("INSERT INTO t VALUES (3)")
        assert db.read("SELECT n FROM t") == [(3,)]


def test_rows_that_a_failing_executemany_returns_are_in_the_way_of_no_commit(blobs: DbWriter) -> None:
    def rows() -> Iterator[tuple[int]]:
        yield (1,)
        raise LookupError

    with blobs.transaction() as tx:
        cursor = tx.connection.cursor()
        with pytest.raises(LookupError):
            cursor.executemany("INSERT INTO t VALUES (?) RETURNING n", rows())
        tx.connection.commit()
        tx.connection.execute("DELETE FROM t")
        tx.connection.rollback()
        assert cursor.fetchall() == []
    assert blobs.read("SELECT n FROM t") == [(1,)]


def test_a_cursor_that_is_closed_by_its_own_rows_is_closed(blobs: DbWriter) -> None:
    def rows() -> Iterator[tuple[int]]:
        yield (1,)
        cursor.close()

    with blobs.transaction() as tx:
        cursor = tx.connection.cursor()
        cursor.executemany("INSERT INTO t VALUES (?)", rows())
        for call in (cursor.execute, cursor.executescript):
            with pytest.raises(sqlite3.ProgrammingError, match="closed cursor"):
                call("SELECT 1")


@pytest.mark.parametrize("lender", ["block", "nested"])
def test_many_rows_from_an_iterator_leave_the_last_rowid_as_it_was(blobs: DbWriter, lender: str) -> None:
    with lent_by(blobs, lender) as connection:
        cursor = connection.execute("INSERT INTO t VALUES (7)")
        first = cursor.lastrowid
        assert first is not None
        assert cursor.executemany("INSERT INTO t VALUES (?)", iter([(8,)])).lastrowid == first
        assert cursor.execute("INSERT INTO t VALUES (9)").lastrowid == first + 2


@pytest.mark.parametrize("lender", ["block", "nested"])
def test_many_rows_from_an_iterator_of_which_one_fails_are_no_number_of_rows(blobs: DbWriter, lender: str) -> None:
    with lent_by(blobs, lender) as connection:
        cursor = connection.cursor()
        with pytest.raises(sqlite3.ProgrammingError):
            cursor.executemany("INSERT INTO t VALUES (?)", iter([(1,), (1, 2)]))
        assert cursor.rowcount == -1


@pytest.mark.parametrize("lender", ["block", "nested"])
def test_a_closed_cursor_runs_nothing(blobs: DbWriter, lender: str) -> None:
    with lent_by(blobs, lender) as connection:
        cursor = connection.cursor()
        cursor.close()
        with pytest.raises(sqlite3.ProgrammingError, match="closed cursor"):
            cursor.executescript("INSERT INTO t VALUES (1)")
        with pytest.raises(sqlite3.ProgrammingError, match="closed cursor"):
            cursor.executemany("INSERT INTO t VALUES (?)", iter([(1,)]))
        with pytest.raises(sqlite3.ProgrammingError, match="closed cursor"):
            cursor.execute("INSERT INTO t VALUES (1)")
    assert blobs.read("SELECT * FROM t") == []


@pytest.mark.parametrize("lender", ["block", "nested"])
def test_one_cursor_may_feed_another(blobs: DbWriter, lender: str) -> None:
    blobs.run_many("INSERT INTO t VALUES (?)", [(1,), (2,), (3,)])
    one: dict[str, int] = {}

    def changed() -> Any:
        for n, *_ in connection.execute("SELECT n FROM t WHERE n < 100 ORDER BY n"):
            one["n"] = 200 + n
            yield one

    with lent_by(blobs, lender) as connection:
        sql = "INSERT INTO t VALUES (? + 100)"
        assert connection.executemany(sql, connection.execute("SELECT n FROM t WHERE n < 100")).rowcount == 3
        assert connection.cursor().executemany("INSERT INTO t VALUES (:n)", changed()).rowcount == 3
        cursor = connection.execute("SELECT n FROM t WHERE n < 100")
        assert cursor.executemany("INSERT INTO t VALUES (? + 300)", cursor).rowcount == 3
        with pytest.raises(sqlite3.ProgrammingError):
            connection.executemany("SELECT ?", iter([(1,)]))
    hundreds = [(100 * k + n,) for k in range(4) for n in (1, 2, 3)]
    assert blobs.read("SELECT n FROM t ORDER BY n") == hundreds
    with blobs.transaction() as tx:
        assert tx.executemany("INSERT INTO t VALUES (?)", tx.connection.execute("SELECT n FROM t")).rowcount == 12


@pytest.mark.parametrize("lender", LENDERS)
def test_a_function_may_use_the_connection_that_it_runs_on(blobs: DbWriter, lender: str) -> None:
    def count() -> int:
        return int(connection.execute("SELECT count(*) FROM b").fetchone()[0])

    with lent_by(blobs, lender) as connection:
        connection.create_function("b_count", 0, count)
        assert connection.execute("SELECT b_count()").fetchone() == (1,)
        assert connection.execute("SELECT b_count()").fetchone() == (1,)


@pytest.mark.parametrize("lender", LENDERS)
def test_cursors_and_blobs_end_with_the_loan(blobs: DbWriter, lender: str) -> None:
    with lent_by(blobs, lender) as connection:
        cursor = connection.execute("SELECT 1 UNION SELECT 2")
        blob: Any = connection.blobopen("b", "data", 1, readonly=lender == "reader")
    uses: list[Callable[[], object]] = [cursor.fetchone, blob.read, lambda: blob[0], lambda: len(blob)]
    uses += [connection.interrupt, connection.cursor, lambda: connection.in_transaction]
    for use in uses:
        with pytest.raises((sqlite3.ProgrammingError, TransactionClosedError)):
            use()
    cursor.close()  # as a finally block does
    blob.close()
    assert not blobs.checkpoint().busy


def test_a_cursor_of_a_nested_block_ends_with_the_outer_one(path: Path) -> None:
    taken, told = threading.Event(), threading.Event()
    kept: list[Any] = []

    def block(db: DbWriter) -> None:
        with pytest.raises(TransactionClosedError), db.transaction(max_hold=0.05), db.transaction() as inner:
            inner.connection.set_trace_callback(heard.append)
            kept.append(inner.connection.execute("INSERT INTO t VALUES (8), (9) RETURNING n"))
            taken.set()
            told.wait(30)

    heard: list[str] = []
    with DbWriter(path) as db:
        db.run("CREATE TABLE t (n)")
        thread = threading.Thread(target=block, args=(db,))
        thread.start()
        taken.wait(30)
        db.run("INSERT INTO t VALUES (1)")  # when it was taken back
        heard.clear()
        assert not db.checkpoint().busy
        db.run("INSERT INTO t VALUES (2)")
        assert heard == []
        told.set()
        thread.join(30)
        db.run("INSERT INTO t VALUES (3)")
        assert db.read("SELECT n FROM t") == [(1,), (2,), (3,)]


def test_a_dropped_cursor_is_ended_at_once(blobs: DbWriter) -> None:
    with blobs.transaction() as tx:
        tx.connection.execute("INSERT INTO t VALUES (1), (2)")
        tx.connection.execute("SELECT n FROM t").fetchone()
        gc.collect()
        tx.execute("DROP TABLE t")  # an unread cursor would lock it


class Signalling:
    """A lock just behind whose acquisition a signal handler comes."""

    def __init__(self, lock: Any, handler: Callable[[], object]) -> None:
        self._lock, self._handler = lock, handler

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def acquire(self, *args: Any) -> bool:
        got: bool = self._lock.acquire(*args)
        self._handler()
        return got

    def release(self) -> None:
        self._lock.release()


def test_a_signal_handler_may_read_as_a_dropped_cursor_ends(blobs: DbWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    with blobs.transaction() as tx:
        tx.execute("INSERT INTO t VALUES (1)")
        cursor = tx.connection.execute("SELECT n FROM t")
        session, found = session_of(blobs), []
        monkeypatch.setattr(session, "lock", Signalling(session.lock, lambda: found.append(rows(blobs))))
        del cursor
        assert found == [[1]]
        monkeypatch.undo()


def test_an_interrupt_from_another_thread_does_not_wait_for_what_it_ends(path: Path) -> None:
    with DbWriter(path) as db, contextlib.ExitStack() as stack:
        connections = [stack.enter_context(db.reader()), stack.enter_context(db.transaction()).connection]
        for connection in connections:
            inside = threading.Event()
            connection.create_function("entered", 1, lambda n, inside=inside: inside.set())
            thread = threading.Thread(target=lambda c=connection, i=inside: i.wait(30) and c.interrupt())
            thread.start()
            with pytest.raises(sqlite3.OperationalError, match="interrupted"):
                connection.execute(
                    "WITH RECURSIVE c(n) AS (SELECT entered(1) UNION ALL SELECT 1 FROM c) SELECT count(*) FROM c"
                ).fetchone()
            thread.join(30)
            assert connection.execute("SELECT 1").fetchone() == (1,)


def test_a_reader_that_is_left_by_a_function_of_its_own_statement_comes_back_when_that_ends(path: Path) -> None:
    with DbWriter(path, readers=1) as db:
        for _ in range(3):
            block = db.reader()
            connection = block.__enter__()
            connection.create_function("leave", 0, lambda block=block: block.__exit__(None, None, None))
            cursor = connection.execute("SELECT leave()")
            for use in (cursor.fetchall, connection.cursor):
                with pytest.raises(sqlite3.ProgrammingError, match="ended"):
                    use()
            assert db.read("SELECT 1", timeout=30) == [(1,)]


@pytest.mark.parametrize("nested", [False, True])
def test_a_block_that_is_left_by_a_function_of_its_own_statement_says_so_and_does_not_hang(
    path: Path, nested: bool
) -> None:
    with DbWriter(path) as db, contextlib.ExitStack() as outer:
        db.run("CREATE TABLE t (n)")
        if nested:
            outer.enter_context(db.transaction())
        block = db.transaction()
        connection = block.__enter__().connection
        connection.execute("INSERT INTO t VALUES (1)")
        refused: list[BaseException] = []

        def leave() -> None:
            try:
                block.__exit__(None, None, None)
            except ReentrantWriteError as error:
                refused.append(error)

        connection.create_function("leave", 0, leave)
        with contextlib.suppress(sqlite3.OperationalError, TransactionClosedError):
            connection.execute("SELECT leave()").fetchall()
        assert len(refused) == 1
        outer.close()
        assert db.run("SELECT 1").rows == [(1,)]
        assert nested or db.read("SELECT n FROM t") == []


def test_a_connection_that_somebody_keeps_is_never_that_of_a_later_loan(any_db: DbWriter) -> None:
    kept = any_db.read(lambda connection: [connection])[0]
    sqlite3.Connection.__init__(kept, ":memory:")  # which empties it
    for _ in range(3):
        assert any_db.read(lambda connection: connection is kept) is False
        with any_db.reader() as connection:
            assert connection is not kept
    with pytest.raises(sqlite3.ProgrammingError, match="this connection is no longer lent"):
        kept.execute("SELECT 1")
    sqlite3.Connection.close(kept)


def test_a_connection_opened_anew_past_its_class_harms_nothing(blobs: DbWriter) -> None:
    with blobs.transaction() as tx:
        connection = tx.connection
        cursor = connection.execute("INSERT INTO t VALUES (1), (2) RETURNING n")
        blob = connection.blobopen("b", "data", 1)
        sqlite3.Connection.__init__(connection, ":memory:")
        sqlite3.Connection.close(connection)
    del cursor, blob
    assert blobs.read("SELECT n FROM t") == [(1,), (2,)]


@pytest.mark.parametrize("seed", [0, 1000])
def test_every_attribute_can_be_called_in_every_state_of_the_loan(seed: int) -> None:
    command = [sys.executable, "-W", "ignore", str(PROGRAM), "--rounds", str(ROUNDS), "--seed", str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stdout) == (0, "lived\n"), done.stderr[-4000:]


def test_a_dump_can_be_had_through_a_loan(db: DbWriter) -> None:
    db.run("INSERT INTO t VALUES (1)")
    with db.transaction() as tx:
        assert any("INSERT INTO" in line for line in tx.connection.iterdump())
    with db.reader() as connection:
        assert any("INSERT INTO" in line for line in connection.iterdump())


def test_a_lent_connection_tells_its_configuration_where_python_can(new_db: DbWriter) -> None:
    option = getattr(sqlite3, "SQLITE_DBCONFIG_ENABLE_FKEY", None)
    with new_db.transaction() as tx:
        told = None if option is None else getattr(tx.connection, "getconfig")(option)  # noqa: B009 - from 3.12 on
    assert told is (None if option is None else True)


def test_a_function_cannot_be_created_when_the_loan_has_ended(db: DbWriter) -> None:
    with db.transaction() as tx:
        connection = tx.connection
    with pytest.raises(sqlite3.ProgrammingError):
        connection.create_function("f", 0, lambda: 1)


def test_a_cursor_that_is_dropped_in_a_sql_function_leaves_the_call_around_it_under_way(path: Path) -> None:
    kept: list[sqlite3.Cursor] = []
    told: list[str] = []

    def drop() -> None:
        kept.clear()
        with pytest.raises(ReentrantWriteError) as caught:
            tx.execute("SELECT 1")
        told.append(str(caught.value))

    with (
        DbWriter(path, on_connect=lambda connection, _: connection.create_function("drop_it", 0, drop)) as db,
        db.transaction() as tx,
    ):
        kept.append(tx.connection.execute("SELECT 1 UNION SELECT 2"))
        tx.execute("SELECT drop_it()")
        assert tx.execute("SELECT 1").rows == [(1,)]
    assert len(told) == 1


def test_what_is_refused_in_a_sql_function_of_the_connection_says_why(path: Path) -> None:
    told: list[str] = []

    def ask() -> None:
        with pytest.raises(sqlite3.DatabaseError, match="not authorized") as caught:
            tx.connection.execute("ATTACH 'other.db' AS other")
        told.append(notes_of(caught.value))

    with (
        DbWriter(path, on_connect=lambda connection, _: connection.create_function("ask", 0, ask)) as db,
        db.transaction() as tx,
    ):
        tx.connection.execute("SELECT ask()").fetchall()
    assert "onewriter: ATTACH and DETACH belong in on_connect" in told[0]


def test_a_blob_that_was_never_opened_is_collected_without_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", said.append)
    with pytest.raises(TypeError, match="blobopen"):
        LentBlob()
    gc.collect()
    assert said == []


@pytest.mark.parametrize("lender", ["block", "nested"])
def test_a_text_that_sqlite_cannot_be_given_is_refused_as_by_sqlite3(blobs: DbWriter, lender: str) -> None:
    sql = "SELECT '\ud800'"
    with lent_by(blobs, lender) as connection:
        for call in (connection.execute, connection.executescript, lambda sql: connection.executemany(sql, iter([()]))):
            with pytest.raises(UnicodeEncodeError):
                call(sql)
