"""SavepointEntry: by which a task enters and leaves a savepoint, or a block inside another."""

from __future__ import annotations

import asyncio
import contextlib
import types
import weakref

from onewriter.base.log import has_note
from onewriter.errors import TransactionClosedError
from onewriter.tasks.block import TaskBlock, TaskSavepoint
from onewriter.tasks.call import Call
from onewriter.tasks.collected import leave_if_collected
from onewriter.write.loan import ENDED, WriteLoan
from onewriter.write.part import end, tell_kept, undo
from onewriter.write.parts import Mark

STAYS = "onewriter: the savepoint had ended, and what it has done stays in its transaction"


class SentPart:
    """The savepoint, as the writer thread begins and ends it. Not a ``Part``: that would be undone where it is
    collected, in the loop's thread, and wait there for a statement."""

    _mark: Mark | None = None  # None: it has not begun

    def __init__(self, loan: WriteLoan) -> None:
        self._loan = loan

    def begin(self) -> None:
        self._mark = self._loan.call(self._loan.all_parts().begin)

    def keep(self) -> None:
        assert self._mark is not None
        try:
            end(self._loan, self._mark)
        except BaseException as error:
            undo(self._loan, self._mark, error, has_failed=False)
            raise

    def undo(self, error: BaseException) -> None:
        if self._mark is not None:
            with contextlib.suppress(BaseException):  # the error is the task's own, and goes on there
                undo(self._loan, self._mark, error, has_failed=True)

    def tell_if_kept(self, error: BaseException) -> None:
        """Raise, in place of ``error``, if it could not be undone any more."""
        if self._mark is not None and self._mark.ended_with_outer:
            tell_kept(error, TransactionClosedError(self._mark.ended_with_outer), has_failed=True)


class SavepointEntry:
    """Of tasks that share the transaction, one at a time is in a savepoint."""

    _is_new = True
    _savepoint: TaskSavepoint | None = None  # as long as it is open

    def __init__(self, block: TaskBlock, loan: WriteLoan, inner: WriteLoan | None = None) -> None:
        self._block = block
        self._part = SentPart(loan)
        self._inner = inner  # the loan that ends with it

    async def __aenter__(self) -> None:
        block, scopes = self._block, self._block._state.scopes
        if not self._is_new:
            raise RuntimeError("a savepoint is entered once: call savepoint() again for another one")
        self._is_new = False
        around = (one for one in scopes.inherited() if isinstance(one, TaskSavepoint) and one.block is block)
        outer = next(around, None)
        savepoint = await block.open_savepoint(outer)
        try:
            savepoint.entry = weakref.ref(self)
            self._scope = scopes.enter(savepoint, writes=True)
            self._collected = leave_if_collected(self, _undo, savepoint, self._part, self._inner, GeneratorExit())
            self._savepoint = savepoint
            await block.call(self._part.begin)
        except BaseException as error:
            if self._savepoint is None:  # Ctrl-C, before it could be left
                block.leave(savepoint)
                raise
            await self.__aexit__(type(error), error, None)
            raise

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: types.TracebackType | None
    ) -> None:
        savepoint, self._savepoint = self._savepoint, None
        if savepoint is None:
            raise RuntimeError("a savepoint that was not entered cannot be left: use `async with`")
        if self._collected.detach() is None:  # it was left by that
            return
        try:
            if kind is not None:
                await _undo(savepoint, self._part, self._inner, GeneratorExit() if error is None else error)
                return
            if self._inner is not None:
                self._inner.close(ENDED)
            try:
                if savepoint.is_open:  # or it has ended with the one around it, and only that is to be told
                    await self._block.until_innermost(savepoint)
            except BaseException as late:
                await _undo(savepoint, self._part, None, late)
                raise
            try:
                await _keep(self._block, self._part)
            finally:
                try:
                    self._block.leave(savepoint)
                except BaseException:  # Ctrl-C, as that began
                    self._block.leave(savepoint)
                    raise
        finally:
            self._block._state.scopes.leave(self._scope)


async def _undo(savepoint: TaskSavepoint, part: SentPart, inner: WriteLoan | None, error: BaseException) -> None:
    if inner is not None:
        inner.close(ENDED)
    block = savepoint.block
    try:
        was_sent = _send_undo(block, part, error)
        if was_sent and savepoint.is_left_late() and isinstance(error, Exception):
            await block.call(part.tell_if_kept, error)
    finally:
        try:
            block.leave(savepoint)
        except BaseException:  # Ctrl-C, as that began
            block.leave(savepoint)
            raise


def _send_undo(block: TaskBlock, part: SentPart, error: BaseException) -> bool:
    """Returns whether the writer thread is to do it; it is not waited for."""
    try:
        block.send(part.undo, error)
        if has_note(error, STAYS):  # of one inside this
            error.add_note("onewriter: it does no more: the savepoint around it is undone")
    except TransactionClosedError as late:  # whose end has undone all, or has kept it
        if not (block.is_undone or block.lends().was_too_long):
            tell_kept(error, late, has_failed=True)
        return False
    return True


async def _keep(block: TaskBlock, part: SentPart) -> None:
    """Keep what the savepoint has done; if the task is cancelled before that has begun, undo it instead."""
    call = Call(None, part.keep)
    block.send(call.run)
    try:
        await call
    except asyncio.CancelledError as error:
        if call.withdraw():
            _send_undo(block, part, error)
            raise
        await call.ended()
        try:
            call.outcome()
            error.add_note(STAYS)
        except Exception as failure:
            error.add_note(f"onewriter: the savepoint could not be kept: {failure!r}")
        raise
