"""Block: a transaction whose statements come from outside, as long as a ``with`` block lasts."""

from __future__ import annotations

import queue
import threading
import types
import weakref
from asyncio import AbstractEventLoop
from collections.abc import Callable
from time import monotonic
from typing import Any

from onewriter.base import garbage
from onewriter.base.arguments import exact
from onewriter.base.log import call_all_safely
from onewriter.base.state import State
from onewriter.base.waiting import SLICE, KnownLoop, wake
from onewriter.errors import TransactionClosedError, WriteTimeoutError, forked_error
from onewriter.write.loan import ENDED, TOO_LONG, WriteLoan
from onewriter.write.ticket import Job

COLLECTED = "was collected while it was open"


class BlockFailedError(Exception):
    """The block raised, so it is rolled back; its own error goes on in its own thread or task."""


class Block(Job[None]):
    """A ``transaction()`` block: the writer begins, serves it until it is given back, and commits or rolls back.

    Any thread or task may use its transaction, and any may leave it. It does not end with the thread or task that
    entered it: web frameworks and fixtures enter, use and leave in different ones. A block that is not reachable any
    more is left when its entry is collected.

    States: waiting → granted (``transaction`` is there) → given back. ``granted`` is resolved once: by the loan, or by
            an outcome without one (withdrawn, no lock to be acquired).
    """

    __slots__ = (
        "_requests",
        "_search",
        "failed",
        "granted",
        "is_given_back",
        "loop",
        "max_hold",
        "nested",
        "transaction",
    )
    granted: Any
    exclusive = lent = needs_savepoint = True
    logs_failure = False  # its own thread or task gets the error

    def __init__(self, state: State, label: str | None, max_hold: float, frame: types.FrameType) -> None:
        Job.__init__(self, state, "transaction" if label is None else exact(label) or "transaction", frame, None)
        self.max_hold = max_hold
        self.loop: KnownLoop | None = None  # in whose thread it is entered
        self.transaction: WriteLoan | None = None
        self.failed = self.is_given_back = False
        self._search: garbage.Search | None = None  # in the garbage, for who could leave it
        self.nested = 0  # writes that were acknowledged as a part of it
        self._requests: Any = None  # to the writer, which serves it: callables, and None: it is given back

    @property
    def is_undone(self) -> bool:
        return self._error is not None or (self.failed and not self.done())

    def line_up(self, granted: Any) -> None:
        """It waits for its turn, which wakes ``granted``; so does its withdrawal, even by who was told of it before."""
        self.granted, self._requests = granted, queue.SimpleQueue()
        with self._state.lock:
            self._waiters = [granted]
            was_withdrawn = self.done()
        if was_withdrawn:
            wake([granted])

    def needs(self, loop: AbstractEventLoop) -> bool:
        """Whether it cannot end while the thread of ``loop`` waits."""
        return self.loop is not None and self.loop() is loop and not self.is_given_back

    def give_back(self, failed: bool) -> None:
        """End the block. Again, it changes nothing; after an interrupt in its midst, it comes to its end."""
        if not self.is_given_back:
            if failed:  # and never back: two threads may leave it at the same time
                self.failed = True
            self._revoke(failed)
            if self._requests is not None:
                self._requests.put(None)
            self.is_given_back = True

    def abandon(self) -> None:
        """It was interrupted as it was entered or left: it never runs, or is rolled back."""
        if not self.withdraw(None):
            self.give_back(failed=True)

    def perform(self, tx: WriteLoan) -> None:
        """Lend the transaction, and serve the block until it is given back, or has to be taken back."""
        self.lend(tx)
        until = self.started_at + self.max_hold
        while (request := self._next_request(tx, until)) is not None:
            request()
            del request  # which may be the last that knows a task
            if self._state.forked:
                raise forked_error()  # a function of the user's has forked, and this is the child
        self.wait_for_call(tx)

    def _next_request(self, tx: WriteLoan, until: float) -> Callable[[], object] | None:
        """Wait for it; None: the block was given back. The only place that takes a block back."""
        while True:
            try:
                request: Callable[[], object] | None = self._requests.get(timeout=self._patience(until))
                return request
            except queue.Empty:
                pass
            self._state.warn_if_slow(monotonic())
            self.look_for_dropped()
            why = TOO_LONG if monotonic() >= until else self._is_lost()
            if why:
                tx.revoke(why)
                raise tx.closed_error()

    def look_for_dropped(self) -> None:
        """For the writer: who could leave it may be in a reference cycle, as a generator which a framework has dropped,
        and be there until the garbage collector runs. That it does, if it is open for long and jobs wait, or close.
        """
        search = self._search = self._search or garbage.Search(monotonic(), garbage.LONG)
        if self._state.is_awaited() and search.is_due(monotonic()):
            garbage.collect_soon()

    def failure_at_end(self, tx: WriteLoan) -> BaseException | None:
        """Given back, and the writer has not served it: returns what has failed it."""
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
        tx.close(ENDED)
        if self.failed:
            tx.end_call()
            raise BlockFailedError
        if not tx.wait_for_call(self.started_at + self.max_hold):
            tx.revoke(TOO_LONG)
        if tx.was_too_long:  # also if only a call was refused for that: the end of a failed savepoint, say
            raise tx.closed_error()

    def entered(self) -> WriteLoan:
        """What it is lent, once it was granted; raises why it is not."""
        if self.transaction is None:
            self.result()
        assert self.transaction is not None
        return self.transaction

    def call_back(self, job: Any = None) -> None:
        """Its callbacks are called by who leaves it. Again, it goes on with the rest."""
        loan = self.transaction
        if loan is not None and loan.parts is not None:
            call_all_safely(self._state, loan.parts.callbacks(committed=self.failed_with is None))

    def lend(self, tx: WriteLoan) -> None:
        """Let those that wait for it have the transaction."""
        raise NotImplementedError

    def _revoke(self, failed: bool) -> None:
        """Refuse its further calls."""
        raise NotImplementedError

    def _patience(self, until: float) -> float:
        """Seconds until the next look at whether it must be taken back, or is slow."""
        raise NotImplementedError

    def _is_lost(self) -> str:
        """Why it can never be given back; empty: it can."""
        return ""


class ThreadBlock(Block):
    """One whose statements the threads that have it run themselves."""

    __slots__ = ("entry", "finalizer", "thread")
    thread: threading.Thread  # which enters it
    entry: weakref.ref[Any] | None  # by which it is left; kept, so that one which is collected tells
    finalizer: dict[str, int]  # "thread": the one that ends it, since its entry is collected

    def come(self, loop: AbstractEventLoop | None) -> None:
        """A thread, that of ``loop`` if there is one, is about to enter it."""
        self.created_at, self.thread, self.finalizer = monotonic(), threading.current_thread(), {}
        if loop is not None:
            self.loop = weakref.ref(loop)
            self._state.note_block(self)

    def is_mine_to_end(self) -> bool:
        """Whether the calling thread is the one that ends it: the first that leaves it, or finds it collected."""
        return self.finalizer.setdefault("thread", threading.get_ident()) == threading.get_ident()

    def end_if_lost(self) -> bool:
        """For the writer: a signal handler may have raised as the finalizer of its entry began."""
        entry = self.entry
        if entry is None or entry() is not None or not self.is_mine_to_end():
            return False
        self.add_done_callback(self.call_back)
        self.abandon()
        return True

    def _is_lost(self) -> str:
        return COLLECTED if self.end_if_lost() else ""

    def end_at_exit(self) -> bool:
        """Nobody ends it any more, if its thread is over when the interpreter ends."""
        if self.thread.is_alive() or self.is_given_back:
            return False
        self.give_back(failed=True)
        return True

    def lend(self, tx: WriteLoan) -> None:
        tx.lend()
        if self._requests is None:  # no thread waits: its own has begun it
            self.transaction = tx
            return
        tx.limit(self.max_hold)  # a use that comes too late is refused, whenever this thread comes to take it back
        with self._state.lock:
            self.transaction, self._waiters = tx, None
        self.granted.release()

    def _revoke(self, failed: bool) -> None:
        if self.transaction is not None:
            self.transaction.close(ENDED)

    def _patience(self, until: float) -> float:
        now, slow = monotonic(), self.started_at + self._state.slow_after
        next_look = min(until if slow < now else min(until, slow + 0.001), now + SLICE)
        return max(0.0, min(next_look - now, threading.TIMEOUT_MAX))


def not_entered(block: Block, timeout: float | None, state: State) -> WriteTimeoutError:
    """The error of a block that could not begin in time."""
    state.count_timeout()
    message = f"{block.describe()} did not begin within {timeout} s and is withdrawn: {state.describe()}"
    return WriteTimeoutError(message, ticket=block, started=False)
