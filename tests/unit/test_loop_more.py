"""Batches in which a job is withdrawn, fails oddly, or meets what another one leaves behind."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import pickle
import signal
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import onewriter.sqlite.retry
from helpers import DEADLINE, holding_lock, parked
from onewriter import DbWriter, Ticket, Transaction, TransactionClosedError, WriterClosedError, WriteTimeoutError

KEYS = "CREATE TABLE p (id INTEGER PRIMARY KEY); CREATE TABLE c (pid REFERENCES p (id))"
INSERT = "INSERT INTO t VALUES (?)"


@contextlib.contextmanager
def waiting_for_lock(db: DbWriter, path: Path) -> Iterator[threading.Event]:
    """What is handed in before the yielded Event is set is taken together, and waits for SQLite's lock."""
    go, there = threading.Event(), threading.Event()
    with parked(db) as release:
        stop = db.enqueue("SELECT 1", label="last before the lock is taken")

        def stay(ticket: Ticket[Any]) -> None:
            there.set()
            go.wait(DEADLINE)

        stop.add_done_callback(stay)
        release.set()
        assert there.wait(DEADLINE)
        with holding_lock(path):
            yield go


def until_waiting(db: DbWriter) -> None:
    """Until the writer waits for SQLite's lock."""
    while "waits since" not in db._state.describe():
        assert not threading.Event().wait(0.001)


@pytest.mark.parametrize(
    ("first", "second", "outcome"),
    [
        ("off", "orphan", sqlite3.IntegrityError),
        ("on", "flush", None),
        ("on", "checkpoint", None),
        ("on", "VACUUM", None),
        ("on", "rebuild", None),
        ("on", "block", None),
    ],
)
def test_a_job_withdrawn_while_its_batch_waits_for_the_lock_lends_nothing_to_the_next(
    path: Path, first: str, second: str, outcome: type[BaseException] | None
) -> None:
    def enter_block() -> None:
        with db.transaction() as tx:
            tx.execute("INSERT INTO p VALUES (7)")

    calls: dict[str, Callable[[], object]] = {
        "orphan": lambda: db.run("INSERT INTO c VALUES (999)"),
        "flush": lambda: db.flush(),
        "checkpoint": lambda: db.checkpoint(),
        "VACUUM": lambda: db.run_without_transaction("VACUUM"),
        "rebuild": lambda: db.run_script("INSERT INTO c VALUES (5); INSERT INTO p VALUES (5)", foreign_keys=False),
        "block": enter_block,
    }
    outcomes: list[BaseException | None] = []

    def call() -> None:
        try:
            calls[second]()
            outcomes.append(None)
        except BaseException as error:
            outcomes.append(error)

    with DbWriter(path) as db:
        db.run_script(KEYS)
        with waiting_for_lock(db, path) as go:
            job = db._job(lambda tx: None, (), None, False) if first == "off" else db._job("SELECT 1", (), None, None)
            db._submit(job, None)
            thread = threading.Thread(target=call)
            thread.start()
            while db.stats().queue_depth < 2:
                assert not threading.Event().wait(0.001)
            go.set()
            until_waiting(db)
            assert job.cancel()
        thread.join(DEADLINE)
        assert [type(error) for error in outcomes] == [type(None) if outcome is None else outcome]
        assert db.read("PRAGMA foreign_key_check") == []


@dataclasses.dataclass(frozen=True)
class FrozenError(Exception):
    item: str = "x"


class NoCodeError(sqlite3.OperationalError):
    sqlite_errorcode = None  # type: ignore[assignment]


class SpeechlessError(Exception):
    def __str__(self) -> str:
        raise LookupError


class FullOfNotesError(Exception):
    __notes__ = ("a", "b")  # type: ignore[assignment]


class UnreadableError(Exception):
    def __getattr__(self, name: str) -> Any:
        raise LookupError(name)


@pytest.mark.parametrize("kind", [FrozenError, NoCodeError, SpeechlessError, FullOfNotesError, UnreadableError])
def test_an_exception_that_refuses_notes_or_has_no_text_reaches_its_caller_and_the_next_job_runs(
    any_db: DbWriter, kind: type[Exception]
) -> None:
    def job(tx: Transaction) -> None:
        raise kind

    with pytest.raises(kind):
        any_db.run(job)
    assert isinstance(any_db.enqueue(job).exception(DEADLINE), kind)
    assert any_db.run("SELECT 1").fetchone() == (1,)


def test_a_hook_whose_exception_refuses_notes_is_told_as_it_is(path: Path) -> None:
    def hook(connection: sqlite3.Connection, readonly: bool) -> None:
        raise FullOfNotesError

    with pytest.raises(FullOfNotesError):
        DbWriter(path, on_connect=hook)


def test_an_error_about_rows_that_a_busy_commit_undid_is_not_told(path: Path) -> None:
    with DbWriter(path, journal_mode="DELETE", lock_timeout=0.05) as db:
        db.run("CREATE TABLE t (k UNIQUE)")
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as reader:
            with parked(db):
                tickets = [db.enqueue("INSERT INTO t VALUES (1)"), db.enqueue("INSERT OR ABORT INTO t VALUES (1)")]
                reader.execute("BEGIN")
                reader.execute("SELECT * FROM t").fetchall()
            errors = [ticket.exception(DEADLINE) for ticket in tickets]
        assert [type(error) for error in errors] == [sqlite3.OperationalError] * 2
        assert "locked" in str(errors[1])


def test_a_job_that_failed_on_what_another_wrote_runs_again_when_that_is_undone(db: DbWriter) -> None:
    db.run("CREATE TABLE t (k UNIQUE)")
    db.run(INSERT, (0,))
    numbers = iter((1, 2))

    def insert_next(tx: Transaction) -> None:
        tx.execute(INSERT, (next(numbers),))

    with parked(db):
        first = db.enqueue(insert_next)
        second = db.enqueue(INSERT, (1,))
        third = db.enqueue(lambda tx: tx.execute("INSERT OR ROLLBACK INTO t VALUES (0)") and None)
    assert (first.exception(DEADLINE), second.exception(DEADLINE)) == (None, None)
    assert isinstance(third.exception(DEADLINE), sqlite3.IntegrityError)
    assert db.read("SELECT k FROM t") == [(0,), (2,), (1,)]


@pytest.mark.parametrize("value", [1 << 70, "\ud800"])  # others are refused at the call
def test_a_parameter_that_cannot_be_bound_has_its_own_error_behind_a_failed_job(db: DbWriter, value: Any) -> None:
    db.run_script("CREATE TABLE t (a UNIQUE); CREATE TABLE u (b); INSERT INTO t VALUES (1)")
    db.run("INSERT INTO u VALUES (1)")
    db.run("INSERT INTO u VALUES (?)", (1,))
    with parked(db):
        db.enqueue("INSERT INTO t VALUES (1)", label="fails")
        ticket = db.enqueue("INSERT INTO u VALUES (?)", (value,))
    in_company = ticket.exception(DEADLINE)
    alone = db.enqueue("INSERT INTO u VALUES (?)", (value,)).exception(DEADLINE)
    assert (type(in_company), str(in_company)) == (type(alone), str(alone))
    assert not isinstance(in_company, sqlite3.IntegrityError)


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


def test_lastrowid_and_rowcount_are_the_statements_own(db: DbWriter) -> None:
    db.run_script("CREATE TABLE t (id INTEGER PRIMARY KEY); CREATE TABLE w (k PRIMARY KEY) WITHOUT ROWID")
    assert db.run("INSERT INTO t VALUES (1)").lastrowid == 1
    with pytest.raises(sqlite3.IntegrityError):
        db.run_many(INSERT, [(5,), (5,)])
    assert db.run("INSERT INTO w VALUES (2)").lastrowid is None
    db.run(INSERT, (9,))
    db.run("CREATE VIRTUAL TABLE f USING fts5(a)")
    assert db.run("INSERT INTO w VALUES (3)").lastrowid is None


def test_an_empty_statement_has_nothing_of_the_one_before(db: DbWriter) -> None:
    db.run("CREATE TABLE t (a)")
    db.run("INSERT INTO t VALUES (1), (2), (3) RETURNING a")
    result = db.run("")
    assert (result.rowcount, result.lastrowid, result.rows) == (-1, None, [])


@pytest.mark.parametrize("size", [0, -1, -5])
def test_fetchmany_of_no_size_gives_all_as_sqlite3_does(db: DbWriter, size: int) -> None:
    assert db.run("VALUES (1), (2), (3)").fetchmany(size) == [(1,), (2,), (3,)]


def test_a_nested_block_leaves_the_factories_of_the_outer_one(db: DbWriter) -> None:
    with db.transaction() as tx:
        tx.connection.text_factory = bytes
        with db.transaction() as inner:
            assert inner.connection.execute("SELECT 'x'").fetchone() == (b"x",)
            inner.connection.text_factory = str
        assert tx.connection.execute("SELECT 'x'").fetchone() == (b"x",)
    assert db.run("SELECT 'x'").rows == [("x",)]


@pytest.mark.parametrize("call", ["run", "read", "transaction", "run_many"])
def test_inside_a_block_that_max_hold_has_ended_the_gateways_calls_raise_too(db: DbWriter, call: str) -> None:
    db.run("CREATE TABLE t (n)")
    calls: dict[str, Callable[[], object]] = {
        "run": lambda: db.run(INSERT, (2,)),
        "read": lambda: db.read("SELECT * FROM t"),
        "transaction": lambda: db.transaction().__enter__(),
        "run_many": lambda: db.run_many(INSERT, [(2,)]),
    }
    with pytest.raises(TransactionClosedError), db.transaction(max_hold=0.01):
        threading.Thread(target=db.run, args=(INSERT, (1,))).start()
        while db.in_writer():
            assert not threading.Event().wait(0.001)
        with pytest.raises(TransactionClosedError, match="max_hold"):
            calls[call]()
        ticket = db.enqueue(INSERT, (3,))  # no part of the block
    db.run(INSERT, (4,))
    assert ticket.done()
    assert db.read("SELECT n FROM t WHERE n <> 1") == [(3,), (4,)]


@pytest.mark.parametrize("where", ["begin", "commit", "close"])
@pytest.mark.parametrize("inline", [False, True])
def test_a_signal_handler_that_enqueues_never_waits_for_the_call_it_interrupts(
    path: Path, where: str, inline: bool
) -> None:
    got: list[Any] = []
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)

    def handler(*_: object) -> None:
        try:
            got.append(db.enqueue("INSERT INTO t VALUES ('signal')", timeout=0.0))
        except Exception as error:
            got.append(error)
        threading.Thread(target=let_go.set).start()

    def hold_reader() -> None:
        with db.reader():
            there.set()
            assert let_go.wait(DEADLINE)

    let_go, there = threading.Event(), threading.Event()
    before = signal.signal(signal.SIGALRM, handler)
    db = DbWriter(path, inline=inline, journal_mode="DELETE")
    try:
        db.run("CREATE TABLE t (a)")
        if where == "close":
            thread = threading.Thread(target=hold_reader)
            thread.start()
            assert there.wait(DEADLINE)
        else:
            other.execute("BEGIN IMMEDIATE" if where == "begin" else "BEGIN")
            other.execute("SELECT * FROM t").fetchall()
            thread = threading.Thread(target=lambda: (let_go.wait(DEADLINE), other.execute("ROLLBACK")))
            thread.start()
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        if where != "close":
            with db.transaction() as tx:
                tx.execute(INSERT, (1,))
        db.close()
        thread.join(DEADLINE)
        if where == "close":
            assert isinstance(got[0], WriterClosedError)
        else:
            assert isinstance(got[0], Ticket)
            assert got[0].exception(DEADLINE) is None
    finally:
        signal.signal(signal.SIGALRM, before)
        other.close()
        db.close()


def test_a_block_that_was_never_accepted_is_not_counted(path: Path) -> None:
    db = DbWriter(path)
    db.close()
    with pytest.raises(WriterClosedError), db.transaction():
        pass
    assert db.close().cancelled == 0


def test_a_timeout_is_checked_wherever_one_is_given(db: DbWriter) -> None:
    ticket = db.enqueue("SELECT 1")
    for call in (ticket.result, ticket.exception, db.flush):
        for value in (float("nan"), -1.0, 10**400):
            with pytest.raises(ValueError, match="timeout must be"):
                call(value)
        with pytest.raises(TypeError, match="timeout must be"):
            call("1")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="callable"):
        ticket.add_done_callback(5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="drain"):
        db.close(drain="no")  # type: ignore[arg-type]


def test_while_callbacks_are_called_a_timeout_says_whose(db: DbWriter) -> None:
    release, inside = threading.Event(), threading.Event()

    def stay(ticket: Ticket[Any]) -> None:
        inside.set()
        release.wait(DEADLINE)

    with parked(db):
        db.enqueue("SELECT 1", label="the one").add_done_callback(stay)
    assert inside.wait(DEADLINE)
    with pytest.raises(WriteTimeoutError, match="callbacks of 'the one'"):
        db.run("SELECT 2", timeout=0.0)
    release.set()
    db.flush()
    assert "callbacks" not in db._state.describe()


def test_a_job_that_swallows_the_end_of_max_hold_hears_of_it(path: Path) -> None:
    endless = "INSERT INTO t WITH RECURSIVE c (x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT count(*) FROM c"

    def job(tx: Transaction) -> None:
        with contextlib.suppress(Exception):
            tx.execute(endless)

    with DbWriter(path) as db:
        db.run("CREATE TABLE t (n)")
    with DbWriter(path, max_hold=0.02) as db, pytest.raises(TransactionClosedError, match="max_hold"):
        db.run(job)


def test_a_timeout_error_can_be_pickled_and_copied(db: DbWriter) -> None:
    with parked(db), pytest.raises(WriteTimeoutError) as timeout:
        db.run("SELECT 1", timeout=0.0)
    for again in (pickle.loads(pickle.dumps(timeout.value)), copy.copy(timeout.value)):
        assert (type(again), str(again), again.started) == (WriteTimeoutError, str(timeout.value), False)


def test_a_lent_connection_tells_its_configuration_where_python_can(db: DbWriter) -> None:
    option = getattr(sqlite3, "SQLITE_DBCONFIG_ENABLE_FKEY", None)
    with db.transaction() as tx:
        told = None if option is None else getattr(tx.connection, "getconfig")(option)  # noqa: B009 - from 3.12 on
    assert told is (None if option is None else True)


def test_who_holds_the_lock_is_looked_up_once_for_many_who_ask(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def describe(path: str) -> str:
        asked.append(path)
        return "somebody"

    monkeypatch.setattr("onewriter.base.state.describe_lock", describe)
    monkeypatch.setattr("onewriter.base.state.FRESH", DEADLINE)
    with DbWriter(path) as db:
        db._state._lock_told = (-DEADLINE, "")
        with waiting_for_lock(db, path) as go:
            ticket = db.enqueue("SELECT 1")
            go.set()
            until_waiting(db)
            asked.clear()
            assert all("somebody" in db._state.describe() for _ in range(100))
            assert not asked
        assert ticket.exception(DEADLINE) is None


def test_the_code_of_an_error_that_is_not_sqlites_means_nothing() -> None:
    class Disguised(Exception):
        sqlite_errorcode = sqlite3.SQLITE_BUSY

    assert not onewriter.sqlite.retry.is_busy(Disguised())


def test_an_interrupt_that_sqlite_tells_by_its_text_alone_is_one_too(db: DbWriter) -> None:
    """As it does where it meets one while it makes ready a table-valued PRAGMA."""
    error = sqlite3.OperationalError("interrupted")
    error.sqlite_errorcode, error.sqlite_errorname = sqlite3.SQLITE_ERROR, "SQLITE_ERROR"
    db.run("CREATE TABLE t (n)")
    with pytest.raises(TransactionClosedError, match="has ended"), db.transaction() as tx:
        executor = tx._loan.session.executor

        def interrupted(*_: object) -> Any:
            tx._loan.close("has ended early")
            raise error

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(executor, "execute", interrupted)
            tx.execute(INSERT, (1,))


def test_another_error_of_sqlite_with_its_own_text_is_no_interrupt() -> None:
    error = sqlite3.OperationalError("near is a syntax error")
    error.sqlite_errorcode, error.sqlite_errorname = sqlite3.SQLITE_ERROR, "SQLITE_ERROR"
    assert not onewriter.sqlite.retry.is_interrupted(error)


@pytest.mark.parametrize("refusal", ["busy", "deferred key"])
def test_callbacks_of_a_job_that_failed_before_a_refused_commit_are_called_once(path: Path, refusal: str) -> None:
    told: list[str] = []

    def fail(tx: Transaction) -> None:
        tx.on_rollback(lambda: told.append("undone"))
        raise LookupError

    def violate(tx: Transaction) -> None:
        tx.execute("PRAGMA defer_foreign_keys = ON")
        tx.execute("INSERT INTO c VALUES (9)")

    with DbWriter(path, journal_mode="DELETE", lock_timeout=0.05) as db:
        db.run_script(KEYS)
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as reader:
            with parked(db):
                first = db.enqueue(fail)
                second = db.enqueue(violate if refusal == "deferred key" else lambda tx: tx.execute("DELETE FROM c"))
                if refusal == "busy":
                    reader.execute("BEGIN")
                    reader.execute("SELECT * FROM c").fetchall()
            assert isinstance(first.exception(DEADLINE), LookupError)
            assert second.exception(DEADLINE) is not None
            db.flush()
    assert told == ["undone"]


def test_many_jobs_behind_a_busy_commit_wait_for_the_lock_once(path: Path) -> None:
    with DbWriter(path, journal_mode="DELETE", lock_timeout=0.05) as db:
        db.run("CREATE TABLE t (k UNIQUE)")
        attempts: list[int] = []
        keep_trying = db._loop._lock.policy.keep_trying

        def counted(*args: Any) -> Any:
            attempts.append(1)
            return keep_trying(*args)

        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as reader:
            with parked(db):
                tickets = [db.enqueue("INSERT INTO t VALUES (1)") for _ in range(30)]
                reader.execute("BEGIN")
                reader.execute("SELECT * FROM t").fetchall()
                db._loop._lock.policy.keep_trying = counted  # type: ignore[method-assign, assignment]
            errors = {str(ticket.exception(DEADLINE)) for ticket in tickets}
        assert errors == {"database is locked"}
        assert len(attempts) <= 2  # of the job that parks, and of them all


def test_a_handler_that_raises_closed_while_its_thread_waits_for_a_block_leaves_nothing_lent(path: Path) -> None:
    def handler(*_: object) -> None:
        raise WriterClosedError("of another gateway")

    before = signal.signal(signal.SIGALRM, handler)
    try:
        with DbWriter(path) as db:
            with parked(db):
                signal.setitimer(signal.ITIMER_REAL, 0.05)
                with pytest.raises(WriterClosedError, match="of another"), db.transaction(timeout=None):
                    raise AssertionError
            assert db.run("SELECT 1").rows == [(1,)]
    finally:
        signal.signal(signal.SIGALRM, before)


def test_a_nested_block_that_ends_after_its_outer_one_was_taken_changes_nothing_of_the_connection(path: Path) -> None:
    with DbWriter(path) as db:
        with pytest.raises(TransactionClosedError), db.transaction(max_hold=0.05) as tx:
            tx.connection.text_factory = bytes
            with db.transaction() as inner:
                assert inner.connection.execute("SELECT 'x'").fetchone() == (b"x",)
                while db.in_writer():
                    assert not threading.Event().wait(0.001)
                other = threading.Thread(target=db.run, args=("SELECT 1",))
                other.start()
                other.join(DEADLINE)
        assert db.run("SELECT 'x'").rows == [("x",)]


def test_a_lone_statement_whose_connection_could_not_be_opened_is_no_unknown_commit(path: Path) -> None:
    failing: list[bool] = []

    def hook(connection: sqlite3.Connection, readonly: bool) -> None:
        if failing:
            error = sqlite3.OperationalError("disk I/O error")
            error.sqlite_errorcode = sqlite3.SQLITE_IOERR_FSYNC
            raise error

    with DbWriter(path, on_connect=hook) as db:
        db._loop._connection.drop()
        failing.append(True)
        with pytest.raises(sqlite3.OperationalError, match="disk I/O"):
            db.run_without_transaction("VACUUM")
        failing.clear()
        assert db.run("SELECT 1").rows == [(1,)]


@pytest.mark.parametrize("name", ["READ", "GETTEMPPATH", "LOCK", "SHMMAP"])
def test_a_lone_statement_that_failed_before_it_wrote_is_no_unknown_commit(db: DbWriter, name: str) -> None:
    session = db._loop._connection.session
    assert session is not None

    def fail(*_: object) -> Any:
        error = sqlite3.OperationalError("disk I/O error")
        error.sqlite_errorcode = getattr(sqlite3, f"SQLITE_IOERR_{name}")
        raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session.executor, "execute", fail)
        with pytest.raises(sqlite3.OperationalError, match="disk I/O"):
            db.run_without_transaction("VACUUM")
    assert db.run("SELECT 1").rows == [(1,)]
