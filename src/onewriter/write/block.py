"""BlockJob: a transaction whose statements the threads that have it run themselves."""

from __future__ import annotations

import contextlib
import threading
import types
from asyncio import AbstractEventLoop, _get_running_loop
from time import monotonic

from onewriter.base.state import State
from onewriter.errors import TransactionClosedError
from onewriter.write.loan import ENDED, TOO_LONG, WriteLoan
from onewriter.write.ticket import Job


class BlockFailedError(Exception):
    """The block raised, so it is rolled back; its own error goes on in its own thread."""


class BlockJob(Job[None]):
    """A ``with transaction()`` block: the writer thread begins, lends, waits, and commits or rolls back.

    Any thread may use it and leave it. That the one which entered it has ended means nothing: web frameworks and
    fixtures enter, use and leave in different threads. One that nobody can reach any more is left when its generator is
    collected.

    Locks: ``granted`` is released once: by the loan, or by an outcome without one (withdrawn, no lock to be had).
           ``given_back`` is released once, by the end of the block.
    """

    __slots__ = ("failed", "given_back", "granted", "loop", "max_hold", "nested", "thread", "transaction")
    exclusive = True
    lent = True
    logs_failure = False  # its own thread hears
    needs_savepoint = True

    def __init__(self, state: State, label: str | None, max_hold: float, frame: types.FrameType) -> None:
        super().__init__(state, label or "transaction", frame, None)
        self.max_hold = max_hold
        self.thread = threading.current_thread()  # which enters it
        self.loop = _get_running_loop()  # of that thread
        self.transaction: WriteLoan | None = None
        self.failed = False
        self.nested = 0  # writes of others that were told that they are done, as a part of it
        self.granted, self.given_back = threading.Lock(), threading.Lock()
        self.granted.acquire()
        self.given_back.acquire()
        self._waiters = [self.granted]

    def needs(self, loop: AbstractEventLoop) -> bool:
        """Whether it cannot end while the thread of ``loop`` waits."""
        return self.loop is loop and self.given_back.locked()

    def end_at_exit(self) -> None:
        """Nobody ends it any more, if its thread is over when the interpreter ends."""
        if not self.thread.is_alive():
            self.give_back(failed=True)

    def lend(self, transaction: WriteLoan) -> None:
        """Let those that wait for it have the transaction."""
        transaction.lend()
        with self._state.lock:
            self.transaction, self._waiters = transaction, None
        self.granted.release()

    def give_back(self, failed: bool) -> None:
        """End the block. Again, it changes nothing."""
        if self.given_back.locked():
            self.failed = failed
            if self.transaction is not None:
                self.transaction.close(ENDED)
            with contextlib.suppress(RuntimeError):  # given back in this moment
                self.given_back.release()

    def perform(self, tx: WriteLoan) -> None:
        """Lend the transaction, and wait until it is given back, or has to be taken back."""
        self.lend(tx)
        until = self.started_at + self.max_hold
        while not self.given_back.acquire(timeout=self._patience(until)):
            self._state.warn_if_slow(monotonic())
            if monotonic() >= until:
                tx.revoke(TOO_LONG)
                raise tx.closed_error()
        self.wait_for_call(tx)

    def _patience(self, until: float) -> float:
        """Seconds until there is something to do."""
        now, slow = monotonic(), self.started_at + self._state.slow_after
        next_look = until if slow < now else min(until, slow + 0.001)
        return max(0.0, min(next_look - now, threading.TIMEOUT_MAX))

    def end_inline(self, tx: WriteLoan) -> BaseException | None:
        """Given back, in the thread that is the writer, which has not waited: returns what has failed it."""
        failure: BaseException | None = None
        try:
            self.wait_for_call(tx)
        except (BlockFailedError, TransactionClosedError) as error:
            failure = error
        if tx.is_overdue:
            tx.revoke(TOO_LONG)
        return tx.closed_error() if tx.was_too_long else failure

    def wait_for_call(self, tx: WriteLoan) -> None:
        """Given back, another thread may be inside SQLite yet: what fails does not wait for that to end by itself."""
        if self.failed:
            tx.revoke(ENDED)
            raise BlockFailedError
        if not tx.wait_for_call(self.started_at + self.max_hold):
            tx.revoke(TOO_LONG)
            raise tx.closed_error()
