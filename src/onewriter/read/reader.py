"""Reader: one connection of the pool. Snapshot: the loan of one that is pinned."""

from __future__ import annotations

import contextlib
import functools
import sqlite3
import threading
from collections.abc import Callable, Iterator
from time import monotonic
from typing import Any, TypeVar

from onewriter.base.state import IN_STATEMENT, State
from onewriter.base.waiting import Flag, call_if_free
from onewriter.errors import ReadTimeoutError, ReentrantWriteError, forked_error
from onewriter.read.claim import NOBODY
from onewriter.read.clock import ReadClock
from onewriter.sqlite.connection import open_reader
from onewriter.sqlite.guard import ReadGuard
from onewriter.sqlite.lending import Lending
from onewriter.sqlite.lent import lend, retire
from onewriter.sqlite.lent_transaction import NoSavepoints, Savepoints
from onewriter.sqlite.pragma_values import database_names
from onewriter.sqlite.result import refuse_live
from onewriter.sqlite.retry import FAILURES, LockPolicy, is_busy, is_corrupt, is_interrupted, with_help
from onewriter.sqlite.settings import Settings
from onewriter.sqlite.statement import Parameters, describe_sql
from onewriter.sqlite.time_limit import TimeLimit
from onewriter.write.ticket import Ticket

T = TypeVar("T")


Fetch = Callable[[sqlite3.Cursor], T]
FETCHALL: Fetch[list[Any]] = sqlite3.Cursor.fetchall
FETCHONE: Fetch[Any] = sqlite3.Cursor.fetchone
STEPS = 250_000  # of SQLite's virtual machine between two looks at the clock


class Reader:
    """One connection of the pool. Belongs to the thread or task of its ``claim``."""

    def __init__(
        self, connection: sqlite3.Connection, guard: ReadGuard, policy: LockPolicy, clock: ReadClock, state: State
    ) -> None:
        self.connection = connection
        self.claim = NOBODY  # the read or block that has it
        self.state = state
        self.clock = clock
        self.is_inherited = False  # this is a child of the process that it belongs to
        self.guard = guard
        self._mark = guard.internal("")  # of internal statements
        self.is_pinned = False
        self.inside = 0  # calls of a borrower that are under way, one in the other
        self.shares: dict[object, None] = {}  # reader() blocks inside the one that has it
        self.when_out: list[Callable[[], object]] = []  # ends of the loan that came before those of all these
        self.seen = 0  # how many jobs were committed before its transaction began
        self._pins: list[str] | None = None
        self._policy = policy
        self._row_factory, self._text_factory = connection.row_factory, connection.text_factory
        self.watch = TimeLimit(self._is_late)
        self.watch.set_on(connection, STEPS)

    def select(
        self, sql: str, parameters: Parameters, fetch: Fetch[Any] = FETCHALL, label: str = "", *, again: bool = True
    ) -> Any:
        """Run one SELECT; raise ReadTimeoutError if it was ended because its time was over.

        Args:
            label: in place of that of the claim.
            again: as for ``attempt``.
        """
        self.guard.text = sql
        try:
            cursor = self.connection.execute(sql, parameters)
            try:
                return fetch(cursor)
            finally:
                cursor.close()
        except sqlite3.DatabaseError as error:
            if not again:
                raise
            if not describe_sql(sql).verb and not isinstance(error, sqlite3.ProgrammingError):
                return fetch(self.connection.cursor())  # since Python 3.12 it is that of the statement before
            repeat = functools.partial(self.select, sql, parameters, fetch, again=False)
            return self._recover(error, label or self.claim.label, repeat)

    def attempt(self, label: str, function: Callable[..., T], *args: Any, again: bool = True) -> T:
        """Call a function that reads here; raise ReadTimeoutError if it was ended because its time was over.

        Args:
            again: it may be called again, if a lock is held (a recovery, or a COMMIT in the rollback-journal
                modes). False for a function of the user's, whose error may come from another database.
        """
        try:
            return function(*args)
        except sqlite3.DatabaseError as error:
            if not again and not is_interrupted(error):
                raise
            return self._recover(error, label, (lambda: function(*args)) if again else None)

    def _recover(self, error: sqlite3.DatabaseError, label: str, again: Callable[[], T] | None) -> T:
        """Try ``again`` if it was a lock; raise ``error``, or ReadTimeoutError if there is no time left."""
        late: BaseException = error
        try:
            self.watch.raise_caught()
            self.guard.explain(error)
            self.note(error)
            if again is not None and is_busy(error):
                try:
                    left = max(0.0, self.claim.deadline - monotonic())
                    return self._policy.call(with_help(again, self.clock.ask_writer), say_nothing, left)
                except sqlite3.OperationalError as busy:
                    late = busy
            if self._is_late() and (is_busy(late) or is_interrupted(late)):
                raise ReadTimeoutError(f"{label} did not finish in time") from late
            raise late
        finally:
            del error, late  # the traceback holds this frame

    def note(self, error: sqlite3.DatabaseError) -> None:
        """Raises TransactionClosedError if it was ended because the job around it has held the writer for too long."""
        if is_corrupt(error):
            self.state.note_corruption(error)
        job = self.claim.job
        if job is not None and is_interrupted(error):
            job.refuse_late(error)

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[Snapshot]:
        """For the ``with`` block it has one snapshot, which the caller's reads see too."""
        self.pin()
        snapshot = Snapshot(self)
        try:
            with self.state.scopes.inside(snapshot, writes=False):
                yield snapshot
        finally:
            snapshot.end()

    def pin(self) -> None:
        """Have it keep the present snapshot until ``reset``."""
        self.seen = self.state.tally.committed
        self.attempt(self.claim.label, self._pin)

    def _pin(self) -> None:
        if not self.connection.in_transaction:  # tried again after it met a lock, it has begun already
            self._internal("BEGIN")
        if self._pins is None:  # here, where a read waits: reading the names may meet a lock
            names = database_names(self.connection)
            self._pins = [self.guard.internal(f'PRAGMA "{name}".schema_version') for name in names]
        for read in self._pins:  # BEGIN alone pins no snapshot: the first read of each database does
            self.guard.text = read
            cursor = self.connection.execute(read)
            try:
                cursor.row_factory = None
                cursor.fetchall()
            finally:
                cursor.close()
        self.is_pinned = self.guard.is_lent = self.guard.leaves_traces = True

    def _internal(self, sql: str) -> None:
        self.guard.text = text = sql + self._mark
        self.guard.is_internal = True
        try:
            self.connection.execute(text).close()
        finally:
            self.guard.is_internal = False

    @property
    def is_inside(self) -> bool:
        return self.inside > 0 or bool(self.shares)

    def ends_later(self, function: Callable[[], object]) -> bool:
        """Whether it is in use, so that ``function``, which ends the loan, is called when that is over."""
        if not (self.inside or self.shares):
            return False
        self.when_out.append(function)
        self.end_late()  # it may have come out before that
        return True

    def end_late(self) -> None:
        while not self.is_inside:
            try:
                function = self.when_out.pop(0)
            except IndexError:
                return
            function()

    def reset(self) -> bool:
        """Reset it for the next claim, whatever the last one did. Returns False if it must be replaced."""
        if self.guard.is_spoilt:
            return False
        self.guard.leaves_traces = False
        if self.guard.must_ask_again:
            self.guard.install(self.connection)
        if self.is_pinned:
            self.is_pinned = self.guard.is_lent = False
            self.connection.row_factory, self.connection.text_factory = self._row_factory, self._text_factory
        if self.connection.in_transaction:
            try:
                self._internal("ROLLBACK")
            except FAILURES:
                return False
        return True

    def _is_late(self) -> bool:
        return monotonic() > self.claim.deadline


def new_reader(settings: Settings, stop: Flag, clock: ReadClock, state: State) -> Reader:
    policy, guard = LockPolicy(settings.lock_timeout, stop), ReadGuard()
    return Reader(open_reader(settings, guard, policy, clock.ask_writer), guard, policy, clock, state)


class Snapshot:
    """The loan of a reader whose transaction is pinned; what ``LentConnection`` asks.

    Locks: _lock is held around every call, so that any thread may use the connection, one call at a time, and its end
           waits for the one under way. Re-entrant, since a SQL function may read too.
           _interrupting is held around interrupt(), which does not wait for that.
    """

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self._claim = reader.claim  # another claim may have the connection, once this has ended
        self.connection = reader.connection
        self.guard = reader.guard
        self.savepoints: Savepoints = NoSavepoints()
        self._lock = threading.RLock()
        self._interrupting = threading.RLock()  # a signal handler may, too
        self.is_left = False  # no further call begins. Not under the lock, which one under way holds
        self.lent: Lending | None = None  # what was lent, if it was asked for

    @property
    def to_lend(self) -> sqlite3.Connection:
        with self._lock:
            if self.lent is None and not self.is_left:
                self.lent = lend(self)
            connection = None if self.lent is None else self.lent.connection
        if connection is None:
            raise ended_error()
        return connection

    @property
    def is_over(self) -> bool:
        return self.is_left or self.reader.is_inherited

    def call(self, function: Callable[..., T], /, *args: Any, **options: Any) -> T:
        reader = self.reader
        if reader.is_inherited:
            raise forked_error()
        with self._lock:
            if self.is_left:
                raise ended_error()
            if reader.guard.is_deciding:  # a signal handler, in the midst of a statement's preparation
                raise ReentrantWriteError(IN_STATEMENT)
            reader.inside += 1
            try:
                return function(*args, **options)
            except sqlite3.DatabaseError as error:
                reader.watch.raise_caught()
                reader.guard.explain(error)
                reader.note(error)
                raise
            finally:
                reader.inside -= 1
                if reader.when_out:
                    reader.end_late()

    def call_outside(self, function: Callable[..., T], /, *args: Any, **options: Any) -> T:
        with self._lock:
            if self.reader.inside:
                raise ReentrantWriteError(IN_STATEMENT)
            return self.call(function, *args, **options)

    def if_free(self, function: Callable[[], None]) -> None:
        if not self.is_over:
            call_if_free(self._lock, function)

    def interrupt(self) -> None:
        if self.reader.is_inherited:
            raise forked_error()
        with self._interrupting:
            if self.is_over:
                raise ended_error()
            self.connection.interrupt()

    def lends(self) -> Snapshot:
        """Where reads inside it go."""
        return self

    @contextlib.contextmanager
    def shared(self) -> Iterator[sqlite3.Connection]:
        """For a reader() inside this one. It may be left later, as where two generators have one each."""
        connection, reader, share = self.to_lend, self.reader, object()
        reader.shares[share] = None
        try:
            with reader.state.scopes.inside(self, writes=False):
                yield connection
        finally:
            reader.shares.pop(share, None)
            reader.end_late()

    def query(self, sql: str, parameters: Parameters, fetch: Fetch[T], label: str, until: float) -> T:
        """A read inside the block, which has a deadline of its own, within that of the block."""
        with self._until(until, label) as reader:
            rows: T = self.call(reader.select, sql, parameters, fetch, label)
            return rows

    def read_with(self, function: Callable[[sqlite3.Connection], T], label: str, until: float) -> T:
        with self._until(until, label) as reader, reader.state.scopes.inside(self, writes=False):
            return refuse_live(reader.attempt(label, function, self.to_lend, again=False))

    @contextlib.contextmanager
    def _until(self, until: float, label: str) -> Iterator[Reader]:
        left = max(0.0, min(until - monotonic(), threading.TIMEOUT_MAX))
        if not self._lock.acquire(timeout=left):
            raise ReadTimeoutError(f"{label} did not begin in time: another thread uses the reader() that it is in")
        try:
            clock, before = self.reader.clock, self._claim.deadline
            try:
                clock.limit(self._claim, min(until, before))
                yield self.reader
            finally:
                clock.limit(self._claim, before)
        finally:
            self._lock.release()

    def refuse_later(self, write: Ticket[Any]) -> None:
        """Raise at once if no read here will ever see ``write``."""
        if not write.done() or (write.sequence or 0) > self.reader.seen:
            raise ReentrantWriteError(
                f"after={write!r} would never be seen here: a reader() block, and a read() of a function, see the "
                "snapshot with which they began"
            )

    def ended(self) -> Exception:
        return forked_error() if self.reader.is_inherited else ended_error()

    def backup(self, target: sqlite3.Connection, **options: Any) -> None:
        self.call(sqlite3.Connection.backup, self.connection, target, **options)

    def mark_dirty(self, name: str) -> None:
        self.reader.guard.is_spoilt = True

    def end(self) -> None:
        """End the loan, after a call that another thread is in has returned."""
        if self.reader.is_inherited:
            return
        if not self.reader.shares:
            self.is_left = True  # first, so that a later call finds it inside the lock
        with self._lock, self._interrupting:
            if not self.reader.ends_later(self.end):  # code that SQLite calls ends the loan in which it is called, say
                self.is_left = True
                retire(self)


def ended_error() -> sqlite3.ProgrammingError:
    return sqlite3.ProgrammingError("the reader() block or read() of this connection has ended")


def say_nothing(has_it: bool, text: str) -> None:
    pass
