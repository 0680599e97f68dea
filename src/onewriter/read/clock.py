"""ReadClock: the thread that watches the time for reads that cannot do so themselves."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Iterable
from time import monotonic
from typing import Any

from onewriter.base.log import report
from onewriter.base.state import State
from onewriter.base.threads import start
from onewriter.base.waiting import wake
from onewriter.read.claim import Claim
from onewriter.sqlite.retry import AskWriter

GRACE = 0.05  # seconds: a statement whose time goes into SQLite's own steps has ended by itself by then
INTERRUPT_AGAIN = 0.1  # seconds between two interrupts of one read, whose next statement would not know of the first
LOOK_AGAIN = 0.01  # seconds, at least, between two looks for slow readers


class ReadClock:
    """Does at its time what reads cannot do themselves.

    It interrupts those whose deadline has passed, since SQLite counts no steps in functions, factories and converters;
    logs those that are open for long; ends a pause of the pool; and helps those that wait for long. Python code cannot
    be stopped; the statement that called it ends when it returns.

    Locks:   ``lock``, the pool's, guards ``rings_at``, ``_thread``, ``is_named`` and ``deadline``, and is held around
             interrupt().
    Threads: one of its own, from the first read that has a time limit or waits, or block, to the first look that finds
             nothing to wait for. A read looks at ``rings_at`` only, which comes before its own deadline unless that is
             an early one.
    """

    def __init__(
        self,
        lock: Any,
        lent: Callable[[], Iterable[Claim]],
        state: State,
        interrupt: Callable[[Claim], None],
        end_pause: Callable[[float], float],
        help_waiting: Callable[[], object],
    ) -> None:
        self.lock = lock
        self.rings_at = math.inf
        self._lent = lent
        self._state = state
        self._interrupt = interrupt
        self._end_pause = end_pause  # if it is over at that time; returns when to look again
        self._help_waiting = help_waiting  # without the lock
        self._bell = threading.Lock()  # released to have the thread look again
        self._bell.acquire()
        self._thread: threading.Thread | None = None
        self._is_stopped = False
        self.ask_writer: AskWriter = str  # to roll back what a killed process has left

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
            start(started)
        except BaseException as error:
            with self.lock:
                self._thread, self.rings_at = None, math.inf
            if not isinstance(error, RuntimeError):  # at the end of the interpreter no thread can be started
                raise

    def limit(self, claim: Claim, deadline: float) -> None:
        """Have its statements end then, in place of an earlier deadline."""
        with self.lock:
            claim.deadline = deadline
        if deadline < self.rings_at:
            self.set(deadline)

    def lift(self, claim: Claim) -> None:
        """Have its statements end at no time, unless they are to end at once, as those of a task that is cancelled."""
        with self.lock:
            if claim.deadline > 0.0:
                claim.deadline = math.inf

    def watch(self, claim: Claim, deadline: float) -> None:
        """The same for a block, which is logged when it is open for long."""
        with self.lock:
            claim.deadline = deadline
        soon = min(deadline, claim.since + self._state.slow_after - GRACE)
        if soon < self.rings_at:
            self.set(soon)

    def stop(self) -> None:
        """Have the thread end, as soon as there is no read to interrupt."""
        thread = self._thread
        self.end()
        if thread is not None and thread.ident is not None:
            thread.join(1.0)

    def end(self) -> None:
        """The same, without waiting for it."""
        self._is_stopped = True
        self._ring()

    def _ring(self) -> None:
        wake([self._bell])

    def _run(self) -> None:
        while (next_look := self._next_look()) is not None:
            self._bell.acquire(timeout=max(0.0, min(next_look - monotonic(), threading.TIMEOUT_MAX)))

    def _next_look(self) -> float | None:
        self.warn()  # without the lock: it logs
        self._state.warn_if_slow(monotonic())
        self._help_waiting()
        with self.lock:
            now = monotonic()
            if self.rings_at + GRACE <= now or self._is_stopped:
                self.rings_at = math.inf  # before the look, so that a deadline that comes with it rings
                self.rings_at = self._look(now) - GRACE
            if self.rings_at == math.inf:
                self._thread = None
                return None
            return self.rings_at + GRACE

    def _look(self, now: float) -> float:
        """Interrupt reads that are late; returns when to look again."""
        looks = [self._end_pause(now), max(now + LOOK_AGAIN, self._state.slow_at)]
        for claim in self._lent():
            if not claim.is_named and not self._is_stopped:
                looks.append(max(now + LOOK_AGAIN, claim.since + self._state.slow_after))
            if claim.deadline + GRACE <= now:
                self._interrupt(claim)
                looks.append(now + INTERRUPT_AGAIN)
            else:
                looks.append(claim.deadline + GRACE)
        return min(looks)

    def warn(self) -> None:
        """Log those that have had a connection for longer than ``slow_after``."""
        for claim in self._lent():
            self.warn_if_slow(claim, "has been open")

    def warn_if_slow(self, claim: Claim, state: str) -> None:
        """Log it, once."""
        seconds = monotonic() - claim.since
        if seconds <= self._state.slow_after:
            return
        with self.lock:
            first, claim.is_named = not claim.is_named, True
        if first:
            kept = "no write can be committed" if self._state.readers_block_commits else "the WAL cannot be reset"
            report(
                self._state, logging.WARNING, "slow: %s %s for %.1f s; meanwhile %s", claim.label, state, seconds, kept
            )
