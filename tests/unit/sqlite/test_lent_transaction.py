"""The transaction of a lent connection: a part of the job, with the meaning that sqlite3 gives it."""

from __future__ import annotations

import contextlib
import sqlite3
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from helpers import rows, session_of
from onewriter import DbWriter, ReentrantWriteError, Transaction, TransactionAbortedError, TransactionClosedError

INSERT = "INSERT INTO t VALUES (?)"
Use = Callable[[Any], object]


@pytest.fixture
def db(table_db: DbWriter) -> DbWriter:
    return table_db


@pytest.fixture
def tx(db: DbWriter) -> Iterator[Transaction]:
    with db.transaction() as transaction:
        yield transaction


def numbers(connection: sqlite3.Connection) -> list[int]:
    return [n for (n,) in connection.execute("SELECT n FROM t ORDER BY n")]


def test_commit_keeps_and_rollback_goes_back_to_it(tx: Transaction) -> None:
    connection = tx.connection
    connection.execute(INSERT, (1,))
    assert connection.in_transaction
    connection.commit()
    assert not connection.in_transaction
    connection.execute(INSERT, (2,))
    connection.rollback()
    connection.rollback()
    assert (numbers(connection), connection.in_transaction) == ([1], False)


def test_nothing_that_was_committed_outlives_a_job_that_fails(db: DbWriter) -> None:
    def job(tx: Transaction) -> None:
        tx.connection.execute(INSERT, (1,))
        tx.connection.commit()
        assert db.read("SELECT n FROM t") == [(1,)]
        raise LookupError

    with pytest.raises(LookupError):
        db.run(job)
    assert rows(db) == []


def test_what_a_library_has_not_committed_is_kept_by_the_end_of_the_job(db: DbWriter) -> None:
    db.run(lambda tx: tx.connection.execute(INSERT, (1,)) and None)
    assert rows(db) == [1]


def test_with_commits_or_rolls_back(tx: Transaction) -> None:
    connection = tx.connection
    with connection:
        connection.execute(INSERT, (1,))
    with pytest.raises(LookupError), connection:
        connection.execute(INSERT, (2,))
        raise LookupError
    assert (numbers(connection), connection.in_transaction) == ([1], False)


TEXTS = [
    ("BEGIN", "COMMIT", "ROLLBACK"),
    ("begin deferred", "end", "rollback transaction"),
    ("/* a */ BEGIN IMMEDIATE TRANSACTION", "COMMIT TRANSACTION -- now", "ROLLBACK;"),
    ("SAVEPOINT one", "RELEASE ONE", "ROLLBACK"),
    ('SAVEPOINT "a b"', "RELEASE SAVEPOINT [a b]", "ROLLBACK"),
]


@pytest.mark.parametrize("lends_level", ["", None])
@pytest.mark.parametrize(("begin", "commit", "rollback"), TEXTS)
def test_text_does_what_it_says(
    tx: Transaction, begin: str, commit: str, rollback: str, lends_level: str | None
) -> None:
    connection = tx.connection
    connection.isolation_level = lends_level  # type: ignore[assignment]
    for number, end in ((1, commit), (2, rollback)):
        connection.execute(begin)
        assert connection.in_transaction
        connection.execute(INSERT, (number,))
        assert connection.execute(end).fetchall() == []
        assert not connection.in_transaction
    assert numbers(connection) == [1]


ERRORS: dict[str, tuple[str, str]] = {
    "BEGIN": ("BEGIN", "cannot start a transaction within a transaction"),
    "COMMIT": ("END", "cannot commit - no transaction is active"),
    "ROLLBACK": ("ROLLBACK", "cannot rollback - no transaction is active"),
    "RELEASE": ("RELEASE a", "no such savepoint: a"),
    "ROLLBACK TO": ("ROLLBACK TO a", "no such savepoint: a"),
    "syntax": ("COMMIT NOW", 'near "NOW": syntax error'),
}


@pytest.mark.parametrize(("sql", "message"), ERRORS.values(), ids=ERRORS)
def test_text_at_the_wrong_time_raises_what_sqlite_raises(tx: Transaction, sql: str, message: str) -> None:
    plain = sqlite3.connect(":memory:")
    for connection in (plain, tx.connection):
        if sql == "BEGIN":
            connection.execute(sql)
        with pytest.raises(sqlite3.OperationalError, match=message) as caught:
            connection.execute(sql)
        assert caught.value.sqlite_errorcode == sqlite3.SQLITE_ERROR
        with pytest.raises(sqlite3.ProgrammingError):
            connection.execute("BEGIN", (1,))
    plain.close()


@pytest.mark.parametrize("failing", [INSERT, "SELECT n FROM nowhere", "SELECT abs(-9223372036854775808)"])
def test_a_statement_that_failed_is_no_error_of_the_next(tx: Transaction, failing: str) -> None:
    connection = tx.connection
    connection.isolation_level = None
    connection.execute("CREATE UNIQUE INDEX one_of_each ON t (n)")
    connection.execute(INSERT, (1,))
    for sql in ("BEGIN", "SAVEPOINT a", "ROLLBACK TO a", "RELEASE a", "COMMIT", "BEGIN", "ROLLBACK"):
        with pytest.raises(sqlite3.Error):
            connection.execute(failing, (1,) if failing is INSERT else ()).fetchall()
        assert connection.execute(sql).fetchall() == []
    with pytest.raises(sqlite3.ProgrammingError, match="bindings"):
        connection.execute("BEGIN", (1,))


def test_savepoints_nest_and_the_innermost_of_a_name_is_meant(tx: Transaction) -> None:
    connection = tx.connection
    for sql in ("SAVEPOINT a", "INSERT INTO t VALUES (1)", "SAVEPOINT b", "SAVEPOINT A", "INSERT INTO t VALUES (2)"):
        connection.execute(sql)
    connection.execute("ROLLBACK TO a")
    assert numbers(connection) == [1]
    connection.execute("RELEASE b")
    with pytest.raises(sqlite3.OperationalError, match="no such savepoint: b"):
        connection.execute("RELEASE b")
    assert connection.in_transaction
    connection.execute("RELEASE a")
    assert not connection.in_transaction


def test_a_savepoint_ends_although_another_cursor_has_a_row_to_give(tx: Transaction) -> None:
    connection = tx.connection
    for _ in range(2):  # the second time nothing has to be prepared
        connection.execute("SAVEPOINT a")
        cursor = connection.execute("SELECT 1 UNION SELECT 2")
        assert next(cursor) == (1,)
        connection.execute("RELEASE a")
        assert cursor.fetchall() == [(2,)]


def test_isolation_level_says_what_begins_by_itself(tx: Transaction) -> None:
    connection = tx.connection
    connection.isolation_level = "exclusive"  # type: ignore[assignment]
    assert connection.isolation_level == "EXCLUSIVE"
    connection.execute("WITH x AS (SELECT 1) INSERT INTO t SELECT * FROM x")
    assert not connection.in_transaction  # nor with sqlite3
    connection.execute(INSERT, (2,))
    connection.isolation_level = None  # which commits
    assert not connection.in_transaction
    connection.execute(INSERT, (3,))
    connection.rollback()
    assert (numbers(connection), connection.isolation_level) == ([1, 2, 3], None)
    for level, error in (("no", ValueError), (1, TypeError)):
        with pytest.raises(error):
            connection.isolation_level = level  # type: ignore[assignment]


def test_a_statement_that_was_never_prepared_begins_nothing(tx: Transaction) -> None:
    connection = tx.connection
    with pytest.raises(sqlite3.OperationalError, match="no such table"):
        connection.execute("INSERT INTO nowhere VALUES (1)")
    assert not connection.in_transaction
    with pytest.raises(sqlite3.ProgrammingError):
        connection.execute(INSERT)
    assert connection.in_transaction
    connection.rollback()
    connection.executemany(INSERT, iter([]))
    assert connection.in_transaction


def test_autocommit_is_what_this_python_has(tx: Transaction) -> None:
    connection: Any = tx.connection
    if sys.version_info < (3, 12):
        with pytest.raises(AttributeError):
            connection.autocommit = True
        return
    connection.execute(INSERT, (0,))
    connection.autocommit = False  # with what is open already
    assert connection.in_transaction
    connection.rollback()
    connection.execute(INSERT, (1,))
    connection.commit()
    assert connection.in_transaction
    connection.execute(INSERT, (2,))
    connection.rollback()
    connection.autocommit = True
    assert not connection.in_transaction
    connection.execute(INSERT, (3,))
    connection.rollback()
    connection.execute("BEGIN")
    connection.commit()
    assert (numbers(connection), connection.in_transaction) == ([1, 3], True)
    with pytest.raises(ValueError, match="autocommit"):
        connection.autocommit = 7


def test_a_script_keeps_what_came_before_it_and_is_done_whole_or_not_at_all(tx: Transaction) -> None:
    connection = tx.connection
    connection.execute(INSERT, (1,))
    with pytest.raises(sqlite3.OperationalError, match="nowhere"):
        connection.executescript("INSERT INTO t VALUES (2); BEGIN; COMMIT; INSERT INTO nowhere VALUES (3)")
    assert not connection.in_transaction
    connection.rollback()
    assert numbers(connection) == [1]


def test_a_transaction_that_a_script_leaves_open_can_be_undone_alone(tx: Transaction) -> None:
    connection = tx.connection
    connection.executescript("INSERT INTO t VALUES (1); SELECT n FROM t; BEGIN; INSERT INTO t VALUES (2);")
    assert connection.in_transaction
    connection.rollback()
    connection.executescript("BEGIN; INSERT INTO t VALUES (3)")
    connection.commit()
    connection.execute(INSERT, (4,))
    connection.rollback()
    assert numbers(connection) == [1, 3]


def test_a_dump_runs(tx: Transaction) -> None:
    connection = tx.connection
    connection.execute(INSERT, (1,))
    dump = "\n".join(connection.iterdump())
    connection.execute("DROP TABLE t")
    connection.executescript(dump)
    assert (numbers(connection), connection.in_transaction) == ([1], False)


def test_a_commit_inside_a_savepoint_of_the_job_is_undone_with_it(tx: Transaction) -> None:
    connection = tx.connection
    connection.execute(INSERT, (1,))
    with contextlib.suppress(LookupError), tx.savepoint():
        connection.execute(INSERT, (2,))
        connection.commit()
        assert not connection.in_transaction
        connection.execute(INSERT, (3,))
        raise LookupError
    assert numbers(connection) == [1]
    with tx.savepoint():
        connection.execute(INSERT, (4,))
        connection.commit()
        connection.execute(INSERT, (5,))
        connection.rollback()
    assert numbers(connection) == [1, 4]


def test_a_rollback_inside_a_savepoint_of_the_job_undoes_all_of_the_librarys_transaction(tx: Transaction) -> None:
    connection, told = tx.connection, list[str]()
    tx.execute(INSERT, (0,))
    connection.execute(INSERT, (1,))
    with tx.savepoint():
        tx.on_commit(lambda: told.append("undone"))
        connection.execute(INSERT, (2,))
        connection.rollback()
        tx.execute(INSERT, (3,))
    with contextlib.suppress(LookupError), tx.savepoint():
        tx.execute(INSERT, (4,))
        raise LookupError
    assert numbers(connection) == [0, 3]


def test_a_nested_blocks_connection_has_a_transaction_of_its_own(db: DbWriter) -> None:
    with db.transaction() as outer:
        outer.connection.execute(INSERT, (1,))
        with db.transaction() as inner:
            assert not inner.connection.in_transaction
            inner.connection.execute(INSERT, (2,))
            inner.connection.rollback()
            inner.connection.execute(INSERT, (3,))
        assert outer.connection.in_transaction
        outer.connection.rollback()
        outer.connection.execute(INSERT, (4,))
    assert rows(db) == [4]


@pytest.mark.parametrize("fails", [False, True])
def test_a_part_that_ends_ends_what_a_library_has_begun_in_it(tx: Transaction, fails: bool) -> None:
    connection = tx.connection
    with contextlib.suppress(LookupError), tx.savepoint():
        connection.execute(INSERT, (1,))
        if fails:
            raise LookupError
    assert not connection.in_transaction
    connection.execute("BEGIN")
    connection.execute(INSERT, (2,))
    connection.rollback()
    assert numbers(connection) == ([] if fails else [1])


def test_after_a_rollback_of_sqlites_own_nothing_hides_its_error(db: DbWriter) -> None:
    db.run(INSERT, (1,))
    with pytest.raises(TransactionAbortedError), db.transaction() as tx:
        connection = tx.connection
        cursor = connection.execute(INSERT, (2,))
        connection.execute("CREATE TABLE b (data)")
        blob: Any = connection.blobopen("b", "data", connection.execute("INSERT INTO b VALUES ('x')").lastrowid or 0)
        with pytest.raises(sqlite3.IntegrityError), connection:
            connection.execute("INSERT OR ROLLBACK INTO t VALUES (1)")
        assert not connection.in_transaction
        connection.rollback()
        cursor.close()
        blob.close()
        connection.close()
        uses: list[Callable[[], object]] = [connection.commit, lambda: connection.execute("BEGIN"), connection.cursor]
        for use in uses:
            with pytest.raises(TransactionAbortedError):
                use()
    assert rows(db) == [1]


@pytest.mark.parametrize("reads", [False, True])
def test_cursors_survive_a_rollback(db: DbWriter, reads: bool) -> None:
    db.run_many(INSERT, [(1,), (2,), (3,)])
    with contextlib.ExitStack() as stack:
        connection = stack.enter_context(db.reader()) if reads else stack.enter_context(db.transaction()).connection
        connection.execute("BEGIN")
        cursor = connection.execute("SELECT n FROM t ORDER BY n")
        assert cursor.fetchone() == (1,)
        connection.rollback()
        assert cursor.fetchall() == [(2,), (3,)]


def test_an_unread_cursor_that_writes_is_no_obstacle_to_a_rollback(tx: Transaction) -> None:
    connection = tx.connection
    cursor = connection.execute("INSERT INTO t VALUES (1), (2), (3) RETURNING n")
    with pytest.raises(sqlite3.OperationalError, match="SQL statements in progress"):
        connection.commit()
    assert connection.in_transaction
    connection.rollback()
    assert not connection.in_transaction
    cursor.close()
    connection.execute(INSERT, (4,))
    connection.commit()
    assert numbers(connection) == [4]


IN_FORCE = [
    *("foreign_keys = ON", "foreign_keys=1", "main.journal_mode = WAL", "journal_mode(wal)", "synchronous = FULL"),
    *("query_only = 0", "locking_mode = NORMAL", "busy_timeout = 0"),
]
NOT_IN_FORCE = ["foreign_keys = OFF", "journal_mode = DELETE", "synchronous = OFF", "query_only = 1", "busy_timeout=5"]


@pytest.mark.parametrize("text", IN_FORCE)
def test_a_pragma_that_sets_what_is_in_force_is_allowed(tx: Transaction, text: str) -> None:
    plain = sqlite3.connect(":memory:")
    has_row = plain.execute(f"PRAGMA {text}").fetchone() is not None
    plain.close()
    cursor = tx.connection.execute(f"PRAGMA {text}")
    assert (cursor.fetchone() is not None) is has_row
    tx.connection.execute(INSERT, (1,))


@pytest.mark.parametrize("text", NOT_IN_FORCE)
def test_another_value_is_refused_with_a_note(tx: Transaction, text: str) -> None:
    for _ in range(2):
        with pytest.raises(sqlite3.DatabaseError, match="not authorized") as caught:
            tx.connection.execute(f"PRAGMA {text}")
        assert "onewriter: PRAGMA" in caught.value.__notes__[0]


def test_a_reader_has_a_transaction_that_does_nothing(db: DbWriter) -> None:
    db.run(INSERT, (1,))
    with db.reader() as connection:
        for sql in ("BEGIN IMMEDIATE", "SAVEPOINT a", "ROLLBACK TO a", "RELEASE a"):
            connection.execute(sql)
            assert connection.in_transaction
        connection.commit()
        assert not connection.in_transaction
        db.run(INSERT, (2,))
        with connection:
            assert connection.execute("PRAGMA query_only = 1").fetchall() == []
        connection.rollback()
        assert numbers(connection) == [1]


def test_after_its_end_a_connection_is_a_closed_one(db: DbWriter) -> None:
    with db.transaction() as tx:
        lent, transaction = tx.connection, tx
        cursor = lent.execute("SELECT 1")
    uses: list[Use] = [
        *(lambda c: c.execute("SELECT 1"), lambda c: c.cursor(), lambda c: c.commit(), lambda c: c.rollback()),
        *(lambda c: c.__enter__(), lambda c: c.in_transaction, lambda c: c.total_changes, lambda c: c.isolation_level),
        *(lambda c: setattr(c, "isolation_level", None), lambda c: c.interrupt(), lambda c: cursor.fetchall()),
        *(lambda c: c.executescript("SELECT 1"), lambda c: c.backup(c), lambda c: c.serialize()),
        lambda c: c(),
    ]
    for use in uses:
        with pytest.raises((sqlite3.ProgrammingError, ValueError)):
            use(lent)
    lent.close()
    with pytest.raises(TransactionClosedError) as caught:
        transaction.execute("SELECT 1")
    assert not isinstance(caught.value, sqlite3.Error)


def test_the_errors_are_attributes(tx: Transaction) -> None:
    names = [
        *("Warning", "Error", "InterfaceError", "DatabaseError", "OperationalError", "IntegrityError", "DataError")
    ]
    for name in [*names, "ProgrammingError", "InternalError", "NotSupportedError"]:
        assert getattr(tx.connection, name) is getattr(sqlite3, name)


def test_a_copy_has_what_the_job_has_done(db: DbWriter) -> None:
    with contextlib.closing(sqlite3.connect(":memory:")) as target, db.transaction() as tx:
        tx.connection.execute(INSERT, (1,))
        steps: list[tuple[int, int, int]] = []
        tx.connection.backup(target, pages=1, progress=lambda *step: steps.append(step))
        assert (numbers(target), len(steps) > 1) == ([1], True)
        with pytest.raises(ValueError, match="same connection"):
            tx.connection.backup(tx.connection)
    with contextlib.closing(sqlite3.connect(":memory:")) as target, db.reader() as connection:
        connection.backup(target)
        assert numbers(target) == [1]


class Adapted:
    def __init__(self, connection: sqlite3.Connection) -> None:
        self.connection = connection

    def __conform__(self, protocol: object) -> int:
        return 10 + int(self.connection.execute("SELECT count(*) FROM t").fetchone()[0])


def test_what_sqlite_calls_may_use_the_connection(tx: Transaction) -> None:
    connection = tx.connection

    def add(n: int) -> int:
        tx.connection.execute(INSERT, (n + 1,))
        return n

    connection.execute(INSERT, (Adapted(connection),))
    connection.create_function("put", 1, add)
    assert connection.execute("SELECT put(20)").fetchone() == (20,)
    assert tx.execute("SELECT put(30)").rows == [(30,)]
    assert numbers(connection) == [10, 21, 31]
    failed: list[BaseException] = []

    def replace() -> None:
        for use in (lambda: connection.create_function("replace_it", 0, None), lambda: tx.execute("SELECT 1")):
            try:
                use()
            except ReentrantWriteError as error:
                failed.append(error)

    connection.create_function("replace_it", 0, replace)
    connection.execute("SELECT replace_it()").fetchall()
    assert len(failed) == 2


def test_a_read_of_the_job_cannot_write_through_a_function_of_another_statement(db: DbWriter) -> None:
    refused: list[BaseException] = []

    def read(view: sqlite3.Connection) -> None:
        def write() -> None:
            try:
                view.execute(INSERT, (1,))
            except ReentrantWriteError as error:
                refused.append(error)

        lent.create_function("write_it", 0, write)
        lent.execute("SELECT write_it()").fetchall()

    with db.transaction() as tx:
        lent = tx.connection
        db.read(read)
    assert (len(refused), rows(db)) == (1, [])


@pytest.mark.parametrize("sql", ["ATTACH ':memory:' AS other", "VACUUM", "VACUUM INTO 'copy.db'"])
def test_what_cannot_be_in_a_job_is_refused_with_a_note(tx: Transaction, sql: str) -> None:
    tx.connection.execute(INSERT, (1,))
    with pytest.raises(sqlite3.DatabaseError) as caught:
        tx.connection.execute(sql)
    assert caught.value.__notes__[0].startswith("onewriter: ")
    assert (numbers(tx.connection), tx.connection.in_transaction) == ([1], True)


@pytest.mark.parametrize("reads", [False, True])
def test_a_signal_handler_cannot_use_a_connection_that_prepares_a_statement(db: DbWriter, reads: bool) -> None:
    """It runs between two lines of Python, and the authorizer has some."""
    refused: list[BaseException] = []
    with contextlib.ExitStack() as stack:
        connection: Any = stack.enter_context(db.reader() if reads else db.transaction())
        connection = connection if reads else connection.connection
        guard = connection._loan.guard
        decide = guard.decide

        def interrupted(*arguments: Any) -> int:
            try:
                connection.execute("SELECT 1")
            except ReentrantWriteError as error:
                refused.append(error)
            return int(decide(*arguments))

        guard.decide = interrupted
        connection.execute("SELECT n AS new_text FROM t").fetchall()
        guard.decide = decide
        assert connection.execute("SELECT 2").fetchone() == (2,)
    assert refused


def test_a_statement_on_a_closed_cursor_begins_nothing(tx: Transaction) -> None:
    with contextlib.closing(sqlite3.connect(":memory:")) as plain:
        for connection in (plain, tx.connection):
            cursor = connection.cursor()
            cursor.close()
            with pytest.raises(sqlite3.ProgrammingError, match="closed cursor"):
                cursor.execute("INSERT INTO t VALUES (1)")
            assert not connection.in_transaction


def test_what_fails_behind_a_pragma_that_changes_nothing_fails(tx: Transaction) -> None:
    with pytest.raises(sqlite3.ProgrammingError, match="one statement"):
        tx.connection.execute("PRAGMA user_version = 0; SELECT 1")


@pytest.mark.parametrize("end", ["rollback", "ROLLBACK TO second"])
@pytest.mark.parametrize("first", ["BEGIN", "SAVEPOINT first"])
def test_a_transaction_that_ended_with_its_savepoint_is_not_the_one_that_begins_in_the_next(
    db: DbWriter, first: str, end: str
) -> None:
    with db.transaction() as tx:
        connection = tx.connection
        with tx.savepoint():
            connection.execute(first)
            connection.execute(INSERT, (1,))
        with tx.savepoint():
            connection.execute("SAVEPOINT second")
            connection.execute(INSERT, (2,))
            with tx.savepoint():
                connection.execute(INSERT, (3,))
                connection.rollback() if end == "rollback" else connection.execute(end)
                tx.execute(INSERT, (4,))
        tx.execute(INSERT, (5,))
    assert rows(db) == [1, 4, 5]


def test_what_a_signal_handler_raises_while_sqlite_asks_about_a_pragma_that_changes_nothing_comes_out(
    db: DbWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> int:
        monkeypatch.undo()
        raise LookupError("of a signal handler")

    with pytest.raises(LookupError, match="of a signal handler"), db.transaction() as tx:
        tx.connection.execute(INSERT, (1,))
        monkeypatch.setattr(session_of(db).guard, "_pragma", interrupted)
        tx.connection.execute("PRAGMA foreign_keys = 1")
    assert rows(db) == []


def test_what_a_signal_handler_raised_in_another_thread_is_of_no_other_statement(db: DbWriter) -> None:
    session_of(db).guard._caught = LookupError("of a signal handler"), 0
    with pytest.raises(sqlite3.OperationalError, match="no such table"):
        db.run("INSERT INTO missing VALUES (1)")
