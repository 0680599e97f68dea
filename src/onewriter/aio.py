"""AsyncDbWriter: the gateway for asyncio. Nothing here ever blocks the event loop.

A write is a job with a future of the loop in place of a lock, so a batch wakes each loop once. A read runs in a small
pool of threads. A ``transaction()`` block's statements run on the writer thread, one after the other.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
import operator
import os
import sqlite3
import sys
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from concurrent.futures import ThreadPoolExecutor
from time import monotonic
from typing import Any, Literal, Self, TypeVar, overload

from onewriter.base.arguments import check_label, check_read, check_sql, check_timeout, name_of
from onewriter.base.call_site import called_from, frame_around
from onewriter.base.log import call_all_safely
from onewriter.base.scopes import enclosing
from onewriter.base.strict import Strict
from onewriter.base.tally import CloseReport, Stats
from onewriter.base.waiting import seconds_until, wake
from onewriter.core import give_up
from onewriter.ends.backup import check_backup
from onewriter.errors import ReadTimeoutError, ReentrantWriteError, WriterClosedError
from onewriter.events import announce
from onewriter.gateway import OWN_READER, After, DbWriter, Function, Label, Seconds
from onewriter.read.pool import HELD_BACK, Borrowing
from onewriter.read.reader import Reader, Snapshot
from onewriter.sqlite.parameters import capture
from onewriter.sqlite.result import Result, first_value
from onewriter.sqlite.statement import Parameters
from onewriter.tasks.block import AsyncTransaction, TaskBlock, TaskSavepoint, perform_inside
from onewriter.tasks.calls import Deadlines, and_the_log, call_in_pool, in_thread, until_done
from onewriter.tasks.reader import AsyncReader, read_snapshot
from onewriter.write.block import BlockFailedError
from onewriter.write.checkpoint import Checkpoint
from onewriter.write.driver import not_entered
from onewriter.write.loan import ENDED, WriteLoan
from onewriter.write.ticket import Job, Ticket

T = TypeVar("T")
FETCHALL, FETCHONE = operator.methodcaller("fetchall"), operator.methodcaller("fetchone")  # of a lent cursor, too
NOT_OPEN = "the gateway is not open: use `async with AsyncDbWriter(…)` or `await db.open()`"


class AsyncDbWriter(Strict):
    """A ``DbWriter`` for asyncio: the same names and arguments, awaitable.

    Opens at ``async with`` or ``await db.open()``. One object may be used by several loops and their tasks. Arguments
    and errors are those of ``DbWriter``; a call belongs to the transaction or reader block of the task in which it is
    *called*, wherever it is awaited.

    Locks: _lock guards _openers, _pool and, until it is open, _open and _db. Nothing waits while it is held.
    """

    def __init__(self, path: str | bytes | os.PathLike[Any], **options: Any) -> None:
        if options.get("inline"):
            raise ValueError("inline=True runs jobs in the calling thread, the loop's: use a temporary file")
        self._open: Callable[[], DbWriter] | None = lambda: DbWriter(path, **options)
        self._db: DbWriter | None = None
        self._is_wrapped = self._is_closed = False
        self._prepare()

    @classmethod
    def wrap(cls, db: DbWriter) -> Self:
        """Use an open ``DbWriter``, and leave it open."""
        if not isinstance(db, DbWriter):
            raise TypeError(f"wrap takes a DbWriter, not {type(db).__name__}")
        if db.is_inline:
            raise ValueError("an inline DbWriter runs jobs in the calling thread, which is the event loop's")
        self = cls.__new__(cls)
        self._open, self._db = None, db
        self._is_wrapped, self._is_closed = True, False
        self._prepare()
        return self

    def _prepare(self) -> None:
        self._lock = threading.Lock()
        self._openers: list[asyncio.Future[None]] = []  # of tasks that wait while another one opens
        self._pool: ThreadPoolExecutor | None = None
        self._deadlines: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Deadlines] = weakref.WeakKeyDictionary()
        self._last_deadlines: tuple[Any, Deadlines] = (None, Deadlines())

    async def open(self) -> Self:
        """Open the database; raises what ``DbWriter`` raises."""
        if self._is_closed:
            raise WriterClosedError("the gateway is closed: make a new AsyncDbWriter")
        while True:
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            with self._lock:
                if self._db is not None or self._is_closed:
                    break
                opening, self._open = self._open, None
                if opening is None:
                    self._openers.append(future)
            if opening is not None:
                await self._open_with(opening)
            else:  # another task opens it; if it fails, this one tries
                await future
        self._gateway()._loop.queue.check_open()
        return self

    async def _open_with(self, opening: Callable[[], DbWriter]) -> None:
        db = None
        try:
            db = await in_thread(opening, undo=DbWriter.close)
        finally:
            with self._lock:
                if db is None:
                    self._open = opening
                elif not self._is_closed:
                    self._db = db
                openers, self._openers = self._openers, []
            wake(openers)
        if self._db is not db:  # it was closed meanwhile
            await in_thread(db.close)

    async def __aenter__(self) -> Self:
        return await self.open()

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __enter__(self) -> None:
        raise TypeError("AsyncDbWriter needs `async with`; `with` goes with DbWriter")

    def __exit__(self, *_: object) -> None:
        raise TypeError("AsyncDbWriter needs `async with`; `with` goes with DbWriter")

    def __repr__(self) -> str:
        return f"<AsyncDbWriter {'not open' if self._db is None else repr(self._db)}>"

    async def close(self, timeout: Seconds = None, *, drain: bool = True) -> CloseReport:
        """As ``DbWriter.close``. A wrapped DbWriter stays open."""
        with self._lock:
            db = self._db
            if db is None:
                self._is_closed, self._open = True, None
                return CloseReport(0, 0, 0, 0, ())
        check_timeout(timeout)
        if not db._state.forked:
            db._state.refuse_endless_wait("close", awaits=True)
        if timeout is None and not self._is_wrapped and db._state.scopes.innermost() is not None:
            raise ReentrantWriteError(OWN_READER)
        self._is_closed = True
        try:
            return db.report() if self._is_wrapped else await in_thread(lambda: db.close(timeout, drain=drain))
        finally:
            with self._lock:
                pool, self._pool = self._pool, None
            if pool is not None:
                pool.shutdown(wait=False)

    # Writes -----------------------------------------------------------------------------------------------------------

    @overload
    def run(
        self, sql: str, params: Any = (), /, *, label: Label = None, timeout: Seconds = 30.0
    ) -> Coroutine[Any, Any, Result]: ...
    @overload
    def run(
        self, fn: Function[T], /, *, label: Label = None, timeout: Seconds = 30.0, foreign_keys: bool | None = None
    ) -> Coroutine[Any, Any, T]: ...
    def run(
        self,
        what: str | Function[T],
        params: Any = (),
        /,
        *,
        label: Label = None,
        timeout: Seconds = 30.0,
        foreign_keys: bool | None = None,
    ) -> Coroutine[Any, Any, Any]:
        """As ``DbWriter.run``. Cancelled before the job starts, it never runs; after that, it finishes whole."""
        return self._execute(self._gateway()._job(what, params, label, foreign_keys), timeout)

    def run_many(
        self, sql: str, seq_of_params: Iterable[Any], /, *, label: Label = None, timeout: Seconds = 30.0
    ) -> Coroutine[Any, Any, Result]:
        """As ``DbWriter.run_many``."""
        return self._execute(self._gateway()._many(sql, seq_of_params, label, sys._getframe(1)), timeout)

    def run_script(
        self, sql: str, /, *, label: Label = None, timeout: Seconds = 30.0, foreign_keys: bool | None = None
    ) -> Coroutine[Any, Any, None]:
        """As ``DbWriter.run_script``."""
        return self._execute(self._gateway()._script(sql, label, foreign_keys, sys._getframe(1)), timeout)

    def run_without_transaction(
        self, sql: str, params: Any = (), /, *, label: Label = None, timeout: Seconds = 30.0
    ) -> Coroutine[Any, Any, Result]:
        """As ``DbWriter.run_without_transaction``."""
        job = self._gateway()._bare(sql, params, label, sys._getframe(1))
        return self._execute(job, timeout, alone="run_without_transaction")

    @overload
    def enqueue(self, sql: str, params: Any = (), /, *, label: Label = None) -> Ticket[Result]: ...
    @overload
    def enqueue(self, fn: Function[T], /, *, label: Label = None) -> Ticket[T]: ...
    def enqueue(self, what: str | Function[T], params: Any = (), /, *, label: Label = None) -> Ticket[Any]:
        """As ``DbWriter.enqueue``, but never waits: QueueFullError at once if there is no room. Not a coroutine."""
        db = self._gateway()
        job = db._job(what, params, label, None, bounded=not db._state.would_deadlock_task())
        db._accept(job, 0.0)
        return job

    @overload
    def enqueue_wait(
        self, sql: str, params: Any = (), /, *, label: Label = None, timeout: Seconds = 30.0
    ) -> Coroutine[Any, Any, Ticket[Result]]: ...
    @overload
    def enqueue_wait(
        self, fn: Function[T], /, *, label: Label = None, timeout: Seconds = 30.0
    ) -> Coroutine[Any, Any, Ticket[T]]: ...
    def enqueue_wait(
        self, what: str | Function[T], params: Any = (), /, *, label: Label = None, timeout: Seconds = 30.0
    ) -> Coroutine[Any, Any, Ticket[Any]]:
        """As ``enqueue``, but waits for room, at most ``timeout`` seconds."""
        check_timeout(timeout)
        return self._enqueue(self._gateway()._job(what, params, label, None, bounded=True), timeout)

    async def _enqueue(self, job: Job[T], timeout: Seconds) -> Ticket[T]:
        db = self._gateway()
        announce(db._state, db._loop.on_event, job, waits=False)
        if db._state.would_deadlock_task():  # its block keeps the writer from making room
            db._loop.queue.put_unbounded(job)
            return job
        queue = db._loop.queue
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiter = queue.line_up(job, future)
        if waiter is None:
            return job
        try:
            async with self._within(future, timeout):
                await future
        except asyncio.CancelledError:
            queue.leave_line(waiter)
            job.cancel()
            raise
        queue.leave_line(waiter)
        if not waiter.accepted:
            raise queue.full_error(job, timeout)
        return job

    def flush(self, timeout: Seconds = None) -> Coroutine[Any, Any, None]:
        """As ``DbWriter.flush``."""
        db = self._gateway()
        flushed: Coroutine[Any, Any, None] = self._execute(
            db._control("flush", None, sys._getframe(1)), timeout, alone="flush"
        )
        return and_the_log(flushed, db._state, timeout)

    def checkpoint(
        self, mode: Literal["PASSIVE", "FULL", "RESTART", "TRUNCATE"] = "TRUNCATE", *, timeout: Seconds = 30.0
    ) -> Coroutine[Any, Any, Checkpoint]:
        """As ``DbWriter.checkpoint``."""
        return self._execute(self._gateway()._checkpoint_job(mode, sys._getframe(1)), timeout, alone="checkpoint")

    def _execute(self, job: Job[T], timeout: Seconds, alone: str = "") -> Coroutine[Any, Any, T]:
        if timeout != 30.0:
            check_timeout(timeout)
        db = self._gateway()
        if enclosing() is not None:
            here = db._state.here()
            if isinstance(here, TaskBlock | TaskSavepoint):
                if alone or job.foreign_keys is not None:
                    db._state.refuse_endless_wait(alone or "foreign_keys=", awaits=True)
                return here.block.call(perform_inside, here.block, job)
        return self._wait_for(db, job, timeout)

    async def _wait_for(self, db: DbWriter, job: Job[T], timeout: Seconds) -> T:
        loop = asyncio.get_running_loop()
        if db._state.is_mine():  # a sync block or a job of this thread, whose end waits for this
            db._state.refuse_endless_wait(f"waiting for job {job.describe()}", awaits=True)
        future: asyncio.Future[None] = loop.create_future()
        job._waiters = [future]  # before anybody else knows the job
        db._submit(job, None)
        deadlines = None
        if timeout is not None:
            deadlines = self._deadlines_of(loop)
            deadlines.add(future, timeout)
        try:
            await future
        except asyncio.CancelledError:
            if not job.cancel():
                job.stop_waiting_for()
            raise
        finally:
            if deadlines is not None:
                deadlines.remove(future)
        if not job.done():
            give_up(job, timeout, db._state)
        try:
            return job.result()
        finally:
            del job  # an error's traceback would hold it, and it holds the error

    @contextlib.asynccontextmanager
    async def transaction(
        self, *, label: Label = None, timeout: Seconds = 30.0, max_hold: float | None = None
    ) -> AsyncIterator[AsyncTransaction]:
        """As ``DbWriter.transaction``, in ``async with``.

        A cancelled block is rolled back, and its statement interrupted. A block whose COMMIT has begun ends with the
        outcome of COMMIT first; a cancellation that came meanwhile is raised after it, with a note that says so.
        """
        db = self._gateway()
        hold = db.check_block(label, timeout, max_hold)
        state = db._state
        here = state.scopes.innermost(writes=True)
        if isinstance(here, TaskBlock | TaskSavepoint):
            outer = here.block
            assert outer.transaction is not None
            inner = outer.transaction.nested()
            nested = AsyncTransaction(outer, inner)
            async with AsyncTransaction(outer, outer.transaction).savepoint():
                try:
                    yield nested
                finally:
                    inner.close(ENDED)
            return
        state.refuse_endless_wait("transaction()", awaits=True)
        block = TaskBlock(state, label, hold, frame_around())
        state.blocks.add(block)
        try:
            transaction = await self._enter(db, block, timeout)
            scope = state.scopes.enter(block, writes=True)
            try:
                yield AsyncTransaction(block, transaction)
            except BaseException as error:
                state.scopes.leave(scope)
                block.end(failed=True)
                cancelled = await block.ended()
                self._call_back(db, block, transaction)
                if cancelled is not None:
                    raise cancelled from error
                raise
            state.scopes.leave(scope)
            block.end(failed=False)
            cancelled = await block.ended()
            self._call_back(db, block, transaction)
        finally:
            state.blocks.discard(block)
        if cancelled is not None:
            outcome = "was committed" if block.failed_with is None else f"ended with {block.failed_with!r}"
            cancelled.add_note(f"onewriter: the transaction of {block.describe()} {outcome}")
            raise cancelled
        block.result()

    async def _enter(self, db: DbWriter, block: TaskBlock, timeout: Seconds) -> WriteLoan:
        db._submit(block, None)
        try:
            async with self._within(block.granted, timeout):
                await block.granted
        except asyncio.CancelledError:
            if not block.cancel():
                block.end(failed=True)
                await block.ended()
            raise
        if block.transaction is None and not block.done():
            if block.cancel():
                raise not_entered(block, timeout, db._loop)
            block.end(failed=True)  # it has started in the same moment, unless it was refused
            cancelled = await block.ended()
            if cancelled is not None:
                raise cancelled
            if isinstance(block.failed_with, BlockFailedError):
                raise not_entered(block, timeout, db._loop)
        if block.transaction is None:
            block.result()  # raises why
        assert block.transaction is not None
        return block.transaction

    def _call_back(self, db: DbWriter, block: TaskBlock, transaction: WriteLoan) -> None:
        callbacks = transaction.callbacks(committed=block.failed_with is None)
        call_all_safely(db._state, [(callback,) for callback in callbacks])

    # Reads ------------------------------------------------------------------------------------------------------------

    @overload
    def read(
        self, sql: str, params: Any = (), /, *, label: Label = None, timeout: Seconds = 30.0, after: After = None
    ) -> Coroutine[Any, Any, list[Any]]: ...
    @overload
    def read(
        self,
        fn: Callable[[sqlite3.Connection], T],
        /,
        *,
        label: Label = None,
        timeout: Seconds = 30.0,
        after: After = None,
    ) -> Coroutine[Any, Any, T]: ...
    def read(
        self,
        what: str | Callable[[sqlite3.Connection], T],
        params: Any = (),
        /,
        *,
        label: Label = None,
        timeout: Seconds = 30.0,
        after: After = None,
    ) -> Coroutine[Any, Any, Any]:
        """As ``DbWriter.read``; a function runs in a thread."""
        check_read(what, params)
        if isinstance(what, str):
            return self._read(what, capture(what, params), label, timeout, after, FETCHALL)
        return self._read_with(what, repr(label or name_of(what)), label, timeout, after, self._here(), own=False)

    def read_one(
        self, sql: str, params: Any = (), /, *, label: Label = None, timeout: Seconds = 30.0, after: After = None
    ) -> Coroutine[Any, Any, Any]:
        """As ``DbWriter.read_one``."""
        return self._read(check_sql(sql), capture(sql, params), label, timeout, after, FETCHONE)

    def read_value(
        self, sql: str, params: Any = (), /, *, label: Label = None, timeout: Seconds = 30.0, after: After = None
    ) -> Coroutine[Any, Any, Any]:
        """As ``DbWriter.read_value``."""
        return self._read(check_sql(sql), capture(sql, params), label, timeout, after, first_value)

    @contextlib.asynccontextmanager
    async def reader(
        self, *, label: Label = None, timeout: Seconds = 30.0, after: After = None
    ) -> AsyncIterator[AsyncReader]:
        """As ``DbWriter.reader``, in ``async with``."""
        place = repr(label) if label else f"reader() in {called_from(frame_around())}"
        deadline = await self._after(after, timeout, label)
        here = self._here()
        if isinstance(here, AsyncReader):
            yield here
            return
        borrowing, readers = Borrowing(place), self._gateway()._readers
        reader = await self._borrow(borrowing, deadline)
        try:
            await self._in_pool(functools.partial(readers.pin, reader, place), borrowing)
            lent = AsyncReader(self, Snapshot(reader), borrowing)
            scopes = self._gateway()._state.scopes
            scope = scopes.enter(lent, writes=False)
            try:
                yield lent
            except asyncio.CancelledError:
                lent._expire()
                raise
            finally:
                scopes.leave(scope)
                await lent._end()
        finally:
            readers.end(borrowing)

    def _here(self) -> Any:
        """The innermost block, job or reader that the caller is inside: its reads belong to it."""
        return None if enclosing() is None else self._gateway()._state.scopes.innermost()

    def _read(
        self,
        sql: str,
        parameters: Parameters,
        label: Label,
        timeout: Seconds,
        after: After,
        fetch: Callable[[sqlite3.Cursor], Any],
    ) -> Coroutine[Any, Any, Any]:
        def read(connection: sqlite3.Connection) -> Any:
            cursor = connection.execute(sql, parameters)
            try:
                return fetch(cursor)
            finally:
                cursor.close()

        name = f"{label!r} ({sql})" if label else sql
        return self._read_with(read, name, label, timeout, after, self._here(), own=True)

    async def _read_with(
        self,
        function: Callable[[sqlite3.Connection], T],
        name: str,
        label: Label,
        timeout: Seconds,
        after: After,
        here: Any,
        own: bool,
    ) -> T:
        if after is not None and isinstance(here, AsyncReader | Snapshot):
            here.lends().refuse_later(after)
        deadline = await self._after(after, timeout, label)
        if isinstance(here, TaskBlock | TaskSavepoint):
            block = here.block
            return await block.call(block.lends().read_with, function, deadline, until=deadline)
        if isinstance(here, AsyncReader):
            return await here._call(deadline, read_snapshot, self._gateway()._readers, function, name)
        if isinstance(here, WriteLoan) and here.is_of_function:  # whose thread this is
            return here.read_with(function, deadline)
        if isinstance(here, WriteLoan):
            return await self._in_pool(functools.partial(here.read_with, function, deadline), None)
        if here is not None:
            return await self._in_pool(functools.partial(here.call_with, function, name, deadline), None)
        borrowing, readers = Borrowing(name), self._gateway()._readers
        await self._borrow(borrowing, deadline)
        call = functools.partial(readers.call_and_return, borrowing, function, name, own=own)
        return await self._in_pool(call, borrowing, returns=True)

    async def _after(self, after: After, timeout: Seconds, label: Label) -> float:
        """Wait until the write ``after`` is committed; returns the deadline of the read."""
        check_label(label)
        check_timeout(timeout)
        deadline = math.inf if timeout is None else monotonic() + timeout
        if after is not None:
            state = self._gateway()._state
            self._gateway().check_after(after)
            if not after.done():
                state.refuse_endless_wait("read(after=…)", awaits=True)
                with after.arrival() as future:
                    async with self._within(future, timeout):
                        await future
                if not after.done():
                    raise ReadTimeoutError(
                        f"{after.describe()} was not committed within {timeout} s: {state.describe()}"
                    )
            after.result()
        return deadline

    async def _borrow(self, borrowing: Borrowing, deadline: float) -> Reader:
        """A connection of the pool, whose time is limited."""
        readers = self._gateway()._readers
        until = monotonic() + HELD_BACK
        while readers.holds_back and monotonic() < until:
            await asyncio.sleep(HELD_BACK / 50)
            borrowing.since = monotonic()
        borrowing.wakeup = asyncio.get_running_loop().create_future()
        try:
            if not readers.take_or_line_up(borrowing):
                async with self._within(borrowing.wakeup, seconds_until(deadline)):
                    await borrowing.wakeup
                readers.refuse_unless_granted(borrowing)
            if borrowing.reader is None:
                return await self._in_pool(lambda: readers.reader_of(borrowing, deadline), borrowing)
            return readers.reader_of(borrowing, deadline)
        except BaseException:
            readers.end(borrowing)
            raise

    async def _in_pool(self, call: Callable[[], T], borrowing: Borrowing | None, *, returns: bool = False) -> T:
        """Call in one of the threads that read; ``returns``: the call ends ``borrowing``, unless it is never made."""
        db = self._db
        assert db is not None
        try:
            with self._lock:  # or else the close of another loop may shut it down just before
                if self._pool is None:  # or no longer: a block may still be open when the gateway is closed
                    self._pool = ThreadPoolExecutor(db._readers.size, f"{db._loop.label}-reader")
                future = self._pool.submit(call_in_pool, call, borrowing, self._pool, db._state)
        except BaseException:
            if borrowing is not None and returns:
                db._readers.end(borrowing)
            raise
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            if not future.cancel():
                if borrowing is not None:
                    db._readers.expire(borrowing)  # a statement that runs ends soon
                if not returns:
                    await until_done(future)
            elif borrowing is not None and returns:
                db._readers.end(borrowing)
            raise
        finally:
            del future  # an error's traceback would hold it, and it holds the error

    # Operations -------------------------------------------------------------------------------------------------------

    async def backup(
        self,
        target: str | bytes | os.PathLike[Any] | sqlite3.Connection,
        *,
        progress: Callable[[int, int, int], object] | None = None,
        pages: int = -1,
    ) -> None:
        """As ``DbWriter.backup``, in a thread, where ``progress`` is called too. Cancelled, it goes on to its end."""
        db = self._gateway()
        db._state.refuse_endless_wait("backup", awaits=True)
        place = called_from(sys._getframe(1))
        is_open = isinstance(target, sqlite3.Connection)
        if is_open:  # sqlite3 lets the thread that made it ask it, and any thread write the copy into it
            check_backup(target, progress, pages)

        def back_up() -> None:
            if not is_open:
                check_backup(target, progress, pages)
            db._back_up(target, progress, pages, place)

        await in_thread(back_up)

    @property
    def path(self) -> str:
        """As ``DbWriter.path``."""
        return self._gateway().path

    @property
    def journal_mode(self) -> str:
        """As ``DbWriter.journal_mode``."""
        return self._gateway().journal_mode

    @property
    def health(self) -> str:
        """As ``DbWriter.health``."""
        return self._gateway().health

    @property
    def closed(self) -> bool:
        """Whether new work is refused."""
        return self._db is None or self._is_closed or self._db.closed

    def in_writer(self) -> bool:
        """Whether the running task is inside a ``transaction()`` block."""
        return self._db is not None and self._db._state.is_in_writer()

    def stats(self) -> Stats:
        """As ``DbWriter.stats``."""
        return self._gateway().stats()

    def _gateway(self) -> DbWriter:
        if self._db is None:
            raise WriterClosedError("the gateway is closed" if self._is_closed else NOT_OPEN)
        if self._is_closed and self._is_wrapped:
            raise WriterClosedError("the gateway is closed")
        return self._db

    def _deadlines_of(self, loop: asyncio.AbstractEventLoop) -> Deadlines:
        known, deadlines = self._last_deadlines
        if known is not loop:
            deadlines = self._deadlines.setdefault(loop, Deadlines())
            self._last_deadlines = loop, deadlines
        return deadlines

    @contextlib.asynccontextmanager
    async def _within(self, future: asyncio.Future[None], timeout: Seconds) -> AsyncIterator[None]:
        """Resolve ``future`` after ``timeout`` seconds, if nobody does so earlier."""
        if timeout is None:
            yield
            return
        deadlines = self._deadlines_of(future.get_loop())
        deadlines.add(future, timeout)
        try:
            yield
        finally:
            deadlines.remove(future)
