"""Transaction: the guarded loan of the write connection."""

from __future__ import annotations

import contextlib
import functools
import math
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator
from threading import get_ident
from time import monotonic
from typing import TYPE_CHECKING, Any, TypeVar

from onewriter.connection import database_names, decode
from onewriter.errors import (
    ForkedError,
    ReadTimeoutError,
    ReentrantWriteError,
    TransactionAbortedError,
    TransactionClosedError,
)
from onewriter.fork import forked_error
from onewriter.guard import Guard, Mode, explain_readonly
from onewriter.holder import IN_STATEMENT, INHERITED
from onewriter.job import check_callback
from onewriter.lent import LentConnection
from onewriter.retry import is_interrupted
from onewriter.statement import (
    Executor,
    Parameters,
    Result,
    capture,
    capture_many,
    check_many,
    describe_sql,
    split_script,
    words_of,
)
from onewriter.watch import Watch

if TYPE_CHECKING:
    from onewriter.job import Job

T = TypeVar("T")
Callback = Callable[[], object]

STEPS = 1000  # of SQLite's virtual machine between two looks at the clock, where a max_hold is set
ENDED = "has ended"
TOO_LONG = "has held the writer longer than max_hold"
NUDGE = 0.005  # seconds between two interrupts of a statement whose loan is over


class WriteSession:
    """The open write connection with its guard and executor; reopened, it is a new session.

    Threads: belongs to the thread that holds the writer.
    """

    def __init__(self, connection: sqlite3.Connection, guard: Guard) -> None:
        self.connection = connection
        self.guard = guard
        self.executor = Executor(connection)
        self._cursor = sqlite3.Connection.cursor(connection)
        self._cursor.row_factory = None
        self._texts: dict[str, str] = {}  # of the gateway's own statements
        self.row_factory, self.text_factory = connection.row_factory, connection.text_factory
        self.lock = threading.Lock()  # held around every call into SQLite of a Transaction
        self._mark, self._release, self._undo = (  # around a job
            guard.own(f"{verb} {guard.mark}_0") for verb in ("SAVEPOINT", "RELEASE", "ROLLBACK TO")
        )
        self.page_size: int = self.own("PRAGMA page_size")[0][0]
        self.databases = database_names(connection)

    def own(self, sql: str) -> list[Any]:
        """Run a statement of the gateway's own, which no job's text can stand for."""
        text = self._texts.get(sql)
        if text is None:
            text = self._texts[sql] = self.guard.own(sql)
        guard, cursor, connection = self.guard, self._cursor, self.connection
        mode, guard.mode = guard.mode, Mode.GATEWAY
        factory, connection.text_factory = connection.text_factory, decode  # not the user's
        try:
            cursor.execute(text)
            return cursor.fetchall()
        finally:
            guard.mode, connection.text_factory = mode, factory

    def forget_error(self) -> None:
        """Of a failed statement: sqlite3 would raise it again for the next one whose parameters cannot be bound."""
        self.own("SELECT 1")

    def words_in_schema(self, *words: str) -> set[str]:
        """The words, not in names, strings or comments, of what has one of these in the schemas of all databases."""
        found: set[str] = set()
        for name in (*self.databases, "temp"):
            # Not by LIKE, which on_connect may have replaced.
            for (text,) in self.own(f'SELECT sql FROM "{name}".sqlite_schema WHERE sql IS NOT NULL'):
                upper = text.upper()
                if any(word in upper for word in words):
                    found |= words_of(text)
        return found

    # These three are the gateway's own too; between two calls of a job the guard's mode is the gateway's.

    def set_mark(self) -> None:
        self._cursor.execute(self._mark)

    def release_mark(self) -> None:
        self._cursor.execute(self._release)

    def undo_to_mark(self) -> None:
        self._cursor.execute(self._undo)

    def restore_factories(self) -> None:
        self.connection.row_factory, self.connection.text_factory = self.row_factory, self.text_factory


class Transaction:
    """What a job's function and a ``with`` block get: statements of one transaction, committed or undone as a whole.

    Use it in the function or block only, and in its thread: later, or elsewhere, every use raises
    ``TransactionClosedError``.

    States:  open → closed; ``_closed`` says why.
    Locks:   the session's lock is held around every call into SQLite, so that whoever ends the loan never enters SQLite
             beside one.
    """

    # Most jobs use none of these, and there is a Transaction for each job. What nested blocks share, the root has.
    borrower: threading.Thread | None = None
    _closed: str | None = None
    _lent: LentConnection | None = None
    _factories: tuple[Any, Any] = (None, None)  # when it was lent
    _inside = False  # a call is under way: code that SQLite calls back must not use the connection
    _until = math.inf
    _read_until: float | None = None  # while nothing may be written
    _ends_readonly = False
    _watch: Watch | None = None
    _marks: tuple[tuple[int, int], ...] = ()  # of the open savepoints: how many callbacks there were at the beginning
    _traced = False
    _after_commit: list[Callback] = []  # noqa: RUF012 - never changed; a longer list takes its place
    _after_rollback: list[Callback] = []  # noqa: RUF012
    _undone: list[Callback] = []  # noqa: RUF012 - on_rollback of savepoints that were rolled back
    has_callbacks = False

    def __init__(self, session: WriteSession, job: Job[Any], outer: Transaction | None = None) -> None:
        self.job = job
        self.thread = get_ident()
        self._session = session
        self._root: Transaction = outer._root if outer else self

    @property
    def label(self) -> str:
        """The job's label."""
        return self.job.label

    @property
    def was_too_long(self) -> bool:
        """Whether a statement was refused or ended because of ``max_hold``."""
        return self._closed == TOO_LONG

    @property
    def is_reading(self) -> bool:
        return self._root._read_until is not None

    @property
    def depth(self) -> int:
        """How many savepoints of the gateway are open."""
        return len(self._root._marks)

    @property
    def connection(self) -> sqlite3.Connection:
        """A ``sqlite3.Connection`` on this transaction, for libraries that want one.

        ``commit``, ``close`` and ``with`` do nothing on it; ``rollback`` undoes what this job or block has done so far;
        BEGIN, COMMIT, ROLLBACK and ATTACH are refused; SAVEPOINT works. It ends with the transaction.
        """
        self._check()
        if self._lent is None:
            self._factories = self._session.connection.row_factory, self._session.connection.text_factory
            self._lent = LentConnection(_WriteLoan(self, self._session))
        return self._lent

    def execute(self, sql: str, params: Any = (), /) -> Result:
        """Run one statement and return all its rows.

        Raises:
            sqlite3.Error: what SQLite raised; unless it is caught, the transaction is rolled back.
            TransactionAbortedError: SQLite rolled back by itself earlier on. Rolled back.
            TransactionClosedError: the transaction has ended, or belongs to another thread.
        """
        if type(params) is not tuple:  # which needs no copy: it is bound now
            params = capture(params)
        return self.call(self._session.executor.execute, check_sql(sql), params)

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
        root, outer = self._root, self._root._marks
        name = f"{self._session.guard.mark}_{len(outer) + 1}"
        mark = len(root._after_commit), len(root._after_rollback)
        self._own(f"SAVEPOINT {name}")
        root._marks = (*outer, mark)
        try:
            yield
            if not self._is_marked(len(outer), mark):
                raise TransactionClosedError("this savepoint ended with the one around it")
        except BaseException:
            if self._is_marked(len(outer), mark):
                root._marks = outer
                self._forget_since(mark)
                if self._closed is None and root._closed is None and self._session.connection.in_transaction:
                    self._own(f"ROLLBACK TO {name}")
                    self._own(f"RELEASE {name}")
            raise
        root._marks = outer
        self._own(f"RELEASE {name}")

    def _is_marked(self, depth: int, mark: tuple[int, int]) -> bool:
        """Whether that savepoint is still open there."""
        marks = self._root._marks
        return len(marks) > depth and marks[depth] is mark

    def on_commit(self, fn: Callback, /) -> None:
        """Call ``fn()`` once, after COMMIT, when the lock is free. Not if the transaction is rolled back."""
        self._check()
        self._root._keep_callback("_after_commit", fn)

    def on_rollback(self, fn: Callback, /) -> None:
        """Call ``fn()`` once, after the transaction, if this part of it was rolled back."""
        self._check()
        self._root._keep_callback("_after_rollback", fn)

    def _keep_callback(self, which: str, fn: Callback) -> None:
        check_callback("the callback", fn)
        if not self.has_callbacks:
            self.has_callbacks, self._after_commit, self._after_rollback = True, [], []
        getattr(self, which).append(fn)

    # What follows is for the gateway: parameters were checked and captured already.

    def statement(self, sql: str, parameters: Parameters) -> Result:
        return self.call(self._session.executor.execute, sql, parameters)

    def bare_statement(self, sql: str, parameters: Parameters) -> Result:
        mode = Mode.VACUUM if describe_sql(sql).verb == "VACUUM" else Mode.BARE
        return self.call(self._session.executor.execute, sql, parameters, mode=mode)

    def statement_many(self, sql: str, rows: list[Parameters]) -> Result:
        return self.call(self._session.executor.execute_many, sql, rows)

    def script(self, sql: str) -> None:
        for statement in split_script(sql):
            self.statement(statement, ())

    def query(self, sql: str, parameters: Parameters, fetch: Callable[[sqlite3.Cursor], T], until: float) -> T:
        """Run a statement that must not write, and see what the transaction has written."""
        with self.readonly(until):
            rows: T = self.call(self._query, sql, parameters, fetch)
            return rows

    def _query(self, sql: str, parameters: Parameters, fetch: Callable[[sqlite3.Cursor], T]) -> T:
        cursor = sqlite3.Connection.execute(self._session.connection, sql, parameters)
        try:
            return fetch(cursor)
        finally:
            cursor.close()

    @contextlib.contextmanager
    def readonly(self, until: float) -> Iterator[None]:
        """For the ``with`` block statements cannot write, and end at the time ``until``."""
        root = self._root
        outer, root._read_until = root._read_until, min(until, root._read_until or math.inf)
        try:
            if outer is None:
                root._ends_readonly = True
                self._own("PRAGMA query_only=1")
            self.call(self._watch_time, until)
            yield
        finally:
            root._read_until = outer
            if outer is None and self._is_usable():
                self._own("PRAGMA query_only=0")  # or else ``end`` does
                root._ends_readonly = False

    def nested(self) -> Transaction:
        """The same transaction as a nested block sees it: it has an end of its own."""
        return Transaction(self._session, self.job, outer=self)

    def call(self, function: Callable[..., T], *args: Any, mode: Mode = Mode.JOB) -> T:
        """Run one call into SQLite, if the loan still holds."""
        root, session = self._root, self._session
        guard = session.guard
        if self._closed is not None or root._closed is not None or root._inside or root.thread != get_ident():
            self._check_thread()
        with session.lock:
            # Looked at inside the lock: whoever takes the loan back closes it first, then waits for the lock.
            if (
                self._closed is not None
                or root._closed is not None
                or (root._watch is not None and root._until < monotonic())
            ):
                raise self.closed_error()
            if not session.connection.in_transaction and self.job.in_transaction:
                raise self.aborted_error()
            guard.refusal, guard.mode, root._inside = None, mode, True
            try:
                return function(*args)
            except sqlite3.Error as error:
                self._explain(error)
                raise
            finally:
                root._inside, guard.mode = False, Mode.GATEWAY

    def limit(self, seconds: float) -> None:
        """Have statements end ``seconds`` from now."""
        self._until = monotonic() + seconds
        self._watch_time(self._until)

    def _watch_time(self, until: float) -> None:
        if until != math.inf:
            self._root.watch()

    def watch(self) -> None:
        """Have statements end when the transaction is closed, too."""
        if self._watch is None:
            self._watch = Watch(self._is_late)
            self._watch.set_on(self._session.connection, STEPS)

    def close(self, why: str) -> None:
        """Refuse every further call. From any thread; one that is under way ends by ``watch`` or ``take_back``."""
        self._closed = self._closed or why

    def lend_to(self, thread: threading.Thread) -> None:
        self.thread, self.borrower = thread.ident or 0, thread

    def leave(self) -> None:
        """The block has ended: its thread is not inside it any more, though the writer has yet to commit."""
        self._closed = self._closed or ENDED
        self.thread = 0

    def end(self) -> None:
        """End the loan; no call is under way."""
        if self._lent is not None:
            self._lent.close_cursors()
            with self._session.lock:
                # What an outer part has set stays. If that was taken back, the connection is somebody else's by now.
                if self is self._root or self._root._closed is None:
                    self._session.connection.row_factory, self._session.connection.text_factory = self._factories
        if self._traced:
            self._session.connection.set_trace_callback(None)
        if self._ends_readonly:
            self._session.own("PRAGMA query_only=0")
        if self._watch is not None:
            self._session.connection.set_progress_handler(None, 0)
        self._closed = self._closed or ENDED

    def take_back(self, why: str) -> None:
        """End the loan although a call may be under way; returns when none is inside SQLite any more."""
        self._closed = why
        while not self._session.lock.acquire(timeout=NUDGE):
            self._session.connection.interrupt()
        self._session.lock.release()

    def callbacks(self, committed: bool) -> list[Callback]:
        return self._undone + (self._after_commit if committed else self._after_rollback)

    def undo(self) -> None:
        """Undo what this job, or its innermost nested part, has done so far; the transaction stays open."""
        root = self._root
        if root._marks:
            self._forget_since(root._marks[-1])
            self._own(f"ROLLBACK TO {self._session.guard.mark}_{len(root._marks)}")
        else:
            self._forget_since((0, 0))
            self.call(self._session.undo_to_mark, mode=Mode.GATEWAY)

    def overdue(self) -> TransactionClosedError | ForkedError | None:
        """The error of a block that has held the writer for too long, where no other thread takes it back."""
        if monotonic() > self._until and self._closed in (None, ENDED):
            self._closed = TOO_LONG
        return None if self._closed in (None, ENDED) else self.closed_error()

    def _own(self, sql: str) -> None:
        self.call(self._session.own, sql)

    def _is_late(self) -> bool:
        return self._closed is not None or monotonic() > min(self._until, self._read_until or math.inf)

    def _is_usable(self) -> bool:
        try:
            self._check()
        except (TransactionClosedError, TransactionAbortedError):
            return False
        return True

    def _check(self) -> None:
        """Raise what a use from here and now would raise."""
        self._check_thread()
        if not self._session.connection.in_transaction and self.job.in_transaction:
            raise self.aborted_error()

    def closed_error(self) -> TransactionClosedError | ForkedError:
        root = self._root
        if INHERITED in (self._closed, root._closed):
            return forked_error()
        if root._until < monotonic() and root._closed is None:
            root._closed = TOO_LONG
        why = self._closed or root._closed or ENDED
        return TransactionClosedError(f"the transaction of job {self.job.describe()} {why}")

    def aborted_error(self) -> TransactionAbortedError:
        # Without it, the statements that follow would be committed one by one.
        return TransactionAbortedError(
            f"SQLite has rolled back the transaction of job {self.job.describe()} (OR ROLLBACK, RAISE(ROLLBACK), "
            "a full disk, an interrupt): let the error that it raised end the job"
        )

    def _check_thread(self) -> None:
        root = self._root
        if self._closed is not None or root._closed is not None:
            raise self.closed_error()
        if root.thread != get_ident():
            raise TransactionClosedError(f"the transaction of job {self.job.describe()} belongs to another thread")
        if root._inside:
            raise ReentrantWriteError(IN_STATEMENT)

    def _explain(self, error: sqlite3.Error) -> None:
        self._session.guard.explain(error)
        root = self._root
        if root._read_until is not None:
            explain_readonly(error)
        if not is_interrupted(error):
            return
        if root._watch is not None:
            root._watch.raise_caught()
        now = monotonic()
        if root._closed is not None or now > root._until:
            raise self.closed_error() from error
        if root._read_until is not None and now > root._read_until:
            raise ReadTimeoutError(f"a read in job {self.job.describe()} did not end in time") from error

    def _forget_since(self, marks: tuple[int, int]) -> None:
        commits, rollbacks = marks
        root = self._root
        if root.has_callbacks:
            del root._after_commit[commits:]
            root._undone = root._undone + root._after_rollback[rollbacks:]
            del root._after_rollback[rollbacks:]


class _WriteLoan:
    """What ``tx.connection`` may do: as the transaction, and savepoints of its own besides."""

    def __init__(self, transaction: Transaction, session: WriteSession) -> None:
        self._transaction = transaction
        self._session = session
        self.connection = session.connection
        self.savepoint = transaction.savepoint

    def undo(self, end_cursors: Callable[[], None]) -> None:
        if not self._transaction.is_reading:  # what ends a read has nothing to undo
            end_cursors()
            self._transaction.undo()

    def outlasts(self, name: str) -> None:
        """Functions are the user's, and stay; who follows SQL would see that of other jobs."""
        self._transaction._traced |= name == "set_trace_callback"

    def call(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        self._session.executor.forget_rowid()
        return self._transaction.call(functools.partial(function, *args, **options), mode=Mode.LENT)


def check_sql(sql: object) -> str:
    if not isinstance(sql, str):
        raise TypeError(f"the SQL must be a str, not {type(sql).__name__}")
    return sql
