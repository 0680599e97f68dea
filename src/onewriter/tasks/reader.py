"""TaskReads: the reads of tasks. AsyncReader: a task's ``reader()`` block."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
import sqlite3
import types
import weakref
from _thread import start_new_thread
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from time import monotonic
from typing import Any, TypeVar

from onewriter.base.arguments import check_sql
from onewriter.base.scopes import enclosing
from onewriter.base.state import State
from onewriter.base.task_waits import new_signal, within
from onewriter.base.waiting import seconds_until
from onewriter.errors import ReadTimeoutError
from onewriter.read.claim import Claim, new_claim
from onewriter.read.pool import ReaderPool
from onewriter.read.read import Read
from onewriter.read.reader import Reader, Snapshot, ended_error
from onewriter.sqlite.parameters import Params, capture
from onewriter.sqlite.result import Result
from onewriter.sqlite.retry import is_interrupted
from onewriter.sqlite.statement import Parameters
from onewriter.tasks.block import TaskBlock, TaskSavepoint
from onewriter.tasks.call import Call
from onewriter.tasks.calls import Turn
from onewriter.tasks.coroutine_functions import mark_coroutine_functions
from onewriter.tasks.threads import ReadingThreads
from onewriter.write.loan import WriteLoan

T = TypeVar("T")
STREAMED = 256  # rows that a stream fetches at a time


class TaskReads:
    """The reads of tasks: they wait for a connection in their loop, and use it in one of a few threads.

    Nothing of SQLite is called in a loop's thread.
    """

    def __init__(self, pool: ReaderPool, state: State, name: str) -> None:
        self._pool = pool
        self.state = state
        self.threads = ReadingThreads(pool.size, name, state)
        pool.used_by.add(weakref.ref(self.threads, pool.used_by.discard))

    def here(self) -> Any:
        """The innermost block, job or reader that the caller is inside: its reads belong to it."""
        return None if enclosing() is None else self.state.scopes.innermost()

    async def read(self, read: Read[T], here: Any, until: float) -> T:
        """Read in what the caller was inside, or with a connection of the pool."""
        if here is None:
            return await self.use(read.label, read.alone, until)
        if isinstance(here, TaskBlock | TaskSavepoint):
            return await here.block.call(read.inside, here.block.lends(), until, until=until)
        if isinstance(here, AsyncReader):
            return await here.call(until, read.inside, here.lends(), until)
        if isinstance(here, WriteLoan) and here.is_of_function:  # whose thread this is
            return read.inside(here, until)
        return await self.call(read.inside, here, until)

    async def use(self, label: str, function: Callable[[Reader], T], until: float) -> T:
        """Wait for a connection of the pool, and call ``function`` with it in a thread."""
        claim = new_claim(label, until)
        try:
            await self._admitted(claim)
            return await self.call(self._pool.lend, claim, function, claim=claim, begins=True, waits=False)
        except BaseException:
            self._end_if_lost(claim)
            raise

    async def reader(self, claim: Claim) -> AsyncReader:
        """Wait for a connection of the pool with a snapshot."""
        snapshot, end_lost = None, functools.partial(self.end_lost, claim, None)
        try:
            await self._admitted(claim)
            try:
                snapshot = await self.call(self._begin, claim, claim=claim, begins=True)
            except asyncio.CancelledError:
                claim.end_lost = end_lost  # at once: Ctrl-C may come behind any call
                await self.end(claim, None)  # it has begun all the same
                raise
            return AsyncReader(self, snapshot, claim)
        except BaseException:
            if snapshot is not None:
                claim.end_lost = functools.partial(self.end_lost, claim, snapshot)
            self._end_if_lost(claim)
            raise

    def _end_if_lost(self, claim: Claim) -> None:
        """Ctrl-C came where nothing else gives it back: behind the admission, or before the reader is there."""
        if claim.end_lost is not None and self._pool.is_out(claim):
            claim.end_lost()

    async def _admitted(self, claim: Claim) -> None:
        """Wait until it is admitted."""
        try:
            loop = asyncio.get_running_loop()
            claim.loop, claim.end_lost = weakref.ref(loop), functools.partial(self.end_lost, claim, None)
            kept: list[asyncio.Future[None]] = []
            if not self._pool.ask(claim, functools.partial(new_signal, kept)):
                if claim.signal is not None:
                    with within(kept[0], seconds_until(claim.deadline)):
                        await kept[0]
                self._pool.check_admitted(claim)
        except BaseException:
            claim.end_lost = None
            self._end_unused(claim)
            raise

    async def call(
        self,
        function: Callable[..., T],
        *args: Any,
        claim: Claim | None = None,
        begins: bool = False,
        waits: bool = True,
    ) -> T:
        """Have a thread call ``function``, and wait for what it returns. A cancellation ends the statement that runs.

        Args:
            claim: whose connection it uses.
            begins: it is the first to use the connection, and ends the claim if it fails.
            waits: a cancelled task waits for its end, before which the connection must not be given back.
        """
        call = Call(claim, function, *args)
        if claim is not None and begins:
            # Weakly: the pool has the claim, and would keep the task that waits for the call.
            claim.end_lost = functools.partial(self._end_lost_call, claim, weakref.ref(call), waits)
        try:
            self.threads.submit(call)
        except BaseException:  # what a signal handler raises may come when a thread has it already
            if claim is not None and begins:
                self._end_unused(claim) if call.withdraw() else self._end_lost_call(claim, lambda: call, waits)
            raise
        try:
            try:
                return await call
            except asyncio.CancelledError:
                if not call.withdraw():
                    if claim is not None:
                        # At once, if nothing else uses the connection: an interrupt ends all that is half read there.
                        self.expire(claim, 0.0 if begins else monotonic())
                    if waits:
                        await call.ended()
                elif claim is not None and begins:
                    self._end_unused(claim)
                raise
        except asyncio.CancelledError:
            raise
        except BaseException:  # the task is collected or interrupted, and waits for nothing; or the call has failed
            if claim is not None and begins and self._pool.is_out(claim):
                self._end_lost_call(claim, lambda: call, waits)
            raise
        finally:
            if claim is not None and begins:
                claim.end_lost = None  # which refers to it

    def _end_lost_call(self, claim: Claim, known: Callable[[], Call[Any] | None], waits: bool) -> None:
        """No task waits for the call that begins to use its connection."""
        claim.thread = 0  # nor does who waits for the connection, in that thread, wait for itself
        call = known()
        if call is None:  # the task was collected, and has ended it
            return
        if call.withdraw():
            self.end_lost(claim, None)
        elif waits:  # or else it gives the connection back itself
            call.then = functools.partial(self.end_lost, claim, None)
            if call.is_done:  # perhaps before it was told so
                call.then()

    def expire(self, claim: Claim, since: float = 0.0) -> None:
        """Have the statement that runs there end soon; by an interrupt, if it has not ended by itself soon after
        ``since``."""
        self._pool.clock.limit(claim, since)

    def lift(self, claim: Claim) -> None:
        """Remove the time limit for its next statements."""
        self._pool.clock.limit(claim, math.inf)

    async def end(self, claim: Claim, snapshot: Snapshot | None) -> asyncio.CancelledError | None:
        """Give back what a block has, in a thread, even if the task is cancelled; returns that cancellation."""
        if not self._pool.is_out(claim):
            return None
        try:
            call = Call(claim, self._finish, claim, snapshot)
            self.threads.submit(call)
        except RuntimeError:  # no loop runs here, or the interpreter ends: then this thread does it
            self._finish(claim, snapshot)
            return None
        cancelled = await call.ended()
        call.outcome()
        return cancelled

    def _begin(self, claim: Claim) -> Snapshot:
        """In a thread: open and pin its connection; without a snapshot, the claim is over."""
        try:
            reader = self._pool.reader_of(claim)
            reader.pin()
            self._pool.clock.watch(claim, math.inf)
            return Snapshot(reader)
        except BaseException:
            self._pool.end(claim)
            raise

    def _finish(self, claim: Claim, snapshot: Snapshot | None) -> None:
        """In a thread: end both."""
        try:
            if snapshot is not None:
                snapshot.end()
        finally:
            self._pool.end(claim)

    def _finish_lost(self, claim: Claim, snapshot: Snapshot | None) -> None:
        self.expire(claim)
        self._finish(claim, snapshot)

    def end_lost(self, claim: Claim, snapshot: Snapshot | None) -> None:
        """For a finalizer, which must not wait: end both, in a thread."""
        claim.thread = 0  # who waits for the connection, in whichever thread, does not wait for itself any more
        with contextlib.suppress(RuntimeError):  # the interpreter ends
            start_new_thread(self._finish_lost, (claim, snapshot))

    def _end_unused(self, claim: Claim) -> None:
        if not self._pool.end_unused(claim):
            try:
                start_new_thread(self._pool.end, (claim,))
            except RuntimeError:  # the interpreter ends
                self._pool.end(claim)


class ReaderEntry:
    """By which a task enters and leaves a ``reader()`` block. A class, as TaskEntry is."""

    _is_new = True
    _reader: AsyncReader | None = None  # as long as it is open
    _collected: weakref.finalize[Any, Any] | None = None  # drops it, once

    def __init__(self, reads: TaskReads, label: str, deadline: Callable[[Any], Awaitable[float]]) -> None:
        self._reads = reads
        self._label = label
        self._deadline = deadline  # waits for what a block there is to see; returns until when it may wait itself

    async def __aenter__(self) -> AsyncReader:
        if not self._is_new:
            raise RuntimeError("a reader() block is entered once: call reader() again for another one")
        self._is_new = False
        here = self._reads.here()
        until = await self._deadline(here)  # which waits for nothing inside another reader, whose snapshot stays
        reader = here if isinstance(here, AsyncReader) else await self._reads.reader(new_claim(self._label, until))
        reader.shares += 1
        try:
            self._collected = collected = weakref.finalize(self, reader.drop)
            collected.atexit = False
            self._scope = self._reads.state.scopes.enter(reader, writes=False)
            self._reader = reader
            return reader
        except BaseException:  # Ctrl-C
            (self._collected or reader.drop)()
            raise

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: types.TracebackType | None
    ) -> None:
        reader, self._reader, collected = self._reader, None, self._collected
        if reader is None or collected is None:
            raise RuntimeError("a reader() block that was not entered cannot be left: use `async with`")
        try:
            self._reads.state.scopes.leave(self._scope)
            was_left = collected.detach() is None  # by that
        except BaseException:  # Ctrl-C
            collected()
            raise
        if not was_left:
            await reader.leave(kind)


@mark_coroutine_functions
class AsyncReader:
    """What ``async with db.reader()`` returns: it runs SELECTs on one snapshot of the database."""

    def __init__(self, reads: TaskReads, snapshot: Snapshot, claim: Claim) -> None:
        self._reads = reads
        self._snapshot = snapshot
        self._claim = claim
        self._turn = Turn()
        self.shares = 0  # reader() blocks that have it, one in another; the last to be left ends it
        # Of a block whose loop was closed nothing runs any more, not even its end.
        self._lost = weakref.finalize(self, reads.end_lost, claim, snapshot)
        self._lost.atexit = False
        claim.end_lost = self._lost

    async def leave(self, kind: type[BaseException] | None) -> None:
        """One of the blocks that have it is left, by an error of this kind."""
        if self.shares == 1 and kind is not None and issubclass(kind, asyncio.CancelledError | GeneratorExit):
            self.expire()
        self.shares -= 1
        if self.shares:
            return
        try:
            if kind is GeneratorExit:  # perhaps the task is collected, and never goes on: it must not have the turn
                cancelled = await self._reads.end(self._claim, self._snapshot)
                self._lost.detach()
                if cancelled is not None:
                    raise cancelled
            else:
                await self.end()
        except BaseException:  # Ctrl-C, perhaps before its end
            self._lost()
            raise

    def drop(self) -> None:
        """The same, without waiting: a thread ends it."""
        self.shares -= 1
        if not self.shares:
            self._snapshot.is_left = True
            self._lost()

    def execute(self, sql: str, params: Params = (), /) -> Coroutine[Any, Any, Result]:
        """Run one SELECT and return all its rows."""
        return self.call(math.inf, fetch_result, self._snapshot, check_sql(sql), capture(sql, params))

    def stream(self, sql: str, params: Params = (), /) -> AsyncGenerator[Any, None]:
        """Run one SELECT and yield its rows in ``async for``; only a few hundred are in memory at a time.

        Other calls on this reader may run in between. If the loop is left early, the statement is closed at the end of
        the block at the latest; ``contextlib.aclosing`` closes it at once. A cancellation ends it, as any asynchronous
        generator: ``async for`` behind that gives no more rows.
        """
        return self._stream(check_sql(sql), capture(sql, params))

    async def _stream(self, sql: str, parameters: Parameters) -> AsyncGenerator[Any, None]:
        cursor = await self.call(math.inf, open_cursor, self._snapshot, sql, parameters)
        waits = is_collected = False
        try:
            while True:
                waits = True
                rows = await self.call(math.inf, cursor.fetchmany, STREAMED)
                waits = False
                if not rows:
                    break
                for row in rows:
                    yield row
        except GeneratorExit:
            is_collected = waits  # as its task, which cannot wait again: the end of the block closes the cursor
            raise
        finally:
            if not is_collected:
                with contextlib.suppress(sqlite3.ProgrammingError):  # the block has ended, and with it the cursor
                    await self.call(math.inf, cursor.close)

    async def call(self, until: float, function: Callable[..., T], *args: Any) -> T:
        turn = self._turn.take()
        if turn is None:
            try:
                async with asyncio.timeout(seconds_until(until)):
                    turn = await self._turn.acquire()
            except TimeoutError:
                text = f"{self._claim.label} is used by another task: the read did not begin in time"
                raise ReadTimeoutError(text) from None
        try:
            if self._snapshot.is_left:  # the connection may be another claim's
                raise ended_error()
            try:
                return await self._reads.call(function, *args, claim=self._claim)
            except asyncio.CancelledError:
                self._reads.lift(self._claim)  # a cancellation has ended this call, and not the next
                raise
        finally:
            self._turn.release(turn)

    def lends(self) -> Snapshot:
        """Where the blocking reads of its task go."""
        return self._snapshot

    def expire(self) -> None:
        """End the statement that runs, and let no other begin."""
        self._snapshot.is_left = True
        self._reads.expire(self._claim)

    async def end(self) -> None:
        """Wait for what another task still runs here; a cancellation expires that, and is raised after its end."""
        cancelled: asyncio.CancelledError | None = None
        turn = self._turn.take()
        while turn is None:
            try:
                turn = await self._turn.acquire()
            except asyncio.CancelledError as error:
                cancelled = error
                self.expire()
        try:
            cancelled = await self._reads.end(self._claim, self._snapshot) or cancelled
            self._lost.detach()
        finally:
            self._turn.release(turn)
        if cancelled is not None:
            raise cancelled


def open_cursor(snapshot: Snapshot, sql: str, parameters: Parameters) -> sqlite3.Cursor:
    return snapshot.to_lend.execute(sql, parameters)


def fetch_result(snapshot: Snapshot, sql: str, parameters: Parameters) -> Result:
    try:
        result: Result = snapshot.call(_select, snapshot.connection, sql, parameters)
    except sqlite3.Error as error:
        if snapshot.is_left and is_interrupted(error):
            raise ended_error() from error
        raise
    if snapshot.is_left:  # meanwhile: whether SQLite was interrupted in time is chance
        raise ended_error()
    return result


def _select(connection: sqlite3.Connection, sql: str, parameters: Parameters) -> Result:
    with contextlib.closing(connection.execute(sql, parameters)) as cursor:
        return Result(cursor.fetchall(), cursor.rowcount, None, cursor.description)
