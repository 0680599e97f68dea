"""DbWriter: what callers construct. Checks arguments, queues jobs, waits; no SQL of its own."""

from __future__ import annotations

import contextlib
import math
import os
import sqlite3
import types
from asyncio import _get_running_loop
from collections.abc import Callable, Iterable, Iterator, Mapping
from threading import get_ident
from time import monotonic
from typing import Any, Literal, Self, TypeVar, overload

from onewriter.base.arguments import NOT_PLAIN, check_function, check_timeout
from onewriter.base.call_site import called_from, caller
from onewriter.base.log import warn_of_blocking
from onewriter.base.scopes import enclosing
from onewriter.base.strict import Strict
from onewriter.base.tally import CloseReport, Stats
from onewriter.base.waiting import seconds_until, thread_signal, wait_in_slices
from onewriter.core import VERSION, After, Core, Function, Label, Seconds, Steps, deadline_of
from onewriter.ends.backup import check_backup
from onewriter.ends.exit import interpreter_ends
from onewriter.errors import ReentrantWriteError
from onewriter.live.watch import Watch
from onewriter.options import Options
from onewriter.read.claim import Claim, new_claim, reader_label
from onewriter.read.read import Read, read_of, sql_read
from onewriter.read.reader import FETCHONE, Reader, Snapshot
from onewriter.sqlite.parameters import Params, capture
from onewriter.sqlite.result import Result, first_value
from onewriter.write.block import ThreadBlock
from onewriter.write.checkpoint import Checkpoint
from onewriter.write.entry import Entry
from onewriter.write.jobs import FunctionJob, StatementJob
from onewriter.write.loan import WriteLoan
from onewriter.write.nested import perform_inside
from onewriter.write.ticket import Job, Ticket
from onewriter.write.transaction import Transaction

T = TypeVar("T")


class DbWriter(Strict):
    """The single writer of a SQLite database, and a pool of read-only connections to it.

    Returns when the write connection is open and configured. All methods may be called from any thread.
    ``with DbWriter(path) as db:`` closes at the end.

    Args:
        path: the database file, created if it does not exist. ``":memory:"`` and ``""``: a private temporary file,
            removed at close.
        label: name used for threads and in the log; default: the file name.
        readers: maximum number of read-only connections, but for who has one and would wait for itself.
        maxsize: maximum number of ``enqueue`` jobs in the queue.
        lock_timeout: seconds to keep trying for SQLite's write lock.
        synchronous: https://www.sqlite.org/pragma.html#pragma_synchronous; FULL survives power loss.
        journal_mode: https://www.sqlite.org/pragma.html#pragma_journal_mode
        foreign_keys: whether they are enforced.
        pragmas: set on every connection and read back.
        on_connect: called with (connection, readonly) for every connection: functions, collations, ATTACH.
        row_factory, detect_types: as in ``sqlite3``, for reads and writes.
        on_error: called on the writer thread with the ticket of a failed ``enqueue`` job that nobody waits for.
        on_event: called with objects of ``onewriter.events``, for telemetry; in the thread that each of them names.
        slow_after: seconds a job, a block or a reader may last before a warning names it.
        max_hold: seconds a job's SQL or a ``transaction()`` block may hold the writer.
        wal_limit: size in bytes below which the gateway tries to keep the WAL.
        auto_checkpoint: False: another program checkpoints (Litestream).
        inline: no writer thread: jobs run in the calling thread, through the same code (for tests).

    Raises:
        sqlite3.Error: the file cannot be opened, with the path and the reason. A file that is refused before SQLite
            opens it is not created.
        TypeError, ValueError: an invalid argument; a PRAGMA that has no effect.
        RuntimeError: SQLite is older than 3.37.2.
    """

    def __init__(
        self,
        path: str | bytes | os.PathLike[Any],
        *,
        label: Label = None,
        readers: int = 4,
        maxsize: int = 10_000,
        lock_timeout: float = 10.0,
        synchronous: Literal["OFF", "NORMAL", "FULL", "EXTRA"] = "FULL",
        journal_mode: Literal["WAL", "DELETE", "TRUNCATE", "PERSIST"] = "WAL",
        foreign_keys: bool = True,
        pragmas: Mapping[str, str | int] | None = None,
        on_connect: Callable[[sqlite3.Connection, bool], object] | None = None,
        row_factory: Any = None,
        detect_types: int = 0,
        on_error: Callable[[Ticket[Any]], object] | None = None,
        on_event: Callable[[Any], object] | None = None,
        slow_after: float = 1.0,
        max_hold: float = math.inf,
        wal_limit: int = 4 * 2**20,
        auto_checkpoint: bool = True,
        inline: bool = False,
    ) -> None:
        options = Options(
            label=label,
            readers=readers,
            maxsize=maxsize,
            lock_timeout=lock_timeout,
            synchronous=synchronous,
            journal_mode=journal_mode,
            foreign_keys=foreign_keys,
            pragmas=pragmas,
            on_connect=on_connect,
            row_factory=row_factory,
            detect_types=detect_types,
            on_error=on_error,
            on_event=on_event,
            slow_after=slow_after,
            max_hold=max_hold,
            wal_limit=wal_limit,
            auto_checkpoint=auto_checkpoint,
            inline=interpreter_ends() or inline,  # no writer thread would be waited for any more, if one could start
        )
        self._core = core = Core(path, options)
        self._state, self._submit, self._use_reader = core.state, core.submit, core.pool.use  # which each call asks for
        core.open()

    def __repr__(self) -> str:
        return self._core.describe("DbWriter")

    def __enter__(self) -> Self:
        self._core.queue.check_open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: types.TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        core: Core | None = getattr(self, "_core", None)
        if core is not None and not core.is_closed:  # what a signal handler raises in here Python discards
            core.drop(self)

    def __reduce__(self) -> Any:
        raise TypeError("a DbWriter cannot be pickled: open one in each process")

    # Writes -----------------------------------------------------------------------------------------------------------

    @overload
    def run(self, sql: str, params: Params = (), /, *, label: Label = None, timeout: Seconds = 30.0) -> Result: ...
    @overload
    def run(
        self, fn: Function[T], /, *, label: Label = None, timeout: Seconds = 30.0, foreign_keys: bool | None = None
    ) -> T: ...
    def run(
        self,
        what: str | Function[T],
        params: Params = (),
        /,
        *,
        label: Label = None,
        timeout: Seconds = 30.0,
        foreign_keys: bool | None = None,
    ) -> Any:
        """Write in a transaction of its own; returns after COMMIT.

        Blocks. Inside a job of this gateway it is a savepoint of that job's transaction.

        Args:
            what: one SQL statement, or a function of the ``Transaction``. A function may run a second time if
                another job rolled back the transaction that they shared (docs/batches.md).
            params: of the statement; copied now.
            label: the job's name in logs and messages.
            timeout: seconds from the call to the result; None: no limit.
            foreign_keys: False: they are not enforced during this function, and are checked before COMMIT.

        Raises:
            WriteTimeoutError: no result in time. ``started`` False: Not committed. True: it goes on; see ``ticket``.
            sqlite3.OperationalError: SQLite's lock could not be acquired within ``lock_timeout`` (SQLITE_BUSY). Not
                committed.
            CommitUnknownError: COMMIT met an I/O error. Unknown.
            WriterClosedError, WriterBrokenError, ReentrantWriteError: Not committed.
            What SQLite or the function raised: Rolled back.
        """
        if type(what) is str and label is None and foreign_keys is None:
            frame = caller()
            return self._execute(StatementJob(self._state, what, capture(what, params), None, frame, False), timeout)
        return self._execute(self._core.job(what, params, label, foreign_keys, caller()), timeout)

    def run_many(
        self, sql: str, seq_of_params: Iterable[Params], /, *, label: Label = None, timeout: Seconds = 30.0
    ) -> Result:
        """Run one statement for each row of parameters, all or none; returns after COMMIT.

        A generator is consumed now, once. ``rowcount`` is that of all rows. Raises as ``run`` does, and
        sqlite3.ProgrammingError for RETURNING (Not committed).
        """
        return self._execute(self._core.many(sql, seq_of_params, label, caller()), timeout)

    def run_script(
        self, sql: str, /, *, label: Label = None, timeout: Seconds = 30.0, foreign_keys: bool | None = None
    ) -> None:
        """Run many statements, all or none, without a hidden COMMIT; returns after COMMIT. Raises as ``run`` does.

        BEGIN at the beginning and COMMIT at the end, as in the output of ``.dump`` and ``iterdump()``, are those of the
        job. ``PRAGMA foreign_keys=OFF`` before them is as ``foreign_keys=False``: checked before COMMIT.
        """
        self._execute(self._core.script(sql, label, foreign_keys, caller()), timeout)

    @overload
    def run_without_transaction(
        self, sql: str, params: Params = (), /, *, label: Label = None, timeout: Seconds = 30.0
    ) -> Result: ...
    @overload
    def run_without_transaction(
        self, fn: Callable[[sqlite3.Connection], T], /, *, label: Label = None, timeout: Seconds = 30.0
    ) -> T: ...
    def run_without_transaction(
        self,
        what: str | Callable[[sqlite3.Connection], T],
        params: Params = (),
        /,
        *,
        label: Label = None,
        timeout: Seconds = 30.0,
    ) -> Any:
        """Run one statement, or a function, alone and outside any transaction; returns when it is done.

        A statement is for VACUUM and PRAGMA; BEGIN, COMMIT, ROLLBACK, SAVEPOINT and ATTACH are refused.
        A function is for code with transactions of its own: migration tools, dumps. It gets an ordinary
        ``sqlite3.Connection`` in autocommit, on which nothing is refused, on the writer thread, while no job runs.
        The connection is closed after the call, so its settings do not remain. The function is called once.

        Raises:
            sqlite3.ProgrammingError: the function left a transaction open. Rolled back; what it had committed before
                stays.
            What SQLite or the function raised: what it had committed stays.
            The others as ``run`` does.
        """
        self._state.refuse_endless_wait("run_without_transaction")
        return self._execute(self._core.bare(what, params, label, caller()), timeout)

    def migrate(self, steps: Steps, *, label: Label = None, timeout: Seconds = 30.0, dry_run: bool = False) -> int:
        """Bring the schema to the newest version; returns that, after the COMMIT of the last step.

        ``PRAGMA user_version`` is the number of steps that have run. Each of the others runs once, in a transaction
        that also sets the version, whichever process starts first; foreign keys are off, and checked before COMMIT.

        Args:
            steps: SQL scripts and functions of a ``Transaction``, in order, all since the first version: append new
                ones, and never change old ones.
            timeout: seconds for all of them; None: no limit. Another process's step is waited for up to
                ``lock_timeout``.
            dry_run: run none; returns the current version, so ``steps[version:]`` are those that would run.

        Raises:
            ValueError: the database is newer than ``steps``. Nothing has run.
            ReentrantWriteError: called inside a job or block. Nothing has run.
            What a step raised, with a note that names it: Rolled back; those before it are committed, and the next
                call goes on with that step.
            The others as ``run`` does, for one step.
        """
        check_timeout(timeout)
        migration, until = self._core.migration(steps, label, caller()), deadline_of(timeout)
        self._state.refuse_endless_wait("migrate")
        version: int = self.read_value(VERSION, label=label, timeout=timeout)
        while not (migration.is_at_end(version) or dry_run):
            version = self._execute(migration.job(), seconds_until(until))
        return version

    def transaction(
        self, *, label: Label = None, timeout: Seconds = 30.0, max_hold: float | None = None
    ) -> contextlib.AbstractContextManager[Transaction]:
        """A ``with`` block that is a transaction of its own; committed at its end, or rolled back if it raises.

        It runs in the calling thread, and nothing else writes meanwhile. Any thread may use the ``Transaction``, one
        call at a time, and any may leave the block. Inside a job or another block (in the same context,
        thread and task) it is a savepoint of that transaction.

        Args:
            label: the block's name in logs and messages.
            timeout: seconds to wait until it begins; None: no limit. The block's own time does not count.
            max_hold: seconds after which the transaction is ended and rolled back; None: the gateway's. A nested
                block has that of the outer one.

        Raises:
            WriteTimeoutError: it did not begin in time. Not committed.
            TransactionClosedError: it held the writer longer than ``max_hold``. Rolled back.
            sqlite3.OperationalError: SQLite's lock could not be acquired within ``lock_timeout``. Not committed.
            CommitUnknownError: COMMIT met an I/O error. Unknown.
            What COMMIT raised: Rolled back.
        """
        core = self._core
        block = ThreadBlock(self._state, label, core.check_block(label, timeout, max_hold), caller())
        return Entry(block, timeout, core.driver, core.options.on_event, core.label)

    @overload
    def enqueue(
        self, sql: str, params: Params = (), /, *, label: Label = None, timeout: Seconds = 30.0
    ) -> Ticket[Result]: ...
    @overload
    def enqueue(self, fn: Function[T], /, *, label: Label = None, timeout: Seconds = 30.0) -> Ticket[T]: ...
    def enqueue(
        self, what: str | Function[T], params: Params = (), /, *, label: Label = None, timeout: Seconds = 30.0
    ) -> Ticket[Any]:
        """Queue a write and return its ticket, without waiting for it: accepted, not committed.

        Blocks while the queue is full, at most ``timeout`` seconds; inside a job, and in a finalizer or signal handler
        that interrupted the queue itself, it never blocks. Inside a job it is not part of that job.

        Raises:
            QueueFullError: no room in time. Not committed.
            WriterClosedError, WriterBrokenError: Not committed.
        """
        if timeout != 30.0:
            check_timeout(timeout)
        state = self._state
        # Who keeps the writer from making room does not wait for room.
        bounded = get_ident() != state.writer_thread and (
            (enclosing() is None and _get_running_loop() is None) or not state.would_deadlock()
        )
        job: Job[Any]
        if type(what) is str and label is None:
            job = StatementJob(state, what, capture(what, params), None, caller(), bounded)
        elif type(what) is types.FunctionType and type(params) is tuple and not params and label is None:
            if what.__code__.co_flags & NOT_PLAIN:
                check_function(what)
            job = FunctionJob(state, what, what.__qualname__, caller(), bounded)
        else:
            job = self._core.job(what, params, label, None, caller(), bounded)
        if state.reporting:
            self._core.accept(job, timeout)
        else:
            self._submit(job, timeout)
        return job

    def enqueue_many(
        self, sql: str, seq_of_params: Iterable[Params], /, *, label: Label = None, timeout: Seconds = 30.0
    ) -> Ticket[Result]:
        """Queue one statement for many rows of parameters, all or none, as ``enqueue`` does: accepted, not committed.

        A generator is consumed now, once. It is one job, and takes one place in the queue. Raises as ``enqueue`` does,
        and sqlite3.ProgrammingError for RETURNING (Not committed).
        """
        check_timeout(timeout)
        bounded = not self._state.would_deadlock()
        job = self._core.many(sql, seq_of_params, label, caller(), bounded)
        self._core.accept(job, timeout)
        return job

    def flush(self, timeout: Seconds = None) -> None:
        """Wait until everything accepted before the call has its outcome, at most ``timeout`` seconds.

        Raises:
            WriteTimeoutError: not yet; the jobs go on.
            ReentrantWriteError: called inside a job.
        """
        self._state.refuse_endless_wait("flush")
        check_timeout(timeout)
        until = math.inf if timeout is None else monotonic() + timeout
        self._execute(self._core.flush(caller()), timeout)
        if self._state.reporter is not None:
            self._state.reporter.wait(until)

    # Reads ------------------------------------------------------------------------------------------------------------

    @overload
    def read(
        self, sql: str, params: Any = (), /, *, label: Label = None, timeout: Seconds = 30.0, after: After = None
    ) -> list[Any]: ...
    @overload
    def read(
        self,
        fn: Callable[[sqlite3.Connection], T],
        /,
        *,
        label: Label = None,
        timeout: Seconds = 30.0,
        after: After = None,
    ) -> T: ...
    def read(
        self,
        what: str | Callable[[sqlite3.Connection], T],
        params: Params = (),
        /,
        *,
        label: Label = None,
        timeout: Seconds = 30.0,
        after: After = None,
    ) -> Any:
        """Run one SELECT on a read-only connection and return all its rows, or what ``what(connection)`` returns.

        Sees every write that was acknowledged before the call, and in WAL mode waits for no transaction. A function
        sees one snapshot. Inside a job it sees that job's transaction.

        Args:
            timeout: seconds for waiting for a connection and running the SQL; None: no limit.
            after: wait until this write is committed, then read.

        Raises:
            ReadTimeoutError: not in time.
            sqlite3.Error: what SQLite raised; a statement that writes is refused.
            The error of ``after``; ValueError if it is another gateway's.
            ReentrantWriteError: inside a ``reader()`` block, whose snapshot will never have ``after``.
        """
        if type(what) is str:
            params = capture(what, params)
            if (
                label is None
                and timeout == 30.0
                and after is None
                and enclosing() is None
                and _get_running_loop() is None
                and (thread := get_ident()) != self._state.writer_thread
            ):
                # Hot path: no Read, which would only tell ``select`` its arguments.
                now = monotonic()
                return self._use_reader(
                    Claim(label=what, since=now, deadline=now + 30.0, thread=thread), Reader.select, what, params
                )
        return self._read(read_of(what, params, label), timeout, after)

    def read_one(
        self, sql: str, params: Params = (), /, *, label: Label = None, timeout: Seconds = 30.0, after: After = None
    ) -> Any:
        """Return the first row of a SELECT, or None. Otherwise as ``read``."""
        return self._read(sql_read(sql, params, FETCHONE, label), timeout, after)

    def read_value(
        self, sql: str, params: Params = (), /, *, label: Label = None, timeout: Seconds = 30.0, after: After = None
    ) -> Any:
        """Return the first column of the first row, whatever ``row_factory`` is, or None. Otherwise as ``read``."""
        return self._read(sql_read(sql, params, first_value, label), timeout, after)

    def reader(
        self, *, label: Label = None, timeout: Seconds = 30.0, after: After = None
    ) -> contextlib.AbstractContextManager[sqlite3.Connection]:
        """A ``with`` block that gives a read-only ``sqlite3.Connection`` on one snapshot, taken when it is entered.

        Its ``commit``, ``rollback`` and ``close`` have no effect. Reads in the block (in the same
        context, thread and task) see the same snapshot. Any thread may use the connection, and leave the block.
        A long block keeps the WAL from being reset; after ``slow_after`` seconds a warning names it.

        Args:
            timeout: seconds to wait for a connection; None: no limit.
            after: as for ``read``.

        Raises:
            ReadTimeoutError: no connection in time.
        """
        check_timeout(timeout)
        return self._reader(reader_label(label, caller()), timeout, after)

    @contextlib.contextmanager
    def _reader(self, label: str, timeout: Seconds, after: After) -> Iterator[sqlite3.Connection]:
        here, deadline = self._wait_for(after, timeout, is_apart=True)
        if isinstance(here, Snapshot):
            with here.shared() as connection:
                yield connection
            return
        writer = None if here is None else self._state.scopes.innermost(writes=True)
        # A job's SQL has its limit, wherever it runs; a block is taken away, and its thread may go on reading.
        job = writer if isinstance(writer, WriteLoan) and writer.is_of_function else None
        with self._core.pool.snapshot(label, deadline, job) as snapshot:
            yield snapshot.to_lend

    @overload
    def watch(
        self, sql: str, params: Params = (), /, *, label: Label = None, every: float = 0.05
    ) -> Watch[list[Any]]: ...
    @overload
    def watch(
        self, fn: Callable[[sqlite3.Connection], T], /, *, label: Label = None, every: float = 0.05
    ) -> Watch[T]: ...
    def watch(
        self,
        what: str | Callable[[sqlite3.Connection], T],
        params: Params = (),
        /,
        *,
        label: Label = None,
        every: float = 0.05,
    ) -> Watch[Any]:
        """A SELECT's rows, or what ``what(connection)`` returns, now and again after each commit that changed them.

        ``with db.watch(sql) as live: for rows in live: …``, or ``live.next(timeout)``. Commits of any process count.
        Blocks only while it waits or reads, and holds no connection between two reads.

        Args:
            params: of the SELECT; copied now.
            every: seconds between two reads, at least; each gives the newest rows.

        Raises:
            WriterClosedError, WriterBrokenError: when the block is entered.
        """
        return Watch(self._core.live, *self._core.watched(what, params, label), every, self)

    # Operations -------------------------------------------------------------------------------------------------------

    @property
    def path(self) -> str:
        """The database file, absolute."""
        return self._core.path

    @property
    def journal_mode(self) -> str:
        """The journal mode in force: ``"WAL"``, ``"DELETE"`` …"""
        return self._core.options.journal_mode

    @property
    def health(self) -> str:
        """``"ok"``, ``"degraded: reason"``, ``"broken: reason"`` or ``"closed"``, now. Never touches the database.

        Degraded: the file is damaged or mounted without its folder, a job or its callbacks hold the writer, or it waits
        for SQLite's lock, longer than ``slow_after``, the queue is nearly full, or readers keep the log over its limit.
        Broken: out of service, see WriterBrokenError.
        """
        return self._core.writer.health

    @property
    def closed(self) -> bool:
        """Whether new work is refused."""
        return self._core.is_closed

    def in_writer(self) -> bool:
        """Whether the caller is inside a job or block of this gateway, or on its writer thread."""
        return self._state.is_in_writer()

    def checkpoint(
        self, mode: Literal["PASSIVE", "FULL", "RESTART", "TRUNCATE"] = "TRUNCATE", *, timeout: Seconds = 30.0
    ) -> Checkpoint:
        """Copy the write-ahead log into the database file, now, and return what was done.

        The gateway does so by itself, unless ``auto_checkpoint`` is False. With RESTART and TRUNCATE new reads wait for
        at most 50 ms, so that the log can be reset; ``busy`` says that a reader or another writer prevented it.

        Args:
            mode: https://www.sqlite.org/pragma.html#pragma_wal_checkpoint
            timeout: seconds to wait for the writer; None: no limit.

        Raises:
            WriteTimeoutError: it was not done in time; ``started`` says whether it goes on.
            ReentrantWriteError: called inside a job.
        """
        job = self._core.checkpoint(mode, caller())
        self._state.refuse_endless_wait("checkpoint")
        return self._execute(job, timeout)

    def backup(
        self,
        target: str | bytes | os.PathLike[Any] | sqlite3.Connection,
        *,
        progress: Callable[[int, int, int], object] | None = None,
        pages: int = -1,
    ) -> None:
        """Copy the database as it is now, while it is read and written.

        Blocks the calling thread only, through a connection of its own. In the rollback-journal modes a COMMIT waits
        for it, as for every reader. The copy replaces what is at the target path when it is complete.

        Args:
            target: a path, or an open ``sqlite3.Connection``.
            progress: called with (status, remaining pages, all pages) after each step, as in ``sqlite3``.
            pages: pages for each step; -1: all in one.

        Raises:
            ValueError, TypeError: an invalid target: the database itself, or one that is in use.
            ForkedError: the target is the file of a gateway that this process has inherited.
            sqlite3.Error, OSError: what SQLite or the file system raised. The target is unchanged.
            ReentrantWriteError: called inside a job.
            What ``progress`` raised. The target is unchanged; after the last step a connection has the whole copy.
        """
        self._state.refuse_endless_wait("backup", commits=False)
        check_backup(target, progress, pages)
        warn_of_blocking()
        self._core.back_up(target, progress, pages, called_from(caller()))

    def stats(self) -> Stats:
        """What the gateway has done and is doing, at one moment. Cheap; never touches the database."""
        return self._core.stats()

    def close(self, timeout: Seconds = None, *, drain: bool = True) -> CloseReport:
        """Refuse new work, finish what was accepted, close all connections, and report the outcome of every job.

        May be called again, and from several threads.

        Args:
            timeout: seconds to wait; then jobs that have not started are withdrawn, and a running job is reported as
                unfinished. None: no limit.
            drain: False: withdraw jobs that have not started at once.

        Raises:
            ReentrantWriteError: called inside a job, or, without a ``timeout``, inside a read or ``reader()`` block
                of this thread.
        """
        warn_of_blocking()
        return self._core.close(timeout, drain)

    # Behind them ------------------------------------------------------------------------------------------------------

    def _execute(self, job: Job[T], timeout: Seconds) -> T:
        """Run a job and return its result: by the writer, or here if this thread is inside a transaction."""
        if timeout != 30.0:
            check_timeout(timeout)
        state = self._state
        if _get_running_loop() is not None:
            warn_of_blocking()
        is_outside = enclosing() is None and get_ident() != state.writer_thread  # as nearly always
        transaction = None if is_outside else self._transaction_here()
        if transaction is not None:
            if job.foreign_keys is not None:
                raise ReentrantWriteError("foreign_keys= needs a transaction of its own: call it outside the job")
            result = perform_inside(transaction, job)
            if isinstance(transaction.job, ThreadBlock):
                transaction.job.nested += 1
            return result
        may_deadlock = not is_outside or state.blocks or state.readers_block_commits or state.is_inside()
        if may_deadlock and state.would_deadlock():
            state.refuse_endless_wait(f"waiting for job {job.describe()}")
        until = math.inf if timeout is None else job.created_at + timeout
        wakeup = job.expect_outcome(thread_signal())
        self._submit(job, timeout)
        try:
            in_time = wait_in_slices(wakeup, until, state)
        except BaseException:  # Ctrl-C
            if not job.withdraw(None):
                job.stop_waiting_for()
            raise
        if not in_time:
            self._core.give_up(job, timeout)
        if state.reporter is not None and state.reporter.is_behind:
            state.reporter.catch_up()
        try:
            return job.outcome()
        finally:
            del job  # an error's traceback would hold it, and it holds the error

    def _read(self, read: Read[T], timeout: Seconds, after: After) -> T:
        here, until = self._wait_for(after, timeout)
        return self._use_reader(new_claim(read.label, until), read.alone) if here is None else read.inside(here, until)

    def _transaction_here(self) -> WriteLoan | None:
        """The transaction that a blocking write belongs to; none inside a task's block, whose writes are awaited."""
        here = self._state.here()
        return here if isinstance(here, WriteLoan) else None

    def _reads_from(self, is_apart: bool) -> WriteLoan | Snapshot | None:
        """The loan that a read in the innermost job, block or reader uses; None: it takes a connection of the pool.
        ``is_apart``: it would not use that of a job.
        """
        here = None if enclosing() is None else self._state.scopes.innermost()
        if here is not None:
            loan: WriteLoan | Snapshot = here.lends()
            if isinstance(loan, WriteLoan) and loan.is_closed and get_ident() in self._state.entering:
                self._state.refuse_endless_wait("a read")  # by a signal handler, as its thread ends the block
            return loan
        job = self._state.job
        if get_ident() == self._state.writer_thread and not (is_apart and job is not None and job.in_transaction):
            self._state.here()  # inside a statement of the writer its connection cannot be used
        return None

    def _wait_for(
        self, after: After, timeout: Seconds, is_apart: bool = False
    ) -> tuple[WriteLoan | Snapshot | None, float]:
        """Wait until the write ``after`` is committed; returns where the read goes, and its deadline."""
        warn_of_blocking()
        if timeout != 30.0:
            check_timeout(timeout)
        deadline = deadline_of(timeout)
        here = self._reads_from(is_apart)
        if after is not None:
            self._core.check_after(after, here)
            if not after.done():
                self._state.refuse_endless_wait("read(after=…)", since=after.created_at)
                if not after.wait(seconds_until(deadline)) and not after.done():
                    raise self._core.committed_late(after, timeout)
            after.result()
        return here, deadline
