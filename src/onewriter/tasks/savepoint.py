"""SavepointEntry: by which a task enters and leaves a savepoint, or a block inside another."""

from __future__ import annotations

import asyncio
import contextlib
import types
from typing import TypeAlias

from onewriter.base.waiting import wake
from onewriter.errors import TransactionClosedError
from onewriter.tasks.block import TaskBlock, TaskSavepoint, open_one
from onewriter.tasks.collected import leave_if_collected
from onewriter.write.loan import ENDED, WriteLoan

Part: TypeAlias = contextlib.AbstractContextManager[None]  # a savepoint, as the writer thread enters and leaves it


class SavepointEntry:
    """Of tasks that share the transaction, one at a time is in a savepoint."""

    _is_new = True
    _savepoint: TaskSavepoint | None = None  # as long as it is open

    def __init__(self, block: TaskBlock, loan: WriteLoan, inner: WriteLoan | None = None) -> None:
        self._block = block
        self._part: Part = loan.part()
        self._inner = inner  # the loan that ends with it

    async def __aenter__(self) -> None:
        block, scopes = self._block, self._block._state.scopes
        if not self._is_new:
            raise RuntimeError("a savepoint is entered once: call savepoint() again for another one")
        self._is_new = False
        around = (one for one in scopes.inherited() if isinstance(one, TaskSavepoint) and one.block is block)
        outer = next(around, None)
        await block.until_innermost(outer)
        savepoint = TaskSavepoint(block, open_one(outer))
        block.enter(savepoint)
        self._scope = scopes.enter(savepoint, writes=True)
        self._savepoint = savepoint
        self._collected = leave_if_collected(self, _undo, savepoint, self._part, self._inner)
        try:
            await block.call(self._part.__enter__)
        except BaseException as error:
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
                await _undo(savepoint, self._part, self._inner, error)
                return
            if self._inner is not None:
                self._inner.close(ENDED)
            try:
                await self._block.until_innermost(savepoint)
            except BaseException as late:
                await _undo(savepoint, self._part, None, late)
                raise
            try:
                await _keep(self._block, self._part)
            finally:
                self._block.leave(savepoint)
        finally:
            self._block._state.scopes.leave(self._scope)


async def _undo(
    savepoint: TaskSavepoint, part: Part, inner: WriteLoan | None, error: BaseException | None = None
) -> None:
    if inner is not None:
        inner.close(ENDED)
    with contextlib.suppress(TransactionClosedError):  # whose end has undone all
        savepoint.block.send(_leave_part, part, GeneratorExit() if error is None else error)
    savepoint.block.leave(savepoint)


async def _keep(block: TaskBlock, part: Part) -> None:
    """Keep what the savepoint has done; if the task is cancelled before that has begun, undo it instead."""
    outcome: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    failures: list[BaseException] = []

    def leave() -> None:
        if outcome.cancelled():
            _leave_part(part, asyncio.CancelledError())
            return
        try:
            part.__exit__(None, None, None)
        except BaseException as error:
            failures.append(error)
        wake([outcome])

    block.send(leave)
    await outcome
    if failures:
        raise failures.pop()


def _leave_part(part: Part, error: BaseException) -> None:
    """On the writer thread: what the savepoint raises again there is the task's own error."""
    with contextlib.suppress(BaseException):
        part.__exit__(type(error), error, error.__traceback__)
