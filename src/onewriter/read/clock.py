"""ReadClock: the thread that looks after reads which cannot look at the time themselves."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable
from time import monotonic
from typing import Any

GRACE = 0.05  # seconds: a statement whose time goes into SQLite's own steps has ended by itself by then


class ReadClock:
    """Has the pool look, when it is time: at deadlines, since functions, factories and converters are no steps of
    SQLite's; at readers that are open for long; and at a pause that is over.

    Locks:   ``lock``, the pool's, guards ``rings_at`` and ``_thread``, and is held for ``look``.
    Threads: one of its own, from the first read with a time limit, or block, to the first look that finds nothing to
             wait for. A read looks at ``rings_at`` only, which comes before its own deadline unless that is an early
             one.

    Args:
        look: called with the time; does what is due, and returns when to look again.
        report: called before each look, without the lock: it logs, in the clock's thread.
    """

    def __init__(self, lock: Any, look: Callable[[float], float], report: Callable[[], object]) -> None:
        self.lock = lock
        self.rings_at = math.inf
        self._look = look
        self._report = report
        self._bell = threading.Lock()  # released to have the thread look again
        self._bell.acquire()
        self._thread: threading.Thread | None = None
        self._is_stopped = False

    def turn_off(self) -> None:
        self.rings_at = -math.inf

    def set(self, deadline: float) -> None:
        """Look again ``GRACE`` after ``deadline``, or earlier; to be called after the reader has that."""
        started = None
        with self.lock:
            if deadline >= self.rings_at:
                return
            self.rings_at = deadline
            if self._thread is None:
                started = self._thread = threading.Thread(target=self._run, name="onewriter-clock", daemon=True)
        if started is None:
            self._ring()
            return
        try:
            started.start()
        except BaseException as error:
            with self.lock:
                self._thread, self.rings_at = None, math.inf
            if not isinstance(error, RuntimeError):  # at the end of the interpreter no thread can be started
                raise

    def set_for(self, moment: float) -> None:
        """Look again at ``moment``, or earlier."""
        self.set(moment - GRACE)

    def stop(self) -> None:
        """Have the thread end, or as soon as there is nobody to interrupt."""
        thread = self._thread
        self.end()
        if thread is not None and thread.ident is not None:
            thread.join(1.0)

    def end(self) -> None:
        """The same, without waiting for it."""
        self._is_stopped = True
        self._ring()

    def _ring(self) -> None:
        with contextlib.suppress(RuntimeError):  # it was rung already
            self._bell.release()

    def _run(self) -> None:
        while (next_look := self._next_look()) is not None:
            self._bell.acquire(timeout=max(0.0, min(next_look - monotonic(), threading.TIMEOUT_MAX)))

    def _next_look(self) -> float | None:
        self._report()
        with self.lock:
            now = monotonic()
            if self.rings_at + GRACE <= now or self._is_stopped:
                self.rings_at = math.inf  # before the look, so that a deadline that comes with it rings
                self.rings_at = self._look(now) - GRACE
            if self.rings_at == math.inf:
                self._thread = None
                return None
            return self.rings_at + GRACE
