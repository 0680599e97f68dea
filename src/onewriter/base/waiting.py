"""How threads and tasks wait, and are woken."""

from __future__ import annotations

import asyncio
import math
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from time import monotonic
from typing import Any, TypeAlias

from onewriter.base.state import State
from onewriter.errors import forked_error

RELEASED_BEFORE = [("release unlocked lock",), ("Semaphore released too many times",)]  # the latter of gevent's
SLICE = 0.25  # seconds; a signal that comes just before the thread sleeps is seen at its next wake-up


KnownLoop: TypeAlias = "weakref.ref[asyncio.AbstractEventLoop]"  # nothing here keeps a loop, and the tasks in it
# What one thread or task waits for: a lock that another releases, or a future of its loop, known weakly.
Signal: TypeAlias = Any


def thread_signal() -> Any:
    """A lock for one wait of a thread: acquired, so that the thread waits until ``wake`` releases it."""
    signal = threading.Lock()
    signal.acquire()
    return signal


class Flag:
    """What threads wait for.

    As ``threading.Event``; but that one's lock stays acquired if a signal handler raises at a certain step of a wait or
    of ``set``, and who sets it next hangs.

    Threads: any.
    """

    def __init__(self) -> None:
        self.is_set = False
        self._waiters: list[Any] = []

    def set(self) -> None:
        self.is_set = True  # first: who begins to wait now looks behind that
        wake(self._waiters.copy())

    def clear(self) -> None:
        self.is_set = False

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is set; False: it is not, after ``timeout`` seconds."""
        until, signal = math.inf if timeout is None else monotonic() + timeout, thread_signal()
        try:
            self._waiters.append(signal)  # no call since ``try``
            return self._wait_with(signal, until)
        finally:
            self._waiters.remove(signal)

    def _wait_with(self, signal: Signal, until: float) -> bool:
        while not self.is_set:
            left = until - monotonic()
            if left <= 0.0:
                return False
            signal.acquire(timeout=min(left, SLICE))
        return True


def this_loop() -> KnownLoop:
    return weakref.ref(asyncio.get_running_loop())


def is_over(known: KnownLoop | None) -> bool:
    """Whether the loop is closed, or was dropped without that: no task of it goes on."""
    if known is None:
        return False
    loop = known()
    return loop is None or loop.is_closed()


def is_there(waiter: Signal) -> bool:
    """Whether it waits: a task whose loop is closed, or was dropped, never goes on."""
    if hasattr(waiter, "release"):
        return True
    future = waiter()
    return future is not None and not future.get_loop().is_closed()


def wake(waiters: Iterable[Signal]) -> None:
    """Wake threads, which wait with a lock, and tasks, which wait with a future: one call for each of their loops.

    A second call changes nothing: it is made where a signal handler may raise as the first one begins.
    """
    loops: dict[asyncio.AbstractEventLoop, list[asyncio.Future[None]]] | None = None
    for waiter in waiters:
        if hasattr(waiter, "release"):  # a lock; futures are of whatever class their loop has
            try:
                waiter.release()
            except RuntimeError as error:
                if error.args not in RELEASED_BEFORE:  # but a signal handler's
                    raise
            continue
        future = waiter()
        if future is not None:
            if loops is None:
                loops = {}
            loops.setdefault(future.get_loop(), []).append(future)
    if loops is not None:
        for loop, futures in loops.items():
            try:
                loop.call_soon_threadsafe(resolve, futures)
            except Exception:
                try:
                    loop.call_soon_threadsafe(resolve, futures)
                except Exception:
                    continue  # the loop is closed: no task waits there any more
                raise  # a signal handler's


def resolve(futures: Sequence[asyncio.Future[None]]) -> None:
    """Called by their loop."""
    try:
        _resolve_each(futures)
    except BaseException:  # a signal handler's, which asyncio would log, and go on
        for future in futures[:1]:
            future.get_loop().call_soon(_resolve_each, futures)
        raise


def _resolve_each(futures: Sequence[asyncio.Future[None]]) -> None:
    for future in futures:
        if not future.done():
            future.set_result(None)


def call_if_free(lock: Any, function: Callable[[], object]) -> None:
    """Call ``function`` under ``lock``, if that is free now."""
    got: list[bool] = []
    try:
        # Acquired and noted in one step: what a signal handler raises in between would leave it taken.
        got.extend(map(lock.acquire, (False,)))
        if True in got:
            function()
    finally:
        if True in got:
            lock.release()


def seconds_until(deadline: float) -> float | None:
    return None if deadline == math.inf else max(0.0, deadline - monotonic())


def wait_in_slices(wakeup: Any, until: float, state: State, is_over: Callable[[], bool] = bool) -> bool:
    """Acquire ``wakeup``, which another thread releases; False if it did not until ``until``. ``is_over``: there is
    nothing to wait for, although nobody says so: the writer has died in that moment."""
    left = until - monotonic()
    while not wakeup.acquire(timeout=SLICE if left > SLICE else max(0.0, left)):
        left = until - monotonic()
        if left <= 0.0:
            return False
        if is_over():
            return True
        if state.forked:  # by a signal handler, and this is the child
            raise forked_error()
        state.warn_if_slow(monotonic())
    return True
