"""Jobs that share a transaction: one that fails undoes only itself, whatever undid the others or refused the COMMIT."""

from __future__ import annotations

import contextlib
import dataclasses
import sqlite3
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers import (
    DEADLINE,
    attaching,
    core_of,
    drop_session,
    eventually,
    file_of,
    full_disk,
    inserting,
    parked,
    raising,
    rows,
    rows_in,
    session_of,
    until_waiting,
    waiting_for_lock,
)
from onewriter import CommitUnknownError, DbWriter, Ticket, Transaction, WriterBrokenError
from onewriter.events import BatchEnded
from onewriter.write.outcomes import commit_outcome_unknown, copy_of, may_be_in_part, may_have_committed

KEYS = "CREATE TABLE p (id INTEGER PRIMARY KEY); CREATE TABLE c (pid REFERENCES p (id))"
INSERT = "INSERT INTO t VALUES (?)"
TABLE = "CREATE TABLE t (n)"


def error_with(code: int | None) -> sqlite3.OperationalError:
    error = sqlite3.OperationalError("disk I/O error")
    if code is not None:
        error.sqlite_errorcode, error.sqlite_errorname = code, "SQLITE_…"
    return error


@pytest.mark.parametrize(
    ("code", "in_transaction", "expected"),
    [
        (sqlite3.SQLITE_IOERR_FSYNC, True, True),
        (sqlite3.SQLITE_IOERR_FSYNC, False, True),
        (sqlite3.SQLITE_IOERR_TRUNCATE, True, True),
        (sqlite3.SQLITE_IOERR_SHORT_READ, True, True),
        (sqlite3.SQLITE_IOERR_WRITE, True, False),
        (sqlite3.SQLITE_IOERR_WRITE, False, False),
        (sqlite3.SQLITE_FULL, True, False),
        (sqlite3.SQLITE_FULL, False, False),
        (sqlite3.SQLITE_BUSY, True, False),
        (sqlite3.SQLITE_CONSTRAINT_FOREIGNKEY, True, False),
        (sqlite3.SQLITE_CORRUPT, False, False),
        (sqlite3.SQLITE_NOTADB, False, False),
        (None, True, False),
        (None, False, True),
    ],
)
def test_only_a_commit_that_can_have_reached_the_file_is_unknown(
    code: int | None, in_transaction: bool, expected: bool
) -> None:
    assert commit_outcome_unknown(error_with(code), in_transaction) is expected


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (sqlite3.SQLITE_IOERR_READ, False),
        (sqlite3.SQLITE_IOERR_WRITE, False),
        (sqlite3.SQLITE_IOERR_FSYNC, True),
        (sqlite3.SQLITE_IOERR_SHMSIZE, True),  # the transaction is in the log, and the index cannot grow
        (sqlite3.SQLITE_IOERR_SHMMAP, True),
    ],
)
def test_what_commits_by_itself_may_have(code: int, expected: bool) -> None:
    assert may_have_committed(error_with(code)) is expected


def test_each_job_gets_an_error_object_of_its_own_that_says_the_same() -> None:
    error = error_with(sqlite3.SQLITE_IOERR_FSYNC)
    copy = copy_of(error)
    assert copy is not error
    assert isinstance(copy, sqlite3.OperationalError)
    assert (str(copy), copy.sqlite_errorcode, copy.sqlite_errorname) == (str(error), error.sqlite_errorcode, "SQLITE_…")


def test_an_error_that_cannot_be_made_again_is_told_as_sqlites() -> None:
    class Demanding(Exception):
        def __init__(self, one: int, two: int) -> None:
            super().__init__(f"{one} and {two}")

    copy = copy_of(Demanding(1, 2))
    assert isinstance(copy, sqlite3.OperationalError)
    assert str(copy) == "1 and 2"
    assert not hasattr(copy, "sqlite_errorcode")


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
            make, frame = core_of(db).job, sys._getframe()
            job = (
                make(lambda tx: None, (), None, False, frame)
                if first == "off"
                else make("SELECT 1", (), None, None, frame)
            )
            core_of(db).submit(job, None)
            thread = threading.Thread(target=call)
            thread.start()
            eventually(lambda: db.stats().queue_depth >= 2)
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


class InterruptingError(Exception):
    @property
    def __notes__(self) -> Any:  # type: ignore[override]
        raise KeyboardInterrupt


@pytest.mark.parametrize(("inline", "error"), [(True, KeyboardInterrupt), (False, InterruptingError)])
def test_an_interrupt_in_the_midst_of_a_note_comes_out_of_an_inline_gateway_only(
    path: Path, inline: bool, error: type[BaseException]
) -> None:
    def job(tx: Transaction) -> None:
        raise InterruptingError

    with DbWriter(path, inline=inline) as db:
        with pytest.raises(error):
            db.run(job)
        assert db.run("SELECT 1").fetchone() == (1,)


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


def test_a_lone_statement_whose_connection_could_not_be_opened_is_no_unknown_commit(path: Path) -> None:
    failing: list[bool] = []

    def hook(connection: sqlite3.Connection, readonly: bool) -> None:
        if failing:
            error = sqlite3.OperationalError("disk I/O error")
            error.sqlite_errorcode = sqlite3.SQLITE_IOERR_FSYNC
            raise error

    with DbWriter(path, on_connect=hook) as db:
        drop_session(db)
        failing.append(True)
        with pytest.raises(sqlite3.OperationalError, match="disk I/O"):
            db.run_without_transaction("VACUUM")
        failing.clear()
        assert db.run("SELECT 1").rows == [(1,)]


@pytest.mark.parametrize("name", ["READ", "GETTEMPPATH", "LOCK"])
def test_a_lone_statement_that_failed_before_it_wrote_is_no_unknown_commit(db: DbWriter, name: str) -> None:
    session = session_of(db)

    def fail(*_: object) -> Any:
        error = sqlite3.OperationalError("disk I/O error")
        error.sqlite_errorcode = getattr(sqlite3, f"SQLITE_IOERR_{name}")
        raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session.executor, "execute", fail)
        with pytest.raises(sqlite3.OperationalError, match="disk I/O"):
            db.run_without_transaction("VACUUM")
    assert db.run("SELECT 1").rows == [(1,)]


def test_an_error_of_a_hook_that_refuses_copies_still_reaches_every_job(path: Path) -> None:
    class HookError(sqlite3.OperationalError):
        def __init__(self, text: str, is_original: bool = False) -> None:
            if not is_original:
                raise SystemExit("there is one only")
            super().__init__(text)

    fails = False

    def hook(connection: sqlite3.Connection, readonly: bool) -> None:
        if fails and not readonly:
            raise HookError("of the hook", is_original=True)

    with DbWriter(path, on_connect=hook) as db:
        db.run(TABLE)
        fails = True
        drop_session(db)  # as after an error that leaves it in doubt; the writer is idle
        tickets = [db.enqueue(INSERT, (n,)) for n in range(3)]
        errors = [ticket.exception(DEADLINE) for ticket in tickets]
        assert ["of the hook" in str(error) for error in errors] == [True] * 3
        assert len(set(map(id, errors))) == 3
        fails = False
        db.run(INSERT, (7,))


def test_a_copy_of_an_error_is_always_an_exception() -> None:
    class Odd(Exception):
        def __new__(cls, *args: object) -> Any:
            return super().__new__(cls) if args else "no exception"

    assert isinstance(copy_of(Odd(1)), BaseException)
    plain = sqlite3.IntegrityError("text")
    plain.sqlite_errorcode = 2067
    copy = copy_of(plain)
    assert (type(copy), str(copy), getattr(copy, "sqlite_errorcode", 0)) == (sqlite3.IntegrityError, "text", 2067)


def test_bad_sql_in_a_batch_does_not_make_the_others_run_again(path: Path) -> None:
    with DbWriter(path, on_error=lambda ticket: None) as db:
        db.run("CREATE TABLE batch (n UNIQUE)")
        with parked(db):
            good = [db.enqueue("INSERT INTO batch VALUES (?)", (n,)) for n in range(3)]
            bad: list[Ticket[Any]] = [
                db.enqueue("INSERT INTO nowhere VALUES (1)"),
                db.enqueue("INSERT INTO batch VALUES (?)", (0,)),
            ]
            good += [db.enqueue("INSERT INTO batch VALUES (?)", (n,)) for n in range(3, 6)]
        assert all(isinstance(ticket.exception(30), sqlite3.Error) for ticket in bad)
        assert [ticket.result(30).rowcount for ticket in good] == [1] * 6
        assert db.stats().run_twice == 0


def test_what_may_roll_back_the_others_does_not_share_their_transaction(db: DbWriter) -> None:
    db.run("CREATE TABLE t (n UNIQUE)")
    with parked(db):
        good = [db.enqueue(INSERT, (n,)) for n in (1, 2)]
        failing = db.enqueue("INSERT OR ROLLBACK INTO t VALUES (1)")
        good.append(db.enqueue(INSERT, (3,)))
    assert isinstance(failing.exception(DEADLINE), sqlite3.IntegrityError)
    assert [ticket.exception(DEADLINE) for ticket in good] == [None] * 3
    assert (rows(db), db.stats().run_twice) == ([1, 2, 3], 0)


def test_statements_share_no_transaction_where_a_trigger_may_roll_it_back(db: DbWriter) -> None:
    db.run("CREATE TABLE t (n)")
    db.run("CREATE TRIGGER u AFTER INSERT ON t WHEN NEW.n = 9 BEGIN SELECT RAISE(ROLLBACK, 'n is 9'); END")
    before = db.stats().commits
    with parked(db):
        tickets = [db.enqueue(INSERT, (n,)) for n in (1, 2, 3)]
    assert [ticket.exception(DEADLINE) for ticket in tickets] == [None] * 3
    assert db.stats().commits == before + 4  # one of the function that has kept the writer


def test_a_statement_whose_returned_rows_cannot_be_read_is_undone(db: DbWriter) -> None:
    db.run("CREATE TABLE t (n)")
    with parked(db):
        good = [db.enqueue(INSERT, (1,))]
        failing = db.enqueue("INSERT INTO t VALUES (CAST(x'ff' AS TEXT)) RETURNING n")  # not UTF-8
        good.append(db.enqueue(INSERT, (2,)))
    assert isinstance(failing.exception(DEADLINE), sqlite3.OperationalError)
    assert [ticket.exception(DEADLINE) for ticket in good] == [None, None]
    assert rows(db) == [1, 2]


def test_a_table_that_a_batch_itself_has_made_counts_for_those_behind_it(db: DbWriter) -> None:
    with parked(db):
        db.enqueue("CREATE TABLE t (n UNIQUE ON CONFLICT FAIL)")
        failing = db.enqueue("INSERT INTO t VALUES (1), (1)")  # FAIL alone would leave the first row
        good = db.enqueue(INSERT, (3,))
    assert isinstance(failing.exception(DEADLINE), sqlite3.IntegrityError)
    assert good.exception(DEADLINE) is None
    assert rows(db) == [3]


def test_a_function_runs_once_even_beside_failing_statements(path: Any) -> None:
    runs = 0

    def count(tx: Transaction) -> None:
        nonlocal runs
        runs += 1
        tx.execute("INSERT INTO t VALUES (?)", (100 + runs,))

    with DbWriter(path) as db:
        db.run("CREATE TABLE t (n UNIQUE)")
        with parked(db):
            first = db.enqueue(INSERT, (1,))
            db.enqueue(count)
            failing = db.enqueue("INSERT INTO t SELECT abs(?)", (-(2**63),))
            db.enqueue(count)
            last = db.enqueue(INSERT, (2,))
        assert isinstance(failing.exception(DEADLINE), sqlite3.OperationalError)
        assert (first.exception(DEADLINE), last.exception(DEADLINE)) == (None, None)
        assert (runs, rows(db)) == (2, [1, 101, 102, 2])


def test_those_behind_a_statement_that_makes_the_others_run_again_run_after_them(db: DbWriter) -> None:
    db.run("CREATE TABLE t (n UNIQUE)")
    with parked(db):
        first = db.enqueue(INSERT, (1,))
        failing = db.enqueue("INSERT OR FAIL INTO t VALUES (2), (1)")  # keeps its first row, but for a savepoint
        behind: list[Ticket[Any]] = [db.enqueue(INSERT, (3,)), db.enqueue(inserting(4))]
    assert isinstance(failing.exception(DEADLINE), sqlite3.IntegrityError)
    assert [ticket.exception(DEADLINE) for ticket in (first, *behind)] == [None] * 3
    assert rows(db) == [1, 3, 4]


def test_what_undid_a_shared_transaction_makes_the_others_run_again(path: Any) -> None:
    runs: list[int] = []
    told: list[str] = []

    def job(n: int) -> Callable[[Transaction], int]:
        def insert(tx: Transaction) -> int:
            runs.append(n)
            tx.on_commit(lambda: told.append(f"{n} committed"))
            tx.on_rollback(lambda: told.append(f"{n} undone"))
            tx.execute(INSERT, (n,))
            return n

        return insert

    def undo_all(tx: Transaction) -> None:
        tx.execute("INSERT OR ROLLBACK INTO t VALUES (1)")

    with DbWriter(path) as db:
        db.run("CREATE TABLE t (n UNIQUE)")
        with parked(db):
            tickets = [db.enqueue(job(n)) for n in (1, 2)]
            failing = db.enqueue(undo_all)
            failing_alone = db.enqueue("INSERT INTO t VALUES (1)")
            tickets.append(db.enqueue(job(3)))
        assert [ticket.result(DEADLINE) for ticket in tickets] == [1, 2, 3]
        assert isinstance(failing.exception(DEADLINE), sqlite3.IntegrityError)
        assert isinstance(failing_alone.exception(DEADLINE), sqlite3.IntegrityError)
        db.flush()
    assert runs == [1, 2, 1, 2, 3]
    assert told == ["1 undone", "2 undone", "1 committed", "2 committed", "3 committed"]


def test_what_undid_all_keeps_its_error_when_the_others_cannot_run_again(path: Any) -> None:
    """Something undoes the shared transaction, and somebody else takes the lock before its jobs run again."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as other:

        def good(tx: Transaction) -> None:
            tx.on_rollback(lambda: other.execute("BEGIN IMMEDIATE"))
            tx.execute(INSERT, (2,))

        def bad(tx: Transaction) -> None:
            raise LookupError("its own")

        def hear(event: object) -> None:
            if isinstance(event, BatchEnded):
                told.extend(event.tickets)

        told: list[object] = []
        with DbWriter(path, lock_timeout=0.05, on_event=hear) as db:
            db.run("CREATE TABLE t (n UNIQUE)")
            db.run(INSERT, (1,))
            with parked(db):
                tickets: list[Ticket[Any]] = [
                    db.enqueue(good),
                    db.enqueue(bad),
                    db.enqueue(lambda tx: tx.execute("INSERT OR ROLLBACK INTO t VALUES (1)") and None),
                ]
            errors = [ticket.exception(DEADLINE) for ticket in tickets]
            db.flush()
            assert [told.count(ticket) for ticket in tickets] == [1, 1, 1]
            other.execute("ROLLBACK")
            assert [type(error) for error in errors] == [
                sqlite3.OperationalError,
                sqlite3.OperationalError,  # it is run again too, and cannot be
                sqlite3.IntegrityError,
            ]
            db.run(INSERT, (3,))
            assert rows(db) == [1, 3]


def test_each_job_of_a_batch_has_its_own_callbacks(path: Path) -> None:
    told: list[str] = []

    def job(n: int) -> Callable[[Transaction], None]:
        def function(tx: Transaction) -> None:
            tx.on_commit(lambda: told.append(f"{n} committed"))
            tx.on_rollback(lambda: told.append(f"{n} rolled back"))
            tx.execute(INSERT, (n % 3,))

        return function

    with DbWriter(path, on_error=lambda ticket: None) as db:
        db.run("CREATE TABLE t (n UNIQUE)")
        with parked(db):
            for n in range(5):
                db.enqueue(job(n))
        db.flush(DEADLINE)
        db.run("SELECT 1")
    assert told == ["0 committed", "1 committed", "2 committed", "3 rolled back", "4 rolled back"]


def test_a_job_that_had_failed_before_its_batch_was_undone_and_the_one_that_undid_it_are_told_once(path: Path) -> None:
    told: list[str] = []

    def fail(tx: Transaction) -> None:
        tx.on_rollback(lambda: told.append("failed"))
        raise ZeroDivisionError

    def undo_all(tx: Transaction) -> None:
        tx.on_rollback(lambda: told.append("has undone all"))
        tx.execute("INSERT OR ROLLBACK INTO t VALUES (1)")

    with DbWriter(path, on_error=lambda ticket: None) as db:
        db.run("CREATE TABLE t (n UNIQUE)")
        db.run(INSERT, (1,))
        with parked(db):
            tickets: list[Ticket[Any]] = [
                db.enqueue(fail),
                db.enqueue(INSERT, (1,)),
                db.enqueue(INSERT, (2,)),
                db.enqueue(undo_all),
            ]
        errors = [type(ticket.exception(DEADLINE)) for ticket in tickets]
        assert errors == [ZeroDivisionError, sqlite3.IntegrityError, type(None), sqlite3.IntegrityError]
        db.flush(DEADLINE)
        assert told == ["failed", "has undone all"]
        assert db.read("SELECT n FROM t ORDER BY n") == [(1,), (2,)]


def test_a_job_whose_file_has_gone_is_rolled_back_and_its_callbacks_are_called(path: Path) -> None:
    called = threading.Event()

    def job(tx: Transaction) -> None:
        tx.on_rollback(called.set)
        path.rename(path.with_name("elsewhere.db"))
        file_of(db).look_again_at = 0.0  # the next look is due

    with DbWriter(path) as db:
        with pytest.raises(WriterBrokenError):
            db.run(job)
        assert db.health.startswith("broken")
        assert called.wait(DEADLINE)


@pytest.fixture
def damaged_file(tmp_path: Path) -> Path:
    """Another database, whose table ``o`` is damaged."""
    other = tmp_path / "damaged.db"
    with contextlib.closing(sqlite3.connect(other)) as connection:
        connection.execute("CREATE TABLE o (x)")
        connection.executemany("INSERT INTO o VALUES (?)", [("x" * 500,)] * 200)
        connection.commit()
    with other.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * 40_000)
    return other


def test_damage_of_another_database_that_a_function_meets_is_not_told_of_this_one(
    table_db: DbWriter, damaged_file: Path
) -> None:
    def read(_: object) -> None:
        with contextlib.closing(sqlite3.connect(damaged_file)) as connection:
            connection.execute("SELECT * FROM o").fetchall()

    def in_a_block() -> None:
        with table_db.transaction():
            read(None)

    def in_a_reader() -> None:
        with table_db.reader():
            read(None)

    calls: list[Callable[[], object]] = [
        lambda: table_db.run(read),
        lambda: table_db.read(read),
        in_a_block,
        in_a_reader,
    ]
    for call in calls:
        with pytest.raises(sqlite3.DatabaseError, match="malformed"):
            call()
    assert table_db.health == "ok"


def test_a_statement_with_parameters_that_fails_as_it_runs_fails_alone(new_db: DbWriter) -> None:
    db = new_db
    db.run("CREATE TABLE t (n)")
    with parked(db):
        first = db.enqueue(INSERT, (1,))
        failing = db.enqueue("INSERT INTO t VALUES (abs(?))", (-(2**63),))
        last = db.enqueue(INSERT, (2,))
    assert (first.result(DEADLINE).rowcount, last.result(DEADLINE).rowcount) == (1, 1)
    with pytest.raises(sqlite3.OperationalError, match="integer overflow"):
        failing.result(DEADLINE)
    assert rows(db) == [1, 2]


def test_each_function_of_a_batch_has_a_savepoint_of_its_own_which_one_that_is_alone_leaves_to_commit(
    db: DbWriter,
) -> None:
    """What it would be undone to would be another's as well; and SQLite keeps the pages of all that are open."""

    def fail(tx: Transaction) -> None:
        tx.execute(INSERT, (-1,))
        raise LookupError

    db.run(TABLE)
    seen, mark = list[str](), session_of(db).guard.mark
    session_of(db).connection.set_trace_callback(seen.append)
    with parked(db):
        tickets = [db.enqueue(function) for function in (inserting(1), fail, inserting(2))]
    assert [ticket.exception(DEADLINE) is None for ticket in tickets] == [True, False, True]
    session_of(db).connection.set_trace_callback(None)
    begun, ended = "SAVEPOINT x_0", "RELEASE x_0"
    assert [text.partition(" /*")[0].replace(mark, "x") for text in seen if mark in text] == [
        begun,  # of what parks the writer, alone
        *[begun, ended, begun, "ROLLBACK TO x_0", ended, begun, ended],
    ]
    assert rows(db) == [1, 2]


# Several databases in one transaction: in WAL mode each commits for itself --------------------------------------------

LARGE = b"x" * 500_000
WRITES_BOTH = "INSERT INTO other.t VALUES (?)"


@pytest.fixture
def two_files(path: Path) -> Iterator[tuple[DbWriter, Path]]:
    """A gateway with an attached file, both in WAL mode."""
    other = path.with_name("other.db")
    for file in (path, other):
        with DbWriter(file) as db:
            db.run(TABLE)
    with DbWriter(path, on_connect=attaching(other)) as db:
        yield db, other


def write_both(tx: Transaction, content: object = LARGE) -> None:
    tx.execute(INSERT, (2,))
    tx.execute(WRITES_BOTH, (content,))


def by_function(db: DbWriter, fill_up: Callable[[], None]) -> None:
    def job(tx: Transaction) -> None:
        write_both(tx)
        fill_up()

    db.run(job)


def by_block(db: DbWriter, fill_up: Callable[[], None], max_hold: float | None = None) -> None:
    with db.transaction(max_hold=max_hold) as tx:
        write_both(tx)
        fill_up()


def by_block_of_the_writer(db: DbWriter, fill_up: Callable[[], None]) -> None:
    by_block(db, fill_up, max_hold=DEADLINE)


def by_blob(db: DbWriter, fill_up: Callable[[], None]) -> None:
    """SQLite asks nobody whether a blob may be written."""

    def job(tx: Transaction) -> None:
        tx.execute(INSERT, (2,))
        with tx.connection.blobopen("t", "n", 1, name="other") as blob:
            blob.write(b"y" * len(LARGE))
        fill_up()

    db.run("INSERT INTO other.t VALUES (?)", (LARGE,))
    db.checkpoint()
    by_main_alone(db)
    db.run(job)


def by_schema(db: DbWriter, fill_up: Callable[[], None]) -> None:
    def job(tx: Transaction) -> None:
        tx.execute(INSERT, (2,))
        tx.execute("REINDEX other.i")
        fill_up()

    db.run_script("CREATE INDEX other.i ON t (n)")
    db.run("INSERT INTO other.t VALUES (?)", (LARGE,))
    db.checkpoint()
    by_main_alone(db)
    db.run(job)


def by_pragma(db: DbWriter, fill_up: Callable[[], None]) -> None:
    def job(tx: Transaction) -> None:
        tx.execute(INSERT, (2,))
        tx.execute("PRAGMA other.user_version = 1")
        fill_up()

    db.run("INSERT INTO other.t VALUES (?)", (LARGE,))  # so its log has no room
    by_main_alone(db)
    db.run(job)


def by_analyze(db: DbWriter, fill_up: Callable[[], None]) -> None:
    """Of the statistics that are there already SQLite asks nobody."""

    def job(tx: Transaction) -> None:
        tx.execute(INSERT, (2,))
        tx.execute("ANALYZE other")
        fill_up()

    db.run_script("CREATE INDEX other.i ON t (n); ANALYZE other")
    db.run("INSERT INTO other.t VALUES (?)", (LARGE,))  # so its log has no room
    by_main_alone(db)
    db.run(job)


def by_main_alone(db: DbWriter) -> None:
    for _ in range(2):  # the first has SQLite ask anew about all that follows
        db.run("UPDATE t SET n = n")


def by_temp(db: DbWriter, fill_up: Callable[[], None]) -> None:
    """SQLite commits TEMP behind the main database."""

    def job(tx: Transaction) -> None:
        tx.execute(INSERT, (2,))
        tx.execute("PRAGMA temp.cache_size = 10")
        tx.execute("CREATE TEMP TABLE large (n)")
        tx.executemany("INSERT INTO large VALUES (?)", [(LARGE[:2000],) for _ in range(1000)])
        fill_up()

    db.run(job)


@pytest.mark.parametrize(
    "write",
    [by_function, by_block, by_block_of_the_writer, by_blob, by_schema, by_pragma, by_analyze, by_temp],
    ids=lambda way: way.__name__,
)
def test_a_commit_that_has_failed_in_the_second_database_is_not_undone_in_the_first(
    two_files: tuple[DbWriter, Path], write: Callable[[DbWriter, Callable[[], None]], None]
) -> None:
    db, other = two_files
    with full_disk(100_000) as fill_up, pytest.raises(CommitUnknownError, match="some of the databases") as failed:
        write(db, fill_up)
    assert isinstance(failed.value.__cause__, sqlite3.OperationalError)
    assert (rows(db), db.health) == ([2], "ok")
    db.run(INSERT, (3,))
    assert rows_in(other) in ([], [LARGE])
    assert rows(db) == [2, 3]


def test_nothing_runs_again_that_may_be_in_one_of_the_databases(two_files: tuple[DbWriter, Path]) -> None:
    db, _ = two_files
    for first in (1, 11):  # the second time all texts are known
        with full_disk(100_000) as fill_up:
            with parked(db):
                tickets: list[Ticket[Any]] = [
                    db.enqueue(INSERT, (first,)),
                    db.enqueue("INSERT INTO nothing VALUES (1)"),
                ]
                tickets.append(db.enqueue(WRITES_BOTH, (LARGE,)))
                tickets.append(db.enqueue(lambda tx: fill_up()))
                tickets.append(db.enqueue(INSERT, (first + 1,)))
            errors = [type(ticket.exception(DEADLINE)) for ticket in tickets]
        unknown = CommitUnknownError
        assert errors == [unknown, sqlite3.OperationalError, unknown, unknown, unknown]
        assert db.run("SELECT count(*) FROM t WHERE n = ?", (first,)).rows == [(1,)]
        by_main_alone(db)
    assert rows(db) == [1, 2, 11, 12]
    assert db.stats().run_twice == 0


def ask(tx: Transaction) -> None:
    tx.connection.blobopen("n", "n", 1, readonly=True, name="other").close()
    tx.connection.blobopen("n", "n", 1, name="MAIN").close()
    tx.execute("PRAGMA temp.table_info(t)")
    tx.execute("PRAGMA other.user_version")


def test_where_one_database_was_written_a_failed_commit_is_undone(two_files: tuple[DbWriter, Path]) -> None:
    db, other = two_files
    db.run(lambda tx: write_both(tx, 0))
    for name in ("main", "other"):
        db.run_script(f"CREATE TABLE {name}.n (n); INSERT INTO {name}.n VALUES ('text')")
    db.run(INSERT, (LARGE,))
    db.checkpoint()
    with full_disk(100_000) as fill_up:
        with parked(db):
            small, failed = db.enqueue(INSERT, (3,)), db.enqueue(INSERT, (LARGE,))
            db.enqueue(ask)
            fill_up()
        assert isinstance(failed.exception(DEADLINE), sqlite3.OperationalError)
        assert small.exception(DEADLINE) is None
    assert rows(db) == [2, LARGE, 3]
    assert rows_in(other) == [0]


def test_a_commit_of_several_databases_that_comes_before_the_first_is_undone(two_files: tuple[DbWriter, Path]) -> None:
    db, other = two_files
    db.run_script(KEYS.replace("pid REFERENCES p (id)", "pid REFERENCES p (id) DEFERRABLE INITIALLY DEFERRED"))

    def job(tx: Transaction) -> None:
        write_both(tx)
        tx.execute("INSERT INTO c VALUES (1)")

    with pytest.raises(sqlite3.IntegrityError):
        db.run(job)
    assert (rows(db), rows_in(other)) == ([], [])


@pytest.mark.parametrize(
    ("code", "written", "in_transaction", "expected"),
    [
        (sqlite3.SQLITE_FULL, {"main", "other"}, False, True),
        (sqlite3.SQLITE_FULL, {"main", "temp"}, False, True),
        (sqlite3.SQLITE_FULL, {"main"}, False, False),
        (sqlite3.SQLITE_FULL, {"temp", "unlogged"}, False, False),  # SQLite's super-journal
        (sqlite3.SQLITE_FULL, {"main", "other"}, True, False),
        (sqlite3.SQLITE_BUSY, {"main", "unlogged"}, True, False),
        (sqlite3.SQLITE_ERROR, {"main", "other"}, False, False),  # it was rolled back before
        (sqlite3.SQLITE_FULL, {"main", "scratch"}, False, False),  # in memory
        (sqlite3.SQLITE_FULL, {"MAIN", "main"}, False, False),  # one, as blobopen was called
        (sqlite3.SQLITE_FULL, {"MAIN", "Other"}, False, True),
    ],
)
def test_which_commits_may_be_in_part(
    two_files: tuple[DbWriter, Path],
    code: int,
    written: set[str],
    in_transaction: bool,
    expected: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    session = session_of(two_files[0])
    session.files |= {"unlogged": "file", "scratch": ""}
    monkeypatch.setattr(session, "find_logs", lambda: {"main": "file", "other": "file"})
    session.guard.written = written
    assert may_be_in_part(error_with(code), in_transaction, session) is expected


def test_damage_that_a_commit_of_several_databases_meets_is_noted(two_files: tuple[DbWriter, Path]) -> None:
    db, _ = two_files
    session = session_of(db)

    def damaged() -> None:
        session.internal("ROLLBACK")
        error = sqlite3.DatabaseError("database disk image is malformed")
        error.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
        raise error

    control: Any = session.control
    control["COMMIT"] = damaged
    with pytest.raises(CommitUnknownError, match="malformed"):
        db.run(lambda tx: write_both(tx, 0))
    assert db.health.startswith("degraded: database disk image is malformed")


@pytest.mark.parametrize(
    ("sql", "written"),
    [
        ("PRAGMA other.incremental_vacuum", {"other"}),
        ("PRAGMA incremental_vacuum(3)", {"main"}),
        ("PRAGMA other.user_version", set()),
        ("PRAGMA other.user_version = 2", {"other"}),
        ("PRAGMA other.table_info(t)", set()),
        ("DROP TABLE other.t", {"other"}),
        ("CREATE TEMP TABLE x (n)", {"temp"}),
        ("SELECT * FROM t, other.t", set()),
    ],
)
def test_which_databases_a_statement_writes(two_files: tuple[DbWriter, Path], sql: str, written: set[str]) -> None:
    db, _ = two_files

    def job(tx: Transaction) -> set[str]:
        tx.execute(sql)
        return session_of(db).guard.written

    assert db.run(job) == written


def test_a_file_that_was_switched_to_wal_meanwhile_commits_for_itself(path: Path) -> None:
    other = path.with_name("other.db")
    for file in (path, other):
        with DbWriter(file, journal_mode="DELETE") as db:
            db.run(TABLE)
    with DbWriter(path, journal_mode="DELETE", on_connect=attaching(other)) as db:
        for file in (path, other):
            with contextlib.closing(sqlite3.connect(file)) as connection:
                assert connection.execute("PRAGMA journal_mode = WAL").fetchone() == ("wal",)
                connection.execute("SELECT * FROM t").fetchall()
        with full_disk(100_000) as fill_up, pytest.raises(CommitUnknownError, match="some of the databases"):
            by_function(db, fill_up)
        assert rows(db) == [2]


def test_where_nothing_can_be_asked_any_more_it_may_be_in_part(
    two_files: tuple[DbWriter, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    session = session_of(two_files[0])
    session.guard.written = {"main", "other"}
    monkeypatch.setattr(session, "find_logs", raising(sqlite3.OperationalError))
    assert may_be_in_part(error_with(sqlite3.SQLITE_FULL), False, session)
