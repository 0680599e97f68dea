"""Transaction: the guarded loan of the write connection."""

from __future__ import annotations

import contextlib
import math
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator
from threading import get_ident
from time import monotonic
from typing import Any, NamedTuple, TypeVar

from onewriter.base.arguments import check_callback, check_sql
from onewriter.base.state import IN_STATEMENT, INHERITED
from onewriter.base.strict import CONNECTIONS_OWN, Elsewhere
from onewriter.errors import (
    ForkedError,
    OneWriterError,
    ReadTimeoutError,
    ReentrantWriteError,
    TransactionAbortedError,
    TransactionClosedError,
    forked_error,
)
from onewriter.sqlite.guard import Mode, explain_readonly
from onewriter.sqlite.lending import Lending
from onewriter.sqlite.lent import lend, retire
from onewriter.sqlite.parameters import capture, capture_many
from onewriter.sqlite.result import Result, refuse_live
from onewriter.sqlite.retry import is_interrupted
from onewriter.sqlite.statement import Parameters, check_many, describe_sql, script_parts
from onewriter.sqlite.watch import Watch
from onewriter.write.session import WriteSession
from onewriter.write.ticket import Job

T = TypeVar("T")
Callback = Callable[[], object]
STEPS = 1000  # of SQLite's virtual machine between two looks at the clock, where a max_hold is set
ENDED = "has ended"
TOO_LONG = "has held the writer longer than max_hold"
NUDGE = 0.005  # seconds between two interrupts of a statement whose loan is over
NONE: list[Any] = []
NO_FACTORIES = (None, None)


class Transaction:
    """What a job's function and a ``with`` block get: statements of one transaction, committed or undone as a whole.

    After the function or block every use raises ``TransactionClosedError``. That of a block may be used by any thread
    that has it, one call at a time; that of a function in this function only, and not by other threads.

    States:  open → closed; ``_closed`` says why.
    Locks:   the session's lock is held around every call into SQLite, so that there is one at a time, and whoever ends
             the loan never enters SQLite beside one. It guards _inside, _marks and the lists of callbacks.
    """

    # There is a Transaction for each job: no dict, and what is set on one by mistake is not lost without a word.
    __slots__ = (
        "__weakref__",
        "_after_commit",
        "_after_rollback",
        "_closed",
        "_ends_readonly",
        "_factories",
        "_inside",
        "_lending",
        "_marks",
        "_read_until",
        "_root",
        "_session",
        "_traced",
        "_undone",
        "_until",
        "_watch",
        "has_callbacks",
        "job",
        "lent",
        "thread",
    )
    row_factory, text_factory, isolation_level, autocommit = map(Elsewhere, CONNECTIONS_OWN)

    def __init__(self, session: WriteSession, job: Job[Any], outer: Transaction | None = None) -> None:
        self.job = job
        self.thread = get_ident()  # which alone may use it; 0: any
        self._session = session
        self._root: Transaction = outer._root if outer else self
        # Most jobs use none of these. What nested blocks share, the root has.
        self._closed: str | None = None
        self.lent: Lending | None = None
        self._factories: tuple[Any, Any] = NO_FACTORIES  # when it was lent
        self._inside = 0  # the thread whose call is under way: code that SQLite calls back must not use the connection
        self._until = math.inf
        self._read_until: float | None = None  # while a read is under way
        self._watch: Watch | None = None
        self._marks: tuple[Mark, ...] = ()  # the open savepoints
        self._traced = self._ends_readonly = self.has_callbacks = False
        # Never changed; a longer list takes its place. Lent are this and nested ones; undone are on_rollback of
        # savepoints that were rolled back.
        self._lending: list[Transaction] = NONE
        self._after_commit: list[Callback] = NONE
        self._after_rollback: list[Callback] = NONE
        self._undone: list[Callback] = NONE

    @property
    def label(self) -> str:
        """The job's label."""
        return self.job.label

    @property
    def was_too_long(self) -> bool:
        """Whether a statement was refused or ended because of ``max_hold``."""
        return self._closed == TOO_LONG

    @property
    def connection(self) -> sqlite3.Connection:
        """A ``sqlite3.Connection`` on this transaction, for libraries that want one.

        ``commit``, ``close`` and ``with`` do nothing on it; ``rollback`` undoes what this job or block has done so far;
        BEGIN, COMMIT, ROLLBACK and ATTACH are refused; SAVEPOINT works. It ends with the transaction.
        """
        self._check()
        if self.lent is None:
            Transaction.call(self, self._lend)
        lent = self.lent
        connection = None if lent is None else lent.connection
        if connection is None:  # it ends in this moment
            raise self.closed_error()
        return connection

    def _lend(self) -> None:
        if self.lent is None:
            connection, root = self._session.connection, self._root
            self._factories = connection.row_factory, connection.text_factory
            root._lending = [*root._lending, self]
            self.lent = lend(_WriteLoan(self, self._session))

    def execute(self, sql: str, params: Any = (), /) -> Result:
        """Run one statement and return all its rows.

        Raises:
            sqlite3.Error: what SQLite raised; unless it is caught, the transaction is rolled back.
            TransactionAbortedError: SQLite rolled back by itself earlier on. Rolled back.
            TransactionClosedError: the transaction has ended, or is that of a function, and this is another thread.
        """
        return self.call(self._session.executor.execute, check_sql(sql), capture(sql, params))

    def executemany(self, sql: str, seq_of_params: Iterable[Any], /) -> Result:
        """Run one statement for each row of parameters; ``rowcount`` is that of all. RETURNING is refused."""
        check_many(check_sql(sql))
        return self.statement_many(sql, capture_many(sql, seq_of_params))

    def executescript(self, sql: str, /) -> None:
        """Run many statements, all or none of them, and without a hidden COMMIT."""
        check_sql(sql)
        with self.part():
            self.script(sql)

    @contextlib.contextmanager
    def savepoint(self) -> Iterator[None]:
        """A part of the transaction that is undone alone if the ``with`` block raises."""
        scopes = self.job._state.scopes
        here, block = scopes.innermost(), scopes.innermost(writes=True)
        # Inside a reader() inside this transaction: from here on reads see the transaction again.
        is_inside = here is not block and isinstance(block, Transaction) and block._root is self._root
        scope = scopes.enter(self, writes=True) if is_inside else None
        try:
            with self.part():
                yield
        finally:
            if scope is not None:
                scopes.leave(scope)

    @contextlib.contextmanager
    def part(self) -> Iterator[None]:
        """The savepoint itself."""
        mark: Mark = self.call(self._begin_part)
        try:
            yield
        except BaseException:
            with contextlib.suppress(OneWriterError):  # it was undone with all
                self.call(self._undo_part, mark)
            raise
        self.call(self._end_part, mark)

    def _begin_part(self) -> Mark:
        root = self._root
        mark = Mark(len(root._marks), len(root._after_commit), len(root._after_rollback))
        self._session.internal(f"SAVEPOINT {self._name_of(mark.depth)}")
        root._marks = (*root._marks, mark)
        return mark

    def _end_part(self, mark: Mark) -> None:
        if not self._is_marked(mark):
            raise TransactionClosedError("this savepoint ended with the one around it")
        self._root._marks = self._root._marks[: mark.depth]
        self._session.internal(f"RELEASE {self._name_of(mark.depth)}")

    def _undo_part(self, mark: Mark) -> None:
        if self._is_marked(mark):
            self._root._marks = self._root._marks[: mark.depth]
            self._forget_since(mark)
            self._session.internal(f"ROLLBACK TO {self._name_of(mark.depth)}")
            self._session.internal(f"RELEASE {self._name_of(mark.depth)}")

    def _name_of(self, depth: int) -> str:
        return f"{self._session.guard.mark}_{depth + 1}"

    def _is_marked(self, mark: Mark) -> bool:
        """Whether that savepoint is still open there."""
        marks = self._root._marks
        return len(marks) > mark.depth and marks[mark.depth] is mark

    def on_commit(self, fn: Callback, /) -> None:
        """Call ``fn()`` once, after COMMIT, when the lock is free. Not if the transaction is rolled back."""
        self.call(self._root._keep_callback, "_after_commit", fn)

    def on_rollback(self, fn: Callback, /) -> None:
        """Call ``fn()`` once, after the transaction, if this part of it was rolled back."""
        self.call(self._root._keep_callback, "_after_rollback", fn)

    def keep_for_task(self, which: str, fn: Callback) -> None:
        """The same for a task, which cannot wait for a statement that another one runs, and may fail at once."""
        if self.is_closed:
            raise self.closed_error()
        with self.job._state.lock:
            self._root._keep_callback(which, fn)

    def _keep_callback(self, which: str, fn: Callback) -> None:
        check_callback("the callback", fn)
        if not self.has_callbacks:
            self.has_callbacks, self._after_commit, self._after_rollback = True, [], []
        getattr(self, which).append(fn)

    # What follows is for the gateway: parameters were checked and captured already.

    def statement(self, sql: str, parameters: Parameters) -> Result:
        return self.call(self._session.executor.execute, sql, parameters, mode=self.job.mode)

    def bare_statement(self, sql: str, parameters: Parameters) -> Result:
        mode = Mode.VACUUM if describe_sql(sql).verb == "VACUUM" else Mode.BARE
        return self.call(self._session.executor.execute, sql, parameters, mode=mode)

    def statement_many(self, sql: str, rows: list[Parameters]) -> Result:
        return self.call(self._session.executor.execute_many, sql, rows)

    def script(self, sql: str) -> None:
        for part in script_parts(sql):
            self.call(self._session.executor.execute_script, part)

    def query(self, sql: str, parameters: Parameters, fetch: Callable[[sqlite3.Cursor], T], until: float) -> T:
        """Run a statement that must not write, and see what the transaction has written."""
        with self.reading(until) as view:
            rows: T = view.call(view._query, sql, parameters, fetch)
            return rows

    def read_with(self, function: Callable[[sqlite3.Connection], T], until: float) -> T:
        """Call a function of the user's that must not write; what it calls is inside too."""
        with self.reading(until) as view, self.job._state.scopes.inside(view, writes=True):
            return refuse_live(function(view.connection))

    def _query(self, sql: str, parameters: Parameters, fetch: Callable[[sqlite3.Cursor], T]) -> T:
        cursor = sqlite3.Connection.execute(self._session.connection, sql, parameters)
        try:
            return fetch(cursor)
        finally:
            cursor.close()

    @contextlib.contextmanager
    def reading(self, until: float) -> Iterator[Reading]:
        """For the ``with`` block a view of the transaction that cannot write, and whose statements end at ``until``."""
        view = Reading(self._session, self.job, outer=self)
        view.until = min(until, getattr(self, "until", math.inf))
        try:
            yield view
        finally:
            view.end()

    @property
    def held_until(self) -> float:
        """When ``max_hold`` is over."""
        return self._root._until

    @property
    def is_closed(self) -> bool:
        return self._closed is not None or self._root._closed is not None

    @property
    def is_of_function(self) -> bool:
        """Whether it is for the thread that made it only."""
        return self._root.thread != 0

    @property
    def is_inside(self) -> bool:
        """Whether the calling thread is in a call of it, so that no other can begin."""
        return self._root._inside == get_ident()

    def lends(self) -> Transaction:
        """Where reads inside it go."""
        return self

    def nested(self) -> Transaction:
        """The same transaction as a nested block sees it: it has an end of its own."""
        return Transaction(self._session, self.job, outer=self)

    def call(self, function: Callable[..., T], *args: Any, mode: Mode = Mode.JOB) -> T:
        """Run one call into SQLite, if the loan still holds."""
        root, session = self._root, self._session
        guard = session.guard
        me = get_ident()
        if self._closed is not None or root._closed is not None or root._inside or (root.thread and root.thread != me):
            self._check_thread()
        with session.lock:
            root._inside = me  # before anything is called: a signal handler that uses it must not wait for its thread
            try:
                # Looked at inside the lock: whoever takes the loan back closes it first, then waits for the lock.
                if (
                    self._closed is not None
                    or root._closed is not None
                    or (root._watch is not None and root._until < monotonic())
                ):
                    raise self.closed_error()
                if not session.connection.in_transaction and self.job.in_transaction:
                    raise self.aborted_error()
                guard.refusal, guard.mode = None, mode
                return function(*args)
            except sqlite3.Error as error:
                self._explain(error)
                raise
            finally:
                root._inside, guard.mode = 0, Mode.GATEWAY

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

    def lend(self) -> None:
        """Let any thread use it."""
        self.thread = 0

    def end(self) -> None:
        """End the loan, and with it what was lent in nested parts. Waits for the call that is inside SQLite."""
        self._closed = self._closed or ENDED  # first, so that whoever comes behind this finds it inside the lock
        root, session = self._root, self._session
        if INHERITED in (self._closed, root._closed):
            return
        if self is not root:
            if self.lent is not None:
                self._refuse_inside()
                with session.lock:
                    self._put_back()
        elif session.lock.locked() or self._lending or self._ends_readonly or self._watch is not None:
            self._refuse_inside()
            with session.lock:
                while self._lending:
                    self._lending[-1]._put_back()
                if self._ends_readonly:
                    session.internal("PRAGMA query_only=0")
                if self._watch is not None:
                    session.connection.set_progress_handler(None, 0)

    def _refuse_inside(self) -> None:
        if self.is_inside:
            raise ReentrantWriteError(IN_STATEMENT)

    def _put_back(self) -> None:
        """End the connection that was lent, under the session's lock; again, or after the outer part's, nothing."""
        session, root = self._session, self._root
        root._lending = [part for part in root._lending if part is not self]
        if self.lent is None:
            return
        with session.interrupting:  # so that none comes later, and hits the next job
            retire(self)
        session.connection.row_factory, session.connection.text_factory = self._factories
        if self._traced:
            session.connection.set_trace_callback(None)

    def take_back(self, why: str) -> None:
        """End the loan although a call may be under way; returns when none is inside SQLite any more."""
        self._closed = why
        self.end_call()

    def end_call(self) -> None:
        """Closed, interrupt the call that is under way."""
        while not self._session.lock.acquire(timeout=NUDGE):
            self._session.connection.interrupt()
        self._session.lock.release()

    def wait_for_call(self, until: float) -> bool:
        """Closed, wait for the call that is under way; False if it is not over at the time ``until``."""
        seconds = max(0.0, min(until - monotonic(), threading.TIMEOUT_MAX))
        if not self._session.lock.acquire(timeout=seconds):
            return False
        self._session.lock.release()
        return True

    def callbacks(self, committed: bool) -> list[Callback]:
        return self._undone + (self._after_commit if committed else self._after_rollback)

    def undo(self) -> None:
        """Undo what this job, or its innermost nested part, has done so far; the transaction stays open."""
        self.call(self._undo, mode=Mode.GATEWAY)

    def _undo(self) -> None:
        marks = self._root._marks
        if marks:
            self._forget_since(marks[-1])
            self._session.internal(f"ROLLBACK TO {self._name_of(marks[-1].depth)}")
        else:
            self._forget_since(Mark(0, 0, 0))
            self._session.undo_to_mark()

    def overdue(self) -> TransactionClosedError | ForkedError | None:
        """The error of a block that has held the writer for too long, where no other thread takes it back."""
        if monotonic() > self._until and self._closed in (None, ENDED):
            self._closed = TOO_LONG
        return None if self._closed in (None, ENDED) else self.closed_error()

    def _is_late(self) -> bool:
        return self._closed is not None or monotonic() > min(self._until, self._read_until or math.inf)

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
        if root.thread and root.thread != get_ident():
            raise TransactionClosedError(
                f"the transaction of job {self.job.describe()} belongs to another thread: a function's is for that "
                "function only; that of a `with transaction()` block is for any thread"
            )
        if root._inside == get_ident():
            raise ReentrantWriteError(IN_STATEMENT)

    def _explain(self, error: sqlite3.Error) -> None:
        self._session.guard.explain(error)
        root = self._root
        if not is_interrupted(error):
            return
        if root._watch is not None:
            root._watch.raise_caught()
        if root._closed is not None or monotonic() > root._until:
            raise self.closed_error() from error

    def _forget_since(self, mark: Mark) -> None:
        root = self._root
        if root.has_callbacks:
            del root._after_commit[mark.after_commit :]
            root._undone = root._undone + root._after_rollback[mark.after_rollback :]
            del root._after_rollback[mark.after_rollback :]


class Mark(NamedTuple):
    """An open savepoint: how deep it is, and how many callbacks there were at its beginning."""

    depth: int
    after_commit: int
    after_rollback: int


class Reading(Transaction):
    """A transaction as a read in it sees it: no call can write, and each ends at the time ``until``.

    SQLite is told so for each call: between two of them another thread may write.
    """

    until = math.inf

    def call(self, function: Callable[..., T], *args: Any, mode: Mode = Mode.JOB) -> T:
        result: T = super().call(self._read, function, args, mode=mode)
        return result

    def _explain(self, error: sqlite3.Error) -> None:
        super()._explain(error)
        explain_readonly(error)
        if is_interrupted(error) and monotonic() > self.until:
            raise ReadTimeoutError(f"a read in job {self.job.describe()} did not end in time") from error

    def _read(self, function: Callable[..., T], args: tuple[Any, ...]) -> T:
        root, session = self._root, self._session
        if self.until != math.inf:
            root.watch()
        session.internal("PRAGMA query_only=1")
        root._ends_readonly, root._read_until = True, self.until
        try:
            return function(*args)
        finally:
            root._read_until = None
            with contextlib.suppress(sqlite3.Error):  # as where its time is over; or else ``end`` does it
                session.internal("PRAGMA query_only=0")
                root._ends_readonly = False


class _WriteLoan:
    """What ``tx.connection`` may do: as the transaction, and savepoints of its own besides."""

    def __init__(self, transaction: Transaction, session: WriteSession) -> None:
        self._transaction = transaction
        self._session = session
        self.connection = session.connection
        self.savepoint = transaction.part

    @property
    def is_over(self) -> bool:
        return self._transaction.is_closed

    def call(self, function: Callable[..., Any], /, *args: Any, **options: Any) -> Any:
        return self._transaction.call(self._run, function, args, options, mode=Mode.LENT)

    call_outside = call

    def _run(self, function: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        self._session.executor.forget_rowid()
        return function(*args, **options)

    def if_free(self, function: Callable[[], None]) -> None:
        lock, root = self._session.lock, self._transaction._root
        if not self.is_over and lock.acquire(blocking=False):
            try:
                root._inside = get_ident()  # as for any call: a signal handler must not wait for its thread
                function()
            finally:
                root._inside = 0
                lock.release()

    def interrupt(self) -> None:
        if self.is_over:
            raise self._transaction.closed_error()
        with self._session.interrupting:
            if self.is_over:
                raise self._transaction.closed_error()
            self.connection.interrupt()

    def undo(self, end_cursors: Callable[[], None]) -> None:
        if not isinstance(self._transaction, Reading):  # what ends a read has nothing to undo
            self.call(end_cursors)
            self._transaction.undo()

    def mark_dirty(self, name: str) -> None:
        """Functions are the user's, and stay; who follows SQL would see that of other jobs."""
        self._transaction._traced |= name == "set_trace_callback"
