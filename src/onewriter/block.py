"""BlockJob: a transaction whose statements the thread that asked for it runs itself."""

from __future__ import annotations

import contextlib
import threading
import types
from time import monotonic

from onewriter.holder import Holder, running_task
from onewriter.job import Job
from onewriter.transaction import TOO_LONG, Transaction

LOOK = 0.05  # seconds between two looks at whether the block's thread still lives


class BlockFailedError(Exception):
    """The block raised, so it is rolled back; its own error goes on in its own thread."""


class BlockJob(Job[None]):
    """A ``with transaction()`` block: the writer thread begins, lends, waits, and commits or rolls back.

    Locks: ``granted`` is released once: by the loan, or by an outcome without one (withdrawn, no lock to be had).
           ``given_back`` is released once, by the end of the block.
    """

    __slots__ = ("failed", "given_back", "granted", "max_hold", "task", "thread", "transaction")
    alone = True
    lent = True
    loud = False  # its own thread hears
    needs_savepoint = True

    def __init__(self, holder: Holder, label: str | None, max_hold: float, frame: types.FrameType) -> None:
        super().__init__(holder, label or "transaction", frame, None)
        self.max_hold = max_hold
        self.thread = threading.current_thread()
        self.task = running_task()  # which may wait for others of its loop in it
        self.transaction: Transaction | None = None
        self.failed = False
        self.granted, self.given_back = threading.Lock(), threading.Lock()
        self.granted.acquire()
        self.given_back.acquire()
        self._waiters = [self.granted]

    def lend(self, transaction: Transaction) -> None:
        """Let the thread that waits for it have the transaction."""
        transaction.lend_to(self.thread)
        with self._holder.lock:
            self.transaction, self._waiters = transaction, None
        self.granted.release()

    def give_back(self, failed: bool) -> None:
        """End the block. The thread's next calls are no longer inside it. Again, it changes nothing."""
        if self.given_back.locked():
            self.failed = failed
            if self.transaction is not None:
                self.transaction.leave()
            with contextlib.suppress(RuntimeError):  # given back in this moment
                self.given_back.release()
        self._holder.taken.pop(self.thread, None)  # after it, so that whoever takes it in this moment sees one of both

    def perform(self, tx: Transaction) -> None:
        """Lend the transaction, and wait until it is given back, or has to be taken back."""
        self.lend(tx)
        until = self.started_at + self.max_hold
        while not self.given_back.acquire(timeout=max(0.0, min(until - monotonic(), LOOK))):
            self._holder.warn_if_slow(monotonic())
            if monotonic() >= until:
                self._holder.taken[self.thread] = tx
                if not self.given_back.locked():  # in this moment
                    self._holder.taken.pop(self.thread, None)
                tx.take_back(TOO_LONG)
            elif not self.thread.is_alive():
                tx.take_back("was open when its thread ended")
            else:
                continue
            raise tx.closed_error()
        if self.failed:
            raise BlockFailedError
