"""WriteLoan: what a job, a block or a read in them may do on the write connection, and for how long."""

from __future__ import annotations

import math
import sqlite3
import threading
from collections.abc import Callable
from threading import get_ident
from time import monotonic
from typing import Any, TypeVar

from onewriter.base.state import IN_STATEMENT, INHERITED
from onewriter.base.waiting import call_if_free
from onewriter.errors import (
    ForkedError,
    ReentrantWriteError,
    TransactionAbortedError,
    TransactionClosedError,
    forked_error,
)
from onewriter.sqlite.guard import Mode
from onewriter.sqlite.parameters import PLAIN_TYPES, Params, capture
from onewriter.sqlite.result import Result
from onewriter.sqlite.retry import error_code, is_corrupt, is_interrupted
from onewriter.sqlite.statement import Parameters, describe_sql, script_parts
from onewriter.sqlite.time_limit import TimeLimit
from onewriter.write.connection_loan import ConnectionLoan
from onewriter.write.parts import Callback, Parts
from onewriter.write.session import WriteSession
from onewriter.write.ticket import Job

T = TypeVar("T")
STEPS = 1000  # of SQLite's virtual machine between two looks at the clock, where a max_hold is set
ENDED = "has ended"
TOO_LONG = "has held the writer longer than max_hold"
NUDGE = 0.005  # seconds between two interrupts of a statement whose loan is over
NONE: list[Any] = []


class WriteLoan:
    """The write connection, lent to one job; nested blocks and reads in it have one each, with an end of its own.

    States:  open → closed; ``_closed`` says why.
    Locks:   the session's lock is held around every call into SQLite, so that there is one at a time, and the thread
             that ends the loan never calls SQLite during one. It guards _inside, _lending and the parts.
    """

    can_write = True
    mode = Mode.GATEWAY  # of the guard, between two calls: others act on the connection there
    # Most jobs use none of these. What nested blocks share, the root has.
    parts: Parts | None = None
    _closed: str | None = None
    _lent: ConnectionLoan | None = None
    _inside = 0  # the thread whose call is under way: code that SQLite calls back must not use the connection
    _around: WriteLoan | None = None  # of a nested one: that of the whole transaction
    _named: Job[Any] | None = None  # of a nested one: what it is for
    _until = math.inf
    _read_until: float | None = None  # while a read is under way
    _time_limit: TimeLimit | None = None
    _ends_readonly = False
    _lending: list[WriteLoan] = NONE  # this and nested ones; never changed: a longer list takes its place

    def __init__(self, session: WriteSession, job: Job[Any], outer: WriteLoan | None = None) -> None:
        self.job = job
        self.session = session
        self.thread = get_ident()  # which alone may use it; 0: any
        self._around = outer and outer._root

    # Who may call, and when -------------------------------------------------------------------------------------------

    @property
    def _root(self) -> WriteLoan:
        return self._around or self  # not kept: what refers to itself waits for the garbage collector

    @property
    def is_closed(self) -> bool:
        return self._closed is not None or self._root._closed is not None

    @property
    def ended_well(self) -> bool:
        """Closed, whether it is committed, or may be yet."""
        return self._root._closed == ENDED and not self.job.is_undone

    @property
    def was_too_long(self) -> bool:
        """Whether a statement was refused or ended because of ``max_hold``."""
        return self._closed == TOO_LONG

    @property
    def is_overdue(self) -> bool:
        """Whether ``max_hold`` is over, and it was not revoked for that."""
        return monotonic() > self._until and self._closed in (None, ENDED)

    @property
    def held_until(self) -> float:
        """When ``max_hold`` is over."""
        return self._root._until

    @property
    def is_of_function(self) -> bool:
        """Whether it is for the thread that made it only."""
        return self._root.thread != 0

    @property
    def is_inside(self) -> bool:
        """Whether the calling thread is in a call of it, so that no other can begin."""
        return (self._around or self)._inside == get_ident()

    @property
    def label(self) -> str:
        return (self._named or self.job).label

    def lends(self) -> WriteLoan:
        """Where reads inside it go."""
        return self

    def nested(self, job: Job[Any]) -> WriteLoan:
        """The same transaction as ``job``, inside this one, sees it: it has an end of its own."""
        inner = WriteLoan(self.session, self.job, outer=self)
        inner._named = job
        return inner

    def call(self, function: Callable[..., T], *args: Any, mode: Mode = Mode.JOB) -> T:
        """Run one call into SQLite, if the loan still holds."""
        root, session = self._around or self, self.session
        guard, me = session.guard, get_ident()
        if self._closed is not None or root._closed is not None or root._inside or (root.thread and root.thread != me):
            self._check_thread()
        with session.lock:
            # Before anything is called: a signal handler that uses it must not wait for its thread.
            before, root._inside = guard.mode, me
            try:
                # Checked inside the lock: the thread that takes the loan back closes it first, then waits for the lock.
                if (
                    self._closed is not None
                    or root._closed is not None
                    or (root._time_limit is not None and root._until < monotonic())
                ):
                    raise self._refusal()
                if not session.connection.in_transaction and self.job.in_transaction:
                    raise self.aborted_error()
                guard.refusal, guard.mode = None, mode
                if root.parts is not None and root.parts.has_failed:
                    root.parts.undo_failed()
                return function(*args)
            except sqlite3.Error as error:
                self._explain(error)
                raise
            finally:
                root._inside, guard.mode = 0, before

    def call_inside(self, function: Callable[..., T], *args: Any, mode: Mode) -> T:
        """The same from code that SQLite calls in this thread, while the call around it goes on."""
        guard = self.session.guard
        if self.is_closed:
            raise self._refusal()
        if guard.is_deciding:  # a signal handler, in the midst of a statement's preparation
            raise ReentrantWriteError(IN_STATEMENT)
        if not self.session.connection.in_transaction:
            raise self.aborted_error()
        before, guard.mode = guard.mode, mode
        try:
            return function(*args)
        except sqlite3.Error as error:
            self._explain(error)
            raise
        finally:
            guard.mode = before

    def if_free(self, function: Callable[[], None]) -> None:
        """Call it under the lock, if that is free now."""
        if not (self.is_closed or self._root._inside):
            call_if_free(self.session.lock, lambda: self._call_free(function))

    def _call_free(self, function: Callable[[], None]) -> None:
        root = self._root  # before the ``try``: a signal handler may raise in a property
        try:
            root._inside = get_ident()  # as for any call
            function()
        finally:
            root._inside = 0

    def closed_error(self) -> TransactionClosedError | ForkedError:
        root = self._root
        if INHERITED in (self._closed, root._closed):
            return forked_error()
        why = self._closed or root._closed or (TOO_LONG if root._until < monotonic() else ENDED)
        return TransactionClosedError(f"the transaction of job {(self._named or self.job).describe()} {why}")

    def _refusal(self) -> TransactionClosedError | ForkedError:
        """Of a call that comes too late: if ``max_hold`` is over, the job fails even if it swallows the error."""
        root = self._root
        if root._closed is None and root._until < monotonic():
            root._closed = TOO_LONG
        return self.closed_error()

    def aborted_error(self) -> TransactionAbortedError:
        # Without it, the statements that follow would be committed one by one.
        return TransactionAbortedError(
            f"SQLite has rolled back the transaction of job {self.job.describe()} (OR ROLLBACK, RAISE(ROLLBACK), "
            "a full disk, an interrupt): do not catch the error that it raised"
        )

    def _check_thread(self) -> None:
        root = self._root
        if self._closed is not None or root._closed is not None:
            raise self._refusal()
        if root.thread and root.thread != get_ident():
            raise TransactionClosedError(
                f"the transaction of job {self.job.describe()} belongs to another thread: a function's is for that "
                "function only; that of a `with transaction()` block is for any thread"
            )
        if root._inside == get_ident():
            raise ReentrantWriteError(IN_STATEMENT)

    def _explain(self, error: sqlite3.Error) -> None:
        guard = self.session.guard
        guard.explain(error)
        # No database, in VACUUM, is the file that it would write INTO.
        if is_corrupt(error) and not (guard.mode is Mode.VACUUM and error_code(error) == sqlite3.SQLITE_NOTADB):
            self.job._state.note_corruption(error)
        if error_code(error) & 0xFF == sqlite3.SQLITE_FULL:
            self.job._state.lacks_room = True
        root = self._root
        if not is_interrupted(error):
            return
        if root._time_limit is not None:
            root._time_limit.raise_caught()
        if root._closed is not None or monotonic() > root._until:
            raise self._refusal() from error

    def refuse_late(self, error: sqlite3.Error) -> None:
        """Raise why a read of the job was interrupted, if it was since that has held the writer for too long."""
        root = self._root
        if root._closed == TOO_LONG or (root._closed is None and monotonic() > root._until):
            raise self._refusal() from error

    # Its length and its end -------------------------------------------------------------------------------------------

    def lend(self) -> None:
        """Let any thread use it."""
        self.thread = 0

    def limit(self, seconds: float) -> None:
        """Have statements end ``seconds`` from now."""
        self._until = monotonic() + seconds
        if self._until != math.inf:
            self._root.set_time_limit()

    def set_time_limit(self) -> None:
        """Have statements end when the transaction is taken back, too."""
        if self._time_limit is None:
            self._time_limit = TimeLimit(self._is_late)
            self._time_limit.set_on(self.session.connection, STEPS)

    def _is_late(self) -> bool:
        # One that is left well waits for the call that is under way.
        return self._closed not in (None, ENDED) or monotonic() > min(self._until, self._read_until or math.inf)

    def close(self, why: str) -> None:
        """Refuse every further call. From any thread; one that is under way ends by its time limit or ``revoke``."""
        self._closed = self._closed or why

    def end(self) -> None:
        """End the loan, and with it what was lent in nested parts. Waits for the call that is inside SQLite."""
        self._closed = self._closed or ENDED  # first, so that a later call finds it inside the lock
        root = self._root
        if INHERITED in (self._closed, root._closed) or (self.is_at_rest() if self is root else self._lent is None):
            return
        if self.is_inside:
            raise ReentrantWriteError(IN_STATEMENT)
        with self.session.lock:
            if self is root:
                self._put_back_all()
            else:
                self._put_back()

    def revoke(self, why: str) -> None:
        """End it although a call may be under way; returns when none is inside SQLite any more."""
        self._closed = why
        self.end_call()

    def end_call(self) -> None:
        """Closed, interrupt the call that is under way."""
        while not self.session.lock.acquire(timeout=NUDGE):
            self.session.connection.interrupt()
        self.session.lock.release()

    def is_at_rest(self) -> bool:
        """Closed, whether no call is under way, and nothing has to be put back."""
        return not (self._inside or self._lending or self._ends_readonly or self._time_limit is not None)

    def wait_for_call(self, until: float) -> bool:
        """Closed, wait for the call that is under way; False if it is not over at the time ``until``."""
        seconds = max(0.0, min(until - monotonic(), threading.TIMEOUT_MAX))
        if not self.session.lock.acquire(timeout=seconds):
            return False
        self.session.lock.release()
        return True

    # Savepoints and callbacks -----------------------------------------------------------------------------------------

    def undo(self) -> None:
        """Undo what this job, or its innermost nested part, has done so far; the transaction stays open."""
        self.call(self.all_parts().undo_innermost, mode=Mode.GATEWAY)

    def all_parts(self) -> Parts:
        """Those of the whole transaction."""
        root = self._root
        if root.parts is None:
            with self.job._state.lock:  # several threads may come first
                root.parts = root.parts or Parts(self.session)
        return root.parts

    def keep(self, committed: bool, fn: Callback) -> None:
        """Have ``fn()`` called once, after COMMIT, or else after a rollback."""
        self.call(self.all_parts().keep, committed, fn)

    def check_open(self) -> None:
        """Raise what a call would, if it can be told without one."""
        if self.is_closed:
            raise self.closed_error()
        if not self.session.connection.in_transaction:
            raise self.aborted_error()

    def keep_late(self, committed: bool, fn: Callback) -> None:
        """``keep`` for a task, on the writer's thread, also if the block has failed by then."""
        keep = self.all_parts().keep
        try:
            self._root.call(keep, committed, fn)
        except (TransactionClosedError, TransactionAbortedError):
            keep(committed, fn)

    # Statements, whose parameters were checked and captured already --------------------------------------------------

    def statement(self, sql: str, parameters: Parameters) -> Result:
        """A job that is one statement."""
        return self.call(self.session.executor.execute, sql, parameters, mode=self.job.mode)

    def execute(self, sql: str, params: Params) -> Result:
        """One statement of a function or block, whose arguments were not checked."""
        if type(params) is not tuple or not PLAIN_TYPES.issuperset(map(type, params)):
            params = capture(sql, params)
        result = self.call(self.session.executor.insert, sql, params)
        return Result([], 1, result, None) if type(result) is int else result  # type: ignore[return-value]

    def bare_statement(self, sql: str, parameters: Parameters) -> Result:
        mode = Mode.VACUUM if describe_sql(sql).verb == "VACUUM" else Mode.BARE
        return self.call(self.session.executor.execute_bare, sql, parameters, mode=mode)

    def statement_many(self, sql: str, rows: list[Parameters]) -> Result:
        return self.call(self.session.executor.execute_many, sql, rows)

    def script(self, sql: str) -> None:
        self.call(self._script, sql)

    def _script(self, sql: str) -> None:
        for part in script_parts(sql):
            if self.is_closed or self._root._until < monotonic():
                raise self._refusal()
            self.session.executor.execute_script(part)

    def whole_script(self, sql: str) -> None:
        # One call: another thread's work in between would be undone with it.
        self.call(self.all_parts().whole, self._script, sql)

    # The connection that libraries get --------------------------------------------------------------------------------

    @property
    def connection(self) -> sqlite3.Connection:
        """The one that is lent, made when it is asked for first."""
        if self._lent is None or not self.is_inside:
            self._check_thread()
        if not self.session.connection.in_transaction and self.job.in_transaction:
            raise self.closed_error() if self.is_closed else self.aborted_error()
        if self._lent is None:
            WriteLoan.call(self, self._lend_connection)
        lent = self._lent
        connection = None if lent is None else lent.lent_connection
        if connection is None:  # it ends in this moment
            raise self.closed_error()
        return connection

    def _lend_connection(self) -> None:
        if self._lent is None:
            self._root._lend_to(self)
            self._lent = ConnectionLoan(self)

    def _lend_to(self, part: WriteLoan) -> None:
        self._lending = [*self._lending, part]

    def _put_back_all(self) -> None:
        while self._lending:
            self._lending[-1]._put_back()
        if self._ends_readonly:
            self.session.internal("PRAGMA query_only=0")
        if self._time_limit is not None:
            self.session.connection.set_progress_handler(None, 0)

    def _put_back(self) -> None:
        """End the connection that was lent, under the session's lock; again, or after the outer part's, nothing."""
        self._root._lending = [loan for loan in self._root._lending if loan is not self]
        lent, self._lent = self._lent, None
        if lent is not None:
            lent.put_back()
