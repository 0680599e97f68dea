"""TaskBlock and AsyncTransaction: a task's ``transaction()`` block, whose statements the writer thread runs."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import math
import queue
import threading
import types
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from time import monotonic
from typing import Any, TypeVar

from onewriter.block import LOOK, BlockFailedError
from onewriter.errors import ReadTimeoutError, TransactionClosedError
from onewriter.holder import Holder
from onewriter.job import Job, check_callback, resolve, seconds_until, wake
from onewriter.statement import Result, capture, capture_many, check_many
from onewriter.transaction import ENDED, TOO_LONG, Transaction, check_sql

T = TypeVar("T")

TASK_ENDED = "was open when its task or its loop ended"
LEFT = "was left by an error or a cancellation"


class TaskBlock(Job[None]):
    """A task's ``transaction()`` block: the writer thread begins, runs what the task sends, and commits or rolls back.

    Locks:   _lock guards _accepts and the putting of requests, so that none is left behind unanswered.
    Threads: made and ended on the loop's thread, performed on the writer's.
    """

    __slots__ = (
        "_accepts",
        "_changes",
        "_lock",
        "_requests",
        "failed",
        "granted",
        "innermost",
        "loop",
        "max_hold",
        "task",
        "thread",
        "transaction",
    )
    alone = lent = needs_savepoint = True
    loud = False  # its own task hears

    def __init__(self, holder: Holder, label: str | None, max_hold: float, frame: types.FrameType) -> None:
        super().__init__(holder, label or "transaction", frame, None)
        self.max_hold = max_hold
        self.loop = asyncio.get_running_loop()
        self.task = asyncio.current_task()
        self.thread = threading.get_ident()
        self.transaction: Transaction | None = None
        self.failed = False
        self.granted: asyncio.Future[None] = self.loop.create_future()
        self._waiters = [self.granted]
        self._lock = threading.Lock()
        self._accepts = True
        self.innermost: TaskSavepoint | None = None  # of the open ones
        self._changes: list[asyncio.Future[None]] = []
        self._requests: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()

    def perform(self, tx: Transaction) -> None:
        tx.limit(self.max_hold)
        tx.watch()  # so that the end of the block ends a statement too
        with self._holder.lock:
            others = [waiter for waiter in self._waiters or () if waiter is not self.granted]
            self.transaction, self._waiters = tx, others or None
            self._holder.block = self
        wake([self.granted])
        try:
            self._serve(tx, self.started_at + self.max_hold)
        finally:
            self._holder.block = None
            with self._lock:
                self._accepts = False
            tx.close(ENDED)
            while not self._requests.empty():  # they meet the closed transaction
                request = self._requests.get()
                if request is not None:
                    with contextlib.suppress(TransactionClosedError):
                        request()
        if self.failed:
            raise BlockFailedError

    def _serve(self, tx: Transaction, until: float) -> None:
        while True:
            try:
                request = self._requests.get(timeout=max(0.0, min(until - monotonic(), LOOK)))
            except queue.Empty:
                self._holder.warn_if_slow(monotonic())
                if monotonic() < until:
                    if not (self.loop.is_closed() or self.task is None or self.task.done()):
                        continue
                    tx.close(TASK_ENDED)
                else:
                    with self._lock:
                        if self._accepts:  # the task is still inside
                            self._holder.taken[self.task] = tx
                    tx.close(TOO_LONG)
                raise tx.closed_error() from None
            if request is None:
                return
            request()

    def end(self, failed: bool) -> None:
        """The block has ended; a statement that still runs is interrupted if it has failed."""
        self.failed = failed
        if failed and self.transaction is not None:
            self.transaction.close(LEFT)
        with self._lock:
            self._accepts = False
            self._holder.taken.pop(self.task, None)
            self._requests.put(None)
        self._look_again()

    def enter(self, savepoint: TaskSavepoint) -> None:
        self.innermost = savepoint

    def leave(self, savepoint: TaskSavepoint) -> None:
        """It has ended: whoever waits for that looks again."""
        savepoint.is_open = False
        self.innermost = open_one(self.innermost)
        self._look_again()

    def _look_again(self) -> None:
        changes, self._changes = self._changes, []
        resolve(changes)

    async def until_innermost(self, savepoint: TaskSavepoint | None) -> None:
        """Wait until no task has a savepoint open inside ``savepoint``: they end in the order of a stack."""
        while self.innermost is not open_one(savepoint) and self._accepts:
            change: asyncio.Future[None] = self.loop.create_future()
            self._changes.append(change)
            await change

    async def ended(self) -> asyncio.CancelledError | None:
        """Wait until it is committed or rolled back, even if the task is cancelled; returns that cancellation."""
        cancelled = None
        while not self.done():
            try:
                with self.arrival() as future:
                    await future
            except asyncio.CancelledError as error:
                cancelled = error
        return cancelled

    def send(self, function: Callable[..., object], *args: Any) -> None:
        """Have the writer thread call ``function``, after what was sent earlier."""
        with self._lock:
            if not self._accepts:
                raise self.closed_error()
            self._requests.put(lambda: function(*args))

    def closed_error(self) -> Exception:
        assert self.transaction is not None
        return self.transaction.closed_error()

    async def call(self, function: Callable[..., T], *args: Any, until: float = math.inf) -> T:
        """The same, and wait for what it returns; if it has not begun ``until`` then, it never does."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        outcome: list[Any] = []
        claim = threading.Lock()  # taken once, by who begins it or who gives up

        def request() -> None:
            if future.cancelled() or not claim.acquire(blocking=False):
                return
            try:
                outcome[:] = (function(*args), None)
            except BaseException as error:
                outcome[:] = (None, error)
            wake([future])

        def give_up() -> None:
            if claim.acquire(blocking=False):
                text = f"{self.describe()} is used by another task: the read did not begin in time"
                outcome[:] = (None, ReadTimeoutError(text))
                resolve([future])

        self.send(request)
        left = seconds_until(until)
        timer = None if left is None else loop.call_later(left, give_up)
        try:
            await future
        finally:
            if timer is not None:
                timer.cancel()
        result, error = outcome
        if error is not None:
            try:
                raise error
            finally:
                del error, outcome
        return result  # type: ignore[no-any-return]


class TaskSavepoint:
    """A savepoint of a task, as the tasks of its block see it."""

    def __init__(self, block: TaskBlock, outer: TaskSavepoint | None) -> None:
        self.block = weakref.ref(block)
        self.outer = outer
        self.is_open = True


def open_one(savepoint: TaskSavepoint | None) -> TaskSavepoint | None:
    """``savepoint``, or the innermost around it that is still open."""
    while savepoint is not None and not savepoint.is_open:
        savepoint = savepoint.outer
    return savepoint


# Those that the running task is in, of all blocks: its own, and those in which the task that made it was then.
_savepoints: contextvars.ContextVar[tuple[TaskSavepoint, ...]] = contextvars.ContextVar("savepoints", default=())


def savepoint_here(block: TaskBlock) -> TaskSavepoint | None:
    """The innermost of ``block`` that the running task is in."""
    return next((one for one in reversed(_savepoints.get()) if one.block() is block), None)


class AsyncTransaction:
    """What ``async with db.transaction()`` gives: a ``Transaction`` whose statements run on the writer thread.

    Tasks that share one are served one after the other.
    """

    def __init__(self, block: TaskBlock, transaction: Transaction) -> None:
        self._block = block
        self._transaction = transaction

    @property
    def label(self) -> str:
        """The block's label."""
        return self._block.label

    def execute(self, sql: str, params: Any = (), /) -> Coroutine[Any, Any, Result]:
        """As ``Transaction.execute``."""
        return self._block.call(self._transaction.statement, check_sql(sql), capture(params))

    def executemany(self, sql: str, seq_of_params: Iterable[Any], /) -> Coroutine[Any, Any, Result]:
        """As ``Transaction.executemany``."""
        check_many(check_sql(sql))
        return self._block.call(self._transaction.statement_many, sql, capture_many(seq_of_params))

    def executescript(self, sql: str, /) -> Coroutine[Any, Any, None]:
        """As ``Transaction.executescript``."""
        return self._block.call(self._transaction.executescript, check_sql(sql))

    @contextlib.asynccontextmanager
    async def savepoint(self) -> AsyncIterator[None]:
        """A part of the transaction that is undone alone if the ``async with`` block raises.

        Tasks that share the transaction have their savepoints one after the other; those of a task that was made inside
        a savepoint are inside it.
        """
        block, outside = self._block, _savepoints.get()
        outer = savepoint_here(block)
        await block.until_innermost(outer)
        mine, part = TaskSavepoint(block, open_one(outer)), self._transaction.savepoint()
        block.enter(mine)
        _savepoints.set((*outside, mine))
        try:
            try:
                await block.call(part.__enter__)
                yield
                await block.until_innermost(mine)
            except BaseException as error:
                with contextlib.suppress(TransactionClosedError):  # whose end has undone all
                    block.send(_leave, part, error)
                raise
            await _leave_well(block, part)
        finally:
            block.leave(mine)
            _savepoints.set(outside)

    def on_commit(self, fn: Callable[[], object], /) -> None:
        """Call ``fn()`` once, on the loop, after COMMIT. Not if the transaction is rolled back."""
        self._block.send(self._transaction.on_commit, _callable(fn))

    def on_rollback(self, fn: Callable[[], object], /) -> None:
        """Call ``fn()`` once, on the loop, after the transaction, if this part of it was rolled back."""
        self._block.send(self._transaction.on_rollback, _callable(fn))


async def _leave_well(block: TaskBlock, savepoint: contextlib.AbstractContextManager[None]) -> None:
    """Keep what the savepoint has done; if the task is cancelled before that is begun, undo it instead."""
    outcome: asyncio.Future[None] = block.loop.create_future()
    failures: list[BaseException] = []

    def leave() -> None:
        if outcome.cancelled():
            _leave(savepoint, asyncio.CancelledError())
            return
        try:
            savepoint.__exit__(None, None, None)
        except BaseException as error:
            failures.append(error)
        wake([outcome])

    block.send(leave)
    await outcome
    if failures:
        raise failures.pop()


def _leave(savepoint: contextlib.AbstractContextManager[None], error: BaseException) -> None:
    """On the writer thread: what the savepoint raises again there is the task's own error."""
    with contextlib.suppress(BaseException):
        savepoint.__exit__(type(error), error, error.__traceback__)


def _callable(fn: Callable[[], object]) -> Callable[[], object]:
    check_callback("the callback", fn)
    return fn
