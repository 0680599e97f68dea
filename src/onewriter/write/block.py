"""Block: a transaction whose statements come from outside, as long as a ``with`` block lasts."""

from __future__ import annotations

import logging
import queue
import threading
import types
from asyncio import AbstractEventLoop, _get_running_loop
from collections.abc import Callable, Iterator
from threading import get_ident
from time import monotonic
from typing import Any, Protocol

from onewriter.base.log import call_all_safely, report
from onewriter.base.state import IN_STATEMENT, State
from onewriter.base.waiting import thread_signal
from onewriter.errors import (
    ReentrantWriteError,
    TransactionClosedError,
    WriterBrokenError,
    WriterClosedError,
    WriteTimeoutError,
    forked_error,
)
from onewriter.events import Hook, announce
from onewriter.write.loan import ENDED, TOO_LONG, WriteLoan
from onewriter.write.ticket import Job
from onewriter.write.transaction import Transaction


class BlockFailedError(Exception):
    """The block raised, so it is rolled back; its own error goes on in its own thread or task."""


class Block(Job[None]):
    """A ``transaction()`` block: the writer begins, serves it until it is given back, and commits or rolls back.

    Any thread or task that has its transaction may use it, and any may leave it. That the one which entered it has
    ended means nothing: web frameworks and fixtures enter, use and leave in different ones. One that nobody can reach
    any more is left when its generator is collected.

    States: waiting → granted (``transaction`` is there) → given back. ``granted`` is resolved once: by the loan, or by
            an outcome without one (withdrawn, no lock to be acquired).
    """

    __slots__ = ("_requests", "failed", "granted", "is_given_back", "loop", "max_hold", "nested", "transaction")
    exclusive = lent = needs_savepoint = True
    logs_failure = False  # its own thread or task gets the error

    def __init__(
        self,
        state: State,
        label: str | None,
        max_hold: float,
        frame: types.FrameType,
        granted: Any,
        loop: AbstractEventLoop | None,
    ) -> None:
        super().__init__(state, label or "transaction", frame, None)
        self.max_hold = max_hold
        self.loop = loop  # in whose thread it is entered
        self.transaction: WriteLoan | None = None
        self.failed = self.is_given_back = False
        self.nested = 0  # writes that were acknowledged as a part of it
        self.granted = granted
        self._waiters = [granted]
        self._requests: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()  # None: it is given back

    def needs(self, loop: AbstractEventLoop) -> bool:
        """Whether it cannot end while the thread of ``loop`` waits."""
        return self.loop is loop and not self.is_given_back

    def give_back(self, failed: bool) -> None:
        """End the block. Again, it changes nothing; after an interrupt in its midst, it comes to its end."""
        if not self.is_given_back:
            self.failed = failed
            self._revoke(failed)
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
            if self._state.forked:
                raise forked_error()  # a function of the user's has forked, and this is the child
        self.wait_for_call(tx)

    def _next_request(self, tx: WriteLoan, until: float) -> Callable[[], object] | None:
        """Wait for it; None: the block was given back. The only place that takes a block back."""
        while True:
            try:
                return self._requests.get(timeout=self._patience(until))
            except queue.Empty:
                pass
            self._state.warn_if_slow(monotonic())
            why = TOO_LONG if monotonic() >= until else self._is_lost()
            if why:
                tx.revoke(why)
                raise tx.closed_error()

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
        tx.close(ENDED)
        if self.failed:
            tx.end_call()
            raise BlockFailedError
        if not tx.wait_for_call(self.started_at + self.max_hold):
            tx.revoke(TOO_LONG)
            raise tx.closed_error()

    def entered(self) -> WriteLoan:
        """What it is lent, once it was granted; raises why it is not."""
        if self.transaction is None:
            self.result()
        assert self.transaction is not None
        return self.transaction

    def call_back(self, job: Any = None) -> None:
        """Its callbacks are called by who leaves it."""
        if self.transaction is not None:
            callbacks = self.transaction.callbacks(committed=self.failed_with is None)
            call_all_safely(self._state, [(callback,) for callback in callbacks])

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
        """Why nobody can ever give it back; empty: somebody may."""
        return ""


class ThreadBlock(Block):
    """One whose statements the threads that have it run themselves."""

    __slots__ = ("thread",)

    def __init__(self, state: State, label: str | None, max_hold: float, frame: types.FrameType) -> None:
        super().__init__(state, label, max_hold, frame, thread_signal(), _get_running_loop())
        self.thread = threading.current_thread()  # which enters it

    def end_at_exit(self) -> None:
        """Nobody ends it any more, if its thread is over when the interpreter ends."""
        if not self.thread.is_alive():
            self.give_back(failed=True)

    def lend(self, tx: WriteLoan) -> None:
        tx.lend()
        with self._state.lock:
            self.transaction, self._waiters = tx, None
        self.granted.release()

    def _revoke(self, failed: bool) -> None:
        if self.transaction is not None:
            self.transaction.close(ENDED)

    def _patience(self, until: float) -> float:
        now, slow = monotonic(), self.started_at + self._state.slow_after
        next_look = until if slow < now else min(until, slow + 0.001)
        return max(0.0, min(next_look - now, threading.TIMEOUT_MAX))


class Turns(Protocol):
    """Who gives a thread the writer's turn, and takes it: the driver."""

    def enter(self, job: ThreadBlock, timeout: float | None) -> WriteLoan: ...
    def leave(self, job: ThreadBlock) -> None: ...


def nested(outer: WriteLoan) -> Iterator[Transaction]:
    """A ``with transaction()`` inside another, or inside a job: a savepoint of that."""
    with outer.part():
        inner = outer.nested()
        try:
            with outer.job._state.scopes.inside(inner, writes=True):
                yield Transaction(inner)
        finally:
            inner.end()


def outermost(
    block: ThreadBlock, timeout: float | None, turns: Turns, hook: Hook | None, gateway: str
) -> Iterator[Transaction]:
    """A thread's ``with transaction()`` that is in no other."""
    state, scopes, me, scope = block._state, block._state.scopes, get_ident(), None
    announce(state, hook, block, waits=True)
    if block.loop is not None:
        state.blocks.add(block)
    try:
        try:
            state.entering.add(me)  # in here: Ctrl-C comes behind a call
            loan = turns.enter(block, timeout)
            scope = scopes.enter(loan, writes=True)
        finally:
            state.entering.discard(me)
        try:
            yield Transaction(loan)
        except BaseException as error:
            _leave(block, scope, turns, failed=True)
            if block.nested and isinstance(error, GeneratorExit):  # closed, or collected, perhaps long after
                text = "%s: %d writes that were made inside %s are rolled back with it: it was closed or collected"
                report(state, logging.WARNING, text, gateway, block.nested, block.describe())
            raise
        _leave(block, scope, turns, failed=False)
    except (WriterClosedError, WriterBrokenError):  # never accepted, or answered already, or a signal handler's
        if not block.done():
            block.give_back(failed=True)  # if it is granted after all, it ends at once
        raise
    except BaseException:  # Ctrl-C, or what another signal handler raises, in the midst of entering or leaving
        block.abandon()
        raise
    finally:
        if scope is not None:
            scopes.leave(scope)
        state.blocks.discard(block)
    block.result()


def _leave(block: ThreadBlock, scope: Any, turns: Turns, failed: bool) -> None:
    state = block._state
    if state.forked:
        if failed:
            return
        raise forked_error()  # the parent's block goes on; nothing is committed here
    # In a function that SQLite calls: the end waits for the statement, and this cannot.
    is_inside = block.transaction is not None and block.transaction.is_inside
    block.give_back(failed or is_inside)
    state.scopes.leave(scope)  # not before: a signal handler in between would wait for its own thread
    if is_inside and not failed:
        raise ReentrantWriteError(f"a block cannot be left here: {IN_STATEMENT}. It is rolled back")
    if is_inside or state.cannot_wait():
        return  # a generator that was collected there, by the writer, or inside one of its locks
    try:
        turns.leave(block)
    except BaseException:  # Ctrl-C: it comes to its end all the same
        block.add_done_callback(block.call_back)
        raise
    block.call_back()


def not_entered(block: Block, timeout: float | None, state: State) -> WriteTimeoutError:
    """The error of who waited for its turn in vain."""
    state.count_timeout()
    message = f"{block.describe()} did not get its turn within {timeout} s and is withdrawn: {state.describe()}"
    return WriteTimeoutError(message, ticket=block, started=False)
