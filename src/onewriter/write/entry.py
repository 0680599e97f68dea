"""Entry: what ``db.transaction()`` gives, by which a thread enters and leaves a block."""

from __future__ import annotations

import functools
import logging
import types
import weakref
from _thread import start_new_thread
from asyncio import _get_running_loop
from threading import get_ident
from typing import Any, Protocol

from onewriter.base.log import report, warn_of_blocking
from onewriter.base.scopes import Scope, enclosing
from onewriter.base.state import IN_STATEMENT
from onewriter.errors import (
    ReentrantWriteError,
    TransactionClosedError,
    WriterBrokenError,
    WriterClosedError,
    forked_error,
)
from onewriter.events import Hook, announce
from onewriter.write.block import ThreadBlock
from onewriter.write.loan import WriteLoan
from onewriter.write.nested import NestedPart
from onewriter.write.transaction import Transaction


class Turns(Protocol):
    """Who gives a thread the writer's turn, and takes it: the driver."""

    def enter(self, job: ThreadBlock, timeout: float | None) -> WriteLoan: ...
    def leave(self, job: ThreadBlock) -> None: ...
    def hand_over(self, job: ThreadBlock) -> None: ...


class Entry:
    """Inside another block or a job it is a savepoint of that.

    If it is collected while its block is open, the block ends, since it cannot be left any more. So what the block has
    refers to this only weakly. Without ``__del__``, in which the error of a signal handler would be lost each time.

    States:  new → open → left.
    Threads: entered by one, left by any.
    """

    _is_new = True
    _scope: Scope[Any] | None = None  # as long as it is open
    _part: NestedPart | None = None

    def __init__(
        self, block: ThreadBlock, timeout: float | None, turns: Turns, hook: Hook | None, gateway: str
    ) -> None:
        self._block = block
        self._timeout = timeout
        self._turns = turns
        self._hook = hook
        self._gateway = gateway

    def __enter__(self) -> Transaction:
        block, state = self._block, self._block._state
        if not self._is_new:
            raise RuntimeError("a block is entered once: call transaction() again for another one")
        self._is_new, loop = False, _get_running_loop()
        if loop is not None:
            warn_of_blocking()
        if enclosing() is not None or state.job is not None:
            outer = state.here()
            if isinstance(outer, WriteLoan):
                self._part = NestedPart(outer, block)
                loan = self._part.__enter__()
                try:
                    return Transaction(loan)
                except BaseException as error:  # Ctrl-C
                    self._part.__exit__(type(error), error, None)
                    raise
        if state.forked or state.would_deadlock():
            state.refuse_endless_wait("transaction()")
        me = get_ident()
        if self._hook is not None:
            announce(state, self._hook, block, waits=True)
        try:  # with all of it: Ctrl-C comes behind a call
            block.entry = weakref.ref(self, functools.partial(_collected, block, self._turns, self._gateway))
            block.come(loop)
            state.entering.add(me)
            loan = self._turns.enter(block, self._timeout)
            self._scope = state.scopes.enter(loan, writes=True)
            state.entering.discard(me)
            return Transaction(loan)
        except BaseException as error:
            try:
                _give_up(block, self._turns, self._scope, error)
            except RecursionError:  # no room for a call: a thread has a stack of its own
                if self._scope is not None:
                    self._scope.what = None
                start_new_thread(_give_up, (block, self._turns, self._scope, None))
            finally:
                state.entering.discard(me)
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: types.TracebackType | None
    ) -> bool | None:
        if self._part is not None:
            self._part.__exit__(kind, error, traceback)
            return None
        if self._scope is None:  # its end would be waited for without end
            raise RuntimeError("a block that was not entered cannot be left: use `with`")
        block = self._block
        try:
            _leave(block, self._turns, self._scope, kind is not None)
        except RecursionError:  # as in ``__enter__``
            if self._scope is not None:
                self._scope.what = None  # nor is this thread inside it any more
            start_new_thread(_give_up, (block, self._turns, self._scope, None))
            raise
        if kind is GeneratorExit:
            _tell_closed(block, self._gateway)
        elif kind is None and (not block.done() or block.failed_with is not None):
            if block.failed:  # that error went on from there
                raise TransactionClosedError(f"{block.describe()} was left by an error before, and is rolled back")
            if not block.done():
                text = "was left in a callback, finalizer or signal handler: it is committed when that has ended"
                raise ReentrantWriteError(f"{block.describe()} {text}")
            block.result()
        return None


def _leave(block: ThreadBlock, turns: Turns, scope: Scope[Any] | None, failed: bool) -> None:
    try:
        _end(block, turns, scope, failed)
    except BaseException as error:
        _give_up(block, turns, scope, error)
        block.add_done_callback(block.call_back)
        raise
    _forget(block, scope)


def _end(block: ThreadBlock, turns: Turns, scope: Scope[Any] | None, failed: bool) -> None:
    state, loan, me = block._state, block.transaction, get_ident()
    assert loan is not None  # it was entered
    if state.forked:
        if failed:
            return
        raise forked_error()  # the parent's block goes on; nothing is committed here
    # In a function that SQLite calls: the end waits for the statement, and this cannot.
    is_inside = loan.is_inside
    if is_inside or state.cannot_wait():  # as when it is collected by the writer, or inside one of its locks
        block.give_back(failed or is_inside)
        block.add_done_callback(block.call_back)
        turns.hand_over(block)
        if is_inside and not failed:
            raise ReentrantWriteError(f"a block cannot be left here: {IN_STATEMENT}. It is rolled back")
        return
    try:
        state.entering.add(me)
        block.give_back(failed)
        if scope is not None:
            state.scopes.leave(scope)  # not before: a signal handler would wait for its own thread
        if not block.done() and block.is_mine_to_end():  # others may leave it at the same time
            turns.leave(block)
        state.entering.discard(me)
        if not block.done():
            block.wait(None)
        block.call_back()
    except BaseException:  # Ctrl-C: it comes to its end all the same
        state.entering.discard(me)
        raise


def _give_up(block: ThreadBlock, turns: Turns, scope: Scope[Any] | None, error: BaseException | None) -> None:
    """The thread was interrupted as it entered or left, or refused: the block ends without it."""
    if not isinstance(error, WriterClosedError | WriterBrokenError):
        block.abandon()
    elif not block.done():  # never accepted, or a signal handler's; if it is granted after all, it ends at once
        block.give_back(failed=True)
    if not block._state.forked:
        turns.hand_over(block)
    _forget(block, scope)


def _forget(block: ThreadBlock, scope: Scope[Any] | None) -> None:
    block.entry = None
    if scope is not None and scope.what is not None:
        block._state.scopes.leave(scope)
    if block.loop is not None:
        block._state.forget_block(block)


def _collected(block: ThreadBlock, turns: Turns, gateway: str, _: object) -> None:
    # What a signal handler raises before the ``try`` is for the writer, which then finds that nobody has ended it.
    try:
        if not block.is_mine_to_end():
            return
        if block.transaction is None or block.is_given_back:  # a second interrupt has ended the end of the first
            _give_up(block, turns, None, None)
        else:
            _leave(block, turns, None, failed=True)
            _tell_closed(block, gateway)
    except BaseException:
        if block.is_mine_to_end():
            _give_up(block, turns, None, None)
        raise


def _tell_closed(block: ThreadBlock, gateway: str) -> None:
    """It was closed or collected, perhaps long after it was entered."""
    if block.nested:
        text = "%s: %d writes that were made inside %s are rolled back with it: it was closed or collected"
        report(block._state, logging.WARNING, text, gateway, block.nested, block.describe())
