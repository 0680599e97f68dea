"""How tasks wait: with time limits, and for what a thread does for them."""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
import weakref
from collections import deque
from collections.abc import Callable, Coroutine
from time import monotonic
from typing import Any, TypeVar

from onewriter.base.scopes import running_task
from onewriter.base.state import State
from onewriter.base.task_waits import waits_of
from onewriter.base.threads import start
from onewriter.base.waiting import Signal, is_over, seconds_until, this_loop, wake

T = TypeVar("T")


class Turn:
    """A lock for tasks, of any loop, in the order of asking. That of a loop that is closed loses it.

    Locks: _lock guards _line and _owner. Re-entrant: a task that is collected while its thread is inside releases.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._owner: Asker | None = None  # what ``take`` or ``acquire`` has returned, until ``release``
        self._line: deque[Asker] = deque()

    def take(self) -> Asker | None:
        """Acquire it, if nobody has it."""
        mine = Asker()
        return mine if self._take_as(mine) else None

    def _take_as(self, mine: Asker) -> bool:
        with self._lock:
            owner = self._owner
            # A task that has it asks again only if Ctrl-C came just behind the acquiring, or before the release.
            lost = owner if owner is not None and owner.is_running() else None
            is_free = self._owner is lost
            if is_free:  # and no call since that look
                self._owner = mine
        return is_free

    async def acquire(self) -> Asker:
        mine = Asker()
        signal: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        mine.signal = weakref.ref(signal)
        try:
            with self._lock:
                if self._take_as(mine):
                    return mine
                self._line.append(mine)
            await waits_of(signal.get_loop()).wait(signal, lambda: self._has_come_to(mine))
        except BaseException:
            with self._lock:
                if mine in self._line:
                    self._line.remove(mine)
                else:  # it was given the turn in this moment
                    self.release(mine)
            raise
        return mine

    def release(self, mine: Asker | None) -> None:
        """Again, or of one that has lost it, it changes nothing. None: nobody had it, and some wait all the same."""
        with self._lock:
            if self._owner is not mine:
                return
            self._owner = first = self._line.popleft() if self._line else None
        if first is not None:
            wake([first.signal])

    def _has_come_to(self, mine: Asker) -> bool:
        owner = self._owner
        if owner is None or owner.has_lost_it():  # None: it came back as the first was about to wait
            self.release(owner)
        return self._owner is mine


class Asker:
    """A task that has the turn, or waits for it. What refers to it keeps neither the task nor its loop."""

    __slots__ = ("_loop", "_task", "signal")

    def __init__(self) -> None:
        self.signal: Signal = type(None)  # of its wait
        self._loop, task = this_loop(), running_task()
        self._task = None if task is None else weakref.ref(task)

    def has_lost_it(self) -> bool:
        """Whether nobody gives it back: its loop is closed, or its task has ended."""
        task = None if self._task is None else self._task()
        return is_over(self._loop) or (self._task is not None and (task is None or task.done()))

    def is_running(self) -> bool:
        return self._task is not None and self._task() is running_task()


async def in_thread(
    function: Callable[[], T], undo: Callable[[T], object] | None = None, left: list[threading.Thread] | None = None
) -> T:
    """Call ``function`` in a thread of its own; ``undo`` what it returns if no task waits for it any more. ``left``
    gets the threads that go on then.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[None] = loop.create_future()
    outcome: list[Any] = []

    def call() -> None:
        try:
            outcome[:] = (function(), None)
        except BaseException as error:
            outcome[:] = (None, error)
        if (future.cancelled() or loop.is_closed()) and undo is not None and outcome[1] is None:
            undo(outcome[0])
        wake([weakref.ref(future)])

    thread = threading.Thread(target=call, name="onewriter-call", daemon=True)
    try:
        start(thread)
        await future
    except BaseException:  # cancelled, collected or interrupted
        with contextlib.suppress(RuntimeError):  # its loop is closed
            future.cancel()
        if outcome and undo is not None and outcome[1] is None:
            with contextlib.suppress(RuntimeError):  # the interpreter ends
                thread = threading.Thread(target=undo, args=[outcome[0]], daemon=True)
                start(thread)
        if left is not None:
            left[:] = filter(threading.Thread.is_alive, [*left, thread])
        raise
    result, error = outcome
    if error is not None:
        try:
            raise error
        finally:
            del error, outcome
    return result  # type: ignore[no-any-return]


def call_and_join(function: Callable[[], T], threads: list[threading.Thread], until: float) -> T:
    """Call it, and wait for the end of ``threads``."""
    try:
        return function()
    finally:
        for thread in threads:
            thread.join(seconds_until(until))


async def and_the_log(flush: Callable[[], Coroutine[Any, Any, None]], state: State, timeout: float | None) -> None:
    """Wait for ``flush``, and then until what the writer has reported is logged.

    It makes its coroutine here: one that was made before is awaited by nobody if the task is cancelled at once.
    """
    until = math.inf if timeout is None else monotonic() + timeout
    await flush()
    reporter = state.reporter
    if reporter is not None and reporter.is_behind:
        await in_thread(lambda: reporter.wait(until))
