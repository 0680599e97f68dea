"""Transaction: the guarded loan of the write connection."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from onewriter.errors import ReentrantWriteError, TransactionAbortedError, TransactionClosedError
from onewriter.guard import Guard, Mode
from onewriter.statement import Executor, Parameters, Result, capture, capture_many, check_many, split_script

if TYPE_CHECKING:
    from onewriter.job import Job


class WriteSession:
    """The open write connection with its guard and executor; reopened, it is a new session.

    Threads: belongs to the thread that holds the writer.
    """

    def __init__(self, connection: sqlite3.Connection, guard: Guard) -> None:
        self.connection = connection
        self.guard = guard
        self.executor = Executor(connection)
        names = [row[1] for row in self.own("PRAGMA database_list")]
        self.databases = [name.replace('"', '""') for name in names if name != "temp"]

    def own(self, sql: str) -> list[Any]:
        """Run a statement of the gateway's own, which no job's text can stand for."""
        mode, self.guard.mode = self.guard.mode, Mode.GATEWAY
        try:
            cursor = sqlite3.Connection.execute(self.connection, self.guard.own(sql))
            try:
                cursor.row_factory = None
                return cursor.fetchall()
            finally:
                cursor.close()
        finally:
            self.guard.mode = mode


class Transaction:
    """What a job's function gets: statements of one transaction, committed or rolled back as a whole.

    Use it in the function only, and in its thread: later, or elsewhere, every use raises ``TransactionClosedError``.
    """

    def __init__(self, session: WriteSession, job: Job[Any]) -> None:
        self.thread = threading.get_ident()
        self._session = session
        self._job = job
        self._open = True
        self._inside = False  # a statement is being run: code it calls back must not use the connection
        self._depth = 0
        self._after_commit: list[Callable[[], object]] = []
        self._after_rollback: list[Callable[[], object]] = []
        self._undone: list[Callable[[], object]] = []  # on_rollback of savepoints that were rolled back

    @property
    def label(self) -> str:
        """The job's label."""
        return self._job.label

    def execute(self, sql: str, params: Any = (), /) -> Result:
        """Run one statement and return all its rows.

        Raises:
            sqlite3.Error: what SQLite raised; unless it is caught, the job is rolled back.
            TransactionAbortedError: SQLite rolled back by itself earlier on. Rolled back.
            TransactionClosedError: the transaction has ended, or belongs to another thread.
        """
        return self.statement(check_sql(sql), capture(params))

    def executemany(self, sql: str, seq_of_params: Iterable[Any], /) -> Result:
        """Run one statement for each row of parameters; ``rowcount`` is that of all. RETURNING is refused."""
        rows = capture_many(seq_of_params)
        check_many(check_sql(sql))
        return self.statement_many(sql, rows)

    def executescript(self, sql: str, /) -> None:
        """Run many statements, all or none of them, and without a hidden COMMIT."""
        check_sql(sql)
        with self.savepoint():
            self.script(sql)

    @contextlib.contextmanager
    def savepoint(self) -> Iterator[None]:
        """A part of the transaction that is undone alone if the ``with`` block raises."""
        depth = self._depth + 1
        name = f"onewriter_{depth}"
        marks = len(self._after_commit), len(self._after_rollback)
        self._own(f"SAVEPOINT {name}")
        self._depth = depth
        try:
            yield
        except BaseException:
            self._depth = depth - 1
            self._forget_since(marks)
            if self._open and self._session.connection.in_transaction:
                self._own(f"ROLLBACK TO {name}")
                self._own(f"RELEASE {name}")
            raise
        self._depth = depth - 1
        self._own(f"RELEASE {name}")

    def on_commit(self, fn: Callable[[], object], /) -> None:
        """Call ``fn()`` once, after COMMIT, when the lock is free. Not if the transaction is rolled back."""
        self._check()
        self._after_commit.append(_callable(fn))

    def on_rollback(self, fn: Callable[[], object], /) -> None:
        """Call ``fn()`` once, after the transaction, if this part of it was rolled back."""
        self._check()
        self._after_rollback.append(_callable(fn))

    # What follows is for the gateway: parameters were checked and captured already.

    def statement(self, sql: str, parameters: Parameters) -> Result:
        with self._statement():
            return self._session.executor.execute(sql, parameters)

    def statement_many(self, sql: str, rows: list[Parameters]) -> Result:
        with self._statement():
            return self._session.executor.execute_many(sql, rows)

    def script(self, sql: str) -> None:
        for statement in split_script(sql):
            self.statement(statement, ())

    def query(self, sql: str, parameters: Parameters, fetch: Callable[[sqlite3.Cursor], Any]) -> Any:
        """Run a statement that must not write, and see what the transaction has written."""
        self._own("PRAGMA query_only=1")
        try:
            with self._statement():
                cursor = sqlite3.Connection.execute(self._session.connection, sql, parameters)
                try:
                    return fetch(cursor)
                finally:
                    cursor.close()
        finally:
            self._session.own("PRAGMA query_only=0")

    def end(self) -> None:
        self._open = False

    def callbacks(self, committed: bool) -> list[Callable[[], object]]:
        return self._undone + (self._after_commit if committed else self._after_rollback)

    @contextlib.contextmanager
    def _statement(self) -> Iterator[None]:
        self._check()
        guard = self._session.guard
        guard.refusal = None
        self._inside = True
        try:
            yield
        except sqlite3.DatabaseError as error:
            if guard.refusal is not None:
                error.add_note(f"onewriter: {guard.refusal}")
            raise
        finally:
            self._inside = False

    def _own(self, sql: str) -> None:
        self._check()
        self._session.own(sql)

    def _check(self) -> None:
        if not self._open:
            raise TransactionClosedError(f"the transaction of job {self._job.describe()} has ended")
        if self.thread != threading.get_ident():
            raise TransactionClosedError(f"the transaction of job {self._job.describe()} belongs to another thread")
        if self._inside:
            raise ReentrantWriteError(
                "a function that SQLite calls while it runs a statement cannot use the connection of that statement"
            )
        if self._job.in_transaction and not self._session.connection.in_transaction:
            # Without this look the statements that follow would be committed one by one.
            raise TransactionAbortedError(
                f"SQLite has rolled back the transaction of job {self._job.describe()} (OR ROLLBACK, RAISE(ROLLBACK), "
                "a full disk, an interrupt): let the error that it raised end the job"
            )

    def _forget_since(self, marks: tuple[int, int]) -> None:
        commits, rollbacks = marks
        del self._after_commit[commits:]
        self._undone += self._after_rollback[rollbacks:]
        del self._after_rollback[rollbacks:]


def check_sql(sql: object) -> str:
    if not isinstance(sql, str):
        raise TypeError(f"the SQL must be a str, not {type(sql).__name__}")
    return sql


def _callable(fn: Callable[[], object]) -> Callable[[], object]:
    if not callable(fn):
        raise TypeError(f"the callback must be callable, not {type(fn).__name__}")
    return fn
