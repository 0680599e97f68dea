"""AsyncDbWriter: the gateway for asyncio. Nothing here blocks the event loop.

A write is a job with a future of the loop in place of a lock, so a batch wakes each loop once. A read runs in a small
pool of threads. A ``transaction()`` block's statements run on the writer thread, one after the other.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import sqlite3
import threading
import weakref
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, Literal, Self, TypeVar, overload

from onewriter.base.arguments import check_timeout
from onewriter.base.call_site import called_from, caller
from onewriter.base.scopes import enclosing
from onewriter.base.strict import Strict
from onewriter.base.tally import CloseReport, Stats
from onewriter.base.task_waits import waits_of, within
from onewriter.base.waiting import seconds_until
from onewriter.core import OWN_READER, VERSION, After, Core, Function, Label, Seconds, Steps, core_of, deadline_of
from onewriter.ends.backup import check_backup
from onewriter.errors import ReentrantWriteError, WriterClosedError
from onewriter.events import announce
from onewriter.gateway import DbWriter
from onewriter.options import Options
from onewriter.read.claim import reader_label
from onewriter.read.read import Read, read_of, sql_read
from onewriter.read.reader import FETCHONE
from onewriter.sqlite.parameters import Params
from onewriter.sqlite.result import Result, first_value
from onewriter.tasks.block import TaskBlock, TaskSavepoint
from onewriter.tasks.calls import Turn, and_the_log, call_and_join, in_thread
from onewriter.tasks.collected import wait_for_collected
from onewriter.tasks.coroutine_functions import mark_coroutine_functions
from onewriter.tasks.entry import TaskEntry
from onewriter.tasks.reader import AsyncReader, ReaderEntry, TaskReads
from onewriter.tasks.transaction import AsyncTransaction
from onewriter.tasks.watch import AsyncWatch
from onewriter.write.checkpoint import Checkpoint
from onewriter.write.migrate import Migration
from onewriter.write.nested import perform_inside
from onewriter.write.ticket import Job, Ticket

T = TypeVar("T")
NOT_OPEN = "the gateway is not open: use `async with AsyncDbWriter(…)` or `await db.open()`"


@mark_coroutine_functions
class AsyncDbWriter(Strict):
    """A ``DbWriter`` for asyncio: the same names and arguments, awaitable.

    Opens at ``async with`` or ``await db.open()``. One object may be used by several loops and their tasks. Arguments
    and errors are those of ``DbWriter``; a call belongs to the transaction or reader block of the task in which it is
    *called*, wherever it is awaited.

    Locks: _lock guards _is_closed, _reads and, until it is open, _opened. Nothing waits while it is held.
    """

    def __init__(self, path: str | bytes | os.PathLike[Any], **options: Any) -> None:
        if options.get("inline"):
            raise ValueError("inline=True runs jobs in the calling thread, the loop's: use a temporary file")
        self._make: Callable[[], Core] = lambda: _open(path, Options(**options))
        self._opened: Core | None = None
        self._wrapped: DbWriter | None = None
        self._prepare()

    @classmethod
    def wrap(cls, db: DbWriter) -> Self:
        """Use an open ``DbWriter``, and leave it open."""
        core = core_of(db)
        if core is None:
            raise TypeError(f"wrap takes a DbWriter, not {type(db).__name__}")
        if core.options.inline:
            raise ValueError("an inline DbWriter runs jobs in the calling thread, which is the event loop's")
        self = cls.__new__(cls)
        self._opened = core
        self._wrapped = db  # kept: it would close when it is collected
        self._prepare()
        return self

    def _prepare(self) -> None:
        self._is_closed, self._lock = False, threading.Lock()
        self._opening = Turn()  # of the tasks that open it
        self._left: list[threading.Thread] = []  # that open it for tasks which were cancelled
        self._reads: TaskReads | None = None

    async def open(self) -> Self:
        """Open the database; raises what ``DbWriter`` raises."""
        if self._is_closed:
            raise WriterClosedError("the gateway is closed: open a new AsyncDbWriter")
        if self._opened is None:
            mine = await self._opening.acquire()
            try:
                if self._opened is None and not self._is_closed:  # if another task's opening fails, this one tries
                    await self._open()
            finally:
                self._opening.release(mine)
        self._core().queue.check_open()
        return self

    async def _open(self) -> None:
        # Without a call, as that of ``__setattr__``: Ctrl-C comes as one begins.
        self.__dict__["_opened"] = core = await in_thread(self._make, _close, self._left)
        with self._lock:
            if self._is_closed:  # meanwhile
                self._opened = None
        if self._opened is None:
            await in_thread(lambda: _close(core), left=self._left)

    async def __aenter__(self) -> Self:
        return await self.open()

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __enter__(self, *_: object) -> None:
        raise TypeError("AsyncDbWriter needs `async with`; `with` goes with DbWriter")

    __exit__ = __enter__

    def __reduce__(self) -> Any:
        raise TypeError("an AsyncDbWriter cannot be copied or pickled: share it, or open one in each process")

    def __del__(self) -> None:
        core: Core | None = getattr(self, "_opened", None)
        if core is not None and self._wrapped is None and not core.is_closed:
            core.drop(self)

    def __repr__(self) -> str:
        opened = self._opened
        return f"<AsyncDbWriter {'not open' if opened is None else opened.describe('DbWriter')}>"

    async def close(self, timeout: Seconds = None, *, drain: bool = True) -> CloseReport:
        """As ``DbWriter.close``. A wrapped DbWriter stays open."""
        check_timeout(timeout)
        with self._lock:
            core = self._opened
            self._is_closed = self._is_closed or core is None
        left, until = self._left, deadline_of(timeout)
        if core is None:
            return await in_thread(lambda: call_and_join(lambda: CloseReport(0, 0, 0, 0, ()), left, until))
        if not core.state.forked:
            await wait_for_collected(core.state)
            core.state.refuse_endless_wait("close", awaits=True, commits=False)
        if timeout is None and self._wrapped is None and core.state.is_inside_open():
            raise ReentrantWriteError(OWN_READER)
        with self._lock:
            self._is_closed = True
        try:
            if self._wrapped is not None:
                return core.report()
            return await in_thread(lambda: call_and_join(lambda: core.close(timeout, drain), left, until))
        finally:
            if self._reads is not None:
                self._reads.threads.shutdown()

    # Writes -----------------------------------------------------------------------------------------------------------

    @overload
    def run(
        self, sql: str, params: Params = (), /, *, label: Label = None, timeout: Seconds = 30.0
    ) -> Coroutine[Any, Any, Result]: ...
    @overload
    def run(
        self, fn: Function[T], /, *, label: Label = None, timeout: Seconds = 30.0, foreign_keys: bool | None = None
    ) -> Coroutine[Any, Any, T]: ...
    def run(
        self,
        what: str | Function[T],
        params: Params = (),
        /,
        *,
        label: Label = None,
        timeout: Seconds = 30.0,
        foreign_keys: bool | None = None,
    ) -> Coroutine[Any, Any, Any]:
        """As ``DbWriter.run``. If cancelled before the job starts, it never runs; after that, it finishes."""
        return self._execute(self._core().job(what, params, label, foreign_keys, caller()), timeout)

    def run_many(
        self, sql: str, seq_of_params: Iterable[Params], /, *, label: Label = None, timeout: Seconds = 30.0
    ) -> Coroutine[Any, Any, Result]:
        """As ``DbWriter.run_many``."""
        return self._execute(self._core().many(sql, seq_of_params, label, caller()), timeout)

    def run_script(
        self, sql: str, /, *, label: Label = None, timeout: Seconds = 30.0, foreign_keys: bool | None = None
    ) -> Coroutine[Any, Any, None]:
        """As ``DbWriter.run_script``."""
        return self._execute(self._core().script(sql, label, foreign_keys, caller()), timeout)

    @overload
    def run_without_transaction(
        self, sql: str, params: Params = (), /, *, label: Label = None, timeout: Seconds = 30.0
    ) -> Coroutine[Any, Any, Result]: ...
    @overload
    def run_without_transaction(
        self, fn: Callable[[sqlite3.Connection], T], /, *, label: Label = None, timeout: Seconds = 30.0
    ) -> Coroutine[Any, Any, T]: ...
    def run_without_transaction(
        self,
        what: str | Callable[[sqlite3.Connection], T],
        params: Params = (),
        /,
        *,
        label: Label = None,
        timeout: Seconds = 30.0,
    ) -> Coroutine[Any, Any, Any]:
        """As ``DbWriter.run_without_transaction``; a function is called on the writer thread."""
        job = self._core().bare(what, params, label, caller())
        return self._execute(job, timeout, alone="run_without_transaction")

    def migrate(
        self, steps: Steps, *, label: Label = None, timeout: Seconds = 30.0, dry_run: bool = False
    ) -> Coroutine[Any, Any, int]:
        """As ``DbWriter.migrate``; functions are called on the writer thread.

        If it is cancelled, it stops after the step that is running.
        """
        check_timeout(timeout)
        core = self._core()
        core.state.refuse_endless_wait("migrate", awaits=True)
        return self._migrate(core.migration(steps, label, caller()), label, timeout, dry_run)

    async def _migrate(self, migration: Migration, label: Label, timeout: Seconds, dry_run: bool) -> int:
        until = deadline_of(timeout)
        version: int = await self.read_value(VERSION, label=label, timeout=timeout)
        while not (migration.is_at_end(version) or dry_run):
            version = await self._execute(migration.job(), seconds_until(until), alone="migrate")
        return version

    @overload
    def enqueue(self, sql: str, params: Params = (), /, *, label: Label = None) -> Ticket[Result]: ...
    @overload
    def enqueue(self, fn: Function[T], /, *, label: Label = None) -> Ticket[T]: ...
    def enqueue(self, what: str | Function[T], params: Params = (), /, *, label: Label = None) -> Ticket[Any]:
        """As ``DbWriter.enqueue``, but never blocks: raises QueueFullError if there is no room. Not a coroutine."""
        core = self._core()
        job = core.job(what, params, label, None, caller(), bounded=not core.state.would_deadlock_task())
        core.accept(job, 0.0)
        return job

    def enqueue_many(self, sql: str, seq_of_params: Iterable[Params], /, *, label: Label = None) -> Ticket[Result]:
        """As ``DbWriter.enqueue_many``, but never blocks: raises QueueFullError without room. Not a coroutine."""
        core = self._core()
        bounded = not core.state.would_deadlock_task()
        job = core.many(sql, seq_of_params, label, caller(), bounded)
        core.accept(job, 0.0)
        return job

    @overload
    def enqueue_wait(
        self, sql: str, params: Params = (), /, *, label: Label = None, timeout: Seconds = 30.0
    ) -> Coroutine[Any, Any, Ticket[Result]]: ...
    @overload
    def enqueue_wait(
        self, fn: Function[T], /, *, label: Label = None, timeout: Seconds = 30.0
    ) -> Coroutine[Any, Any, Ticket[T]]: ...
    def enqueue_wait(
        self, what: str | Function[T], params: Params = (), /, *, label: Label = None, timeout: Seconds = 30.0
    ) -> Coroutine[Any, Any, Ticket[Any]]:
        """As ``enqueue``, but waits for room, at most ``timeout`` seconds."""
        check_timeout(timeout)
        return self._enqueue(self._core().job(what, params, label, None, caller(), bounded=True), timeout)

    async def _enqueue(self, job: Job[T], timeout: Seconds) -> Ticket[T]:
        core = self._core()
        announce(core.state, core.options.on_event, job, waits=False)
        if core.state.would_deadlock_task():  # its block keeps the writer from making room
            core.queue.put_unbounded(job)
            return job
        queue = core.queue
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiter = queue.line_up(job, weakref.ref(future))
        if waiter is None:
            return job
        try:
            with within(future, timeout):
                await future
        except asyncio.CancelledError as error:
            queue.leave_line(waiter)
            if not job.cancel():
                error.add_note(f"onewriter: job {job.describe()} had started in that moment, and goes on to its end")
            raise
        queue.leave_line(waiter)
        if not waiter.accepted:
            raise queue.full_error(job, timeout)
        return job

    def flush(self, timeout: Seconds = None) -> Coroutine[Any, Any, None]:
        """As ``DbWriter.flush``."""
        core = self._core()
        core.state.refuse_endless_wait("flush", awaits=True)
        check_timeout(timeout)
        job = core.flush(caller())
        return and_the_log(lambda: self._wait_for(core, job, timeout), core.state, timeout)

    def checkpoint(
        self, mode: Literal["PASSIVE", "FULL", "RESTART", "TRUNCATE"] = "TRUNCATE", *, timeout: Seconds = 30.0
    ) -> Coroutine[Any, Any, Checkpoint]:
        """As ``DbWriter.checkpoint``."""
        return self._execute(self._core().checkpoint(mode, caller()), timeout, alone="checkpoint")

    def _execute(self, job: Job[T], timeout: Seconds, alone: str = "") -> Coroutine[Any, Any, T]:
        if timeout != 30.0:
            check_timeout(timeout)
        core = self._core()
        if enclosing() is not None:
            here = core.state.here()
            if isinstance(here, TaskBlock | TaskSavepoint):
                if alone or job.foreign_keys is not None:
                    core.state.refuse_endless_wait(alone or "foreign_keys=", awaits=True)
                return here.block.call(perform_inside, here.lends(), job)
        return self._wait_for(core, job, timeout)

    async def _wait_for(self, core: Core, job: Job[T], timeout: Seconds) -> T:
        loop = asyncio.get_running_loop()
        if core.state.would_deadlock_task():  # inside a sync block, say, whose end waits for this
            core.state.refuse_endless_wait(f"waiting for job {job.describe()}", awaits=True)
        future: asyncio.Future[None] = loop.create_future()
        job.expect_outcome(weakref.ref(future))
        core.submit(job, None)
        waits, timer = waits_of(loop), None
        try:
            timer = waits.add(future, timeout)
            await future
        except asyncio.CancelledError:
            if not job.cancel():
                job.stop_waiting_for()
            raise
        finally:
            waits.remove(future, timer)
        if not job.done():
            core.give_up(job, timeout)
        try:
            return job.outcome()
        finally:
            del job  # an error's traceback would hold it, and it holds the error

    def transaction(
        self, *, label: Label = None, timeout: Seconds = 30.0, max_hold: float | None = None
    ) -> contextlib.AbstractAsyncContextManager[AsyncTransaction]:
        """As ``DbWriter.transaction``, for ``async with``.

        A cancelled block is rolled back, and its statement interrupted. If its COMMIT has begun, the block waits for
        that; a cancellation that came meanwhile is raised after it, with a note that gives the outcome.
        """
        core = self._core()
        block = TaskBlock(core.state, label, core.check_block(label, timeout, max_hold), caller())
        return TaskEntry(block, timeout, core.submit)

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
        params: Params = (),
        /,
        *,
        label: Label = None,
        timeout: Seconds = 30.0,
        after: After = None,
    ) -> Coroutine[Any, Any, Any]:
        """As ``DbWriter.read``; a function runs in a thread."""
        return self._read(read_of(what, params, label), timeout, after)

    def read_one(
        self, sql: str, params: Params = (), /, *, label: Label = None, timeout: Seconds = 30.0, after: After = None
    ) -> Coroutine[Any, Any, Any]:
        """As ``DbWriter.read_one``."""
        return self._read(sql_read(sql, params, FETCHONE, label), timeout, after)

    def read_value(
        self, sql: str, params: Params = (), /, *, label: Label = None, timeout: Seconds = 30.0, after: After = None
    ) -> Coroutine[Any, Any, Any]:
        """As ``DbWriter.read_value``."""
        return self._read(sql_read(sql, params, first_value, label), timeout, after)

    def reader(
        self, *, label: Label = None, timeout: Seconds = 30.0, after: After = None
    ) -> contextlib.AbstractAsyncContextManager[AsyncReader]:
        """As ``DbWriter.reader``, for ``async with``."""
        place = reader_label(label, caller())
        return ReaderEntry(self._task_reads(), place, functools.partial(self._after, after, timeout))

    @overload
    def watch(
        self, sql: str, params: Params = (), /, *, label: Label = None, every: float = 0.05
    ) -> AsyncWatch[list[Any]]: ...
    @overload
    def watch(
        self, fn: Callable[[sqlite3.Connection], T], /, *, label: Label = None, every: float = 0.05
    ) -> AsyncWatch[T]: ...
    def watch(
        self,
        what: str | Callable[[sqlite3.Connection], T],
        params: Params = (),
        /,
        *,
        label: Label = None,
        every: float = 0.05,
    ) -> AsyncWatch[Any]:
        """As ``DbWriter.watch``, for ``async with`` and ``async for``; a function runs in a thread."""
        core = self._core()
        return AsyncWatch(core.live, *core.watched(what, params, label), every, self, self._task_reads())

    def _read(self, read: Read[T], timeout: Seconds, after: After) -> Coroutine[Any, Any, T]:
        reads = self._task_reads()
        return self._read_there(read, reads, reads.here(), timeout, after)

    async def _read_there(self, read: Read[T], reads: TaskReads, here: Any, timeout: Seconds, after: After) -> T:
        return await reads.read(read, here, await self._after(after, timeout, here))

    def _task_reads(self) -> TaskReads:
        core = self._core()
        if self._reads is None:
            with self._lock:
                if self._reads is None:
                    self._reads = TaskReads(core.pool, core.state, f"{core.label}-reader")
        return self._reads

    async def _after(self, after: After, timeout: Seconds, here: Any) -> float:
        """Wait until the write ``after`` is committed; returns the deadline of the read."""
        if timeout != 30.0:
            check_timeout(timeout)
        deadline = deadline_of(timeout)
        if after is not None:
            core = self._core()
            core.check_after(after, here)
            if not after.done():
                core.state.refuse_endless_wait("read(after=…)", awaits=True)
                with after.arrival(timeout) as future:
                    await future
                if not after.done():
                    raise core.committed_late(after, timeout)
            after.result()
        return deadline

    # Operations -------------------------------------------------------------------------------------------------------

    async def backup(
        self,
        target: str | bytes | os.PathLike[Any] | sqlite3.Connection,
        *,
        progress: Callable[[int, int, int], object] | None = None,
        pages: int = -1,
    ) -> None:
        """As ``DbWriter.backup``, in a thread, where ``progress`` is called too. Cancelled, it goes on to its end."""
        core = self._core()
        core.state.refuse_endless_wait("backup", awaits=True, commits=False)
        place = called_from(caller())
        is_open = isinstance(target, sqlite3.Connection)
        if is_open:  # sqlite3 lets the thread that made it ask it, and any thread write the copy into it
            check_backup(target, progress, pages)

        def back_up() -> None:
            if not is_open:
                check_backup(target, progress, pages)
            core.back_up(target, progress, pages, place)

        await in_thread(back_up)

    @property
    def path(self) -> str:
        """As ``DbWriter.path``."""
        return self._core().path

    @property
    def journal_mode(self) -> str:
        """As ``DbWriter.journal_mode``."""
        return self._core().options.journal_mode

    @property
    def health(self) -> str:
        """As ``DbWriter.health``."""
        return self._core().writer.health

    @property
    def closed(self) -> bool:
        """Whether new work is refused."""
        return self._opened is None or self._is_closed or self._opened.is_closed

    def in_writer(self) -> bool:
        """Whether the running task is inside a ``transaction()`` block."""
        return self._opened is not None and self._opened.state.is_in_writer()

    def stats(self) -> Stats:
        """As ``DbWriter.stats``."""
        return self._core().stats()

    def _core(self) -> Core:
        core = self._opened
        if core is None or (self._is_closed and self._wrapped is not None):
            raise WriterClosedError("the gateway is closed" if self._is_closed else NOT_OPEN)
        return core


def _open(path: object, options: Options) -> Core:
    core = Core(path, options)
    core.open()
    return core


def _close(core: Core) -> None:
    core.close(None, drain=True)
