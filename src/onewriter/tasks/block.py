"""TaskBlock: a task's ``transaction()`` block, whose statements the writer thread runs."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
import threading
import types
import weakref
from collections.abc import Callable
from time import monotonic
from typing import Any, TypeVar

from onewriter.base.arguments import check_callback
from onewriter.base.scopes import running_task
from onewriter.base.state import State
from onewriter.base.task_waits import waits_of
from onewriter.base.waiting import Signal, is_over, seconds_until, wake
from onewriter.errors import ReadTimeoutError, TransactionClosedError
from onewriter.tasks.call import Call
from onewriter.write.block import COLLECTED, Block
from onewriter.write.loan import ENDED, WriteLoan

T = TypeVar("T")
LOOK = 0.05  # seconds between two looks at whether the loop is closed
LOOP_CLOSED = "was open when its loop was closed or dropped"
LEFT = "was left by an error or a cancellation"


class TaskBlock(Block):
    """A block whose statements the writer thread runs, as tasks send them.

    Locks:   _lock guards _accepts, _changes, _is_kept, innermost and the putting of requests, so that each gets an
             answer.
    Threads: made on a loop's thread, performed on the writer's, used and ended on that of any loop.
    """

    __slots__ = ("_accepts", "_changes", "_is_kept", "_lock", "entry", "innermost")

    def __init__(self, state: State, label: str | None, max_hold: float, frame: types.FrameType) -> None:
        super().__init__(state, label, max_hold, frame)
        self._lock = threading.RLock()  # a task that is collected while its thread is inside may leave it
        self._accepts = True
        self._is_kept = False  # left well, and about to be committed
        self.entry: Callable[[], object] = object  # by which it is left, or None: that is collected
        self.innermost: TaskSavepoint | None = None  # of the open ones
        self._changes: list[Signal] = []

    def come(self) -> asyncio.Future[None]:
        """A task is about to enter it; returns what it is to wait for."""
        loop = asyncio.get_running_loop()
        granted: asyncio.Future[None] = loop.create_future()
        self.created_at, self.loop = monotonic(), weakref.ref(loop)
        self.line_up(weakref.ref(granted))
        self._state.note_block(self)
        return granted

    @property
    def block(self) -> TaskBlock:
        return self

    def lends(self) -> WriteLoan:
        """Where the blocking reads of its task go."""
        assert self.transaction is not None
        return self.transaction

    def needs(self, loop: asyncio.AbstractEventLoop) -> bool:
        return self.loop is not None and self.loop() is loop and self._accepts

    def end_at_exit(self) -> bool:
        """Nothing can end it any more, if its loop does not run when the interpreter ends."""
        loop = None if self.loop is None else self.loop()
        if loop is not None and loop.is_running():
            return False
        self.give_back(failed=True)
        return True

    def lend(self, tx: WriteLoan) -> None:
        if why := self._is_lost():  # perhaps with hundreds of others, while they waited in line
            tx.revoke(why)
            raise tx.closed_error()
        tx.limit(self.max_hold)
        tx.set_time_limit()  # so that the end of the block ends a statement too
        tx.lend()
        with self._state.lock:
            self._waiters = self._others() or None
            self.transaction = tx
        wake([self.granted])

    def _others(self) -> list[Any]:
        return [waiter for waiter in self._waiters or () if waiter is not self.granted]

    def perform(self, tx: WriteLoan) -> None:
        scopes = self._state.scopes
        scopes.enter_job(tx)  # what a function that a task sends calls is inside
        try:
            super().perform(tx)
        finally:
            with self._lock:
                self._accepts = False
            self._look_again()
            tx.close(ENDED)
            tx.end_call()
            while not (self._state.forked or self._requests.empty()):  # they meet the closed transaction
                request = self._requests.get()
                if request is not None:
                    with contextlib.suppress(TransactionClosedError):
                        request()
            scopes.leave_job()

    def give_back(self, failed: bool) -> None:
        with self._lock:
            super().give_back(failed)
            self._accepts = False
        self._look_again()

    def _revoke(self, failed: bool) -> None:
        if failed and self.transaction is not None:  # a statement that still runs is interrupted
            self.transaction.close(LEFT)

    def wait_for_call(self, tx: WriteLoan) -> None:
        with self._lock:
            self._is_kept = not self.failed
        super().wait_for_call(tx)

    def cancel_end(self) -> None:
        """The task that leaves it well is cancelled: it is rolled back, unless it is about to be committed."""
        with self._lock:
            if not (self._is_kept or self.failed):
                self.failed = True
                self._revoke(failed=True)

    def _patience(self, until: float) -> float:
        return max(0.0, min(until - monotonic(), LOOK))

    def _is_lost(self) -> str:
        if self.entry() is None:  # and perhaps a signal handler has raised as its finalizer began
            return COLLECTED
        return LOOP_CLOSED if is_over(self.loop) else ""

    async def open_savepoint(self, outer: TaskSavepoint | None) -> TaskSavepoint:
        """Wait for its turn; ``outer``: that in which the task was made."""
        while True:
            await self.until_innermost(outer)
            savepoint = TaskSavepoint(self)
            try:
                with self._lock:  # a task of another loop may have opened one since
                    if self._is_turn_of(outer):
                        savepoint.outer = self.innermost
                        self.innermost = savepoint
                        return savepoint
            except BaseException:  # Ctrl-C, as the lock was released
                if self.innermost is savepoint:
                    self.leave(savepoint)
                raise

    def leave(self, savepoint: TaskSavepoint) -> None:
        """It has ended: wake the tasks that wait for that."""
        with self._lock:
            if savepoint.is_open:
                self._end_those_inside(savepoint)
            savepoint.is_open = False
            self.innermost = open_one(self.innermost)
        self._look_again()

    def _end_those_inside(self, savepoint: TaskSavepoint) -> None:
        """Those of this task have ended with it."""
        inside = self.innermost
        while inside is not None and inside is not savepoint:
            if inside.is_mine():
                inside.is_open = False
            inside = inside.outer

    def _look_again(self) -> None:
        with self._lock:
            changes, self._changes = self._changes, []
        wake(changes)

    async def until_innermost(self, savepoint: TaskSavepoint | None) -> None:
        """Wait until no other task has a savepoint open inside ``savepoint``: they end in the order of a stack.

        One of this task would be waited for without end, and is kept with ``savepoint``, as those of threads are.
        """
        while True:
            loop = asyncio.get_running_loop()
            change: asyncio.Future[None] = loop.create_future()
            with self._lock:
                if self._is_turn_of(savepoint):
                    return
                self._changes.append(weakref.ref(change))
            await waits_of(loop).wait(change, lambda: self._is_turn_of(savepoint))

    def _is_turn_of(self, savepoint: TaskSavepoint | None) -> bool:
        with self._lock:
            return not self._accepts or self._is_innermost_of_others(savepoint)

    def _is_innermost_of_others(self, savepoint: TaskSavepoint | None) -> bool:
        inside, end = self.innermost, open_one(savepoint)
        while inside is not None and inside is not end and (inside.is_mine() or not inside.is_open):
            inside = inside.outer
        return inside is end

    async def ended(self) -> asyncio.CancelledError | None:
        """Wait until it is committed or rolled back, even if the task is cancelled; returns that cancellation."""
        cancelled = None
        while not self.done():
            try:
                with self.arrival() as future:
                    await future
            except asyncio.CancelledError as error:
                cancelled = error
                self.cancel_end()
        return cancelled

    def send(self, function: Callable[..., object], *args: Any) -> None:
        """Have the writer thread call ``function``, after what was sent earlier."""
        with self._lock:
            if not self._accepts:
                raise self.closed_error()
            self._requests.put(functools.partial(function, *args))

    def keep(self, transaction: WriteLoan, committed: bool, fn: Callable[[], object]) -> None:
        """Keep a callback, behind what was sent earlier: the end of a savepoint, say, that it is not in."""
        check_callback("the callback", fn)
        transaction.check_open()
        if threading.get_ident() == self._state.writer_thread:  # a function that was sent, of whose part it is
            transaction.keep_late(committed, fn)
        else:
            self.send(transaction.keep_late, committed, fn)

    def closed_error(self) -> Exception:
        assert self.transaction is not None
        return self.transaction.closed_error()

    async def call(self, function: Callable[..., T], *args: Any, until: float = math.inf) -> T:
        """The same, and wait for what it returns; if it has not begun by ``until``, it never does."""
        call = Call(None, function, *args)
        self.send(call.run)
        left, timer = seconds_until(until), None
        if left is not None:
            late = ReadTimeoutError(f"{self.describe()} is used by another task: the read did not begin in time")
            timer = asyncio.get_running_loop().call_later(left, call.expire, late)
        try:
            return await call
        finally:
            if timer is not None:
                timer.cancel()


class TaskSavepoint:
    """A savepoint of a task, as the tasks of its block see it."""

    def __init__(self, block: TaskBlock) -> None:
        self.block = block
        self.outer: TaskSavepoint | None = None  # in the order of the stack
        self.is_open = True
        self.entry: Callable[[], object] = object  # by which it is left, or None: that is collected
        task = running_task()
        self._task = None if task is None else weakref.ref(task)

    def is_mine(self) -> bool:
        """Whether the running task has entered it, so that it cannot wait for its end; unless it is left in this
        moment, since nobody can leave it. That a task has ended means nothing: another may leave what it has entered.
        """
        task = self._task and self._task()
        return task is not None and task is running_task() and self.entry() is not None

    def is_left_late(self) -> bool:
        """Whether one around it has been left before."""
        outer = self.outer
        while outer is not None and outer.is_open:
            outer = outer.outer
        return outer is not None

    def lends(self) -> WriteLoan:
        return self.block.lends()


def open_one(savepoint: TaskSavepoint | None) -> TaskSavepoint | None:
    """``savepoint``, or the innermost around it that is still open."""
    while savepoint is not None and not savepoint.is_open:
        savepoint = savepoint.outer
    return savepoint
